"""Images for training: sources (drawn, folders, archives) -> packs of uint8 pixels -> batches in a fixed order."""
