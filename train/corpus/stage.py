"""The corpus stage: documents in, a clean, shuffled sample and the facts among them out.

The input may be of any size, and so may the sample (:mod:`train.corpus.sample`).
"""

import json
import random
import shutil
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_hmem.documents.files import Document, Faults
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file, write_atomic

from ..ranks import ALONE, Ranks
from ..recipe.recipe import Recipe
from .facts import Fact, make_facts
from .readers import corpus_files, read_documents
from .sample import Sample, hashes, is_held_out, read_shards


def _line(record: Any) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with atomic_file(path) as file:
        file.writelines(lines)


def run_corpus(
    recipe: Recipe,
    folder: Path,
    ranks: Ranks = ALONE,
    corpus: Path | None = None,
    table: Path | None = None,
) -> None:
    """Writes ``corpus/``: train.jsonl, held_out.jsonl, facts.jsonl and report.json.

    ``corpus`` is the folder of documents (:mod:`.readers`), ``table`` the file that facts are
    taken from.
    """
    section, out, faults = recipe.corpus, folder / "corpus", Faults()
    shards = list[Path]()
    if section.documents != 0:
        shards = read_shards(corpus_files(corpus), section, out / "shards", ranks)
    if not ranks.first:
        return
    sample = Sample(shards, section, faults)
    faults.print()
    if section.documents != 0 and not len(sample.train):
        counts = ", ".join(f"{count} × {reason}" for reason, count in faults.counts.items())
        raise UserError("no document is left", counts, "correct the files or the sample")
    facts, of_facts, held_out = _make_facts(recipe, corpus, table, sample)
    lines = [_line(document) for document in of_facts]
    plain, count = sum("times" not in document for document in of_facts), len(sample.train)
    order = array("q", range(count + len(lines)))
    random.Random(recipe.seed).shuffle(order)
    documents = tqdm(order, desc="writing", unit=" documents", delay=2)
    _write_lines(
        out / "train.jsonl",
        (sample.line(sample.train[i]) if i < count else lines[i - count] for i in documents),
    )
    held_out_lines = [*map(sample.line, sample.held_out), *map(_line, held_out)]
    _write_lines(out / "held_out.jsonl", held_out_lines)
    _write_lines(out / "facts.jsonl", (_line(fact.to_dict()) for fact in facts))
    characters = int(sample.train["characters"].sum()) + sum(len(d["text"]) for d in of_facts)
    report = {
        "train_documents": count + plain,
        "fact_documents": len(of_facts) - plain,
        "held_out_documents": len(held_out_lines),
        "facts": sum(fact.times > 0 for fact in facts),
        "train_characters": characters,
        "passed_over": dict(faults.counts),
        "passed_over_first": faults.named,
    }
    write_atomic(out / "report.json", json.dumps(report, indent=2) + "\n")
    shutil.rmtree(out / "shards", ignore_errors=True)
    print(
        f"corpus: {count + plain} documents and {len(of_facts) - plain} that state facts to train "
        f"on, {len(held_out_lines)} held out, {sum(faults.counts.values())} passed over, in {out}"
    )


def _make_facts(
    recipe: Recipe, corpus: Path | None, table: Path | None, sample: Sample
) -> tuple[list[Fact], list[dict[str, Any]], list[dict[str, Any]]]:
    """The facts, their documents to train on, and those held out."""
    facts, train, held_out = list[Fact](), list[dict[str, Any]](), list[dict[str, Any]]()
    for kind in recipe.corpus.facts:
        documents, stated = make_facts(kind, recipe.seed, table, _articles(corpus, sample))
        facts += stated
        for document in documents:
            # A fact is stated exactly as often as its document: only plain ones are held out.
            plain = "times" not in document
            held = plain and is_held_out(document["id"], recipe.corpus.held_out)
            (held_out if held else train).append(document)
    return facts, train, held_out


def _articles(folder: Path | None, sample: Sample) -> Iterator[Document]:
    """The documents of ``folder`` that are not sampled: people are taken from these alone, or their
    facts would be stated once more. What is wrong was named when the sample was drawn."""
    sampled = {int(first) for part in (sample.train, sample.held_out) for first in part["first"]}
    for document in read_documents(corpus_files(folder), Faults()):
        if hashes(document[0])[0] not in sampled:
            yield document
