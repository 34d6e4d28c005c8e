"""Whether what was recorded computes what the model computes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hmem.bank.format import GENERIC
from mlx_hmem.errors import UserError
from mlx_hmem.model.model import MemoryModel

from .functions import Function, Functions
from .record import newer_operations

PROBES = ("The old bridge", " Two\n\nlines", "Ünï, 日本 and 🦊", "<s> a </s>", "1234567 x=y;")


def plain_tokenizer(model: MemoryModel) -> str:
    """The text of a ``tokenizer.json`` that does all that the model's tokenizer does."""
    from tokenizers import Tokenizer

    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    remedy = "convert it to a tokenizer.json of the tokenizers library"
    if backend is None:
        raise UserError("the tokenizer has no plain form", type(model.tokenizer).__name__, remedy)
    text = str(backend.to_str())
    plain = Tokenizer.from_str(text)
    plain.encode_special_tokens = True  # as the runner sets it
    for probe in PROBES:
        for special in (True, False):
            ids = plain.encode(probe, add_special_tokens=special).ids
            if ids != list(model.tokenizer.encode(probe, add_special_tokens=special)):
                raise UserError("the tokenizer does more than its plain form", repr(probe), remedy)
    return text


def check_functions(functions: Functions, part: Path) -> None:
    """Compares the recorded functions with the model, on a few tokens and the generic memory."""

    def call(function: Function, *inputs: mx.array) -> list[mx.array]:
        imported: Any = mx.import_function(str(part / function.file))
        return list(imported(*inputs))

    bank, weights = functions.bank, list(functions.weights.values())
    num_rows, length = functions.num_rows((GENERIC,)), min(functions.prefill)
    stored = bank.stored(GENERIC, 0).arrays(bank.manifest.parts(GENERIC))
    rows = call(functions.memory((GENERIC,)), *stored)
    vocabulary = functions.model.tokenizer.vocab_size
    most = min(5, length + 1, functions.context, *functions.kv_lengths)
    ids = np.random.default_rng(0).integers(vocabulary, size=most).tolist()
    padded = mx.array([ids[:-1] + [0] * (length - len(ids) + 1)], mx.int32)
    start, count = mx.array(0, mx.int32), mx.array(len(ids) - 1, mx.int32)
    last = mx.array([ids[-1:]], mx.int32)
    logits = functions.model.with_rows(functions.model.rows_of([bank.generic()]))(mx.array([ids]))
    wanted = logits[:, -1] - mx.logsumexp(logits[:, -1], keepdims=True)
    for kv_length in (None, *functions.kv_lengths):
        begin = functions.step("prefill", length, num_rows, kv_length)
        if kv_length is None or length <= kv_length:
            cache = call(begin, padded, start, *functions.cache, *rows, *weights)
        decode = functions.step("decode", 1, num_rows, kv_length)
        _compare(call(decode, last, count, *cache, *rows, *weights)[0], wanted, functions.dtype)


def _compare(found: mx.array, wanted: mx.array, dtype: mx.Dtype) -> None:
    """Raises a ``UserError`` unless log-probabilities (1, vocabulary) are about the same."""
    numbers: Any = [mx.abs(array).max().item() for array in (found - wanted, wanted)]
    difference, largest = numbers
    allowed = 1e-3 if dtype == mx.float32 else 0.05
    if not difference <= allowed * largest:  # NaN too
        raise UserError(
            "the recorded functions compute something else than the model",
            f"log-probabilities differ by {difference:.2g}",
            "this architecture makes no bundle",
        )


def newer_operations_of(folder: Path) -> list[str]:
    """The operations in a bundle's functions that MLX 0.31.1 cannot read."""
    files = (folder / "functions").iterdir()
    return sorted({name for file in files for name in newer_operations(file.read_bytes())})
