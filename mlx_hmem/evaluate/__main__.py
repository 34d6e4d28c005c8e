"""``python -m mlx_hmem.evaluate …``: ``mlx_hmem.evaluate``."""

import sys

from mlx_hmem.errors import GO_ON, run_program
from mlx_hmem.evaluate.command import main

if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]), GO_ON)
