"""Measuring: the step on this machine, what other machines would take, and tables of results."""
