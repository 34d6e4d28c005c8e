"""How matrix products are computed, settled before MLX is loaded.

OpenBLAS 0.3.21 took a processor younger than itself for one of 2004: training was five times
slower there, without a word."""

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

CPUINFO = Path("/proc/cpuinfo")
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
    or not CPUINFO.exists()
    or "avx2" not in CPUINFO.read_text(),
    reason="needs OpenBLAS on a Linux PC with AVX2",
)
def test_kernels_fit_the_processor_and_can_be_chosen():
    assert core() in ("SkylakeX", "Haswell")
    assert core(OPENBLAS_CORETYPE="Nehalem") == "Nehalem"


def test_the_tests_have_whole_float32_products_on_every_gpu():
    """MLX asks for the variable once. On M5 two ways to compute one thing were 1e-3 apart."""
    program = """
import os, sys
class Asked:
    def find_spec(self, name, *_):
        if name == "mlx.core":
            print(os.environ.get("MLX_ENABLE_TF32"))
sys.meta_path.insert(0, Asked())
import tests
"""
    inherited = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=inherited, cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode() == "0\n"
