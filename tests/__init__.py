import os

# Metal from M5 on, and CUDA, take float32 products in ten bits of fraction unless told otherwise.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx_hmem  # isort: skip  # noqa: F401  OpenBLAS goes in front before MLX is loaded
import mlx.core as mx

mx.default_stream(mx.default_device())  # number 0, as in a process of its own
