"""Puts OpenBLAS in front of the reference BLAS that MLX's Linux CPU wheel links.

Measured: 8 GFLOP/s with the reference BLAS, 120 with OpenBLAS on one thread. It is used where it is
installed (``apt-get install libopenblas0-pthread``) and silently done without elsewhere.
It must be loaded before ``mlx.core``, and not into a process that runs PyTorch, which brings its
own OpenMP threads.
"""

import contextlib
import ctypes
import os
import sys


def prefer_openblas() -> None:
    if sys.platform != "linux" or "torch" in sys.modules or "mlx.core" in sys.modules:
        return
    # Two threads under contention ran 5 to 16 times slower than one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
