"""The static encoder: one vector per word piece, averaged, in MiniLM's space.

Distilled from MiniLM by ``train/tree/static_encoder.py``. It knows no word order and no context,
but it chooses mostly the clusters that MiniLM chooses and runs hundreds of times faster: what it
costs is the splitting into word pieces, so that is cached per word.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, load_safetensors, save_safetensors, write_atomic
from mlx_hmem.reading import read_json
from mlx_hmem.retriever.texts import check_texts, load_tokenizer

MODEL_TYPE = "static_encoder"
VOCAB_SIZE = 30522
MAX_CHARACTERS = 4096
# Bounds the gathered rows: some 16,000 pieces, 8 MB.
CHARACTERS_PER_BATCH = 1 << 16
MAX_CACHED_WORDS = 1 << 18

# A run without ASCII space or punctuation, or one mark. BERT's pre-tokenizer splits at all of these
# and no rule of its normaliser reaches across, so a text's pieces are the pieces of its words.
WORDS = re.compile(r"[^ \t\n\r!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")


class WordPieces:
    """Texts to word-piece ids as the tokenizer gives them without [CLS] and [SEP], with a cache of
    words. Names of special tokens inside a text are plain text here. Of a word that it does not
    know the letters that it knows stand for it: all of Thai would be one piece else."""

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.unknown = tokenizer.token_to_id("[UNK]")
        self.cache: dict[str, tuple[int, ...]] = {}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """At most ``max_length`` ids of each text; of long texts the start is read."""
        words = [WORDS.findall(text[:MAX_CHARACTERS]) for text in texts]
        new = list(set().union(*words).difference(self.cache))
        if new:
            if len(self.cache) > MAX_CACHED_WORDS:
                self.cache.clear()
                new = list(set().union(*words))
            found = self.tokenizer.encode_batch_fast(new, add_special_tokens=False)
            self.cache.update(
                (word, tuple(self._ids(word, pieces.ids)))
                for word, pieces in zip(new, found, strict=True)
            )
        get = self.cache.__getitem__
        return [list(chain.from_iterable(map(get, w)))[: self.max_length] for w in words]

    def _ids(self, word: str, ids: list[int]) -> Iterator[int]:
        if self.unknown not in ids or word.isascii():
            yield from ids
            return
        normal = self.tokenizer.normalizer.normalize_str(word)
        for part, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            own = [token.id for token in self.tokenizer.model.tokenize(part)]
            if own == [self.unknown] and not part.isascii():
                letters = map(self.tokenizer.token_to_id, part)
                own = [letter for letter in letters if letter is not None] or own
            yield from own


class StaticEncoder:
    """The encoder in ``folder``: ``config.json``, ``encoder.safetensors``, ``tokenizer.json``.

    A text's vector is normalise(mean of its pieces' vectors · projection + bias). ``vectors``
    (30522, rank) int8 with a scale per row, ``projection`` (rank, 384), ``bias`` (384,).
    Raises UserError where a file is missing, damaged, or does not fit the others.
    """

    name = "static"

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        config = _read_config(folder / "config.json")
        self.dim: int = config["dim"]
        self.teacher: str = config["teacher"]
        tensors = _read_tensors(folder / "encoder.safetensors", config["rank"], self.dim)
        self.vectors = tensors["vectors"].astype(np.float32) * tensors["scales"][:, None]
        self.projection, self.bias = tensors["projection"], tensors["bias"]
        self.tokenizer = load_tokenizer(folder / "tokenizer.json", VOCAB_SIZE)
        self.pieces = WordPieces(self.tokenizer, config["max_length"])
        self.fingerprint = fingerprint(folder / "encoder.safetensors", folder / "tokenizer.json")

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """Vectors of ``texts``, (n, dim) float32, L2-normalised, in the order of ``texts``.

        A text without word pieces gets the bias's direction. An empty sequence gives (0, dim).
        Raises UserError for anything that is not a string.
        """
        texts = check_texts(texts)
        result = np.empty((len(texts), self.dim), np.float32)
        with tqdm(total=len(texts), desc="encoding", unit="text", disable=not progress) as bar:
            for part in _batches(texts):
                pooled = pool(self.vectors, self.pieces(texts[part]))
                vectors = pooled @ self.projection + self.bias
                vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
                result[part] = vectors
                bar.update(len(vectors))
        return result


def pool(vectors: np.ndarray, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """The mean of each text's rows of ``vectors``, (n, rank); zeros for a text without pieces."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
    result = np.zeros((len(ids), vectors.shape[1]), np.float32)
    full = lengths > 0  # reduceat has no empty runs
    if len(flat):
        starts = (np.cumsum(lengths) - lengths)[full]
        sums = np.add.reduceat(vectors[flat], starts, axis=0)
        result[full] = sums / lengths[full, None]
    return result


