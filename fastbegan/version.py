"""The version, by itself: run folders and exports name it, and need nothing else of the package."""

__version__ = "0.1.0"
