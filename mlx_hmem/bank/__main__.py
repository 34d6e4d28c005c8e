"""``python -m mlx_hmem.bank …``: ``mlx_hmem.bank``, whose body stands above this room."""

import sys

from mlx_hmem.bank_tools.command import main
from mlx_hmem.errors import run_program

if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
