"""A machine that executes the PTX of the project's kernels on a CPU; README.md here says what that proves."""
