import gzip
import json
import random
from pathlib import Path

import pytest

from mlx_hmem.documents.files import Faults
from mlx_hmem.evaluate.texts import records
from tests.helpers.programs import refused
from tests.helpers.samples import sample_documents
from train.corpus.cleaning import clean, cut
from train.corpus.readers import corpus_files
from train.corpus.stage import run_corpus
from train.recipe.recipe import CorpusSection, Recipe


def document(number: int) -> dict[str, str]:
    return {"id": str(number), "title": f"T{number}", "text": f"Text {number} is here. It ends."}


def write(path: Path, documents: list[dict[str, str]]) -> None:
    data = "".join(json.dumps(d) + "\n" for d in documents).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_broken_lines_are_named_counted_and_passed_over(tmp_path):
    lines = [
        json.dumps(document(1)).encode(), b'{"id": "2", "text": ',
        b'{"id": "3", "title": "no text"}', b'{"title": "no id", "text": "A text."}',
        b'{"id": "4", "text": 5}', b'{"id": "5", "text": "\xff\xfe"}',
        rb'{"id": "6", "text": "half a pair \ud800"}', b"[1, 2]", b"[" * 100_000,
        b'{"id": "7", "text": " ( ; ) "}', b"", json.dumps(document(1)).encode(),
        json.dumps(document(8)).encode(),
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    faults = Faults()
    kept, _ = sample_documents(corpus_files(tmp_path), CorpusSection(held_out=0), faults)
    assert sorted(d["id"] for d in kept) == ["1", "8"]
    assert sum(faults.counts.values()) == 10
    for where, reason in [
        (2, "not JSON"), (3, "no `text`"), (4, "no `id`"), (5, "`text` is not a text"),
        (6, "not UTF-8"), (7, "not UTF-8"), (8, "not a JSON object"), (9, "not JSON"),
    ]:  # fmt: skip
        assert f"a.jsonl:{where}: {reason}" in faults.named
    assert faults.counts["no text"] == faults.counts["the id occurred before"] == 1


def test_a_truncated_gzip_file_gives_what_comes_before_the_break(tmp_path):
    draw = random.Random(0)
    documents = [
        {"id": str(i), "text": "".join(draw.choices("abcdef ", k=200))} for i in range(500)
    ]
    data = gzip.compress("".join(json.dumps(d) + "\n" for d in documents).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    write(tmp_path / "b.jsonl.gz", [document(1000)])
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip at all")
    faults = Faults()
    kept, _ = sample_documents(corpus_files(tmp_path), CorpusSection(held_out=0), faults)
    assert 100 < len(kept) < 400
    assert "1000" in [d["id"] for d in kept]
    assert sum(faults.counts.values()) == 2
    assert faults.named[0].startswith("a.jsonl.gz:")
    assert "broken gzip" in faults.named[0]
    assert faults.named[1].startswith("c.jsonl.gz:1:")


def test_an_overlong_line_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_hmem.documents.lines.MAX_LINE", 1000)
    write(tmp_path / "a.jsonl", [document(1), {"id": "2", "text": "x" * 5000}, document(3)])
    faults = Faults()
    kept, _ = sample_documents(corpus_files(tmp_path), CorpusSection(held_out=0), faults)
    assert sorted(d["id"] for d in kept) == ["1", "3"]
    assert faults.named == ["a.jsonl:2: a line over 1000 bytes"]


def test_the_sample_follows_from_the_ids_alone(tmp_path):
    documents = [document(i) for i in range(400)]
    section = CorpusSection(documents=100, held_out=0.2)
    samples = []
    for order in (documents, documents[::-1]):
        folder = tmp_path / f"{order[0]['id']}"
        folder.mkdir()
        write(folder / "a.jsonl", order[:150])
        write(folder / "b.jsonl.gz", order[150:])
        samples.append(sample_documents(corpus_files(folder), section, Faults()))
    assert samples[0] == samples[1]
    train, held_out = samples[0]
    assert len(train) + len(held_out) == 100
    assert 5 <= len(held_out) <= 40
    # A larger sample holds the smaller one, and nothing moves between the two parts.
    more = CorpusSection(documents=300, held_out=0.2)
    larger = sample_documents(corpus_files(tmp_path / "0"), more, Faults())
    for small, large in zip(samples[0], larger, strict=True):
        assert {d["id"] for d in small} <= {d["id"] for d in large}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Aristotle (; Greek: Ἀ) was", "Aristotle (Greek: Ἀ) was"),
        ("Almond () is ( ; ) here ( ) .", "Almond is here."),
        ("It was so.<ref name=a/> Next<ref>x</ref> one.", "It was so. Next one."),
        ("A first one. Where formula_12 holds, it is. A last one.", "A first one. A last one."),
        ("One.\n #if: \n }}{{\n | width = 200\nTwo.", "One.\nTwo."),
        ("One.\n[[File:a.jpg|250px|thumb]]\nTwo &amp; three.<br>", "One.\nTwo & three."),
        ("__NOTOC__\nThe C-Star\xa0class\n\n\nflew.", "The C-Star class\nflew."),
        ("A {{Citation needed|date=2010}} b[ [update]].", "A b."),
        ("Text.\nReferences.\nExternal links.", "Text."),
        ("a < b and c > d, 3 ... [and] 4 .5 !", "a < b and c > d, 3 ... [and] 4 .5 !"),
    ],
)
def test_extractor_marks_are_cleaned_away(text, wanted):
    assert clean(text) == wanted


