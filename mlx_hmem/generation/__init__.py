"""Text from a model with memory: one prompt, many at once, a conversation."""
