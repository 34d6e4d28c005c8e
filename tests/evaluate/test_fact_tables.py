"""Tables of facts: counted as a plain search counts, scored by the paper's rule, kept at once."""

import csv
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_hmem.evaluate import recall
from mlx_hmem.evaluate.command import main
from mlx_hmem.evaluate.facts import Fact, FactRecall, is_right
from mlx_hmem.evaluate.paper import counting
from mlx_hmem.evaluate.paper.counting import NameCounter, count_names
from mlx_hmem.evaluate.paper.fact_runs import FactRun, count_buckets, decade
from mlx_hmem.evaluate.paper.fact_tables import atomic_numbers, read_fact_table
from tests.helpers.places import shared
from tests.helpers.programs import refused
from train.corpus.facts import make_facts

HEADER = "prompt,answers,key\n"


def counts_of(keys, text):
    counter = NameCounter(keys)
    counter.add(text)
    return [counter.counts[i] for i in range(len(keys))]


def write_corpus(folder: Path, *files: list[str]) -> Path:
    folder.mkdir()
    for number, texts in enumerate(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def test_the_elements_are_those_of_another_source():
    elements = json.loads(shared("data", "elements.json").read_text())
    others = {e["number"]: e for e in elements}
    facts, keys = atomic_numbers()
    assert [int(fact.answer) for fact in facts] == list(range(1, 119)) == sorted(others)
    for fact, names in zip(facts, keys, strict=True):
        other = others[int(fact.answer)]
        assert {other["name"].lower(), *map(str.lower, other["aliases"])} <= set(names)
        assert fact.prompt == f"The atomic number of {names[0]} is"


@pytest.mark.parametrize(
    ("names", "text", "count"),
    [
        (["iron"], "Iron, iron and IRON; irons, environ, iron_2.", 3),
        (["Lead"], "Lead and lead, LEAD.", 1),
        (["tin"], "Tin Tin tin-tin.", 4),
        (["caesium", "cesium"], "caesium (cesium), Cesium.", 3),
        (["new york"], "New York, new york, New york, NEW YORK; New Yorker.", 4),
        (["York", "New York"], "New York and York.", 2),
        (["C++"], "C++ and C+.", 1),
        (["(born"], "Ann (born 1950).", 1),
        (["Ørsted"], "Ørsted’s Ørsteds", 1),
        (["a"], "", 0),
    ],
)
def test_names_are_counted_as_words_of_their_own(names, text, count):
    assert counts_of([names], text) == [count]


def test_where_names_overlap_the_longest_counts_and_one_name_may_be_of_several():
    keys = [["New York"], ["York"], ["york", "New York"]]
    assert counts_of(keys, "New York is not York.") == [1, 1, 2]


def test_many_names_at_once_are_counted_as_each_by_a_plain_search(tmp_path):
    documents, facts = make_facts({"kind": "invented", "topics": 3, "entities_per_topic": 8,
                                   "frequencies": [1, 4]}, seed=2)  # fmt: skip
    texts = [d["text"] for d in documents]
    names = sorted({word for fact in facts for word in fact.statement.rstrip(".").split()})
    texts = texts[:120]
    text = "\n".join(texts)
    expected = []
    for name in names:
        any_case = re.IGNORECASE if name.islower() else 0
        expected.append(len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text, any_case)))
    keys = [[name] for name in names]
    corpus = write_corpus(tmp_path / "corpus", texts[:50], texts[50:])
    found = count_names(keys, corpus, tmp_path / "out", progress=False)
    assert found == expected
    assert sum(count > 0 for count in found) > 20


def test_finished_files_are_not_counted_again_and_changed_ones_are(tmp_path, monkeypatch):
    corpus, out = (
        write_corpus(tmp_path / "corpus", ["gold"], ["gold gold"], ["tin"]),
        tmp_path / "o",
    )
    keys, added = [["gold"], ["tin"]], []
    add = NameCounter.add

    def stopping(self, text):
        added.append(text)
        if text == stop:
            raise KeyboardInterrupt
        add(self, text)

    monkeypatch.setattr(NameCounter, "add", stopping)
    stop = "tin"
    with pytest.raises(KeyboardInterrupt):
        count_names(keys, corpus, out, progress=False)
    stop = ""
    assert count_names(keys, corpus, out, progress=False) == [3, 1]
    assert added == ["gold", "gold gold", "tin", "tin"]
    assert count_names(keys, corpus, out, progress=False) == [3, 1]
    assert len(added) == 4
    (corpus / "0.jsonl.gz").unlink()
    assert count_names(keys, corpus, out, progress=False) == [2, 1]


