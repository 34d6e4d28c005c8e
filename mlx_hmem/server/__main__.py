"""``python -m mlx_hmem.server …``: ``mlx_hmem.server``."""

import sys

from mlx_hmem.__main__ import main
from mlx_hmem.errors import run_program

if __name__ == "__main__":
    sys.argv[:1] = ["mlx_hmem", "server"]
    run_program(main)
