"""One file per command: its options, and the function that runs it."""
