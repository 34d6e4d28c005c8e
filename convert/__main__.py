"""``python -m convert …``: ``mlx_hmem.convert`` in a checkout."""

import sys

from mlx_hmem.errors import GO_ON, run_program


def main() -> None:
    from .command import main as program  # here a missing package is one line

    program(sys.argv[1:])


if __name__ == "__main__":
    run_program(main, GO_ON)
