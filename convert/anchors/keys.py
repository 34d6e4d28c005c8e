"""Tables of names: which tensor of PyTorch becomes which of ours, and back.

A table is a list of :class:`Rule`; both directions read the same one. In a name ``{i}`` stands for
the number of a layer, ``{e}`` for that of an expert of a mixture, ``{any}`` for any text. Of all
the rules that fit a name the first counts. A tensor that no rule takes, one that is missing and one
of the wrong shape are errors, listed together in one line.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mlx_hmem.errors import UserError

from ..torch_files.tensors import LazyTensor
from .weights import DTYPES, FLOATS, Target

MOST_NAMES = 6  # of each list in an error
# What torch.compile, FSDP and activation checkpointing put before the name of a module they wrap.
WITHIN = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    ``how``: "same"; "parts": PyTorch has one matrix, ours are equal parts of its rows, in order;
    "transposed"; "stacked": ours has a first axis for PyTorch's ``{e}``.
    """

    torch: str
    mlx: tuple[str, ...]
    how: str = "same"


@dataclass(frozen=True)
class Drop:
    """Tensors of PyTorch that are left out on purpose, and why."""

    torch: str
    why: str


SAME = Rule("{any}", ("{any}",))


@lru_cache
def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern)
    for name, what in (("i", r"\d+"), ("e", r"\d+"), ("any", ".+")):
        text = text.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{what})")
    return re.compile(text)


def fits(pattern: str, name: str) -> dict[str, str] | None:
    """What the placeholders of ``pattern`` stand for in ``name``; None if it does not fit."""
    found = _regex(pattern).fullmatch(name)
    return found.groupdict() if found else None


