"""Random models and memory banks of the paper's shapes, made on the spot.

A bank of 4.6 to 21.1 billion parameters holds real values only in the blocks that will be read; all
others are holes in sparse files, so that 42 GB take the disk the few hundred megabytes of those
blocks. What is measured does not notice: a read of one block touches no other.

The cluster tree is full, 16 children of every cluster on four levels, and its centroids are vectors
of random texts, so that such texts spread over it. The tokenizer knows 50,432 words, ``w0`` and so
on: a text of so many words has so many tokens.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from tokenizers import Tokenizer, models, pre_tokenizers

from convert.anchors.weights import DTYPES
from convert.torch_files.tensors import ITEM_SIZES, safetensors_header
from mlx_hmem.anchors.load import anchor_hash, named_parameters
from mlx_hmem.anchors.openlm import PRESETS, Model
from mlx_hmem.bank import Bank, Manifest, Quantization, rewrite_bank, stored_levels
from mlx_hmem.bank.format import Key
from mlx_hmem.config import FORMAT_VERSION, ClusterPath, HmemConfig, MemoryConfig, RetrieverConfig
from mlx_hmem.files import fingerprint, write_atomic
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.tokenizer import read_tokenizer
from mlx_hmem.retriever import ClusterTree, Retriever, load_encoder
from mlx_hmem.retriever.encoder import STATIC_FOLDER
from train.step.start import num_parameters

BRANCHING = (16, 16, 16, 16)
Anchor = Literal["openlm-160m", "openlm-410m", "openlm-1b"]
Bits = Literal[16, 8, 4]
# r of each level (paper, section 6): 4.6, 12.7 and 21.1 billion parameters.
R: dict[str, tuple[int, ...]] = {
    "openlm-160m": (256, 64, 16, 0),
    "openlm-410m": (512, 128, 32, 0),
    "openlm-1b": (768, 256, 16, 0),
}
ANCHORS: tuple[Anchor, ...] = get_args(Anchor)
BITS: tuple[Bits, ...] = get_args(Bits)
GROUP = 64  # values that share a scale and a bias

VOCAB = 50_432
POOL = 4096  # random texts whose vectors become centroids
Dtype = Literal["float32", "bfloat16"]


def paper_config(anchor: str) -> MemoryConfig:
    args = PRESETS[anchor]
    return MemoryConfig(args.hidden_size, args.num_hidden_layers, R[anchor], BRANCHING)


def spread_paths(config: MemoryConfig, count: int) -> list[ClusterPath]:
    """Paths spread over the bank; as far as there are so many, each in another level-1 cluster."""
    last = config.num_clusters[-1]
    return [config.path_to(config.num_levels, last * i // count + i) for i in range(count)]


def sibling(config: MemoryConfig, path: ClusterPath, level: int) -> ClusterPath:
    """A path that differs from ``path`` on ``level`` and all deeper levels, and on none above."""
    below = math.prod(config.branching[level:])
    first = (path[level - 2] if level > 1 else 0) * config.branching[level - 1]
    cluster = first + (path[level - 1] - first + 1) % config.branching[level - 1]
    return config.path_to(config.num_levels, cluster * below)


def keys_of(config: MemoryConfig, paths: Iterable[ClusterPath]) -> set[Key]:
    """The blocks of some paths."""
    return {(n, i) for path in paths for n, i in enumerate(path, 1) if config.r[n - 1]}


def make_bank(
    folder: Path,
    config: MemoryConfig,
    filled: Collection[Key],
    bits: int = 16,
    anchor_hash: str = "none",
    tree_hash: str = "none",
    shard_bytes: int = 64 << 20,
) -> Manifest:
    """A bank with normal values in the blocks of ``filled`` and holes for all others; ``bits``: in
    mode affine on all levels, or 16 for bfloat16 as it is."""
    rng = np.random.default_rng(0)

    def block(level: int, cluster: int) -> np.ndarray | None:
        wanted = (level, cluster) in filled
        return rng.standard_normal(config.block_shape(level), np.float32) if wanted else None

    how = None
    if bits < 16:
        how = tuple(Quantization(n, "affine", bits, GROUP) for n in stored_levels(config))
    planned = Manifest.planned(config, "bfloat16", how, anchor_hash, tree_hash)
    return rewrite_bank(folder, planned, block, shard_bytes=shard_bytes)


class FilePart(NamedTuple):
    """Where a block lies."""

    file: Path
    offset: int
    nbytes: int


def file_parts(folder: Path, manifest: Manifest, keys: Iterable[Key]) -> list[FilePart]:
    """Where blocks lie, worked out from the manifest alone."""
    levels = {level.level: level for level in manifest.levels}
    parts = []
    for number, cluster in keys:
        level = levels[number]
        shard = level.shards[level.shard_of(cluster)]
        offset = manifest.page_size + (cluster - shard.first_cluster) * level.block_stride
        parts.append(FilePart(folder / shard.file, offset, level.block_bytes))
    return parts


def random_texts(count: int, words: int, seed: int) -> list[str]:
    """Texts of words that the static encoder knows. Each text repeats a few of them, as texts on a
    topic do."""
    tokens = Tokenizer.from_file(str(STATIC_FOLDER / "tokenizer.json")).get_vocab()
    known = np.array(sorted(word for word in tokens if re.fullmatch("[a-z]{3,}", word)))
    rng = np.random.default_rng(seed)
    topics = known[rng.integers(len(known), size=(count, 8))]
    return [" ".join(rng.choice(topic, words)) for topic in topics]


def random_tree(vectors: np.ndarray, branching: Sequence[int] = BRANCHING) -> ClusterTree:
    """A full tree with ``vectors`` (n, dim) for centroids."""
    rng = np.random.default_rng(0)
    sizes = [int(np.prod(branching[: level + 1])) for level in range(len(branching))]
    centroids = [vectors[rng.integers(len(vectors), size=size)] for size in sizes]
    counts = [np.full(size, sizes[-1] // size, np.int64) for size in sizes]
    return ClusterTree(tuple(branching), centroids, counts, seed=0)


def random_retriever() -> Retriever:
    encoder = load_encoder("static")
    return Retriever(encoder, random_tree(encoder.encode(random_texts(POOL, 50, seed=1))))


def write_config(folder: Path, name: str, **more: Any) -> None:
    """An anchor's config.json, and its tokenizer."""
    config = asdict(PRESETS[name]) | {"eos_token_id": 1} | more
    write_atomic(folder / "config.json", json.dumps(config))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    write_atomic(folder / "tokenizer_config.json", json.dumps(config))


