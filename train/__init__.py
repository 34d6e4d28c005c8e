"""Programs that make models: ``mlx_hmem.train RECIPE.yaml --out FOLDER``."""

import mlx_hmem  # noqa: F401  OpenBLAS goes in front before MLX is loaded
