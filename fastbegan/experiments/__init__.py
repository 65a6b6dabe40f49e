"""The experiments of the paper's section 4, one file each, on a common `study`."""
