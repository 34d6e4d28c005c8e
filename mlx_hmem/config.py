"""Configurations of a model directory: frozen, validated when made, JSON in and out.

``hmem.json`` holds one :class:`HmemConfig`. Unknown keys are refused, so that a typing error or a
newer format is never silently ignored.
"""

import dataclasses
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from mlx_hmem.errors import UserError, printable
from mlx_hmem.files import is_whole
from mlx_hmem.reading import check_version, read_json, strict_json

FORMAT_VERSION = 1
# The projections of a layer, each with the sizes of its inputs and its outputs.
PROJECTIONS: dict[str, tuple[str, str]] = {
    "query": ("hidden_size", "query_size"),
    "key": ("hidden_size", "key_value_size"),
    "value": ("hidden_size", "key_value_size"),
    "output": ("query_size", "hidden_size"),
    "gate": ("hidden_size", "intermediate_size"),
    "up": ("hidden_size", "intermediate_size"),
    "down": ("intermediate_size", "hidden_size"),
}
SIZES = ("hidden_size", "query_size", "key_value_size", "intermediate_size")
# The kinds of memory (paper, section 3), each with the projections that it patches: those of
# `lora` are the config's `targets`.
KINDS: dict[str, tuple[str, ...]] = {
    "ffn": (),
    "lora_ffn": ("gate", "up", "down"),
    "lora_qk": ("query", "key"),
    "lora_vo": ("value", "output"),
    "kv": (),
    "lora": (),
}
# Keys that came after the first models: left out where they are None, so that nothing written
# without them changes, nor its fingerprint.
LATER_KEYS = ("targets", "names", "words", "reading_rate")
MAX_DEPTH = 8
MAX_LAYERS = 4096
MAX_CLUSTERS = 1 << 24
ClusterPath = tuple[int, ...]  # the global cluster index on each level


@cache
def _parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    """What a class is made of: a bank has one of a class for each of hundreds of files."""
    return inspect.signature(cls).parameters


class JsonConfig:
    """Mixin for frozen dataclasses: dictionaries and JSON in and out, unknown keys refused."""

    @classmethod
    def from_dict(cls, values: Any, source: str = "") -> Self:
        name = source or cls.__name__
        if not isinstance(values, dict):
            raise UserError(f"{name} is not a JSON object", repr(values)[:80], "restore the file")
        known = _parameters(cls)  # type: ignore[arg-type]
        if unknown := sorted(set(values) - set(known)):
            remedy = f"known keys are {', '.join(known)}"
            raise UserError(f"unknown key in {name}", unknown[0], remedy)
        required = {n for n, each in known.items() if each.default is each.empty}
        if missing := sorted(required - set(values)):
            raise UserError(f"missing key in {name}", missing[0], "add it or restore the file")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self, dict_factory=_written)  # type: ignore[call-overload]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _written(values: list[tuple[str, Any]]) -> dict[str, Any]:
    return {k: v for k, v in values if v is not None or k not in LATER_KEYS}