def test_plain_texts_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "PIECE", 64)
    (tmp_path / "a.txt").write_text("\n".join(["gold " * 9 + "é"] * 30))
    (tmp_path / "b.md").write_text("gold " * 500)  # one line
    found = count_names([["gold"]], tmp_path, tmp_path / "out", progress=False)
    assert found == [9 * 30 + 500]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a corpus without text"),
        ({"a.csv": b"gold"}, "a corpus without text"),
        ({"a.jsonl": b'{"text": " "}\n'}, "a corpus without text"),
        ({"a.jsonl": b'{"text": "gold"}\n{"t": 1}\n'}, "line 2 has no `text`"),
        ({"a.jsonl": b"gold\n"}, "line 1 is not valid JSON"),
        ({"a.txt": "Ørsted".encode("latin-1")}, "cannot be read as text"),
        ({"a.txt.gz": b"gold"}, "cannot be read as text"),
    ],
)
def test_a_wrong_corpus_is_a_user_error(tmp_path, content, message):
    for name, data in (content or {}).items():
        (tmp_path / name).write_bytes(data)
    refused(message, count_names, [["gold"]], tmp_path, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("answer", "continuation", "right"),
    [("26", " 27, not 26", True), ("26", " 126 260", False), ("26", "26", True), ("26", "", False),
     ("Oslo", " in Oslo", False)],
)  # fmt: skip
def test_by_the_papers_rule_one_integer_that_matches_is_enough(answer, continuation, right):
    assert is_right(Fact("It is", answer, (), 1, "k", "t"), continuation, "any") is right


def test_buckets_are_decades_of_counts_and_hold_each_fact_once():
    counts = [0, 0, 1, 9, 10, 99, 1000]
    facts = tuple(Fact(f"p{i}", "a", (), n, "k", "t") for i, n in enumerate(counts))
    right = (True, False, True, True, False, False, True)
    buckets = count_buckets(FactRecall("none", facts, ("",) * 7, right))
    assert [(decade(b), b.right, b.total) for b in buckets] == [
        ("0", 1, 2), ("1–9", 2, 2), ("10–99", 0, 2), ("1,000–9,999", 1, 1)
    ]  # fmt: skip
    assert buckets[0].standard_error == pytest.approx((0.5 * 0.5 / 2) ** 0.5)


def test_a_csv_is_read_with_its_aliases_and_quotes(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_bytes(
        "\ufeffkey,note,prompt,answers\r\n"
        'Oslo|Kristiania,x,"In Norway, the capital is",Oslo | Christiania\r\n'.encode()
    )
    facts, keys = read_fact_table(path)
    assert facts == [Fact("In Norway, the capital is", "Oslo", ("Christiania",), 0, "fact", "Oslo")]
    assert keys == [("Oslo", "Kristiania")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no column `prompt`: nothing"),
        (b"prompt,answers\n", "no column `key`: prompt, answers"),
        (HEADER.encode(), "no facts"),
        (HEADER.encode() + b"a,b,c\na, | ,c\n", "line 3 has an empty `answers`"),
        (HEADER.encode() + b"a,b,\n", "line 2 has an empty `key`"),
        (HEADER.encode() + b"a,b\n", "line 2 has not as many cells"),
        (HEADER.encode() + b"a,b,c,d\n", "line 2 has not as many cells"),
        (HEADER.encode() + b'a,"b,c\n', "no CSV"),
        (HEADER.encode() + "a,Ørsted,c\n".encode("latin-1"), "cannot be read as text"),
    ],
)
def test_a_wrong_csv_is_a_user_error_with_its_line(tmp_path, data, message):
    path = tmp_path / "facts.csv"
    path.write_bytes(data)
    refused(message, read_fact_table, path)


def test_kept_continuations_are_those_of_recall_and_are_not_made_again(model, tmp_path):
    facts, _ = atomic_numbers()
    run = FactRun(model, tmp_path, "m", "first", progress=False)
    some = facts[:20]
    first = run.recall(some, "fetched")
    assert first == recall(model, some, "fetched", progress=False)
    (path,) = tmp_path.glob("facts.fetched.*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]) + lines[8][:9])  # cut short within a row
    assert run.recall(some, "fetched") == first
    assert sorted(path.read_text().splitlines()[1:]) == sorted(x.strip() for x in lines[1:])
    path.write_text(lines[0] + "".join(
        json.dumps({"row": i, "text": fact.answer}) + "\n" for i, fact in enumerate(some)
    ))  # fmt: skip
    assert run.recall(some, "fetched").bucket().right == 20
    assert replace(run, model_name="other").recall(some, "fetched") == first


def test_the_command_prints_a_table_by_count_and_json_by_fact(
    model, model_folder, tmp_path, capsys
):
    corpus = write_corpus(tmp_path / "corpus", ["Gold is gold.", "Tin."])
    path = tmp_path / "f.csv"
    with path.open("w", newline="") as file:
        rows = [("The number of gold is", "79|80", "gold"), ("The number of zinc is", "30", "zinc")]
        csv.writer(file).writerows([("prompt", "answers", "key"), *rows])
    command = [str(model_folder), "--facts", str(path), "--corpus", str(corpus)]
    command += ["--out", str(tmp_path / "out"), "--memory", "none,fetched"]
    main([*command, "--json"])
    (found,) = json.loads(capsys.readouterr().out)["facts"]
    assert [fact["count"] for fact in found["facts"]] == [2, 0]
    assert found["facts"][0]["answers"] == ["79", "80"]
    expected = recall(model, read_fact_table(path).facts, "fetched", progress=False)
    texts = tuple(fact["continuations"]["fetched"] for fact in found["facts"])
    assert texts == expected.continuations
    assert [b["total"] for b in found["results"][1]["buckets"]] == [1, 1]
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["times", "in", "the", "corpus", "0", "1–9", "all"]
    assert [line.split()[0] for line in lines[3:]] == ["none", "fetched"]
    refused("unknown --route", main, [*command, "--route", "title"])