def test_a_document_is_cut_at_a_sentence_end():
    text = 'He ran. "It is 3.5 km." Then he slept and slept'
    assert cut(text, 100) == text
    assert cut(text, 30) == 'He ran. "It is 3.5 km."'
    assert cut(text, 20) == "He ran."
    assert cut("no end at all here", 10) == "no end at"
    assert cut("x" * 50, 10) == "x" * 10


def test_the_stage_writes_plain_and_fact_documents_and_keeps_facts_exact(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write(source / "a.jsonl.gz", [document(i) for i in range(200)])
    facts = ({"kind": "invented", "frequencies": [2, 4]},)
    recipe = Recipe(name="t", corpus=CorpusSection(documents=150, held_out=0.2, facts=facts))
    run_corpus(recipe, tmp_path / "run", corpus=source)
    out = tmp_path / "run" / "corpus"
    texts = list(records(out / "train.jsonl"))
    held_out = [json.loads(line) for line in (out / "held_out.jsonl").open()]
    stated = [json.loads(line) for line in (out / "facts.jsonl").open()]
    report = json.loads((out / "report.json").read_text())
    assert len(stated) == report["facts"] > 0
    assert len(texts) == report["train_documents"] + report["fact_documents"]
    assert len(held_out) == report["held_out_documents"] > 0
    assert not any(d["id"].startswith("fact-") for d in held_out)
    for fact in stated[:10]:
        statement = f"{fact['prompt']} {fact['answer']}."
        assert sum(text.count(statement) for text in texts) == fact["times"]
    first = (out / "train.jsonl").read_bytes()
    run_corpus(recipe, tmp_path / "again", corpus=source)
    assert (tmp_path / "again" / "corpus" / "train.jsonl").read_bytes() == first


@pytest.mark.parametrize("documents", [None, 90])
def test_shards_do_not_change_the_corpus(tmp_path, monkeypatch, documents):
    # others would not know what follows
    monkeypatch.setattr("train.corpus.shards.num_cores", lambda: 1)
    source = tmp_path / "in"
    source.mkdir()
    for number in range(20):
        repeated = document(7) if number in (3, 11) else document(1000 + number)
        write(source / f"{number}.jsonl", [document(20 * number + i) for i in range(20)])
        with (source / f"{number}.jsonl").open("a") as file:
            file.write(json.dumps(repeated) + "\nbroken\n")
    section = CorpusSection(documents=documents, held_out=0.2)
    recipe = Recipe(name="t", corpus=section)
    for size in (1 << 20, 2000):
        monkeypatch.setattr("train.corpus.sample.SHARD_BYTES", size)
        run_corpus(recipe, tmp_path / str(size), corpus=source)
    one, many = (tmp_path / str(size) / "corpus" for size in (1 << 20, 2000))
    for name in ("train.jsonl", "held_out.jsonl", "report.json"):
        assert (one / name).read_bytes() == (many / name).read_bytes()
    report = json.loads((one / "report.json").read_text())
    assert report["train_documents"] + report["held_out_documents"] == (documents or 418)
    if documents is None:
        assert report["passed_over"] == {"not JSON": 20, "the id occurred before": 2}
    assert not (many / "shards").exists()


def test_people_come_from_articles_that_are_not_sampled_and_ids_stay_apart(tmp_path):
    people = [
        {"id": str(i), "title": f"Jo N{i}", "text": f"Jo N{i} (1 May {1900 + i}) was a poet. Fine."}
        for i in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(person) for person in people))
    facts = ({"kind": "people", "people": 30, "frequencies": [2]}, {"kind": "invented"})
    section = CorpusSection(documents=30, held_out=0.2, facts=facts)
    run_corpus(Recipe(name="t", corpus=section), tmp_path, corpus=tmp_path)
    out = tmp_path / "corpus"
    documents = [
        json.loads(line)
        for name in ("train.jsonl", "held_out.jsonl")
        for line in (out / name).open()
    ]
    assert len({d["id"] for d in documents}) == len(documents)
    articles = {d["title"] for d in documents if d["id"].isdigit()}
    stated = {d["title"] for d in documents if d["id"].startswith("fact-people")}
    assert len(articles) == len(stated) == 30
    assert not any(f"The poet {title} was born in" in stated for title in articles)


def test_no_corpus_no_files_and_nothing_left_are_one_line(tmp_path):
    recipe = Recipe(name="t")
    refused("--corpus", run_corpus, recipe, tmp_path)
    refused(r"no \*.jsonl", run_corpus, recipe, tmp_path, corpus=tmp_path)
    (tmp_path / "a.jsonl").write_text("nothing\n")
    left = r"no document is left: 1 × [^{]*; correct"
    refused(left, run_corpus, recipe, tmp_path, corpus=tmp_path)
    assert not (tmp_path / "corpus" / "train.jsonl").exists()
