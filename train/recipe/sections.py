"""The sections of a recipe: frozen dataclasses in the style of :mod:`mlx_hmem.config`, a line for
each key (:mod:`.keys`), every value checked before any work starts.
"""

from dataclasses import dataclass
from typing import Any

from mlx_hmem.bank import Quantization
from mlx_hmem.config import KINDS, PROJECTIONS, JsonConfig
from mlx_hmem.errors import UserError

from .keys import check_keys, check_whole, key


@dataclass(frozen=True)
class CorpusSection(JsonConfig):
    documents: int | None = key(
        None, "documents to sample, by the md5 of the id; null takes all, 0 none"
    )
    max_characters: int = key(
        900, "a longer document is cut at the last sentence end before that", least=16
    )
    held_out: float = key(0.02, "fraction of the documents that is never trained on", most=0.5)
    facts: tuple[dict[str, Any], ...] = key(
        (), "lists of facts to state: `kind` and the keys of that kind"
    )
    anchor_times: int | None = key(
        None, "the anchor's own training leaves out facts stated fewer times than this", least=2
    )

    def __post_init__(self) -> None:
        check_keys(self, "corpus.")
        if self.documents == 0 and not self.facts:
            raise UserError(
                "a corpus of nothing", "documents 0, no facts", "raise documents or add facts"
            )


@dataclass(frozen=True)
class TokenizerSection(JsonConfig):
    vocab_size: int = key(
        2048, "pieces, the 256 bytes among them; with `path`, rows of the embeddings", least=300
    )
    path: str | None = key(
        None, "folder or Hub id of a tokenizer to take; null trains one on the text"
    )

    def __post_init__(self) -> None:
        check_keys(self, "tokenizer.")
        most = 65536 if self.path is None else 1 << 24
        check_whole("tokenizer.vocab_size", self.vocab_size, 300, most)


@dataclass(frozen=True)
class WindowsSection(JsonConfig):
    context: int = key(256, "tokens of a training sequence", least=8)
    anchor_context: int | None = key(
        None, "those of the anchor's training, and its longest; null: `context`"
    )
    decompose: bool = key(
        False,
        "the anchor trains on parts of one document each, of power-of-two lengths, in place of "
        "rows of packed documents (Pouransari et al. 2024)",
    )

    def __post_init__(self) -> None:
        check_keys(self, "windows.")
        if self.anchor_context is not None:
            check_whole("windows.anchor_context", self.anchor_context, self.context)
        if self.decompose and self.of_anchor & (self.of_anchor - 1):
            raise UserError(
                "windows.decompose needs a context that is a power of two",
                self.of_anchor,
                f"set the anchor's context to {1 << self.of_anchor.bit_length()}",
            )

    @property
    def of_anchor(self) -> int:
        return self.anchor_context or self.context


@dataclass(frozen=True)
class TreeSection(JsonConfig):
    branching: tuple[int, ...] = key((16, 4), "children of a cluster on each level", least=1)
    encoder: str = key("static", "`static`, `minilm` or a folder")
    prompts: int = key(0, "pieces of each window that move the centroids; 0: k-means (paper)")

    def __post_init__(self) -> None:
        check_keys(self, "tree.")


# Of a training: how it is watched, not what it makes. A run may go on with other values.
WATCHED = ("validate_every", "validation_sequences")


