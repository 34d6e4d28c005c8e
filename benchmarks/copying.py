"""``python -m benchmarks.copying MODEL… --text FILE [--json]``: what models of one tokenizer lose
on tokens that a text repeats, and on the others.

A token is repeated if it has followed the token before it earlier in the same text: a model that
looks back for that pair and copies what came after it (induction, Olsson et al. 2022,
arXiv 2209.11895) predicts it without knowing anything. Nats per token, each text from its
beginning up to the context, with fetched memory where a model has a bank, and how many per cent
the perplexity is above that of the first model. ± is the standard error over texts, paired.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from tqdm import tqdm

from benchmarks.common.show import Result, benchmark
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import read_texts
from mlx_hmem.evaluate.perplexity import ratio_and_error
from mlx_hmem.evaluate.scoring import LONGEST
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel

KINDS = ("all", "repeated", "new")


def repeated(ids: Sequence[int]) -> np.ndarray:
    """Of each token after the first whether its pair with the one before stood earlier; (n - 1,)
    bool."""
    pairs = list(pairwise(ids))
    first = {pair: i for i, pair in reversed(list(enumerate(pairs)))}
    return np.array([first[pair] < i for i, pair in enumerate(pairs)], dtype=bool)


def losses_of(model: MemoryModel, text: str, ids: list[int]) -> np.ndarray:
    """Cross-entropy in nats of each token of ``ids`` after the first, (n - 1,)."""
    tokens = mx.array([ids])
    if model.retriever is None:
        logits = model(tokens[:, :-1], memory="none")
    else:
        logits = model(tokens[:, :-1], paths=[model.retriever.route(text)])
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:])
    return np.array(losses)[0].astype(np.float64)


def measure(model: MemoryModel, texts: Sequence[str], rows: Sequence[list[int]]) -> np.ndarray:
    """(texts, 3, 2): nats and tokens of each kind in each text, whose token ids are ``rows``."""
    sums = np.zeros((len(texts), len(KINDS), 2))
    for i, (text, ids) in enumerate(zip(tqdm(texts, unit="text", leave=False), rows, strict=True)):
        losses, again = losses_of(model, text, ids), repeated(ids)
        for kind, chosen in enumerate((np.ones_like(again), again, ~again)):
            sums[i, kind] = losses[chosen].sum(), chosen.sum()
    return sums


def compare(sums: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Of each model the figures of each kind, and beside the first model."""
    found: list[dict[str, Any]] = []
    for own in sums:
        row: dict[str, Any] = {}
        for kind, name in enumerate(KINDS):
            nats, error = ratio_and_error(*own[:, kind].T)
            row[name] = {"tokens": int(own[:, kind, 1].sum()), "nats": nats, "error": error}
            if own is not sums[0]:
                more = own[:, kind, 0] - sums[0][:, kind, 0]
                mean, error = ratio_and_error(more, own[:, kind, 1])
                row[name] |= {
                    "per_cent": 100 * math.expm1(mean),
                    "per_cent_error": 100 * math.exp(mean) * error,
                }
        found.append(row)
    return found


def results(models: Sequence[Path], *, text: Path) -> Result:
    texts = [each for each in read_texts(text) if each.strip()]
    if len(texts) < 2:
        raise UserError("too few texts to compare by", len(texts), "give two or more")
    loaded = [load(folder) for folder in models]
    context = min(model.context or LONGEST for model in loaded)
    rows_of = [[model.tokenizer.encode(text)[:context] for text in texts] for model in loaded]
    if odd := [f for f, rows in zip(models, rows_of, strict=True) if rows != rows_of[0]]:
        raise UserError("a model has another tokenizer", odd[0], "compare models of one tokenizer")
    sums = [measure(model, texts, rows_of[0]) for model in loaded]
    with np.errstate(invalid="ignore"):  # where no text repeats anything
        return dict(zip(map(str, models), compare(sums), strict=True))


if __name__ == "__main__":
    benchmark(__doc__, results)