def _placement(layers: Any, num_layers: int) -> tuple[int, ...] | None:
    """The layers that a placement names; None for all of them."""
    if layers is None or layers == "all":
        return None
    if isinstance(layers, tuple | list):
        return tuple(layers)
    where, _, text = str(layers).partition(" ")
    count = int(text) if text.isdecimal() else 0
    starts = {"first": 0, "middle": (num_layers - count) // 2, "last": num_layers - count}
    known = f"all, first N, middle N or last N with N up to {num_layers}, or a list of layers"
    right = where in starts and 1 <= count <= num_layers
    _check(right, "no such placement of memory", repr(layers), f"use {known}")
    return tuple(range(starts[where], starts[where] + count))


def _check(right: bool, what: str, value: object, remedy: str = "correct it") -> None:
    if not right:
        raise UserError(what, value, remedy)


def _positive_int(name: str, value: Any, least: int = 1) -> None:
    right = type(value) is int and value >= least
    _check(right, f"{name} is not a whole number of {least} or more", repr(value))


@dataclass(frozen=True)
class MemoryConfig(JsonConfig):
    """The shape of a memory bank (paper, section 3).

    ``r[l]`` is the block-size multiplier of level l + 1: added FFN width, LoRA rank, or number of
    key-value slots; 0 means no memory on that level. ``branching[l]`` is the number of children of
    each cluster above level l + 1, so level l + 1 has ``branching[0] * ... * branching[l]``
    clusters. The sizes are the anchor's; those that the kind does not need may be 0.
    """

    hidden_size: int
    num_hidden_layers: int
    r: tuple[int, ...]
    branching: tuple[int, ...]
    kind: str = "ffn"  # one of KINDS
    intermediate_size: int = 0  # inner FFN width
    query_size: int = 0  # heads × head_dim
    key_value_size: int = 0  # key-value heads × head_dim
    gated: bool = True  # whether the anchor's FFN has a gate
    layers: tuple[int, ...] | None = None  # those that have memory, counted from 0; None: all
    targets: tuple[str, ...] | None = None  # of kind lora: what it patches, as PROJECTIONS has them

    def __post_init__(self) -> None:
        _positive_int("hidden_size", self.hidden_size)
        _positive_int("num_hidden_layers", self.num_hidden_layers)
        most = self.num_hidden_layers
        _check(most <= MAX_LAYERS, "too many layers", most, f"stay within {MAX_LAYERS}")
        known = f"use one of {', '.join(KINDS)}"
        right = isinstance(self.kind, str) and self.kind in KINDS
        _check(right, "unknown memory kind", repr(self.kind), known)
        _check(isinstance(self.gated, bool), "gated is not true or false", repr(self.gated))
        self._check_targets()
        for name in SIZES[1:]:
            _positive_int(name, getattr(self, name), least=int(name in self.matrices))
        self._check_layers()
        for name in ("r", "branching"):
            value, remedy = getattr(self, name), "give one number per level"
            _check(isinstance(value, tuple), f"{name} is not a list", repr(value), remedy)
        _check(
            1 <= len(self.r) <= MAX_DEPTH and len(self.r) == len(self.branching),
            "r and branching need one entry per level, 1 to 8 of them",
            f"r {self.r}, branching {self.branching}",
            "give both the same length",
        )
        for value in self.r:
            _positive_int("r", value, least=0)
        for value in self.branching:
            _positive_int("branching", value)
        _check(any(self.r), "no level has memory", f"r {self.r}", "make one r at least 1")
        most = self.num_clusters[-1]
        _check(most <= MAX_CLUSTERS, "too many clusters", most, f"stay within {MAX_CLUSTERS}")

    def _check_targets(self) -> None:
        targets, known = self.targets, [n for n in PROJECTIONS if self.gated or n != "gate"]
        if self.kind != "lora":
            what = f"memory of kind {self.kind} has no targets"
            _check(targets is None, what, repr(targets)[:80], "use kind lora")
            return
        right = isinstance(targets, tuple) and len(targets) > 0
        right = right and list(targets or ()) == [n for n in known if n in (targets or ())]
        remedy = f"name some of {', '.join(known)}, in this order"
        _check(
            right, "targets is not a list of an anchor's projections", repr(targets)[:80], remedy
        )

    def _check_layers(self) -> None:
        layers, most = self.layers, self.num_hidden_layers - 1
        right = layers is None or (
            isinstance(layers, tuple)
            and len(layers) > 0
            and all(is_whole(i, most) for i in layers)
            and sorted(set(layers)) == list(layers)
        )
        remedy = f"use numbers from 0 to {most}, or null for all"
        _check(right, "layers is not a rising list of layers", repr(layers), remedy)

    @property
    def num_levels(self) -> int:
        return len(self.r)

    @property
    def num_clusters(self) -> tuple[int, ...]:
        """Clusters on each level."""
        return tuple(math.prod(self.branching[: i + 1]) for i in range(len(self.branching)))

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """The layers of the anchor that have memory."""
        return tuple(range(self.num_hidden_layers)) if self.layers is None else self.layers

    @property
    def num_memory_layers(self) -> int:
        return self.num_hidden_layers if self.layers is None else len(self.layers)

    @property
    def patched(self) -> tuple[str, ...]:
        """The projections that a LoRA patch changes, as PROJECTIONS has them."""
        names = self.targets or KINDS[self.kind]
        return tuple(name for name in names if self.gated or name != "gate")

    @property
    def matrices(self) -> dict[str, list[str]]:
        """The matrices of a layer, of each a row for each unit of r, in the order of a block: their
        names by the size that is their width. A LoRA pair of projection p is p_a and p_b."""
        if self.kind == "ffn":
            return {"hidden_size": ["gate", "up", "down"][not self.gated :]}
        if self.kind == "kv":
            return {"query_size": ["key", "value"]}
        found: dict[str, list[str]] = {size: [] for size in SIZES}
        for name in self.patched:
            inputs, outputs = PROJECTIONS[name]
            found[inputs].append(f"{name}_a")
            found[outputs].append(f"{name}_b")
        return {size: names for size, names in found.items() if names}

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(rows, width) of the parts of a block, for each unit of r and each layer."""
        return tuple((len(names), getattr(self, size)) for size, names in self.matrices.items())

    def shape_of(self, r: int) -> tuple[int, ...]:
        """Shape of a block with multiplier ``r``.

        (layers, rows, r, width) where all rows have one width: gate, up and the transposed down
        for kind ``ffn``. Otherwise (layers, parameters of a layer), one group after the other, each
        of them (rows, r, width).
        """
        layers = self.num_memory_layers
        if len(self.groups) == 1:
            rows, width = self.groups[0]
            return (layers, rows, r, width)
        return (layers, r * sum(rows * width for rows, width in self.groups))

    def block_shape(self, level: int) -> tuple[int, ...]:
        """:meth:`shape_of` a block of ``level`` (1 = coarsest); of 0, the generic memory, r is the
        sum over the levels."""
        return self.shape_of(self.r[level - 1] if level else sum(self.r))

    @property
    def fetched_parameters(self) -> int:
        """Parameters of one fetched memory: 3 · sum(r) · layers · hidden for kind ``ffn``."""
        return sum(math.prod(self.block_shape(i + 1)) for i in range(self.num_levels))

    @property
    def bank_parameters(self) -> int:
        """Parameters of all blocks, the generic memory not counted."""
        return sum(n * math.prod(self.block_shape(i + 1)) for i, n in enumerate(self.num_clusters))

    def placed(self, layers: Any, keep_parameters: bool = False) -> Self:
        """This memory on some layers only (paper, appendix F).

        ``layers`` is "all", "first N", "middle N", "last N" or a list. To ``keep_parameters``, r
        grows by the factor by which the layers become fewer, rounded.
        """
        chosen = _placement(layers, self.num_hidden_layers)
        count = self.num_hidden_layers if chosen is None else len(chosen)
        factor = self.num_memory_layers / count if keep_parameters and count else 1
        r = tuple(round(value * factor) for value in self.r)
        return dataclasses.replace(self, layers=chosen, r=r)

    def check_path(self, path: Any, whole: bool = True) -> ClusterPath:
        """Returns ``path`` as a tuple of ints, or says why it names no blocks of this bank.

        A path that is not ``whole`` may end above the last level: it names one cluster.
        """
        try:
            result = tuple(int(i) for i in path)
        except (TypeError, ValueError):
            raise UserError(
                "a cluster path is not a sequence of whole numbers", repr(path), "use (3, 51)"
            ) from None
        least, most = self.num_levels if whole else 1, self.num_levels
        what = f"a cluster path needs {'' if whole else '1 to '}{most} levels"
        _check(least <= len(result) <= most, what, result, "route with this model")
        for level, (index, count) in enumerate(zip(result, self.num_clusters, strict=False), 1):
            what = f"no such cluster on level {level}"
            _check(0 <= index < count, what, index, f"use 0 to {count - 1}")
        for level, (above, index) in enumerate(pairwise(result), 1):
            if (under := index // self.branching[level]) != above:
                remedy = f"{index} of level {level + 1} lies under cluster {under} of level {level}"
                raise UserError("not a cluster path", result, f"cluster {remedy}")
        return result

    def path_to(self, level: int, cluster: int) -> ClusterPath:
        """The path that leads to a cluster."""
        path = [cluster]
        for width in reversed(self.branching[1:level]):
            path.append(path[-1] // width)
        return tuple(reversed(path))

    def clusters_on(self, path: ClusterPath, level: int) -> range:
        """The clusters of ``level`` that lie on the path or below it; all of them for ()."""
        if not path:
            return range(self.num_clusters[level - 1])
        if level <= len(path):
            return range(path[level - 1], path[level - 1] + 1)
        count = math.prod(self.branching[len(path) : level])
        return range(path[-1] * count, (path[-1] + 1) * count)

    def check_blocked(self, blocked: Iterable[Any]) -> frozenset[tuple[int, int]]:
        """(level, cluster) of clusters that may not be fetched, each given as the path to it."""
        paths = [self.check_path(path, whole=False) for path in blocked]
        return frozenset((len(path), path[-1]) for path in paths)


@dataclass(frozen=True)
class RetrieverConfig(JsonConfig):
    """Which encoder turns text into vectors, and by which files it is known."""

    encoder: str  # `minilm`, `static`, or a folder inside the model
    encoder_hash: str  # fingerprint of the encoder's files
    tree_hash: str  # and of tree.safetensors

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            right = isinstance(value, str) and printable(value) == value
            _check(right, f"{name} is not a plain text", repr(value)[:80], "restore hmem.json")


@dataclass(frozen=True)
class HmemConfig(JsonConfig):
    """``hmem.json``: what ties an anchor, a retriever and a memory bank into one model.

    The hashes are of the anchor's weights, of what ``config.json`` says, and of the tokenizer's
    vocabulary; a model of before has only the first. ``names`` are cluster paths that may be chosen
    by name; where there is no retriever that is the only way.
    """

    format_version: int
    memory: MemoryConfig
    retriever: RetrieverConfig | None
    anchor_hash: str
    config_hash: str | None = None
    tokenizer_hash: str | None = None
    names: dict[str, ClusterPath] | None = None

    def __post_init__(self) -> None:
        names, what = self.names, "names of memories are no names, each with its cluster path"
        if names is not None:
            right = isinstance(names, dict) and len(names) > 0 and all(map(_is_plain, names))
            right = right and all(isinstance(path, list | tuple) for path in names.values())
            right = right and all(is_whole(i) for path in names.values() for i in path)
            _check(right, what, repr(names)[:80], "restore hmem.json")
            paths = {name: self.memory.check_path(path) for name, path in names.items()}
            object.__setattr__(self, "names", paths)
        right = self.retriever is not None or names is not None
        _check(right, "a memory has neither a retriever nor names", "null", "restore hmem.json")

    @property
    def routed(self) -> RetrieverConfig:
        """The retriever; UserError where the memory is chosen by name alone."""
        if self.retriever is None:
            raise not_routed(self.names or ())
        return self.retriever

    @property
    def tree_hash(self) -> str:
        """Of the cluster tree; "" where there is none."""
        return "" if self.retriever is None else self.retriever.tree_hash

    @classmethod
    def from_file(cls, path: Path) -> "HmemConfig":
        values = read_json(path, parse=strict_json)
        check_version(values, FORMAT_VERSION, path, "make the model again")
        for key, kind in (("memory", MemoryConfig), ("retriever", RetrieverConfig)):
            if key in values and (values[key] is not None or key == "memory"):
                values[key] = kind.from_dict(values[key], f"{path} ({key})")
        return cls.from_dict(values, str(path))


def _is_plain(text: Any) -> bool:
    return isinstance(text, str) and text != "" and printable(text) == text


def not_routed(names: Iterable[str]) -> UserError:
    """That a text cannot choose a memory, where the model knows them by name alone."""
    known = f"it is chosen by name: {', '.join(names)}"
    remedy = "name one with --memory-name; a tree is made of texts (convert adapters --texts)"
    return UserError("this memory has no cluster tree", known, remedy)
