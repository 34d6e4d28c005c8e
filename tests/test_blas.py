"""OpenBLAS 0.3.21 took a processor younger than itself for one of 2004: training was five times
slower there, without a word."""

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

CORE = """
import ctypes, mlx_hmem
blas = ctypes.CDLL("libopenblas.so.0")
blas.openblas_get_corename.restype = ctypes.c_char_p
print(blas.openblas_get_corename().decode())
"""


def core(**variables: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    done = subprocess.run(
        [sys.executable, "-c", CORE], env=inherited | variables, capture_output=True, check=True
    )
    return done.stdout.decode().strip()


@pytest.mark.skipif(
    sys.platform != "linux"
    or find_library("openblas") is None
    or "avx2" not in Path("/proc/cpuinfo").read_text(),
    reason="needs OpenBLAS on a Linux PC with AVX2",
)
def test_kernels_fit_the_processor_and_can_be_chosen():
    assert core() in ("SkylakeX", "Haswell")
    assert core(OPENBLAS_CORETYPE="Nehalem") == "Nehalem"