def short_name(name: str, prefixes: Sequence[str]) -> str:
    """A name without wrappers' prefixes, in whatever order and number they come, and without those
    of compiled, sharded and checkpointed modules within it."""
    name = WITHIN.sub("", name)
    while prefix := next((p for p in prefixes if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def strip(
    tensors: Mapping[str, LazyTensor],
    prefixes: Sequence[str],
    is_embedding: Callable[[str], bool] = lambda name: False,
) -> dict[str, LazyTensor]:
    """Takes wrappers' prefixes off the names, and nn.Embedding's end off those that are of one."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        short = short_name(name, prefixes)
        if is_embedding(short):
            short = short.removesuffix(".weight")
        if short in result:
            raise UserError("two tensors have one name without prefixes", short, "rename one")
        result[short] = tensor
    return result


def entry_of(tensor: LazyTensor, index: int) -> LazyTensor:
    """``tensor[index]``, still in the file."""
    one = tensor.rows(index, 1)
    strides = tensor.strides[1:] if tensor.strides else None
    return replace(one, shape=tensor.shape[1:], strides=strides)


class Problems:
    """Names of tensors with which something is wrong, collected so that one line says it all."""

    def __init__(self) -> None:
        self.lists: dict[str, list[str]] = {"missing": [], "wrong shape": [], "left over": []}

    def check(self, what: str, remedy: str) -> None:
        texts = []
        for kind, names in self.lists.items():
            if names:
                more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
                shown = ", ".join(name[:200] for name in names[:MOST_NAMES])
                texts.append(f"{kind}: {shown}{more}")
        if texts:
            raise UserError(what, "; ".join(texts), remedy)


def to_mlx(
    tensors: Mapping[str, LazyTensor],
    rules: Sequence[Rule],
    drops: Sequence[Drop],
    wanted: Shapes,
    dtype: str | None = None,
    remedy: str = "give the config of this checkpoint",
) -> tuple[list[Target], list[str]]:
    """PyTorch's tensors as ours.

    Args:
        tensors: by PyTorch's names.
        wanted: our names and shapes, all of them.
        dtype: that of the result, as MLX calls it; None keeps each tensor's own.
        remedy: what to do where the two do not fit.

    Returns the targets in the order of ``wanted``, and a line for each kind of dropped tensor.
    Raises UserError with lists of what is missing, of the wrong shape, or left over.
    """
    problems, targets, used = Problems(), [], set()
    for name, shape in wanted.items():
        rule, part, values = rule_of(name, rules)
        count = shape[0] if rule.how == "stacked" else 1
        sources = [rule.torch.format(**values, e=e) for e in range(count)]
        used |= set(sources)
        if absent := [source for source in sources if source not in tensors]:
            problems.lists["missing"] += absent
            continue
        pieces, fitting = [tensors[source] for source in sources], _torch_shape(rule, shape)
        if {(piece.shape, piece.dtype) for piece in pieces} != {(fitting, pieces[0].dtype)}:
            wrong = f"{sources[0]} is {pieces[0].shape}, config.json makes it {fitting}"
            problems.lists["wrong shape"].append(wrong)
            continue
        if rule.how == "parts":
            pieces = [pieces[0].rows(part * shape[0], shape[0])]
        elif rule.how == "transposed":
            pieces = [pieces[0].T]
        targets.append(target_of(name, shape, pieces, dtype))
    notes = _dropped(set(tensors) - used, drops, problems)
    problems.check("the tensors do not fit the config", remedy)
    return targets, notes


def rule_of(name: str, rules: Sequence[Rule]) -> tuple[Rule, int, dict[str, str]]:
    for rule in rules:
        for part, pattern in enumerate(rule.mlx):
            if (values := fits(pattern, name)) is not None:
                return rule, part, values
    raise UserError("no rule makes this tensor", name, "add a line to the table of names")


def _torch_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    if rule.how == "parts":
        return (shape[0] * len(rule.mlx), *shape[1:])
    if rule.how == "transposed":
        return shape[::-1]
    return shape[1:] if rule.how == "stacked" else shape


def target_of(
    name: str, shape: tuple[int, ...], pieces: Sequence[LazyTensor], dtype: str | None
) -> Target:
    own = pieces[0].dtype
    if own not in FLOATS:
        raise UserError(f"{name} holds no floating-point numbers", own, "dequantise the model")
    if dtype is None and own == "F64":
        raise UserError(f"{name} has a type MLX does not have", own, "add --dtype float32")
    return Target(name, DTYPES[dtype] if dtype else own, shape, tuple(pieces))


def _dropped(names: set[str], drops: Sequence[Drop], problems: Problems) -> list[str]:
    """What no rule took: a line for each rule of dropping; the rest are problems."""
    notes = Counter[Drop]()
    for name in sorted(names):
        drop = next((d for d in drops if fits(d.torch, name) is not None), None)
        if drop is None:
            problems.lists["left over"].append(name)
        else:
            notes[drop] += 1
    return [f"dropped {d.torch} ({count}): {d.why}" for d, count in notes.items()]


def to_torch(
    tensors: Mapping[str, LazyTensor],
    rules: Sequence[Rule],
    wanted: Shapes,
    dtype: str | None = None,
) -> list[Target]:
    """Our tensors under PyTorch's names, the exact inverse of :func:`to_mlx`.

    They must be those of ``wanted``, as there.
    """
    problems, targets = Problems(), list[Target]()
    problems.lists["missing"] = [name for name in wanted if name not in tensors]
    problems.lists["left over"] = [name for name in tensors if name not in wanted]
    problems.lists["wrong shape"] = [
        f"{name} is {tensor.shape}, config.json makes it {wanted[name]}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name]
    ]
    problems.check("this is no whole model of MLX", "restore the model")
    for name, tensor in tensors.items():
        rule, part, values = rule_of(name, rules)
        if rule.how == "stacked":
            made = [[entry_of(tensor, e)] for e in range(tensor.shape[0])]
        elif rule.how == "transposed":
            made = [[tensor.T]]
        elif part == 0:
            made = [[tensors[pattern.format(**values)] for pattern in rule.mlx]]
        else:
            continue  # it went along with part 0
        for e, pieces in enumerate(made):
            if len({piece.dtype for piece in pieces}) > 1:
                raise UserError("parts of one matrix differ in dtype", name, "add --dtype")
            shape = pieces[0].shape
            if len(pieces) > 1:
                shape = (sum(piece.shape[0] for piece in pieces), *shape[1:])
            targets.append(target_of(rule.torch.format(**values, e=e), shape, pieces, dtype))
    return targets
