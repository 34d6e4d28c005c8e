"""The windows of a cluster as rows of training: each by itself, as long as its text, in batches of
about as many tokens.

Text that is only ever read from its beginning is known in that order alone. So a pass also has, for
a share of the sentences, what a question or another beginning leads to: the sentence behind its
document's title, its first words as the answer to some of its others, and what follows on a few of
them. Which sentences and which words is drawn anew for each pass, from the seed. Only what follows
is learned, and of an answer only the beginning: that is where a sentence is chosen, and the windows
teach the rest. All passes have as many steps, so that the schedule of learning rates is known
beforehand. There are as many passes as give a cluster ``STEPS``, where they are not given: what it
knows follows from its steps more than from how often it has read each sentence.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..corpus.own import OwnDocument, sentences
from ..data.taken_tokenizer import TakenTokenizer
from ..data.windows import Windows, choose
from ..step.gradient import SHAPES, Ragged
from .run import OwnText, Settings, whole_paths

FEWEST_TOKENS = 6  # of the second half of a sentence, for it to be worth ending
SHORTEST = 16  # characters of a sentence that is told apart
WORD = 4  # letters of a word that a question may name
SHARE = 0.5  # of what can be told apart, in a pass
ANSWER = 8  # tokens of an answer that are learned
STEPS = 240  # of a cluster, until its text is known by heart
PASSES = (4, 28)  # at least, and at most
QUICK = 0.4  # of them, for the gist of it
IN_A_PASS = 6  # tokens for a token of the text
ASKED = (
    "Question: What about the {words} of {title}?\nAnswer:",
    "Question: What is said of {title} and {words}?\nAnswer:",
    "Question: {title}: {words}?\nAnswer:",
)
BEGUN = ("{title}: {words}", "About {title}, {words}", "Question: {title}: {words}?\nAnswer:")
_END = re.compile(r"[.!?][\"')\]]*\s*$|\n")


def title_of(document: OwnDocument) -> str:
    """A heading that the text begins with, else the document's name without folder and ending."""
    first = document.text.lstrip().partition("\n")[0]
    if first.startswith("#"):
        return first.strip("# ")
    name = re.sub(r"\.\w+$", "", document.name.rpartition("/")[2])
    return re.sub(r"[-_\s]+", " ", name).strip()


def num_passes(tokens: int, settings: Settings) -> int:
    """Over a cluster of level 1 with so many tokens of text."""
    if settings.passes is not None:
        return settings.passes
    steps = tokens * IN_A_PASS / settings.step_tokens
    passes = min(max(round(STEPS / steps), PASSES[0]), PASSES[1])
    return math.ceil(QUICK * passes) if settings.quick else passes


