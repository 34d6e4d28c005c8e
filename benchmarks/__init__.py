"""Speed, memory and parity: ``python -m benchmarks.NAME [--json]``; RESULTS.md holds figures."""

import mlx_hmem  # noqa: F401  OpenBLAS goes in front before any benchmark loads MLX
