"""From files to batches: sources (procedural faces, folders) -> packed uint8 sets -> batches in a fixed order."""
