"""The sections of a recipe: frozen dataclasses in the style of :mod:`mlx_hmem.config`, one place
for each default and its help text, every value checked before any work starts.
"""

from dataclasses import dataclass, field
from typing import Any

from mlx_hmem.bank import Quantization
from mlx_hmem.config import ROWS_OF_KIND, JsonConfig
from mlx_hmem.errors import UserError

from .checks import (
    check_number,
    check_path,
    check_truth,
    check_whole,
    check_wholes,
    help_text,
)


@dataclass(frozen=True)
class CorpusSection(JsonConfig):
    documents: int | None = field(
        default=None,
        metadata=help_text("documents to sample, by the md5 of the id; null takes all, 0 none"),
    )
    max_characters: int = field(
        default=900,
        metadata=help_text("a longer document is cut at the last sentence end before that"),
    )
    held_out: float = field(
        default=0.02, metadata=help_text("fraction of the documents that is never trained on")
    )
    facts: tuple[dict[str, Any], ...] = field(
        default=(), metadata=help_text("lists of facts to state: `kind` and the keys of that kind")
    )
    anchor_times: int | None = field(
        default=None,
        metadata=help_text(
            "the anchor's own training leaves out facts stated fewer times than this"
        ),
    )

    def __post_init__(self) -> None:
        if self.documents is not None:
            check_whole("corpus.", "documents", self.documents, 0)
        check_whole("corpus.", "max_characters", self.max_characters, 16)
        check_number("corpus.", "held_out", self.held_out, 0, 0.5)
        if self.anchor_times is not None:
            check_whole("corpus.", "anchor_times", self.anchor_times, 2)
        if not isinstance(self.facts, tuple) or not all(isinstance(f, dict) for f in self.facts):
            raise UserError(
                "corpus.facts is not a list of mappings",
                repr(self.facts),
                "begin each with `- kind:`",
            )
        if self.documents == 0 and not self.facts:
            raise UserError(
                "a corpus of nothing", "documents 0, no facts", "raise documents or add facts"
            )


@dataclass(frozen=True)
class TokenizerSection(JsonConfig):
    vocab_size: int = field(
        default=2048,
        metadata=help_text("pieces, the 256 bytes among them; with `path`, rows of the embeddings"),
    )
    path: str | None = field(
        default=None,
        metadata=help_text("folder or Hub id of a tokenizer to take; null trains one on the text"),
    )

    def __post_init__(self) -> None:
        most = 65536 if self.path is None else 1 << 24
        check_whole("tokenizer.", "vocab_size", self.vocab_size, 300, most)
        check_path("tokenizer.", self.path)


@dataclass(frozen=True)
class WindowsSection(JsonConfig):
    context: int = field(default=256, metadata=help_text("tokens of a training sequence"))
    anchor_context: int | None = field(
        default=None,
        metadata=help_text("those of the anchor's training, and its longest; null: `context`"),
    )
    decompose: bool = field(
        default=False,
        metadata=help_text(
            "the anchor trains on parts of one document each, of power-of-two lengths, in place of "
            "rows of packed documents (Pouransari et al. 2024)"
        ),
    )

    def __post_init__(self) -> None:
        check_whole("windows.", "context", self.context, 8)
        if self.anchor_context is not None:
            check_whole("windows.", "anchor_context", self.anchor_context, self.context)
        check_truth("windows.", "decompose", self.decompose)
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
    branching: tuple[int, ...] = field(
        default=(16, 4), metadata=help_text("children of a cluster on each level")
    )
    encoder: str = field(default="static", metadata=help_text("`static`, `minilm` or a folder"))
    prompts: int = field(
        default=0,
        metadata=help_text("pieces of each window that move the centroids; 0: k-means (paper)"),
    )

    def __post_init__(self) -> None:
        check_wholes("tree.", "branching", self.branching, 2)
        check_whole("tree.", "prompts", self.prompts, 0)
        if not isinstance(self.encoder, str) or not self.encoder:
            raise UserError("tree.encoder is not a name", repr(self.encoder), "use static")


# Of a training: how it is watched, not what it makes. A run may go on with other values.
WATCHED = ("validate_every", "validation_sequences")


