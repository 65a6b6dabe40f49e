"""A run's folder: settings, metrics, checkpoints, sheets and curves."""
