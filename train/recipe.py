"""The recipe of a model: every number that training needs, from one YAML file.

Frozen dataclasses in the style of :mod:`mlx_hmem.config`: one place for each default and its help
text, unknown keys refused, every value checked before any work starts.
"""

import dataclasses
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlx_hmem.bank import Quantization
from mlx_hmem.bank.format import stored_r
from mlx_hmem.bank.quantization import check_quantization
from mlx_hmem.config import ROWS_OF_KIND, JsonConfig, MemoryConfig
from mlx_hmem.errors import UserError

ANYTHING = float("inf")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _whole(section: str, name: str, value: Any, least: int, most: float = ANYTHING) -> None:
    if type(value) is not int or not least <= value <= most:
        upper = "" if most == ANYTHING else f" to {most}"
        raise UserError(
            f"{section}{name} is not a whole number",
            repr(value),
            f"use {least}{upper or ' or more'}",
        )


def _number(section: str, name: str, value: Any, least: float, most: float = ANYTHING) -> None:
    if type(value) not in (int, float) or not least <= value <= most or value == ANYTHING:
        upper = "" if most == ANYTHING else f" to {most}"
        raise UserError(
            f"{section}{name} is not a number in range",
            repr(value),
            f"use {least}{upper or ' or more'}",
        )


def _truth(section: str, name: str, value: Any) -> None:
    if type(value) is not bool:
        raise UserError(f"{section}{name} is not true or false", repr(value), "use true or false")


def _wholes(section: str, name: str, value: Any, least: int) -> None:
    if not isinstance(value, tuple) or not value:
        raise UserError(
            f"{section}{name} is not a list of whole numbers", repr(value), "use [16, 4]"
        )
    for item in value:
        _whole(section, name, item, least)


@dataclass(frozen=True)
class CorpusSection(JsonConfig):
    documents: int | None = field(
        default=None,
        metadata=_help("documents to sample, by the md5 of the id; null takes all, 0 none"),
    )
    max_characters: int = field(
        default=900, metadata=_help("a longer document is cut at the last sentence end before that")
    )
    held_out: float = field(
        default=0.02, metadata=_help("fraction of the documents that is never trained on")
    )
    facts: tuple[dict[str, Any], ...] = field(
        default=(), metadata=_help("lists of facts to state: `kind` and the keys of that kind")
    )

    def __post_init__(self) -> None:
        if self.documents is not None:
            _whole("corpus.", "documents", self.documents, 0)
        _whole("corpus.", "max_characters", self.max_characters, 16)
        _number("corpus.", "held_out", self.held_out, 0, 0.5)
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
    vocab_size: int = field(default=2048, metadata=_help("pieces, the 256 bytes among them"))

    def __post_init__(self) -> None:
        _whole("tokenizer.", "vocab_size", self.vocab_size, 300, 65536)


@dataclass(frozen=True)
class WindowsSection(JsonConfig):
    context: int = field(default=256, metadata=_help("tokens of a training sequence"))

    def __post_init__(self) -> None:
        _whole("windows.", "context", self.context, 8)


@dataclass(frozen=True)
class TreeSection(JsonConfig):
    branching: tuple[int, ...] = field(
        default=(16, 4), metadata=_help("children of a cluster on each level")
    )
    encoder: str = field(default="static", metadata=_help("`static`, `minilm` or a folder"))

    def __post_init__(self) -> None:
        _wholes("tree.", "branching", self.branching, 2)
        if not isinstance(self.encoder, str) or not self.encoder:
            raise UserError("tree.encoder is not a name", repr(self.encoder), "use static")


