"""The paper's encoder, all-MiniLM-L6-v2, in plain MLX (paper, section 2).

A 6-layer BERT over word pieces, mean pooled and L2-normalised. It is the reference: accurate, and
slow on CPUs. The static encoder imitates it at a small part of the cost. Texts are cut after 256
word pieces, [CLS] and [SEP] counted, as sentence-transformers does.

Vectors decide on routes, so they must be the same wherever a tree is used: a device that rounds the
factors of float32 products is not asked.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer
from tqdm import tqdm

from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, load_safetensors
from mlx_hmem.reading import read_json, require_file
from mlx_hmem.retriever.texts import check_texts, load_tokenizer

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
MAX_LENGTH = 256
# Larger batches leave the processor's cache: 4096 ran 15 % slower on a Linux CPU.
TOKENS_PER_BATCH = 2048

VOCAB_SIZE, POSITIONS, TYPES, LAYERS = 30522, 512, 2, 6
DIM, HEADS, INNER, EPS = 384, 12, 1536, 1e-12
# What the code below computes; a folder with another configuration is another model.
ARCHITECTURE: dict[str, object] = {
    "model_type": "bert",
    "hidden_size": DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": TYPES,
    "vocab_size": VOCAB_SIZE,
    "hidden_act": "gelu",
    "layer_norm_eps": EPS,
}

# Names in the checkpoint -> names here. Keys that nothing here reads are dropped.
RENAMES = (
    ("attention.self.", "attention."),
    ("attention.output.dense.", "attention.out."),
    ("attention.output.LayerNorm.", "attention_norm."),
    ("intermediate.dense.", "up."),
    ("output.dense.", "down."),
    ("output.LayerNorm.", "norm."),
    ("encoder.layer.", "layers."),
    ("LayerNorm.", "norm."),
)
UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


# erf(z) = z P(z^2) / Q(z^2) on [-4, 4] to float32 precision (Eigen's and XLA's coefficients): MLX's
# own erf costs 25 ns an element on Linux CPUs, as much as all matmuls together.
ERF_P = (-2.72614225801306e-10, 2.77068142495902e-8, -2.10102402082508e-6, -5.69250639462346e-5,
         -7.34990630326855e-4, -2.95459980854025e-3, -1.60960333262415e-2)  # fmt: skip
ERF_Q = (-1.45660718464996e-5, -2.13374055278905e-4, -1.68282697438203e-3, -7.37332916720468e-3,
         -1.42647390514189e-2)  # fmt: skip


@partial(mx.compile, shapeless=True)
def gelu(x: mx.array) -> mx.array:
    """GELU by erf, within 2e-6 of ``nn.gelu``."""
    z = mx.clip(x * 0.5**0.5, -4, 4)
    square = z * z
    p, q = (reduce(lambda value, more: value * square + more, of) for of in (ERF_P, ERF_Q))
    return 0.5 * x * (1 + z * p / q)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, DIM)
        self.key = nn.Linear(DIM, DIM)
        self.value = nn.Linear(DIM, DIM)
        self.out = nn.Linear(DIM, DIM)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        B, T, _ = x.shape
        q, k, v = (
            layer(x).reshape(B, T, HEADS, -1).transpose(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, T, -1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm = nn.LayerNorm(DIM, eps=EPS)
        self.up = nn.Linear(DIM, INNER)
        self.down = nn.Linear(INNER, DIM)
        self.norm = nn.LayerNorm(DIM, eps=EPS)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.attention_norm(x + self.attention(x, mask))
        return self.norm(x + self.down(gelu(self.up(x))))


class BertModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB_SIZE, DIM)
        self.position_embeddings = nn.Embedding(POSITIONS, DIM)
        self.token_type_embeddings = nn.Embedding(TYPES, DIM)
        self.norm = nn.LayerNorm(DIM, eps=EPS)
        self.layers = [Layer() for _ in range(LAYERS)]

    def __call__(self, ids: mx.array, lengths: mx.array) -> mx.array:
        """ids (batch, time) int32 padded on the right, lengths (batch,) -> (batch, 384) float32,
        the mean over the real word pieces, L2-normalised."""
        T = ids.shape[1]
        real = mx.arange(T)[None] < lengths[:, None]
        x = self.word_embeddings(ids) + self.position_embeddings.weight[:T]
        x = self.norm(x + self.token_type_embeddings.weight[0])
        mask = real[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        mean = mx.where(real[..., None], x, 0).sum(axis=1) / lengths[:, None]
        return mean / mx.maximum(mx.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


class MiniLMEncoder:
    """all-MiniLM-L6-v2 from a folder with ``config.json``, ``model.safetensors`` and
    ``tokenizer.json``.

    ``name`` is "minilm", ``dim`` 384, ``fingerprint`` that of the weights and the tokenizer.
    Raises UserError where a file is missing, damaged, or belongs to another model.
    """

    name = "minilm"
    dim = DIM

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        for file in FILES:
            remedy = f"point to a folder that holds {', '.join(FILES)} of {HUB_ID}"
            require_file(folder / file, remedy)
        _check_architecture(folder / "config.json")
        self.tokenizer: Tokenizer = load_tokenizer(folder / "tokenizer.json", VOCAB_SIZE)
        self.tokenizer.enable_truncation(MAX_LENGTH)
        self.model = BertModel()
        self.model.load_weights(_read_weights(folder / "model.safetensors", self.model))
        self.model.eval()
        architecture = str(mx.device_info().get("architecture"))
        self._on_cpu = rounds_products(mx.default_device(), architecture)
        self.fingerprint = fingerprint(folder / "model.safetensors", folder / "tokenizer.json")

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """Vectors of ``texts``, (n, 384) float32, L2-normalised, in the order of ``texts``.

        Texts of like length share a batch. An empty sequence gives (0, 384). Raises UserError for
        anything that is not a string.
        """
        texts = check_texts(texts)
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        vectors = np.empty((len(ids), DIM), np.float32)
        with tqdm(total=len(ids), desc="encoding", unit="text", disable=not progress) as bar:
            for rows in _batches([len(i) for i in ids]):
                vectors[rows] = self._encode_batch([ids[row] for row in rows])
                bar.update(len(rows))
        return vectors

    def _encode_batch(self, ids: list[list[int]]) -> np.ndarray:
        lengths = [len(i) for i in ids]
        padded = np.zeros((len(ids), max(lengths)), np.int32)
        for row, values in zip(padded, ids, strict=True):
            row[: len(values)] = values
        with mx.stream(mx.cpu) if self._on_cpu else nullcontext():
            return np.array(self.model(mx.array(padded), mx.array(lengths)))


def rounds_products(device: mx.Device, architecture: str) -> bool:
    """Whether MLX takes float32 products as TF32 there, in ten bits of fraction: on CUDA, and on
    Apple's GPUs from M5 (generation 17) on, unless ``MLX_ENABLE_TF32`` is 0."""
    if device.type != mx.DeviceType.gpu or os.environ.get("MLX_ENABLE_TF32") == "0":
        return False
    found = re.match(r"applegpu_g(\d+)", architecture)
    return found is None or int(found[1]) >= 17


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Row numbers by falling length, so that memory peaks first; padded size is bounded."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        count = max(1, TOKENS_PER_BATCH // lengths[order[start]])
        yield order[start : start + count]
        start += count