def told_apart(title: str, text: str, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Of each sentence of ``text`` what leads to it or into it, and what follows."""
    for start, end in sentences(text):
        sentence = text[start:end].strip()
        if len(sentence) < SHORTEST:
            continue
        yield f"{title}:", f" {sentence}"
        words = [w for w in re.findall(r"\w+", sentence) if len(w) >= WORD and w not in title]
        for asked in ASKED if words else ():
            places = rng.choice(len(words), min(len(words), int(rng.integers(1, 4))), replace=False)
            named = " ".join(words[i] for i in sorted(places))
            yield asked.format(title=title, words=named), f" {sentence}"
        words = sentence.split()
        for begun in BEGUN if len(words) > 1 else ():
            at = int(rng.integers(max(1, len(words) // 3), len(words)))
            said = " ".join(words[max(0, at - int(rng.integers(3, 7))) : at])
            yield begun.format(title=title, words=said), f" {' '.join(words[at:])}"


@dataclass(frozen=True)
class Padded:
    """Windows of several lengths; those that are taken are padded on the right to the longest of
    them, (rows, a multiple of SHAPES and one more)."""

    windows: Windows

    @classmethod
    def of(cls, rows: list[np.ndarray]) -> "Padded":
        return cls(Windows(np.concatenate(rows), np.cumsum([0, *map(len, rows)])))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.windows.offsets)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.windows), _padded(self.lengths)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        chosen = [self.windows[row] for row in rows]
        width = _padded(np.array([len(own) for own in chosen]))
        tokens = np.zeros((len(rows), width), self.windows.tokens.dtype)
        for target, own in zip(tokens, chosen, strict=True):
            target[: len(own)] = own
        return tokens


def _padded(lengths: np.ndarray) -> int:
    return -(-(int(lengths.max()) - 1) // SHAPES) * SHAPES + 1


class Rows(NamedTuple):
    """``given``: how many tokens of each are given, and ``lengths``: how many there are; ``paths``:
    in the model, (n, levels). The first ``windows`` of them are those of the text; ``apart``: the
    numbers of what each pass has beside them."""

    tokens: Padded
    given: np.ndarray
    lengths: np.ndarray
    paths: np.ndarray
    windows: int
    apart: list[np.ndarray]

    @classmethod
    def of(
        cls,
        text: OwnText,
        own: np.ndarray,
        paths: np.ndarray,
        settings: Settings,
        tokenizer: TakenTokenizer,
        key: int,
    ) -> "Rows":
        """The windows numbered ``own`` and what is told apart of them; ``paths``: of all windows,
        in the tree of these documents; ``key`` and the seed give what is drawn."""
        windows, begin = choose(text.windows, own), text.windows.begin
        rows, places = [windows[i] for i in range(len(windows))], list(own)
        given, apart = [1] * len(rows), list[np.ndarray]()
        titles = {n: title_of(text.documents[n]) for n in np.unique(text.owner[own])}
        said = [
            (place, titles[text.owner[place]], words)
            for place, words in zip(own, windows.texts(tokenizer), strict=True)
            if not text.added[place]
        ]
        for number in range(num_passes(len(windows.tokens), settings)):
            rng, first = np.random.default_rng([settings.seed, key, number]), len(rows)
            told = [
                (place, before, after)
                for place, title, words in said
                for before, after in told_apart(title, words, rng)
            ]
            for chosen in rng.permutation(len(told))[: round(SHARE * len(told))]:
                place, before, after = told[chosen]
                ids = [*begin, *tokenizer.encode(before + after)][: settings.context]
                given.append(len(begin) + len(tokenizer.encode(before)))
                rows.append(np.array(ids[: given[-1] + ANSWER], windows.tokens.dtype))
                places.append(place)
            apart.append(np.arange(first, len(rows)))
        tokens, paths = Padded.of(rows), whole_paths(settings, paths[places])
        return cls(tokens, np.array(given), tokens.lengths, paths, len(windows), apart)

    def ragged(self, at_once: int) -> Ragged:
        return Ragged(self.given, self.lengths, at_once)


class Passes:
    """The steps of the passes over ``rows``; ``key`` and the seed give the order. ``total``: tokens
    of all."""

    def __init__(self, rows: Rows, settings: Settings, key: int):
        self.lengths, self._orders = rows.lengths, list[np.ndarray]()
        for number, apart in enumerate(rows.apart):
            random = np.random.default_rng([settings.seed, key, number, 1])
            self._orders.append(random.permutation([*range(rows.windows), *apart]))
        tokens = [int(self.lengths[order].sum()) for order in self._orders]
        # A step as long as the longest row at least is never empty.
        self.a_pass = max(1, min(tokens) // max(settings.step_tokens, int(rows.lengths.max())))
        self.num_steps, self.total = self.a_pass * len(tokens), sum(tokens)

    def rows(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step, the longest first; one at least."""
        number, own = divmod(step, self.a_pass)
        order = self._orders[number]
        ends = np.cumsum(self.lengths[order])
        chosen = order[(ends - self.lengths[order]) * self.a_pass // ends[-1] == own]
        return chosen[np.argsort(-self.lengths[chosen], kind="stable")]


class Sentences:
    """Which sentences of some rows a model can end: given all before it, each token of a sentence's
    second half is its likeliest next one.

    A token that ends in a full stop, a question or exclamation mark, or holds a new line, ends a
    sentence.
    """

    def __init__(self, rows: Rows, tokenizer: TakenTokenizer):
        text = [rows.tokens.windows[number] for number in range(rows.windows)]
        present = np.unique(np.concatenate(text))
        ending = [int(t) for t in present if _END.search(tokenizer.decode([int(t)]))]
        self.halves = list[tuple[int, int, int]]()  # row, and from which to before which target
        for number, row in enumerate(text):
            ends = np.flatnonzero(np.isin(row, ending)) + 1
            for start, end in zip([1, *ends], [*ends, len(row)], strict=True):
                if end - start >= 2 * FEWEST_TOKENS:
                    self.halves.append((number, (start + end) // 2 - 1, int(end) - 1))

    def known(self, likeliest: np.ndarray) -> int:
        """How many, if ``likeliest`` (rows, longest) says which targets were the likeliest."""
        return sum(bool(likeliest[row, start:end].all()) for row, start, end in self.halves)
