"""The memory bank on disk: its format, the lazy reader and the writer (docs/bank_format.md)."""

from mlx_hmem.bank.format import Manifest, stored_levels
from mlx_hmem.bank.quantization import Quantization
from mlx_hmem.bank.read.reader import Bank
from mlx_hmem.bank.writer import rewrite_bank

__all__ = ["Bank", "Manifest", "Quantization", "rewrite_bank", "stored_levels"]