@dataclass(frozen=True)
class TrainerConfig(JsonConfig):
    """One phase of AdamW: linear warm-up, then cosine from peak to final learning rate."""

    epochs: float = field(default=1.0, metadata=_help("passes over the sequences"))
    batch_size: int = field(default=8, metadata=_help("sequences of one step"))
    learning_rate: float = field(default=3e-3, metadata=_help("peak learning rate"))
    final_learning_rate: float = field(default=3e-5, metadata=_help("where the cosine ends"))
    warmup_steps: int = field(default=100, metadata=_help("steps of linear warm-up"))
    weight_decay: float = field(default=0.05, metadata=_help("decoupled weight decay"))
    grad_clip: float = field(default=1.0, metadata=_help("greatest norm of the gradient"))
    beta1: float = field(default=0.9, metadata=_help("decay of the first moment"))
    beta2: float = field(default=0.95, metadata=_help("decay of the second moment"))
    save_every: int = field(default=200, metadata=_help("steps between checkpoints"))
    micro_batch_size: int | None = field(
        default=None, metadata=_help("sequences at a time, gradients add up; null: the whole batch")
    )
    document_mask: bool = field(
        default=True, metadata=_help("attention stays within a document (paper, section 5)")
    )

    def __post_init__(self) -> None:
        _number("training.", "epochs", self.epochs, 1e-6)
        _whole("training.", "batch_size", self.batch_size, 1)
        _number("training.", "learning_rate", self.learning_rate, 0)
        _number("training.", "final_learning_rate", self.final_learning_rate, 0)
        _whole("training.", "warmup_steps", self.warmup_steps, 0)
        _number("training.", "weight_decay", self.weight_decay, 0)
        _number("training.", "grad_clip", self.grad_clip, 1e-6)
        _number("training.", "beta1", self.beta1, 0, 0.9999999)
        _number("training.", "beta2", self.beta2, 0, 0.9999999)
        _whole("training.", "save_every", self.save_every, 1)
        if self.micro_batch_size is not None:
            _whole("training.", "micro_batch_size", self.micro_batch_size, 1)
            if self.batch_size % self.micro_batch_size:
                raise UserError(
                    "training.batch_size is not a multiple of micro_batch_size",
                    f"{self.batch_size}, {self.micro_batch_size}",
                    "let one divide the other",
                )
        _truth("training.", "document_mask", self.document_mask)


@dataclass(frozen=True)
class AnchorSection(JsonConfig):
    hidden_size: int = field(default=128, metadata=_help("width of the residual stream"))
    num_hidden_layers: int = field(default=5, metadata=_help("layers"))
    num_attention_heads: int = field(default=2, metadata=_help("attention heads"))
    head_dim: int = field(default=64, metadata=_help("width of one head"))
    intermediate_size: int = field(default=352, metadata=_help("inner width of the FFN"))
    tie_word_embeddings: bool = field(
        default=True, metadata=_help("one matrix for input and output embeddings")
    )
    training: TrainerConfig | None = field(
        default_factory=TrainerConfig,
        metadata=_help("how the anchor is trained; null leaves it at its start, for co-training"),
    )

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            _whole("anchor.", name, getattr(self, name), 1)
        _whole("anchor.", "intermediate_size", self.intermediate_size, 1)
        if self.head_dim % 2:
            raise UserError("anchor.head_dim is odd", self.head_dim, "rotary positions need pairs")
        _truth("anchor.", "tie_word_embeddings", self.tie_word_embeddings)


@dataclass(frozen=True)
class CotrainSection(JsonConfig):
    """Training the anchor along with the memories (paper, section 5), in the same steps."""

    learning_rate_scale: float = field(
        default=1.0, metadata=_help("learning rate of the anchor ÷ that of the memories")
    )
    weight_decay: float = field(default=0.05, metadata=_help("that of the anchor"))
    generic_probability: float | None = field(
        default=None,
        metadata=_help(
            "how often the generic memory stands in for the fetched one; null: 1 / (k + 1), k the "
            "branching of level 1; 1 trains with generic memory alone"
        ),
    )

    def __post_init__(self) -> None:
        _number("cotrain.", "learning_rate_scale", self.learning_rate_scale, 0)
        _number("cotrain.", "weight_decay", self.weight_decay, 0)
        if self.generic_probability is not None:
            _number("cotrain.", "generic_probability", self.generic_probability, 0, 1)


@dataclass(frozen=True)
class MemoriesSection(JsonConfig):
    r: tuple[int, ...] = field(
        default=(48, 24), metadata=_help("block-size multiplier of each level")
    )
    kind: str = field(default="ffn", metadata=_help(f"one of {', '.join(ROWS_OF_KIND)}"))
    layers: Any = field(
        default="all", metadata=_help("all, first N, middle N, last N, or a list of layers")
    )
    keep_parameters: bool = field(
        default=False, metadata=_help("on fewer layers, raise r to as many parameters as on all")
    )
    cache_bytes: int = field(
        default=1 << 30, metadata=_help("memory for blocks of deeper levels while training")
    )
    training: TrainerConfig = field(
        default_factory=TrainerConfig, metadata=_help("how the memories are trained")
    )
    cotrain: CotrainSection | None = field(
        default=None, metadata=_help("how the anchor is trained along; null: it is frozen")
    )

    def __post_init__(self) -> None:
        _wholes("memories.", "r", self.r, 0)
        _whole("memories.", "cache_bytes", self.cache_bytes, 1)
        _truth("memories.", "keep_parameters", self.keep_parameters)


