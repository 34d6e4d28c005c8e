import mlx_hmem  # isort: skip  # noqa: F401  OpenBLAS goes in front before MLX is loaded
import mlx.core as mx

mx.default_stream(mx.default_device())  # number 0, as in a process of its own
