import mlx_hmem  # noqa: F401  OpenBLAS goes in front before a test, or a process of one, loads MLX
