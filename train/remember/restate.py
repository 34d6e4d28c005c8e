"""Restatements of documents as questions and answers, written by the anchor: more text to train on.

A passage is some sentences of a document, about a window, and never of those that are held out. It
is put to the anchor alone, in its chat template or, where the tokenizer has none, after two
examples. What is no question with an answer, is cut off, or is copied is dropped and counted.

A batch has passages of one document, and its seed follows from that document: what is written of it
does not depend on what else is in the folder, so that it can be forgotten. The price: documents of
one passage make batches of ``count`` rows. ``restated.jsonl`` in the run's folder has a line for
each batch, so that a stopped run goes on with the next.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import xxhash
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_hmem.errors import UserError
from mlx_hmem.folders import add_lines, whole_lines
from mlx_hmem.generation.batch import batch_generate
from mlx_hmem.generation.template import chat_ids
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.tokenizer import read_tokenizer
from mlx_hmem.reading import sealed, strict_json, unsealed

from ..corpus.own import OwnDocument, sentences
from ..cost.plan import time_text
from .export import Base
from .run import context_of, write_lines

JOURNAL = "restated.jsonl"
MOST_TOKENS = 96  # of a restatement, and at most a quarter of the anchor's context
FEWEST = 32  # tokens of a passage that there must be room for
SLACK = 8  # tokens that a prompt may have more than its parts
ROWS = 32  # of a batch
TEMP, TOP_P = 0.7, 0.9  # some variety, for there may be several of a passage
UNLIKE, CUT_OFF, COPIED = "without question and answer", "cut off", "copied"

ASKED = """Read this text:

{}

Write one question that the text answers, and its answer in a full sentence. Both must be understood
without the text. Write nothing but two lines of this form:
Question: ...
Answer: ..."""
EXAMPLES = """Text: The old mill was built by Jane Reed in 1783.
Question: Who built the old mill?
Answer: It was built by Jane Reed.

Text: Herons nest in trees. They eat fish.
Question: What do herons eat?
Answer: Herons eat fish.

