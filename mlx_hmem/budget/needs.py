"""What a model will take of memory, reckoned from its files' headers before any of it is loaded.

Reckoned are, at the moment when all are there at once:

* the program with its tokenizer and retriever (figures measured on Linux),
* the anchor as its file stores it,
* keys and values of a whole context; quantised, with the scales of their groups,
* one fetched memory: joined, in the anchor's dtype; and, while it arrives, its blocks as they are
  stored,
* one part of a prompt: twice an attention map, and the inner widths of one layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_hmem.anchors.architectures import anchor_layers
from mlx_hmem.anchors.load import anchor_of_config, read_config, weight_files
from mlx_hmem.bank.format import MANIFEST, Manifest, num_blocks
from mlx_hmem.budget.resident import IMPORTS
from mlx_hmem.files import read_safetensors_header
from mlx_hmem.memory.layer import AttentionLayer, FFNLayer

STEP = 256  # tokens by which mlx-lm's caches grow


@dataclass(frozen=True)
class Needs:
    """What the reckoning follows from. Bytes, tokens, and numbers of values."""

    program: int
    anchor: int
    most_context: int | None  # tokens; None where the anchor does not say
    dtype_size: int  # bytes of an activation
    num_layers: int
    kv_values: int  # keys and values of one token in all layers
    kv_group: int  # values that would share a scale; 0: they cannot be quantised
    num_heads: int
    hidden_size: int
    inner_size: int
    vocab_size: int
    fetched: int = 0  # values of one fetched memory
    fetched_rows: int = 0  # sum of r
    stored: int = 0  # bytes of the blocks of one path
    levels: dict[int, int] = field(default_factory=dict)  # bytes of all blocks of each level

    def kv(self, context: int, bits: int | None) -> int:
        """Bytes of the keys and values of a context, one layer of them twice as it grows."""
        each = float(self.dtype_size)
        if bits is not None:
            each = bits / 8 + 2 * self.dtype_size / self.kv_group
        tokens = -(-context // STEP) * STEP
        return int(tokens * self.kv_values * each * (1 + 1 / self.num_layers))

    def part(self, tokens: int, context: int, bits: int | None) -> int:
        """Bytes that processing so many tokens of a prompt takes beside all that stays."""
        attention = 2 * tokens * self.num_heads * context
        inner = tokens * (6 * self.hidden_size + 4 * self.inner_size + 4 * self.fetched_rows)
        # The first part is in the cache before it is quantised.
        first = 0 if bits is None else self.kv(tokens, None) - self.kv(context, bits)
        return max(self.dtype_size * (attention + inner), first) + 16 * self.vocab_size

    @property
    def memory(self) -> int:
        """Bytes of a fetched memory as it is used."""
        return self.fetched * self.dtype_size


def needs_of(folder: Path) -> Needs:
    """Of the anchor in ``folder``, by its headers."""
    config = read_config(folder)
    tensors = [t for f in weight_files(folder) for t in read_safetensors_header(f)[0].values()]
    gains = [t for t in tensors if len(t.shape) == 1 and t.dtype in ("F32", "F16", "BF16")]
    anchor = anchor_of_config(config)
    layers = anchor_layers(anchor)
    attention = [layer.attention for layer in layers if isinstance(layer.attention, AttentionLayer)]
    inner = [layer.ffn.up.size for layer in layers if isinstance(layer.ffn, FFNLayer)]
    hidden = attention[0].output.size
    head_dim = attention[0].query.size // attention[0].num_heads
    plain = all(type(cache) is KVCache for cache in make_prompt_cache(anchor))
    group = next((n for n in (64, 32) if head_dim % n == 0), 0) if plain else 0
    tokenizer = sum(f.stat().st_size for f in folder.glob("tokenizer*.json"))
    return Needs(
        program=IMPORTS + 4_000_000 + 16 * tokenizer,
        anchor=sum(t.end - t.start for t in tensors),
        most_context=config.get("max_position_embeddings"),
        dtype_size=4 if not gains or gains[-1].dtype == "F32" else 2,
        num_layers=len(layers),
        kv_values=sum(a.key.size + a.value.size for a in attention),
        kv_group=group,
        num_heads=attention[0].num_heads,
        hidden_size=hidden,
        inner_size=max(inner, default=4 * hidden),
        vocab_size=int(config.get("vocab_size", 0)),
    )


def read_needs(folder: Path, models: Sequence[Path], encoder: Path | None) -> Needs:
    """Of the model in ``folder``, by headers and manifests; nothing is loaded.

    ``models``: the folders that hold a ``bank`` and a ``retriever``, itself first; none for an
    anchor alone. ``encoder``: the folder of theirs.
    """
    needs = needs_of(folder)
    if not models:
        return needs
    files = [model / "bank" / MANIFEST for model in models]
    program = needs.program + 3 * sum(file.stat().st_size for file in files)
    # The small levels of the cluster tree; the large ones stay in the file.
    trees = [model / "retriever" / "tree.safetensors" for model in models]
    program += sum(min(file.stat().st_size, 8_000_000) for file in trees if file.exists())
    if encoder is not None:
        program += sum(20 * f.stat().st_size for f in encoder.glob("tokenizer.json"))
        headers = [read_safetensors_header(f)[0] for f in encoder.glob("*.safetensors")]
        program += sum(4 * math.prod(t.shape) for header in headers for t in header.values())
    manifests = [Manifest.from_file(file) for file in files]
    return replace(
        needs,
        program=program,
        # The largest of the banks; levels are kept of the first alone.
        fetched=max(m.memory.fetched_parameters for m in manifests),
        fetched_rows=max(sum(m.memory.r) for m in manifests),
        stored=max(sum(level.block_bytes for level in m.levels) for m in manifests),
        levels={
            level.level: level.block_bytes * num_blocks(manifests[0].memory, level.level)
            for level in manifests[0].levels
        },
    )
