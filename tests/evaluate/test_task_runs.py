"""Whole runs over tasks: cut short and gone on with, kept results, averages, the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.command import main
from mlx_hmem.evaluate.facts import Proportion
from mlx_hmem.evaluate.journal import Journal
from mlx_hmem.evaluate.tasks.benchmark import TaskResult, averages, model_fingerprint, score_task
from mlx_hmem.evaluate.tasks.few_shot import PromptTokens, build_prompts
from mlx_hmem.evaluate.tasks.task import CHOICE, LANGUAGE, Task, load_tasks
from tests.helpers.faults import flip, stop_at
from tests.helpers.programs import assert_refused, process, refused
from tests.helpers.task_helpers import alone, greedy_alone, run_task, write_tasks


@pytest.fixture
def folder(tmp_path, texts) -> Path:
    return write_tasks(tmp_path, texts)


@pytest.mark.parametrize("label", ["choice", "language", "schema", "generation"])
def test_rows_in_batches_are_right_where_each_alone_is(model, folder, label):
    (data,) = load_tasks(label, folder)
    task, _, examples = data
    result, kept = run_task(model, data, folder, "fetched", tokens_per_batch=700)
    assert [row["row"] for row in kept] == list(range(24))
    prompts, tokens = build_prompts(task, examples), PromptTokens(model.tokenizer, 96)
    longest = tokens.longest_answer(task, examples)
    for prompt, row in zip(prompts, kept, strict=True):
        path = model.retriever.route(prompt.route_text)
        if label == "generation":
            start = tokens.question(prompt, longest).context
            ids = greedy_alone(model, start, longest, "fetched", path)
            assert row["text"] == tokens.decode(ids)
            continue
        found = [alone(model, c, "fetched", path) for c in tokens.candidates(prompt)]
        counts = [len(c.answer) for c in tokens.candidates(prompt)]
        means = [nats / n for (nats, _), n in zip(found, counts, strict=True)]
        assert row["nats"] == pytest.approx(means, rel=1e-3)
        if label == "language":
            assert row["right"] == found[0][1]
        else:
            assert row["choice"] == int(np.argmin(means))
            assert row["right"] == (row["choice"] == prompt.example.gold)
    assert result.right == sum(row["right"] for row in kept)


@pytest.mark.parametrize("label", ["choice", "language", "generation"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_end(model, folder, label, monkeypatch):
    (data,) = load_tasks(label, folder)
    options = {"tokens_per_batch": 400}
    whole, kept = run_task(model, data, folder, "fetched", **options)
    (folder / "out").rename(folder / "whole")
    calls = stop_at(monkeypatch, Journal, "add", 3)
    with pytest.raises(KeyboardInterrupt):
        run_task(model, data, folder, "fetched", **options)
    (path,) = (folder / "out").iterdir()
    path.write_bytes(path.read_bytes() + b'{"row": 3, "ri')  # a kill in the middle of a line
    done = len(path.read_text().splitlines()) - 2
    assert 0 < done == sum(len(rows) for _, rows in calls[:2]) < 24
    calls.clear()
    resumed, again = run_task(model, data, folder, "fetched", **options)
    assert sum(len(rows) for _, rows in calls) == 24 - done
    assert resumed == whole
    assert [(r["row"], r["right"]) for r in again] == [(r["row"], r["right"]) for r in kept]
    calls.clear()
    assert run_task(model, data, folder, "fetched")[0] == whole
    assert calls == []  # nothing is scored twice


def test_a_part_of_the_rows_has_the_prompts_of_the_whole(model, folder):
    (data,) = load_tasks("choice", folder)
    part, some = run_task(model, data, folder, limit=7)
    assert (part.rows, part.of_rows, len(some)) == (7, 24, 7)
    whole, kept = run_task(model, data, folder)
    assert whole.rows == 24
    by_row = {row["row"]: row for row in kept}
    assert len(kept) == 24  # the 7 were not scored again
    for row in some:
        assert by_row[row["row"]] == row


def test_a_row_whose_answer_fills_the_context_is_left_out(model, folder):
    # One such row of piqa ended a run over all tasks of a model with 256 tokens after half an hour.
    (data,) = load_tasks("choice", folder)
    options = {"out": folder / "out", "model_name": "m", "context": 60, "progress": False}
    before = score_task(model, data, "none", **options)
    rows = [json.loads(line) for line in data.file.read_text().splitlines()]
    rows[3]["choices"][0] = "word " * 60
    data.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data,) = load_tasks("choice", folder)
    after = score_task(model, data, "none", **options)
    assert (before.rows, before.left_out) == (24, 0)
    assert (after.rows, after.of_rows, after.left_out) == (23, 24, 1)
    assert after.to_dict()["left_out"] == 1
    with pytest.raises(UserError, match=r"no row has room .*: .*choice\.jsonl; use a model"):
        score_task(model, data, "none", **(options | {"context": 1}))


def test_other_settings_have_other_results(model, folder):
    (data,) = load_tasks("choice", folder)
    out = folder / "out"
    for memory, name, shots, context in [
        ("none", "m", 1, None), ("generic", "m", 1, None), ("none", "n", 1, None),
        ("none", "m", 0, None), ("none", "m", 1, 60),
    ]:  # fmt: skip
        other = data._replace(task=Task("choice", CHOICE, shots))
        score_task(model, other, memory, out=out, model_name=name, limit=1, context=context,
                   progress=False)  # fmt: skip
    assert len(list(out.iterdir())) == 5
    data.file.write_text(data.file.read_text().replace(data.examples[0].contexts[0], "New"))
    score_task(model, data, "none", out=out, model_name="m", limit=1, progress=False)
    assert len(list(out.iterdir())) == 6


def test_a_journal_has_one_writer_and_refuses_what_is_not_its_own(tmp_path):
    journal = Journal(tmp_path, "a", {"x": 1})
    with journal.open() as held:
        held.add([{"row": 0, "right": True}])
        with pytest.raises(UserError, match="another run"), Journal(tmp_path, "a", {"x": 1}).open():
            pass
    with Journal(tmp_path, "a", {"x": 1}).open() as again:
        assert again.rows == {0: {"row": 0, "right": True}}
    for text in ('{"x": 2}\n', '{"x": 1}\n{"ro\n', '{"x": 1}\n3\n'):
        journal.path.write_text(text)
        with pytest.raises(UserError, match="no file of results"), journal.open():
            pass


def test_a_model_is_known_by_all_that_it_computes_with(broken):
    before = model_fingerprint(broken)
    assert model_fingerprint(broken) == before
    for name in ("config.json", "hmem.json", "bank/bank.json", "tokenizer.json"):
        old = (broken / name).read_bytes()
        (broken / name).write_bytes(old + b" ")
        assert model_fingerprint(broken) != before
        (broken / name).write_bytes(old)
    flip(broken / "model.safetensors", -1)
    assert model_fingerprint(broken) != before


def test_averages_are_means_over_tasks_with_their_errors():
    def result(label, group, right, memory="none", categories=None):
        task = Task(label, CHOICE, group=group)
        return TaskResult(task, "f", memory, right, 100, 100, 0, categories or {})

    some = [
        result("piqa", "specific", 50),
        result("arc_easy", "specific", 20),
        result("piqa", "specific", 90),  # once more: the first counts
        result("boolq", "common", 60),
        result("boolq", "common", 70, "fetched"),
        result("jeopardy", "", 99),
    ]
    common, with_memory, specific = averages(some)
    assert (common.name, common.memory, common.accuracy) == ("Avg-CK", "none", 0.6)
    assert (with_memory.memory, with_memory.accuracy) == ("fetched", 0.7)
    assert specific.accuracy == pytest.approx(0.35)
    assert specific.standard_error == pytest.approx(math.sqrt(0.0025 + 0.0016) / 2)
    assert (set(specific.tasks), len(specific.missing)) == ({"piqa", "arc_easy"}, 5)
    parted = result("j", "", 3, categories={"a": Proportion(1, 2), "b": Proportion(2, 8)})
    assert parted.accuracy == pytest.approx((0.5 + 0.25) / 2)
    assert parted.standard_error == pytest.approx(
        math.sqrt(0.25 / 2 + 0.25 * 0.75 / 8) / 2
    )  # fmt: skip


def test_the_command_prints_a_table_and_json(model_folder, folder, capsys):
    command = [str(model_folder), "--tasks", "choice,language", "--data", str(folder)]
    command += ["--out", str(folder / "out"), "--memory", "none,fetched"]
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(t["task"], t["memory"]) for t in found["tasks"]] == [
        ("choice", "none"), ("choice", "fetched"), ("language", "none"), ("language", "fetched")
    ]  # fmt: skip
    for task in found["tasks"]:
        assert task["rows"] == 24
        assert 0 <= task["accuracy"] <= 1
    assert set(found["tasks"][2]["categories"]) == {"x", "y"}
    assert [(a["name"], a["memory"]) for a in found["averages"]] == [
        ("Avg-SK", "none"), ("Avg-SK", "fetched")
    ]  # fmt: skip
    main(command)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["accuracy,", "%", "rows", "none", "fetched"]
    accuracy = found["tasks"][1]["accuracy"]
    assert out[1].startswith("choice, 1-shot")
    assert f"{100 * accuracy:.1f} ±" in out[1]
    assert len({len(line) for line in out}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks", "guess"], "no such task: 'guess'"),
        (["--tasks", "boolq"], "task boolq has no file"),
        (["--tasks", "choice:many"], "not a number of examples"),
        (["--tasks", ","], "no task to score"),
        (["--tasks", "empty"], "a task file has no rows"),
        (["--data", "nowhere"], "no such data folder: nowhere"),
        (["--memory", "some"], "unknown memory mode"),
    ],
)
def test_a_wrong_command_is_one_line(model_folder, folder, change, message):
    (folder / "empty.jsonl").write_text("\n\n")
    tasks = json.loads((folder / "tasks.json").read_text())
    tasks.append({"label": "empty", "icl_task_type": LANGUAGE})
    (folder / "tasks.json").write_text(json.dumps(tasks))
    command = [str(model_folder), "--tasks", "choice", "--data", str(folder), *change]
    refused(message, main, command)
    refused("--data", main, [str(model_folder), "--tasks", "choice"])


def test_all_tasks_of_a_folder_without_any_names_the_folder(model_folder, tmp_path):
    with pytest.raises(UserError, match=f"no file of a task that counts.*: {tmp_path}; put"):
        main([str(model_folder), "--tasks", "all", "--data", str(tmp_path)])


def test_a_broken_row_ends_the_command_with_one_line_and_status_2(model_folder, folder):
    (folder / "choice.jsonl").write_text('{"query": "a"}\n')
    command = ["-m", "mlx_hmem.evaluate", model_folder, "--tasks", "choice", "--data", folder]
    assert_refused(process(*command), "choice.jsonl, line 1 has no `choices`")
