"""mlx-lm's own server, over the BLAS that ours has."""

import runpy

import mlx_hmem  # noqa: F401  puts it in front of MLX's

if __name__ == "__main__":
    runpy.run_module("mlx_lm.server", run_name="__main__")
