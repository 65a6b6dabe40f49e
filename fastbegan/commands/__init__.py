"""A file a command: its options, and what it does with them."""