@dataclass(frozen=True)
class TrainerConfig(JsonConfig):
    """One phase of AdamW: linear warm-up, then cosine from peak to final learning rate."""

    epochs: float = key(1.0, "passes over the sequences", least=1e-6)
    steps: int | None = key(None, "steps, in place of epochs", least=1)
    batch_size: int = key(8, "sequences of one step", least=1)
    learning_rate: float = key(3e-3, "peak learning rate")
    final_learning_rate: float = key(3e-5, "where the cosine ends")
    reading_rate: float | None = key(
        None, "share of the rate for what reads in a memory: LoRA's A, gate and up, keys; null: 1"
    )
    warmup_steps: int = key(100, "steps of linear warm-up")
    weight_decay: float = key(0.05, "decoupled weight decay")
    grad_clip: float = key(1.0, "greatest norm of the gradient", least=1e-6)
    beta1: float = key(0.9, "decay of the first moment", most=0.9999999)
    beta2: float = key(0.95, "decay of the second moment", most=0.9999999)
    save_every: int = key(200, "steps between checkpoints", least=1)
    micro_batch_size: int | None = key(
        None, "sequences at a time, gradients add up; null: the whole batch", least=1
    )
    document_mask: bool = key(True, "attention stays within a document (paper, section 5)")
    gradient_checkpointing: bool = key(
        False, "layers keep their input only: less memory, a third more time"
    )
    validate_every: int = key(0, "steps between validations on held-out text; 0: there is none")
    validation_sequences: int = key(
        64, "held-out windows that a validation reads, at most", least=1
    )

    @property
    def part(self) -> int:
        """Sequences that are worked on at a time."""
        return self.micro_batch_size or self.batch_size

    def num_steps(self, num_sequences: int, of: int | None = None) -> int:
        """Steps on all sequences, or on ``num_sequences`` ``of`` all."""
        if self.steps is not None:
            return max(1, round(self.steps * num_sequences / (of or num_sequences)))
        return max(1, int(self.epochs * num_sequences) // self.batch_size)

    def numbers(self) -> dict[str, Any]:
        """What the trained weights follow from."""
        return {name: value for name, value in self.to_dict().items() if name not in WATCHED}

    def __post_init__(self) -> None:
        check_keys(self, "training.")
        if self.batch_size % (self.micro_batch_size or 1):
            raise UserError(
                "training.batch_size is not a multiple of micro_batch_size",
                f"{self.batch_size}, {self.micro_batch_size}",
                "let one divide the other",
            )


@dataclass(frozen=True)
class AnchorSection(JsonConfig):
    hidden_size: int = key(128, "width of the residual stream", least=1)
    num_hidden_layers: int = key(5, "layers", least=1)
    num_attention_heads: int = key(2, "attention heads", least=1)
    head_dim: int = key(64, "width of one head", least=1)
    intermediate_size: int = key(352, "inner width of the FFN", least=1)
    tie_word_embeddings: bool = key(True, "one matrix for input and output embeddings")
    training: TrainerConfig | None = key(
        TrainerConfig, "how the anchor is trained; null leaves it at its start"
    )
    path: str | None = key(
        None,
        "folder or Hub id of the model to start from, with its sizes and tokenizer in place of "
        "those here; any architecture that memory can be attached to",
    )
    config: dict[str, Any] | None = key(None, "its config.json; filled in from `path`")

    def __post_init__(self) -> None:
        check_keys(self, "anchor.")
        if self.path is None and self.config is not None:
            raise UserError("anchor.config without a path", "path null", "leave config out")
        if self.head_dim % 2:
            raise UserError("anchor.head_dim is odd", self.head_dim, "rotary positions need pairs")


@dataclass(frozen=True)
class CotrainSection(JsonConfig):
    """Training the anchor along with the memories (paper, section 5), in the same steps."""

    learning_rate_scale: float = key(1.0, "learning rate of the anchor ÷ that of the memories")
    weight_decay: float = key(0.05, "that of the anchor")
    generic_probability: float | None = key(
        None,
        "how often the generic memory stands in for the fetched one; null: 1 / (k + 1), k the "
        "branching of level 1; 1 trains with generic memory alone",
        most=1,
    )

    def __post_init__(self) -> None:
        check_keys(self, "cotrain.")


@dataclass(frozen=True)
class MemoriesSection(JsonConfig):
    r: tuple[int, ...] = key((48, 24), "block-size multiplier of each level")
    kind: str = key("ffn", f"one of {', '.join(KINDS)}")
    targets: tuple[str, ...] | None = key(
        None, f"what kind lora patches, in this order: {', '.join(PROJECTIONS)}"
    )
    layers: Any = key("all", "all, first N, middle N, last N, or a list of layers")
    keep_parameters: bool = key(False, "on fewer layers, raise r to as many parameters as on all")
    cache_bytes: int = key(1 << 30, "memory for blocks of deeper levels while training", least=1)
    cache_level_1: bool = key(
        False, "those of level 1 too; false: they stay in memory once they are read"
    )
    training: TrainerConfig = key(TrainerConfig, "how the memories are trained")
    cotrain: CotrainSection | None = key(
        None, "how the anchor is trained along; null: it is frozen"
    )
    group_by_subtree: bool = key(
        False,
        "batches of one level-1 cluster each: deeper blocks are read less often, and subtrees "
        "can be trained apart; warm-up and cosine then count the steps of each cluster",
    )

    def __post_init__(self) -> None:
        check_keys(self, "memories.")


@dataclass(frozen=True)
class DenseSection(JsonConfig):
    training: TrainerConfig = key(
        TrainerConfig, "how the anchor is trained on without memory, to compare with"
    )


@dataclass(frozen=True)
class ExportSection(JsonConfig):
    dtype: str = key("float16", "type of the bank's numbers")
    quantization: dict[str, Any] | None = key(
        None, "of all blocks: `mode`, `bits` and `group_size` as MLX names them; or null"
    )
    encoder_by_name: bool = key(
        False, "the model names the package's static encoder and holds no copy of it"
    )
    attribution: str = key("", "source and licence of the text, for the model's card")

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise UserError(
                "unknown export.dtype", repr(self.dtype), "use float16, bfloat16 or float32"
            )
        check_keys(self, "export.")
        if self.quantization is not None:
            self.quantization_of(0)

    def quantization_of(self, level: int) -> Quantization:
        values = {"level": level} | (self.quantization or {})
        return Quantization.from_dict(values, "export.quantization")
