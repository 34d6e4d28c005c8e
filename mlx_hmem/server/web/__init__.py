"""The thread that serves HTTP: nothing here calls MLX."""
