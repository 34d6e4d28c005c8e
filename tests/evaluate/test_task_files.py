"""Files of tasks and texts: which are read, and what is refused, by file and line."""

import json
import math
from pathlib import Path

import pytest

from mlx_hmem.evaluate import read_texts
from mlx_hmem.evaluate.perplexity import perplexity
from mlx_hmem.evaluate.scoring import Candidate
from mlx_hmem.evaluate.tasks.task import CHOICE, load_tasks
from tests.helpers.places import shared
from tests.helpers.programs import refused
from tests.helpers.task_helpers import alone, write_rows, write_tasks


@pytest.fixture
def folder(tmp_path, texts) -> Path:
    return write_tasks(tmp_path, texts)


def test_wikitext_is_read_article_by_article(tmp_path):
    text = " \n = One = \n \n Text a . \n = 1 rad / s = \n b \n \n = = Part = = \n \n c \n"
    text += " \n = Two = \n \n d \n"
    (tmp_path / "w.raw").write_text(text)
    assert read_texts(tmp_path / "w.raw") == [
        "= One = \n \n Text a . \n = 1 rad / s = \n b \n \n = = Part = = \n \n c",
        "= Two = \n \n d",
    ]
    marked = tmp_path / "marked.jsonl"
    marked.write_text('{"text": "One."}\n', encoding="utf-8-sig")  # as editors on Windows write it
    assert read_texts(marked) == ["One."]
    assert read_texts(tmp_path / "w.raw", limit=1)[0].startswith("= One")
    (tmp_path / "w.txt").write_text("No heading.\n\nAt all.")
    assert read_texts(tmp_path / "w.txt") == ["No heading.\n\nAt all."]
    (tmp_path / "w.txt").write_bytes(b"\xff\xfe\x00")
    refused("cannot be read", read_texts, tmp_path / "w.txt")


def test_wikitext_2_has_sixty_articles():
    articles = read_texts(shared("data", "wikitext2", "wiki.test.raw.gz"))
    assert len(articles) == 60
    assert articles[0].startswith("= Robert Boulter =")


def test_a_whole_document_can_route_all_its_windows(model, texts):
    text = " ".join(texts[:12])
    start, *tokens = model.tokenizer.encode(text)
    size = -(-len(tokens) // -(-len(tokens) // 31))
    path, nats = model.retriever.route(text), 0.0
    for i in range(0, len(tokens), size):
        part = tokens[i : i + size]
        nats += alone(model, Candidate([start], part), "fetched", path)[0]
    found = perplexity(model, [text], route_by="document", context=32, progress=False)
    assert found.per_token == pytest.approx(math.exp(nats / len(tokens)), rel=1e-4)
    by_window = perplexity(model, [text], route_by="window", context=32, progress=False)
    assert abs(by_window.per_token - found.per_token) > 1e-3 * found.per_token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": '{"query": "a", "choices": ["b", "c"]}'}, "line 3 has no `gold`"),
        ({"choice": '{"query": "a", "choices": ["b", "c"], "gold": 2}'}, "line 3: `gold`"),
        ({"choice": '{"query": "a", "choices": ["b", "c"], "gold": true}'}, "line 3: `gold`"),
        ({"choice": '{"query": "a", "choices": ["b"], "gold": 0}'}, "line 3: `choices`"),
        ({"choice": '{"query": "a", "choices": ["b", 3], "gold": 0}'}, "line 3: `choices`"),
        ({"choice": '{"query": "a", "choices": ["b", " "], "gold": 0}'}, "line 3: an entry"),
        ({"choice": '{"query": " ", "choices": ["b", "c"], "gold": 0}'}, "line 3: `query` is em"),
        ({"choice": '{"query": "a", '}, "line 3 is not valid JSON"),
        ({"choice": "[1]"}, "line 3 is not a JSON object"),
        ({"generation": '{"context": "\\ud800", "answer": "b"}'}, "line 3 is not text"),
        ({"language": '{"context": "a", "continuation": "b"}'}, "line 3 has no `category`"),
        ({"language": '{"context": "a", "category": "b"}'}, "line 3 has no `continuation`"),
        ({"schema": '{"context_options": "ab", "continuation": "b", "gold": 0}'}, "line 3: `cont"),
        ({"generation": '{"context": "a", "answer": "b", "aliases": "c"}'}, "line 3: `aliases`"),
        ({"generation": '{"context": "a", "answer": 4}'}, "line 3: `answer` is not a text"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_by_file_and_line(folder, change, message):
    ((label, line),) = change.items()
    path = folder / f"{label}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", line, *lines[1:]]))  # an empty line counts
    assert f"{path}, {message}" in refused("", load_tasks, label, folder)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"label": "t", "icl_task_type": "guessing"}, "unknown task type of t: 'guessing'"),
        ({"label": "t"}, "missing key in .*task 1: icl_task_type"),
        ({"label": "t", "icl_task_type": CHOICE, "shots": 3}, "unknown key .*shots"),
        ({"label": "t", "icl_task_type": CHOICE, "num_fewshot": "3"}, "`num_fewshot` of task 't'"),
        ({"label": "t", "icl_task_type": CHOICE, "num_fewshot": -1}, "negative"),
        ({"label": "t", "icl_task_type": CHOICE, "files": [3]}, "`files`"),
        ({"label": "t", "icl_task_type": CHOICE, "files": "t"}, "`files`"),
        ({"label": 3, "icl_task_type": CHOICE}, "`label`"),
        ({"label": "", "icl_task_type": CHOICE}, "no label"),
        ({"label": "t", "icl_task_type": CHOICE, "group": "rare"}, "unknown group"),
        ({"label": "t", "icl_task_type": CHOICE, "has_categories": 1}, "`has_categories`"),
        ([], "not a JSON object"),
    ],
)
def test_a_wrong_task_is_refused(tmp_path, task, message):
    write_rows(tmp_path / "t.jsonl", [{"query": "a", "choices": ["b", "c"], "gold": 0}])
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    refused(message, load_tasks, "t", tmp_path)


def test_a_name_is_a_label_or_a_files_and_may_say_how_many_examples(tmp_path):
    row = {"context_options": ["a b", "a c"], "continuation": "d", "gold": 0}
    write_rows(tmp_path / "winograd_wsc.jsonl", [row])
    write_rows(tmp_path / "squad_xquad_en.jsonl", [{"context": "a", "continuation": "b"}])
    write_rows(tmp_path / "squad_train_sample.jsonl", [{"context": "a", "continuation": "b"}])

    def found(names):
        return [
            (t.label, t.num_fewshot, t.group, f.name) for t, f, _ in load_tasks(names, tmp_path)
        ]

    wsc = ("winograd", 3, "common", "winograd_wsc.jsonl")
    xquad = ("squad", 3, "common", "squad_xquad_en.jsonl")
    assert found("winograd_wsc,winograd") == [wsc]
    assert found("winograd:0, squad") == [("winograd", 0, "", "winograd_wsc.jsonl"), xquad]
    assert found("squad_train_sample")[0][3] == "squad_train_sample.jsonl"
    assert found("all") == [xquad, wsc]