def _batches(texts: list[str]) -> Iterator[slice]:
    """Consecutive texts, so many at a time that the gathered rows stay small."""
    start = characters = 0
    for end, text in enumerate(texts, 1):
        characters += min(len(text), MAX_CHARACTERS) + 1
        if characters >= CHARACTERS_PER_BATCH or end == len(texts):
            yield slice(start, end)
            start, characters = end, 0


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise UserError("not a static encoder", path, "use the folder that the distillation made")
    for key in ("dim", "rank", "max_length"):
        value = config.get(key)
        if type(value) is not int or not 1 <= value <= 65536:
            raise UserError(f"{path}: {key} is out of range", value, "use 1 to 65536")
    if not isinstance(config.get("teacher"), str):
        raise UserError(f"{path}: teacher is not a text", config.get("teacher"), "restore the file")
    return config


def _read_tensors(path: Path, rank: int, dim: int) -> dict[str, np.ndarray]:
    loaded = load_safetensors(path)
    wanted = {
        "vectors": ((VOCAB_SIZE, rank), mx.int8),
        "scales": ((VOCAB_SIZE,), mx.float16),
        "projection": ((rank, dim), mx.float16),
        "bias": ((dim,), mx.float32),
    }
    if set(loaded) != set(wanted):
        raise UserError(f"{path} has the wrong tensors", sorted(loaded), f"need {sorted(wanted)}")
    result = {}
    for name, (shape, dtype) in wanted.items():
        if loaded[name].shape != shape or loaded[name].dtype != dtype:
            raise UserError(
                f"{path}: tensor {name} does not fit",
                f"{loaded[name].shape} {loaded[name].dtype}",
                f"need {shape} {dtype}",
            )
        array = np.array(loaded[name])
        if array.dtype != np.int8:
            array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise UserError(f"{path}: tensor {name} is not finite", name, "distil it again")
        result[name] = array
    return result


def save_static(
    folder: Path,
    vectors: np.ndarray,
    projection: np.ndarray,
    bias: np.ndarray,
    tokenizer: bytes,
    *,
    teacher: str,
    max_length: int,
) -> None:
    """Writes an encoder's folder: ``vectors`` (30522, rank) rounded to int8 with a scale per row.

    ``tokenizer`` is the text of tokenizer.json, ``teacher`` the fingerprint of the encoder in whose
    space the vectors lie.
    """
    scales = np.maximum(np.abs(vectors).max(axis=1) / 127, 1e-7).astype(np.float16)
    rounded = np.rint(vectors / scales[:, None].astype(np.float32))
    save_safetensors(
        folder / "encoder.safetensors",
        {
            "vectors": mx.array(np.clip(rounded, -127, 127).astype(np.int8)),
            "scales": mx.array(scales),
            "projection": mx.array(projection.astype(np.float16)),
            "bias": mx.array(bias.astype(np.float32)),
        },
    )
    write_atomic(folder / "tokenizer.json", tokenizer)
    config = {
        "model_type": MODEL_TYPE,
        "dim": projection.shape[1],
        "rank": projection.shape[0],
        "max_length": max_length,
        "teacher": teacher,
    }
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
