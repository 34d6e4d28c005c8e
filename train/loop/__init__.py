"""The training loop and what one sees of it."""
