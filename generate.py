"""``python generate.py --prompt TEXT``: ``mlx_hmem.generate`` in a checkout."""

import sys

from mlx_hmem.errors import run_program


def main() -> None:
    from mlx_hmem.generation.command import main as program  # an interrupt while it loads is quiet

    program(sys.argv[1:])


if __name__ == "__main__":
    run_program(main)