@dataclass(frozen=True)
class TrainerConfig(JsonConfig):
    """One phase of AdamW: linear warm-up, then cosine from peak to final learning rate."""

    epochs: float = field(default=1.0, metadata=help_text("passes over the sequences"))
    steps: int | None = field(default=None, metadata=help_text("steps, in place of epochs"))
    batch_size: int = field(default=8, metadata=help_text("sequences of one step"))
    learning_rate: float = field(default=3e-3, metadata=help_text("peak learning rate"))
    final_learning_rate: float = field(default=3e-5, metadata=help_text("where the cosine ends"))
    warmup_steps: int = field(default=100, metadata=help_text("steps of linear warm-up"))
    weight_decay: float = field(default=0.05, metadata=help_text("decoupled weight decay"))
    grad_clip: float = field(default=1.0, metadata=help_text("greatest norm of the gradient"))
    beta1: float = field(default=0.9, metadata=help_text("decay of the first moment"))
    beta2: float = field(default=0.95, metadata=help_text("decay of the second moment"))
    save_every: int = field(default=200, metadata=help_text("steps between checkpoints"))
    micro_batch_size: int | None = field(
        default=None,
        metadata=help_text("sequences at a time, gradients add up; null: the whole batch"),
    )
    document_mask: bool = field(
        default=True, metadata=help_text("attention stays within a document (paper, section 5)")
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata=help_text("layers keep their input only: less memory, a third more time"),
    )
    validate_every: int = field(
        default=0,
        metadata=help_text("steps between validations on held-out text; 0: there is none"),
    )
    validation_sequences: int = field(
        default=64, metadata=help_text("held-out windows that a validation reads, at most")
    )

    def num_steps(self, num_sequences: int, of: int | None = None) -> int:
        """Steps on all sequences, or on ``num_sequences`` ``of`` all."""
        if self.steps is not None:
            return max(1, round(self.steps * num_sequences / (of or num_sequences)))
        return max(1, int(self.epochs * num_sequences) // self.batch_size)

    def numbers(self) -> dict[str, Any]:
        """What the trained weights follow from."""
        return {name: value for name, value in self.to_dict().items() if name not in WATCHED}

    def __post_init__(self) -> None:
        check_number("training.", "epochs", self.epochs, 1e-6)
        if self.steps is not None:
            check_whole("training.", "steps", self.steps, 1)
        check_whole("training.", "batch_size", self.batch_size, 1)
        check_number("training.", "learning_rate", self.learning_rate, 0)
        check_number("training.", "final_learning_rate", self.final_learning_rate, 0)
        check_whole("training.", "warmup_steps", self.warmup_steps, 0)
        check_number("training.", "weight_decay", self.weight_decay, 0)
        check_number("training.", "grad_clip", self.grad_clip, 1e-6)
        check_number("training.", "beta1", self.beta1, 0, 0.9999999)
        check_number("training.", "beta2", self.beta2, 0, 0.9999999)
        check_whole("training.", "save_every", self.save_every, 1)
        if self.micro_batch_size is not None:
            check_whole("training.", "micro_batch_size", self.micro_batch_size, 1)
            if self.batch_size % self.micro_batch_size:
                raise UserError(
                    "training.batch_size is not a multiple of micro_batch_size",
                    f"{self.batch_size}, {self.micro_batch_size}",
                    "let one divide the other",
                )
        check_truth("training.", "document_mask", self.document_mask)
        check_truth("training.", "gradient_checkpointing", self.gradient_checkpointing)
        check_whole("training.", "validate_every", self.validate_every, 0)
        check_whole("training.", "validation_sequences", self.validation_sequences, 1)


@dataclass(frozen=True)
class AnchorSection(JsonConfig):
    hidden_size: int = field(default=128, metadata=help_text("width of the residual stream"))
    num_hidden_layers: int = field(default=5, metadata=help_text("layers"))
    num_attention_heads: int = field(default=2, metadata=help_text("attention heads"))
    head_dim: int = field(default=64, metadata=help_text("width of one head"))
    intermediate_size: int = field(default=352, metadata=help_text("inner width of the FFN"))
    tie_word_embeddings: bool = field(
        default=True, metadata=help_text("one matrix for input and output embeddings")
    )
    training: TrainerConfig | None = field(
        default_factory=TrainerConfig,
        metadata=help_text("how the anchor is trained; null leaves it at its start"),
    )
    path: str | None = field(
        default=None,
        metadata=help_text(
            "folder or Hub id of the model to start from, with its sizes and tokenizer in place of "
            "those here; any architecture that memory can be attached to"
        ),
    )
    config: dict[str, Any] | None = field(
        default=None, metadata=help_text("its config.json; filled in from `path`")
    )

    def __post_init__(self) -> None:
        check_path("anchor.", self.path)
        if self.path is None and self.config is not None:
            raise UserError("anchor.config without a path", "path null", "leave config out")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            check_whole("anchor.", name, getattr(self, name), 1)
        check_whole("anchor.", "intermediate_size", self.intermediate_size, 1)
        if self.head_dim % 2:
            raise UserError("anchor.head_dim is odd", self.head_dim, "rotary positions need pairs")
        check_truth("anchor.", "tie_word_embeddings", self.tie_word_embeddings)


@dataclass(frozen=True)
class CotrainSection(JsonConfig):
    """Training the anchor along with the memories (paper, section 5), in the same steps."""

    learning_rate_scale: float = field(
        default=1.0, metadata=help_text("learning rate of the anchor ÷ that of the memories")
    )
    weight_decay: float = field(default=0.05, metadata=help_text("that of the anchor"))
    generic_probability: float | None = field(
        default=None,
        metadata=help_text(
            "how often the generic memory stands in for the fetched one; null: 1 / (k + 1), k the "
            "branching of level 1; 1 trains with generic memory alone"
        ),
    )

    def __post_init__(self) -> None:
        check_number("cotrain.", "learning_rate_scale", self.learning_rate_scale, 0)
        check_number("cotrain.", "weight_decay", self.weight_decay, 0)
        if self.generic_probability is not None:
            check_number("cotrain.", "generic_probability", self.generic_probability, 0, 1)


@dataclass(frozen=True)
class MemoriesSection(JsonConfig):
    r: tuple[int, ...] = field(
        default=(48, 24), metadata=help_text("block-size multiplier of each level")
    )
    kind: str = field(default="ffn", metadata=help_text(f"one of {', '.join(ROWS_OF_KIND)}"))
    layers: Any = field(
        default="all", metadata=help_text("all, first N, middle N, last N, or a list of layers")
    )
    keep_parameters: bool = field(
        default=False,
        metadata=help_text("on fewer layers, raise r to as many parameters as on all"),
    )
    cache_bytes: int = field(
        default=1 << 30, metadata=help_text("memory for blocks of deeper levels while training")
    )
    cache_level_1: bool = field(
        default=False,
        metadata=help_text("those of level 1 too; false: they stay in memory once they are read"),
    )
    training: TrainerConfig = field(
        default_factory=TrainerConfig, metadata=help_text("how the memories are trained")
    )
    cotrain: CotrainSection | None = field(
        default=None, metadata=help_text("how the anchor is trained along; null: it is frozen")
    )
    group_by_subtree: bool = field(
        default=False,
        metadata=help_text(
            "batches of one level-1 cluster each: deeper blocks are read less often, and subtrees "
            "can be trained apart; warm-up and cosine then count the steps of each cluster"
        ),
    )

    def __post_init__(self) -> None:
        check_wholes("memories.", "r", self.r, 0)
        check_truth("memories.", "group_by_subtree", self.group_by_subtree)
        check_whole("memories.", "cache_bytes", self.cache_bytes, 1)
        check_truth("memories.", "keep_parameters", self.keep_parameters)
        check_truth("memories.", "cache_level_1", self.cache_level_1)


@dataclass(frozen=True)
class DenseSection(JsonConfig):
    training: TrainerConfig = field(
        default_factory=TrainerConfig,
        metadata=help_text("how the anchor is trained on without memory, to compare with"),
    )


@dataclass(frozen=True)
class ExportSection(JsonConfig):
    dtype: str = field(default="float16", metadata=help_text("type of the bank's numbers"))
    quantization: dict[str, Any] | None = field(
        default=None,
        metadata=help_text(
            "of all blocks: `mode`, `bits` and `group_size` as MLX names them; or null"
        ),
    )
    encoder_by_name: bool = field(
        default=False,
        metadata=help_text("the model names the package's static encoder and holds no copy of it"),
    )
    attribution: str = field(
        default="", metadata=help_text("source and licence of the text, for the model's card")
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise UserError(
                "unknown export.dtype", repr(self.dtype), "use float16, bfloat16 or float32"
            )
        check_truth("export.", "encoder_by_name", self.encoder_by_name)
        if self.quantization is not None:
            self.quantization_of(0)

    def quantization_of(self, level: int) -> Quantization:
        values = {"level": level} | (self.quantization or {})
        return Quantization.from_dict(values, "export.quantization")
