"""``python -m mlx_hmem.bank COMMAND DIR``: see mlx_hmem/bank_tools/command.py."""

from mlx_hmem.bank_tools.command import main
from mlx_hmem.errors import run_program

if __name__ == "__main__":
    run_program(main)
