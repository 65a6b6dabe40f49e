"""The Triton kernels and their launchers. Imported on first use, since importing Triton takes a second."""
