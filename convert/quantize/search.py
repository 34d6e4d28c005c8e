"""The fewest bytes of a bank whose held-out loss rises by no more than a share of it.

Each level is rounded by itself first, in every form that may serve; no bank is written for that:
the blocks that the text fetches are rounded as they come. The rises of several levels add up,
nearly. So of all combinations those are tried that no other should beat in both bytes and rise, the
fewest bytes first, until one is measured to keep the bound. What is tried, and in which order, does
not depend on the bound: a tighter one never ends in fewer bytes.

Every measurement leaves a note, so that a stopped run goes on behind the last. Only mode affine is
tried: docs/quantizing.md says why.
"""

import copy
import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mlx_hmem.bank import Manifest, Quantization
from mlx_hmem.bank.format import GENERIC, Level, num_blocks, stored_levels, stored_r
from mlx_hmem.bank.quantization import MODES, check_quantization
from mlx_hmem.bank.writer import level_bytes
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.perplexity import document_losses, ratio_and_error
from mlx_hmem.files import write_atomic
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.reading import read_json

from .bank import level_title
from .rounded import Lost, RoundedBank

FEW_TOKENS = 2000  # of held-out text
Forms = tuple[Quantization, ...]  # of the levels that are rounded
_Choice = tuple[int, float, Forms]  # bytes and rise, over the levels as they were


class Bound(NamedTuple):
    """The share of the held-out loss by which it may rise, and the levels that may be quantised,
    0 being the generic memory."""

    share: float
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """A candidate: some levels of what ``memory`` reads in these ``forms``, the others as they
    were.

    ``bytes`` are those of the files of all these levels. ``loss``, and its ``rise`` over the levels
    as they were, are nats per token; ``rise_error`` is the standard error of the rise over
    documents, in pairs (NaN of one document). NaN, too, where little is left of a block.
    """

    memory: str
    forms: Forms
    bytes: int
    loss: float
    rise: float
    rise_error: float
    kept: bool = False


@dataclass(frozen=True)
class Search:
    """What was measured, for each memory the most bytes first: those of the levels as they were."""

    max_loss: float
    documents: int
    tokens: int
    curve: tuple[Measured, ...]

    @property
    def forms(self) -> dict[int, Quantization]:
        """What is kept, by level."""
        return {form.level: form for each in self.curve if each.kept for form in each.forms}


def search(folder: Path, bank: Manifest, bound: Bound, texts: Sequence[str], notes: Path) -> Search:
    """Searches forms for levels of the ``bank`` of a model directory; those that are quantised
    already stay as they are. ``notes``: the folder for what is measured.

    Raises UserError: no level can be quantised.
    """
    known = {level: forms for level in bound.levels if (forms := forms_of(bank, level))}
    for level in [n for n in known if is_zeros(bank, n)]:
        print(f"{level_title(level)} stays as it was: it is zeros", file=sys.stderr)
        del known[level]
    if not known:
        remedy = "they are zeros or quantised, or no form has fewer bytes; leave out --max-loss"
        raise UserError("no level of the bank can be quantised", [*bound.levels], remedy)
    model, curve = load(folder), list[Measured]()
    count = sum(map(len, known.values()))
    with tqdm(total=count, desc="measuring forms", unit="form", delay=2, disable=None) as bar:
        for memory in ("fetched", "generic"):
            own = {n: f for n, f in known.items() if (n == GENERIC) == (memory == "generic")}
            if own:
                trials = _Trials(model, bank, memory, texts, notes, bar)
                kept = _cheapest(trials, own, bound.share)
                trials.found[kept.forms] = replace(kept, kept=True)
                curve += sorted(trials.found.values(), key=lambda each: -each.bytes)
    model.require_bank().close()
    found = Search(bound.share, len(trials.tokens), int(trials.tokens.sum()), tuple(curve))
    if found.tokens < FEW_TOKENS or found.documents < 2:
        _warn(found)
    return found


def _warn(search: Search) -> None:
    """That the text is short, and what it leaves in doubt."""
    for each in (each for each in search.curve if each.kept):
        rise, error = (v / (each.loss - each.rise) for v in (each.rise, each.rise_error))
        said = (
            f"standard error {error:.3%}" if search.documents > 1 else "one document has no error"
        )
        what = f"warning: {search.tokens:,} tokens of text say little of the {each.memory} memory"
        print(f"{what}: its loss rises by {rise:+.3%}, {said}", file=sys.stderr)


def forms_of(bank: Manifest, level: int) -> Forms:
    """The forms that may serve a level, the best first: each has fewer bytes than those before it,
    which round less. None where it is quantised already, or no group fits."""
    least, found = bytes_of(bank, level), list[Quantization]()
    bits, sizes = MODES["affine"]
    choices = [(count, size) for count in sorted(bits, reverse=True) for size in sorted(sizes)]
    for form in (Quantization(level, "affine", *each) for each in choices):
        try:
            check_quantization((form,), bank.memory, stored_r(bank.memory))
        except UserError:
            continue
        if bank.quantization_of(level) is None and (size := bytes_of(bank, level, form)) < least:
            found.append(form)
            least = size
    return tuple(found)