def _check_architecture(path: Path) -> None:
    config = read_json(path)
    for key, wanted in ARCHITECTURE.items():
        value = config.get(key) if isinstance(config, dict) else None
        if value != wanted:
            raise UserError(f"{path} is not {HUB_ID}: {key}", value, f"it must be {wanted!r}")


def _read_weights(path: Path, model: nn.Module) -> list[tuple[str, mx.array]]:
    """The checkpoint under the names of ``model``, checked for missing, unknown and misshapen."""
    parameters = dict(tree_flatten(model.parameters()))
    wanted = {name: value.shape for name, value in parameters.items()}
    weights = {}
    for key, value in load_safetensors(path).items():
        if key in UNUSED:
            continue
        name = key.removeprefix("embeddings.")
        for old, new in RENAMES:
            name = name.replace(old, new)
        if name not in wanted:
            raise UserError(f"{path} has an unknown tensor", key, f"use the files of {HUB_ID}")
        if value.shape != wanted[name]:
            raise UserError(
                f"{path}: tensor {key} has the wrong shape", value.shape, f"need {wanted[name]}"
            )
        weights[name] = value.astype(mx.float32)
    if missing := sorted(set(wanted) - set(weights)):
        raise UserError(f"{path} lacks a tensor", missing[0], f"use the files of {HUB_ID}")
    return list(weights.items())
