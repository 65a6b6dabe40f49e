"""Measurements: the step on this machine, estimates for other GPUs, and tables of results."""