@dataclass(frozen=True)
class DenseSection(JsonConfig):
    training: TrainerConfig = field(
        default_factory=TrainerConfig,
        metadata=_help("how the anchor is trained on without memory, to compare with"),
    )


@dataclass(frozen=True)
class ExportSection(JsonConfig):
    dtype: str = field(default="float16", metadata=_help("type of the bank's numbers"))
    quantization: dict[str, Any] | None = field(
        default=None,
        metadata=_help("of all blocks: `mode`, `bits` and `group_size` as MLX names them; or null"),
    )
    attribution: str = field(
        default="", metadata=_help("source and licence of the text, for the model's card")
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise UserError(
                "unknown export.dtype", repr(self.dtype), "use float16, bfloat16 or float32"
            )
        if self.quantization is not None:
            self.quantization_of(0)

    def quantization_of(self, level: int) -> Quantization:
        values = {"level": level} | (self.quantization or {})
        return Quantization.from_dict(values, "export.quantization")


@dataclass(frozen=True)
class Recipe(JsonConfig):
    name: str = field(metadata=_help("name of the model"))
    seed: int = field(default=0, metadata=_help("every random choice follows from it"))
    corpus: CorpusSection = field(default_factory=CorpusSection)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    windows: WindowsSection = field(default_factory=WindowsSection)
    tree: TreeSection = field(default_factory=TreeSection)
    anchor: AnchorSection = field(default_factory=AnchorSection)
    memories: MemoriesSection = field(default_factory=MemoriesSection)
    dense: DenseSection | None = field(default_factory=DenseSection)
    export: ExportSection = field(default_factory=ExportSection)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UserError("name is not a text", repr(self.name), "name the model")
        _whole("", "seed", self.seed, 0, 2**32 - 1)
        config = self.memory_config  # r, branching and the anchor must fit together
        if self.anchor.training is None and self.memories.cotrain is None:
            raise UserError(
                "nothing trains the anchor",
                "anchor.training null, memories.cotrain null",
                "give one of them",
            )
        if self.export.quantization is not None:
            r = stored_r(config)
            check_quantization(tuple(map(self.export.quantization_of, r)), config, r)

    @property
    def memory_config(self) -> MemoryConfig:
        anchor, memories = self.anchor, self.memories
        heads = anchor.num_attention_heads * anchor.head_dim
        config = MemoryConfig(
            hidden_size=anchor.hidden_size,
            num_hidden_layers=anchor.num_hidden_layers,
            r=memories.r,
            branching=self.tree.branching,
            kind=memories.kind,
            intermediate_size=anchor.intermediate_size,
            query_size=heads,
            key_value_size=heads,
        )
        return config.placed(memories.layers, memories.keep_parameters)

    def sections(self, names: Iterable[str]) -> dict[str, Any]:
        """The named parts as JSON values: what a stage's result depends on."""
        values = self.to_dict()
        del values["memories"]["cache_bytes"]  # how fast, not what
        return {name: values[name] for name in names}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number, as everybody means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _section(cls: type[JsonConfig], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(
            f"{where} is not a mapping", repr(values)[:80], "write `key: value` lines there"
        )
    if odd := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"a key of {where} is not a word", repr(odd[0]), "write `key: value`")
    hints = typing.get_type_hints(cls)
    result = dict(values)
    for part in dataclasses.fields(cls):  # type: ignore[arg-type]
        kinds = [hints[part.name], *typing.get_args(hints[part.name])]
        nested = next((k for k in kinds if isinstance(k, type) and issubclass(k, JsonConfig)), None)
        if nested is None or part.name not in values:
            continue
        if values[part.name] is None and type(None) in kinds:
            continue
        result[part.name] = _section(nested, values[part.name], f"{where}, {part.name}")
    return cls.from_dict(result, where)


def load_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe; a wrong one raises ``UserError``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError("no such recipe", path, "give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8", error, "save it as UTF-8") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML", error, "correct it") from None
    recipe: Recipe = _section(Recipe, values, str(path))
    return recipe
