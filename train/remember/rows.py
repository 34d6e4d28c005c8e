"""The windows of a cluster as rows of training: each by itself, as long as its text, in batches of
about as many tokens.

Text that is only ever read from its beginning is known in that order alone. So each sentence is a
row by itself too, behind its document's title, and the answer to a question of some of its words; a
pass sees every window once, and a share of these, in an order of its own that follows from the
seed. All passes have as many steps, so that the schedule of learning rates is known beforehand.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from ..corpus.own import OwnDocument, sentences
from ..data.taken_tokenizer import TakenTokenizer
from ..data.windows import choose
from ..step.gradient import SHAPES, Ragged
from .run import OwnText, Settings, whole_paths

FEWEST_TOKENS = 6  # of the second half of a sentence, for it to be worth ending
SHORTEST = 16  # characters of a sentence that is a row by itself
WORD = 4  # letters of a word that a question may name
SHARE = 0.08  # of the sentences' rows, in a pass
ASKED = (
    "What about the {words} of {title}?",
    "What is said of {title} and {words}?",
    "{title}: {words}?",
)
_END = re.compile(r"[.!?][\"')\]]*\s*$|\n")


def title_of(document: OwnDocument) -> str:
    """A heading that the text begins with, else the document's name without folder and ending."""
    first = document.text.lstrip().partition("\n")[0]
    if first.startswith("#"):
        return first.strip("# ")
    name = re.sub(r"\.\w+$", "", document.name.rpartition("/")[2])
    return re.sub(r"[-_\s]+", " ", name).strip()


def told_apart(title: str, text: str) -> Iterator[tuple[str, str]]:
    """Each sentence of ``text`` behind the title, and as the answer to questions: what is given,
    and what follows."""
    for start, end in sentences(text):
        sentence = text[start:end].strip()
        if len(sentence) < SHORTEST:
            continue
        yield f"{title}:", f" {sentence}"
        words = [w for w in re.findall(r"\w+", sentence) if len(w) >= WORD and w not in title]
        if not words:
            continue
        rng = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{title}\n{sentence}".encode()))
        for asked in ASKED:
            places = rng.choice(len(words), min(len(words), int(rng.integers(1, 4))), replace=False)
            named = " ".join(words[i] for i in sorted(places))
            yield f"Question: {asked.format(title=title, words=named)}\nAnswer:", f" {sentence}"


class Rows(NamedTuple):
    """``tokens``: padded on the right, (n, longest + 1); ``given``: how many of each are given, and
    ``lengths``: how many there are; ``paths``: in the model, (n, levels). The first ``windows`` of
    them are those of the text."""

    tokens: np.ndarray
    given: np.ndarray
    lengths: np.ndarray
    paths: np.ndarray
    windows: int

    @classmethod
    def of(
        cls,
        text: OwnText,
        own: np.ndarray,
        paths: np.ndarray,
        settings: Settings,
        tokenizer: TakenTokenizer,
    ) -> "Rows":
        """The windows numbered ``own`` and what is told apart of them; ``paths``: of all windows,
        in the tree of these documents."""
        windows, begin = choose(text.windows, own), text.windows.begin
        rows, places = [windows[i] for i in range(len(windows))], list(own)
        given = [1] * len(rows)
        for number, said in zip(own, windows.texts(tokenizer), strict=True):
            if not text.added[number]:
                title = title_of(text.documents[text.owner[number]])
                for before, after in told_apart(title, said):
                    ids = [*begin, *tokenizer.encode(before + after)][: settings.context]
                    rows.append(np.array(ids, windows.tokens.dtype))
                    given.append(len(begin) + len(tokenizer.encode(before)))
                    places.append(number)
        lengths = np.array([len(row) for row in rows])
        width = -(-(int(lengths.max()) - 1) // SHAPES) * SHAPES + 1
        tokens = np.full((len(rows), width), begin[0], windows.tokens.dtype)
        for target, row in zip(tokens, rows, strict=True):
            target[: len(row)] = row
        paths = whole_paths(settings, paths[places])
        return cls(tokens, np.array(given), lengths, paths, len(windows))

    def ragged(self, at_once: int) -> Ragged:
        return Ragged(self.given, self.lengths, at_once)


class Passes:
    """The steps of the passes over ``rows``; ``key`` and the seed give what is in each and the
    order. ``total``: tokens of all."""

    def __init__(self, rows: Rows, settings: Settings, key: int):
        self.lengths, self.windows = rows.lengths, rows.windows
        self._apart = round(SHARE * (len(rows.lengths) - rows.windows))
        self._key = (settings.seed, key)
        tokens = [self.tokens(number) for number in range(settings.passes)]
        # A step as long as the longest row at least is never empty.
        self.a_pass = max(1, min(tokens) // max(settings.step_tokens, int(rows.lengths.max())))
        self.num_steps, self.total = self.a_pass * settings.passes, sum(tokens)

    def tokens(self, number: int) -> int:
        """Of a pass."""
        return int(self.lengths[self._order(number)].sum())

    def rows(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step, the longest first; one at least."""
        number, own = divmod(step, self.a_pass)
        order = self._order(number)
        ends = np.cumsum(self.lengths[order])
        chosen = order[(ends - self.lengths[order]) * self.a_pass // ends[-1] == own]
        return chosen[np.argsort(-self.lengths[chosen], kind="stable")]

    def _order(self, number: int) -> np.ndarray:
        random = np.random.default_rng([*self._key, number])
        apart = random.permutation(np.arange(self.windows, len(self.lengths)))[: self._apart]
        return random.permutation(np.concatenate([np.arange(self.windows), apart]))


class Sentences:
    """Which sentences of some rows a model can end: given all before it, each token of a sentence's
    second half is its likeliest next one.

    A token that ends in a full stop, a question or exclamation mark, or holds a new line, ends a
    sentence.
    """

    def __init__(self, rows: Rows, tokenizer: TakenTokenizer):
        text = rows.tokens[: rows.windows]
        present = np.unique(text)
        ending = [int(t) for t in present if _END.search(tokenizer.decode([int(t)]))]
        self.halves = list[tuple[int, int, int]]()  # row, and from which to before which target
        for number, (row, length) in enumerate(zip(text, rows.lengths, strict=False)):
            ends = np.flatnonzero(np.isin(row[:length], ending)) + 1
            for start, end in zip([1, *ends], [*ends, length], strict=True):
                if end - start >= 2 * FEWEST_TOKENS:
                    self.halves.append((number, (start + end) // 2 - 1, int(end) - 1))

    def known(self, likeliest: np.ndarray) -> int:
        """How many, if ``likeliest`` (rows, longest) says which targets were the likeliest."""
        return sum(bool(likeliest[row, start:end].all()) for row, start, end in self.halves)
