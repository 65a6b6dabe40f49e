"""Images for training: sources (portraits, folders, archives) -> packs of uint8 pixels -> batches in a fixed order."""