"""
_PAIR = re.compile(
    r"^[ *#]*question[ *]*:[ *]*(?P<question>[^\n]*?)[ *]*\n"
    r"[\s*#]*answer[ *]*:[ *]*(?P<answer>.*?)[\s*]*?"
    r"(?P<end>\n\s*\n|^[ *#]*(?:text|question|answer)[ *]*:|\Z)",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)


def prompt_of(tokenizer: TokenizerWrapper, passage: str) -> list[int]:
    """The ids of what the anchor is given."""
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(f"{EXAMPLES}Text: {passage}\nQuestion:"))
    return chat_ids(tokenizer, None, [], ASKED.format(passage), enable_thinking=False)


def passages_of(text: str, tokenizer: TokenizerWrapper, room: int) -> Iterator[str]:
    """The text in parts of whole sentences, of about equal length and at most ``room`` tokens; a
    longer sentence is cut."""
    spans = sentences(text)
    pieces = [each for start, end in spans for each in _pieces(text[start:end], tokenizer, room)]
    total = sum(size for _, size in pieces)
    equal = total / max(1, -(-total // room))
    now, used = "", 0
    for piece, size in pieces:
        if now.strip() and (used >= equal or used + size > room):
            yield now.strip()
            now, used = "", 0
        now, used = now + piece, used + size
    if now.strip():
        yield now.strip()


def _pieces(text: str, tokenizer: TokenizerWrapper, room: int) -> Iterator[tuple[str, int]]:
    """Parts of at most ``room`` tokens, halves of halves between words, and their tokens."""
    size = len(tokenizer.encode(text, add_special_tokens=False))
    if size <= room or len(text) < 2:
        yield text, size
        return
    middle = text.rfind(" ", 1, len(text) // 2) + 1 or len(text) // 2
    for half in (text[:middle], text[middle:]):
        yield from _pieces(half, tokenizer, room)


def judge(said: str, ended: bool, passage: str, known: Collection[str]) -> tuple[str, str]:
    """The restatement in what was said, as text to train on, and what is wrong with it, "" if
    nothing. ``known``: those that the document has."""
    found = _PAIR.search(said.rpartition("</think>")[2])
    if not found:
        return "", UNLIKE if ended else CUT_OFF
    question, answer = found.group("question"), found.group("answer").strip()
    if not re.search(r"\w.*[?？؟]$", question) or not re.search(r"\w.*[^?？؟]$", answer, re.DOTALL):
        return "", UNLIKE
    text = f"Question: {question}\nAnswer: {answer}"
    if not ended and not found.group("end"):
        return text, CUT_OFF
    if _plain(question) in _plain(passage + EXAMPLES) or f"Answer: {answer}" in EXAMPLES:
        return text, COPIED
    return text, COPIED if text in known else ""


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


class PassageBatch(NamedTuple):
    """Passages of one document that make a batch."""

    sha256: str
    number: int
    passages: list[str]


class Reckoned(NamedTuple):
    """What restating will cost: passages, tokens to read, to write at most, and seconds."""

    passages: int
    read: int
    written: int
    seconds: float

    def said(self, count: int) -> str:
        return (
            f"{count} of each of {self.passages:,} passages, {self.read:,} tokens to read, at most "
            f"{self.written:,} to write: about {time_text(self.seconds / 3600)}"
        )


@dataclass(frozen=True)
class Writer:
    """An anchor without memory that writes ``count`` restatements of each passage. The prompt has
    ``room`` for so many tokens of it; ``most`` may be written."""

    model: MemoryModel
    room: int
    most: int
    count: int
    seed: int

    @classmethod
    def open(cls, base: Base, count: int, seed: int) -> "Writer":
        """The anchor of ``base``; UserError where its context is too short."""
        anchor, config = base.anchor
        model = MemoryModel(anchor, config, read_tokenizer(base.folder, config))
        room, most = context_of(config), MOST_TOKENS
        if model.context is not None:
            most = min(most, model.context // 4)
            front = len(prompt_of(model.tokenizer, ""))
            room = min(room, model.context - front - most - SLACK)
        if room < FEWEST:
            raise UserError(
                "the anchor's context is too short to restate a text",
                f"{model.context} tokens",
                "leave --restate out",
            )
        return cls(model, room, most, count, seed)

    def parts(self, documents: Sequence[OwnDocument]) -> Iterator[PassageBatch]:
        size = max(1, ROWS // self.count)
        for document in documents:
            passages = list(passages_of(document.text, self.model.tokenizer, self.room))
            for number, start in enumerate(range(0, len(passages), size)):
                yield PassageBatch(document.sha256, number, passages[start : start + size])

    def reckon(self, documents: Sequence[OwnDocument]) -> Reckoned:
        """Takes a few steps of the middle one of the batches to measure their time."""
        parts = list(self.parts(documents))
        passages = [passage for part in parts for passage in part.passages]
        if not passages:
            return Reckoned(0, 0, 0, 0.0)
        tokenizer = self.model.tokenizer
        read = sum(len(prompt_of(tokenizer, p)) for p in passages)
        middle = sorted(parts, key=lambda part: len("".join(part.passages)))[len(parts) // 2]
        _, short, long = (self._seconds(middle, n) for n in (1, 1, 9))  # the first compiles
        each = short + max(0.0, long - short) / 8 * self.most
        rows = self.count * len(passages)
        return Reckoned(len(passages), read * self.count, rows * self.most, each * len(parts))

    def _seconds(self, part: PassageBatch, tokens: int) -> float:
        start = time.perf_counter()
        self._generate(part, tokens)
        return time.perf_counter() - start

    def _generate(self, part: PassageBatch, tokens: int) -> Iterator[tuple[str, str, bool]]:
        """Of each row its passage, what is said of it, and whether that has come to an end."""
        given = [passage for passage in part.passages for _ in range(self.count)]
        ids = [prompt_of(self.model.tokenizer, passage) for passage in given]
        what = f"{self.seed} {part.sha256} {part.number}"
        mx.random.seed(xxhash.xxh3_64_intdigest(what.encode()))
        found = batch_generate(
            self.model,
            given,
            ids=ids,
            max_tokens=tokens,
            memory="none",
            sampler=make_sampler(temp=TEMP, top_p=TOP_P),
        )
        front = "" if self.model.tokenizer.has_chat_template else "Question:"
        said = (front + each.text for each in found)
        ended = (each.finish_reason == "stop" for each in found)
        return zip(given, said, ended, strict=True)

    def write(self, part: PassageBatch, known: Collection[str]) -> tuple[list[str], Counter[str]]:
        """The restatements of a batch, and how many were dropped by what was wrong."""
        texts, dropped = list[str](), Counter[str]()
        for passage, said, ended in self._generate(part, self.most):
            text, wrong = judge(said, ended, passage, {*known, *texts})
            if wrong:
                dropped[wrong] += 1
            else:
                texts.append(text)
        return texts, dropped


def _lines(run: Path) -> list[dict[str, Any]]:
    """Those of the journal; one that was being written when the run stopped does not count."""
    path = run / JOURNAL
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        lines = [unsealed(strict_json(line)) for line in whole]
        if any({"sha256", "part", "texts", "dropped"} - set(line) for line in lines):
            raise ValueError("a line without what belongs in it")
    except (TypeError, ValueError) as error:
        remedy = "restore the folder as the remembering left it"
        raise UserError(f"{path} is damaged", error, remedy) from None
    return lines


def restated(run: Path) -> dict[str, list[str]]:
    """The restatements of each document by its hash, those of a run that made any."""
    found: dict[str, list[str]] = {}
    for line in _lines(run):
        found.setdefault(line["sha256"], []).extend(line["texts"])
    return found


def restated_of(run: Path, target: Path, stays: Collection[str]) -> None:
    """Takes over to another run what was written of the documents that stay, by their hashes."""
    if (run / JOURNAL).exists():
        left = [line for line in _lines(run) if line["sha256"] in stays]
        write_lines(target / JOURNAL, left)


def restate(run: Path, writer: Writer, documents: Sequence[OwnDocument]) -> str:
    """Writes what the journal has not yet; in words what was kept."""
    lines, known = _lines(run), restated(run)
    done = {(line["sha256"], line["part"]) for line in lines}
    parts = list(writer.parts(documents))
    total = sum(len(part.passages) for part in parts)
    bar = tqdm(total=total, desc="restating", unit="passage", delay=2)
    with (run / JOURNAL).open("a+b") as file, bar:
        whole_lines(file)
        for part in parts:
            if (part.sha256, part.number) not in done:
                own = known.setdefault(part.sha256, [])
                texts, dropped = writer.write(part, own)
                own += texts
                line = {"sha256": part.sha256, "part": part.number, "texts": texts}
                lines.append(line | {"dropped": dict(dropped)})
                add_lines(file, [json.dumps(sealed(lines[-1]), ensure_ascii=False)])
            bar.update(len(part.passages))
    kept = sum(len(line["texts"]) for line in lines)
    dropped = sum((Counter(line["dropped"]) for line in lines), Counter[str]())
    notes = "".join(f", {n} {wrong}" for wrong, n in sorted(dropped.items()))
    return f"restatements: {kept} of {kept + dropped.total()} kept{notes}"
