"""Training: the loop, one step of it, what it costs and what it fits into."""