def bytes_of(bank: Manifest, level: int, form: Quantization | None = None) -> int:
    """Bytes of the files of a level in this form; None: as it is."""
    form = form or bank.quantization_of(level)
    return level_bytes(bank.memory, Level.layout(bank.memory, level, bank.dtype, form))


def is_zeros(bank: Manifest, level: int) -> bool:
    """Whether all blocks of a level are, as a generic memory that was never trained."""
    return all(bank.is_zeros(level, n) for n in range(num_blocks(bank.memory, level)))


class _Trials:
    """Candidates for one kind of memory, each measured when it is first asked for."""

    def __init__(
        self,
        model: MemoryModel,
        bank: Manifest,
        memory: str,
        texts: Sequence[str],
        notes: Path,
        bar: tqdm,
    ):
        self.model, self.bank, self.memory, self.texts = model, bank, memory, texts
        self.notes, self.bar, self.found = notes, bar, dict[Forms, Measured]()
        self.nats, self.tokens = self._losses(())
        self.found[()] = self._summed((), self.nats)

    def of(self, forms: Forms) -> Measured:
        if forms not in self.found:
            self.found[forms] = self._summed(forms, self._losses(forms)[0])
            self.bar.total = max(self.bar.total or 0, self.bar.n + 1)  # combinations come on top
            self.bar.update()
        return self.found[forms]

    def _summed(self, forms: Forms, nats: np.ndarray) -> Measured:
        own = {form.level: form for form in forms}
        levels = [
            n for n in stored_levels(self.bank.memory) if bool(n) == (self.memory != "generic")
        ]
        size = sum(bytes_of(self.bank, level, own.get(level)) for level in levels)
        rise, error = ratio_and_error(nats - self.nats, self.tokens)
        loss = float(nats.sum() / self.tokens.sum())
        return Measured(self.memory, forms, size, loss, rise, error)

    def _losses(self, forms: Forms) -> tuple[np.ndarray, np.ndarray]:
        """Nats and tokens of each document, (n,) float64; NaN where little is left of a block."""
        names = [f"{form.level}-{form.mode}-{form.bits}-{form.group_size}" for form in forms]
        note = self.notes / ".".join(["loss", self.memory, *names, "json"])
        if not note.exists():
            model = copy.copy(self.model)
            model.bank = RoundedBank(model.require_bank(), {form.level: form for form in forms})
            try:
                found = document_losses(model, self.texts, self.memory, progress=False)
                nats, tokens = found.nats, found.tokens
            except Lost:
                nats, tokens = np.full_like(self.nats, math.nan), self.tokens
            write_atomic(note, json.dumps({"nats": nats.tolist(), "tokens": tokens.tolist()}))
        known = read_json(note)
        return np.array(known["nats"]), np.array(known["tokens"])


def _cheapest(trials: _Trials, known: dict[int, Forms], share: float) -> Measured:
    """The candidate to keep."""
    before, choices = trials.of(()), list[list[_Choice]]()
    for level, forms in known.items():
        alone = [trials.of((form,)) for form in forms]
        if not any(each.rise for each in alone):
            what = "no rounding of it changes what this text loses"
            print(f"{level_title(level)} stays as it was: {what}", file=sys.stderr)
            alone = []
        own = [(each.bytes - before.bytes, each.rise, each.forms) for each in alone]
        choices.append([(0, 0.0, ()), *(each for each in own if not math.isnan(each[1]))])
    # Chance may have it that a form with fewer bits seems the better one, on each level: behind all
    # others come the best forms, and the levels as they were.
    ends = [_joined([each[:2][-1] for each in choices]), _joined([each[0] for each in choices])]
    tries = sorted([*_front(choices), *ends], key=lambda each: each[:2])
    bound = share * before.loss
    return next(
        found
        for _, rise, forms in tries
        if rise <= bound and (found := trials.of(forms)).rise <= bound
    )


def _front(choices: Sequence[Sequence[_Choice]]) -> list[_Choice]:
    """One choice of each level, joined: those that no other beats in both bytes and rise, the
    fewest bytes first."""
    front: list[_Choice] = [(0, 0.0, ())]
    for own in choices:
        pairs = sorted(map(_joined, itertools.product(front, own)), key=lambda each: each[:2])
        least = itertools.accumulate((rise for _, rise, _ in pairs), min, initial=math.inf)
        front = [each for each, before in zip(pairs, least, strict=False) if each[1] < before]
    return front


def _joined(choices: Iterable[_Choice]) -> _Choice:
    sizes, rises, forms = zip(*choices, strict=True)
    return sum(sizes), sum(rises), tuple(itertools.chain(*forms))
