"""Training on several ranks: their messages, the watch over them, and the signals that end a run."""
