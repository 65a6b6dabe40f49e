"""The Triton kernels and how they are launched. Imported on first use, since importing Triton takes a second."""