def random_anchor(name: str, dtype: str = "float32", bits: int | None = None) -> Model:
    """``bits``: of an anchor that is quantised as mlx-lm does it, in groups of ``GROUP``."""
    mx.random.seed(0)
    anchor = Model(PRESETS[name])
    anchor.update(tree_map(lambda array: array.astype(getattr(mx, dtype)), anchor.parameters()))
    if bits is not None:
        nn.quantize(anchor, group_size=GROUP, bits=bits)
    mx.eval(anchor.parameters())
    return anchor


def copy_of(anchor: Model, bits: int | None = None) -> Model:
    """Another anchor with the same arrays for weights, which may be quantised."""
    other = Model(anchor.args)
    if bits is not None:
        nn.quantize(other, group_size=GROUP, bits=bits)
    other.update(anchor.parameters())
    return other


def model_of(
    place: Path, anchor: Model, retriever: Retriever | None = None, bank: Bank | None = None
) -> MemoryModel:
    """A model of parts that are in memory; its tokenizer is written to ``place``."""
    write_tokenizer(place)
    tokenizer = read_tokenizer(place, {"eos_token_id": 1})
    context = {"max_position_embeddings": anchor.args.max_position_embeddings}
    return MemoryModel(anchor, context, tokenizer, retriever, bank)


def write_anchor(folder: Path, name: str, dtype: str) -> None:
    """An anchor with zeros for weights, which take no room on the disk and all of it in memory, and
    its tokenizer; ``folder`` may be new."""
    folder.mkdir(exist_ok=True)
    model, tag = Model(PRESETS[name]), DTYPES[dtype]
    tensors = [(key, tag, array.shape) for key, array in named_parameters(model).items()]
    header = safetensors_header(tensors, {})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + ITEM_SIZES[tag] * num_parameters(model))
    write_config(folder, name)


def write_memory(folder: Path, name: str, prompts: Sequence[str], bits: int = 16) -> int:
    """Gives an anchor's folder a memory, whose bank has values in the blocks of the paths of
    ``prompts``. Returns the parameters of the bank."""
    config, retriever = paper_config(name), random_retriever()
    (folder / "retriever").mkdir()
    tree = folder / "retriever" / "tree.safetensors"
    retriever.tree.save(tree, retriever.encoder.fingerprint)
    known = RetrieverConfig("static", retriever.encoder.fingerprint, fingerprint(tree))
    hmem = HmemConfig(FORMAT_VERSION, config, known, anchor_hash(folder))
    filled = keys_of(config, [retriever.route(prompt) for prompt in prompts])
    make_bank(folder / "bank", config, filled, bits, hmem.anchor_hash, known.tree_hash)
    write_atomic(folder / "hmem.json", hmem.to_json())
    return config.bank_parameters
