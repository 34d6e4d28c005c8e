"""Rows of a table, with a gradient that is summed in the same order on every device.

MLX's gradient of a gather adds all rows at once. Metal and CUDA do that by atomic additions, in the
order in which their threads happen to come: where three rows or more meet, the last bits differ
from run to run, and a run that goes on is not the one that was never stopped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hmem.memory.layer import extend


@mx.custom_function
def blocks_of(blocks: mx.array, index: mx.array) -> mx.array:
    """``blocks[index]``, the blocks (n, ...) of some sequences, ``index`` (sequences,)."""
    return blocks[index]


@blocks_of.vjp
def _of_blocks(primals: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
    """One sequence after the other, each into the sum so far: few and large."""
    blocks, index = primals
    total = mx.zeros_like(blocks)
    for row in range(index.size):
        own = slice(row, row + 1)
        total = total.at[index[own]].add(cotangent[own])
    return [total, mx.zeros_like(index)]


@mx.custom_function
def embeddings_of(weight: mx.array, ids: mx.array) -> mx.array:
    """``weight[ids]``, embeddings (vocabulary, hidden) of ids (batch, time)."""
    return weight[ids]


@embeddings_of.vjp
def _of_embeddings(primals: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
    """On the CPU, which adds them in order: many and small."""
    weight, ids = primals
    with mx.stream(mx.cpu):
        return [mx.zeros_like(weight).at[ids].add(cotangent), mx.zeros_like(ids)]


def sum_embeddings_in_order(anchor: nn.Module) -> None:
    """Makes the trained embeddings of ``anchor`` take their gradient from :func:`embeddings_of`."""
    for _, module in anchor.named_modules():
        if isinstance(module, nn.Embedding) and module.trainable_parameters():
            extend(module, partial(_embedded, module))


def _embedded(module: nn.Embedding, before: Callable[..., mx.array], ids: mx.array) -> mx.array:
    found: Any = embeddings_of(module.weight, ids)
    return found
