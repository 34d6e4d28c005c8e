"""Puts OpenBLAS in front of the reference BLAS that MLX's Linux CPU wheel links.

Measured: 8 GFLOP/s with the reference BLAS, 120 with OpenBLAS on one thread. It is used where it is
installed (``apt-get install libopenblas0-pthread``) and silently done without elsewhere.
It must be loaded before ``mlx.core``, and not into a process that runs PyTorch, which brings its
own OpenMP threads.

It chooses its kernels by the model of the processor, and falls back to those of 2004 for one that
is younger than itself (0.3.21 on an Intel server of 2023: 32 GFLOP/s in place of 158). So it is
told which instructions there are, unless ``OPENBLAS_CORETYPE`` says it already.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

# The oldest kernels that need such flags of /proc/cpuinfo, the fastest first.
KERNELS = {
    "SkylakeX": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}


def prefer_openblas() -> None:
    if sys.platform != "linux" or "torch" in sys.modules or "mlx.core" in sys.modules:
        return
    # Two threads under contention ran 5 to 16 times slower than one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if kernels := _kernels():
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)


def _kernels() -> str | None:
    """What OpenBLAS calls the fastest kernels that this processor runs, if one of ours."""
    try:
        found = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return None
    return next((name for name, flags in KERNELS.items() if flags <= found), None)
