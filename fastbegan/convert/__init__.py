"""`accelerate(model)` puts the fast layers under a model that was written without them; `restore` takes them out."""

from .shell import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
