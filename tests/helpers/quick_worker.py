"""``mlx_hmem.server``, behind what the variable ``FIRST`` says is to be run before."""

import os
import sys

from mlx_hmem.__main__ import main
from mlx_hmem.errors import run_program

exec(os.environ["FIRST"])
sys.argv[:1] = ["mlx_hmem", "server"]
run_program(main)
