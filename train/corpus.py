"""The corpus: documents in, a clean, shuffled sample out.

The sample is held in memory, cut to ``max_characters`` a document; the input streams past and may
be of any size. Which documents are taken, and which are held out, follows from the md5 of their
ids alone, so it does not change with the order of the files.
"""

import hashlib
import heapq
import html
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from train.facts import Fact, make_facts
from train.readers import CorpusFile, Faults, corpus_files, read_documents
from train.recipe import CorpusSection, Recipe

_MARKS = [
    (re.compile(r"<!--.*?(-->|$)", re.DOTALL), ""),
    (re.compile(r"<ref[^<>]*/>|<ref[^<>]*>[^<>]*</ref>"), ""),
    (re.compile(r"</?[a-zA-Z][^<>\n]{0,200}>"), ""),
    (re.compile(r"__[A-Z]+__"), ""),
    (re.compile(r"\{\{[^{}]*\}\}"), ""),
    (re.compile(r"\[ ?\[ ?update\]\]"), ""),
    (re.compile(r"^.*(#if:|\{\{|\}\}|\[\[|\]\]|\{\||\|\}).*$", re.MULTILINE), ""),
    (re.compile(r"^\s*[|!].*$", re.MULTILINE), ""),
    # A sentence around a lost formula says nothing any more.
    (re.compile(r"(?<![^.!?\n])[^.!?\n]*formula_\d[^.!?\n]*[.!?]?"), ""),
    (re.compile(r"\(\s*(?:[;,:]\s*)+"), "("),
    (re.compile(r" ?\(\s*\)"), ""),
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r" +([,;])|(?<=\w) +(\.)(?=\s|$)"), r"\1\2"),
    (re.compile(r"\s*\n\s*"), "\n"),
    # Headings of lists that the extractor left out.
    (re.compile(r"\n(References|External links|See also|Notes|Further reading)\.(?=\n|$)"), ""),
]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\ufeff]")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]?(?=\s)")


def clean(text: str) -> str:
    """Takes out what an encyclopaedia extractor leaves behind: marks, templates, empty brackets."""
    text = _CONTROL.sub("", html.unescape(text).replace("\r\n", "\n").replace("\r", "\n"))
    for pattern, replacement in _MARKS:
        text = pattern.sub(replacement, text)
    return text.strip()


def cut(text: str, max_characters: int) -> str:
    """``text``, or its start up to the last sentence (else word) end within ``max_characters``."""
    if len(text) <= max_characters:
        return text
    ends = [m.end() for m in _SENTENCE_END.finditer(text[: max_characters + 1])]
    if ends:
        return text[: ends[-1]]
    return text[: max_characters + 1].rsplit(None, 1)[0][:max_characters]


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this id is held out, by the second half of the id's md5."""
    return int.from_bytes(hashlib.md5(name.encode()).digest()[8:], "big") / 2**64 < fraction


def sample_documents(
    files: Iterable[CorpusFile], section: CorpusSection, faults: Faults
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Cleaned and cut documents (id, title, text): those to train on and those held out.

    Takes the ``section.documents`` documents with the smallest md5 of their id (all where null);
    ``section.held_out`` of them, by another part of the same hash, are held out.
    """
    most = sys.maxsize if section.documents is None else section.documents
    heap: list[tuple[int, str, str, str]] = []  # (-hash, id, title, raw text), the worst on top
    taken: set[str] = set()
    for name, title, text in read_documents(files, faults):
        rank = int.from_bytes(hashlib.md5(name.encode()).digest()[:8], "big")
        if len(heap) == most and -rank <= heap[0][0]:
            continue
        if name in taken:
            faults.add(f"id {name}", "the id occurred before")
            continue
        # What cleaning takes out is a small part: the start of a long text is enough.
        text = cut(clean(text[: 4 * section.max_characters + 1000]), section.max_characters)
        if not text:
            faults.add(f"id {name}", "no text")
            continue
        taken.add(name)
        heapq.heappush(heap, (-rank, name, title, text))
        if len(heap) > most:
            taken.remove(heapq.heappop(heap)[1])
    train, held_out = list[dict[str, str]](), list[dict[str, str]]()
    for _, name, title, text in sorted(heap, reverse=True):
        document = {"id": name, "title": title, "text": text}
        (held_out if is_held_out(name, section.held_out) else train).append(document)
    return train, held_out


def _articles(folder: Path | None) -> Iterator[tuple[str, str, str]]:
    """All documents of ``folder``; their faults were named when the sample was drawn."""
    yield from read_documents(corpus_files(folder), Faults())


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(path, "".join(lines))


def read_texts(path: Path) -> Iterator[str]:
    """The ``text`` of each document of a file that :func:`write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def run_corpus(
    recipe: Recipe, folder: Path, corpus: Path | None = None, table: Path | None = None
) -> None:
    """Writes ``corpus/``: train.jsonl, held_out.jsonl, facts.jsonl and report.json.

    ``corpus`` is the folder of documents (:mod:`train.readers`), ``table`` the file that facts are
    taken from.
    """
    section, out, faults = recipe.corpus, folder / "corpus", Faults()
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    if section.documents != 0:
        train, held_out = sample_documents(corpus_files(corpus), section, faults)
        faults.print()
        if not train:
            raise UserError(
                "no document is left", dict(faults.counts), "correct the files or the sample"
            )
    num_plain, facts = len(train), list[Fact]()
    # Facts about people come from articles that are not sampled: these would state them once more.
    sampled = {document["id"] for document in (*train, *held_out)}
    for kind in section.facts:
        articles = (a for a in _articles(corpus) if a[0] not in sampled)
        documents, stated = make_facts(kind, recipe.seed, table, articles)
        facts += stated
        for document in documents:
            # A fact is stated exactly as often as its document: only plain ones are held out.
            plain = document["id"].startswith("plain-")
            out_of_training = plain and is_held_out(document["id"], section.held_out)
            (held_out if out_of_training else train).append(document)
            num_plain += plain and not out_of_training
    random.Random(recipe.seed).shuffle(train)
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "held_out.jsonl", held_out)
    write_jsonl(out / "facts.jsonl", (fact.to_dict() for fact in facts))
    report = {
        "train_documents": num_plain,
        "fact_documents": len(train) - num_plain,
        "held_out_documents": len(held_out),
        "facts": sum(fact.times > 0 for fact in facts),
        "train_characters": sum(len(d["text"]) for d in train),
        "passed_over": dict(faults.counts),
        "passed_over_first": faults.named,
    }
    write_atomic(out / "report.json", json.dumps(report, indent=2) + "\n")
    print(
        f"corpus: {num_plain} documents and {len(train) - num_plain} that state facts to train on, "
        f"{len(held_out)} held out, {sum(faults.counts.values())} passed over, in {out}"
    )
