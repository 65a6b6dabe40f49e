"""The experiments of the paper's section 4, a file each, over one `study`."""
