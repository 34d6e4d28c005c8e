"""What tests of benchmark tasks share: files of rows, and slow plain ways to score them."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hmem.evaluate.scoring import Candidate
from mlx_hmem.evaluate.tasks import task as kinds
from mlx_hmem.evaluate.tasks.benchmark import score_task
from mlx_hmem.model.model import MemoryModel


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_of(task: kinds.Task, folder: Path, rows: list[dict]) -> kinds.TaskData:
    path = write_rows(folder / f"{task.label}.jsonl", rows)
    return kinds.TaskData(task, path, kinds.read_examples(task, path))


def run_task(model, data, folder, memory="none", **options):
    """The result and what was kept of every row, in order."""
    result = score_task(
        model, data, memory, out=folder / "out", model_name="m", progress=False, **options
    )
    lines = []
    for path in (folder / "out").glob(f"{data.task.label}.*.{memory}.*.jsonl"):
        lines += [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return result, sorted(lines, key=lambda row: row["row"])


def alone(model: MemoryModel, candidate: Candidate, memory: str, path) -> tuple[float, bool]:
    """A candidate by itself, in one piece and without a cache; the rest by NumPy."""
    ids = mx.array([candidate.context + candidate.answer])
    paths = None if path is None else [path]
    logits = np.array(model(ids, paths=paths, memory=memory)[0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(candidate.answer)) + len(candidate.context) - 1
    nats = -logs[rows, candidate.answer].sum()
    return nats, bool((logits[rows].argmax(-1) == candidate.answer).all())


def some_questions(vocab: int, seed: int = 0) -> list[list[Candidate]]:
    """Of all sorts: one choice or several, with much, little or nothing in common, equal ones."""
    rng = np.random.default_rng(seed)

    def ids(least: int, most: int) -> list[int]:
        return rng.integers(3, vocab, rng.integers(least, most + 1)).tolist()

    questions = []
    for _ in range(12):
        context, tails = ids(1, 30), [ids(0, 4) for _ in range(3)]
        questions.append([Candidate(context, ids(1, 6)) for _ in range(4)])
        questions.append([Candidate(context + tail, ids(2, 2)) for tail in tails])
        questions.append([Candidate(ids(1, 9), ids(1, 3))])
        questions.append([Candidate(ids(5, 9), ids(1, 3)) for _ in range(2)])
    questions[0][3] = questions[0][1]
    questions.append([Candidate([5], [6]), Candidate([5], [7, 8])])
    return questions


def greedy_alone(model, prompt, count, memory, path):
    ids, ends = list(prompt), model.tokenizer.eos_token_ids
    for _ in range(count):
        paths = None if path is None else [path]
        new = mx.argmax(model(mx.array([ids]), paths=paths, memory=memory)[0, -1]).item()
        if new in ends:
            break
        ids.append(new)
    return ids[len(prompt) :]


def leaf_paths(count: int) -> list[tuple[int, ...]]:
    """Cluster paths of the session's model, one for each of ``count`` rows."""
    leaves = [(5 * i) % 12 for i in range(count)]
    return [(leaf // 4, leaf // 2, leaf) for leaf in leaves]


def write_tasks(tmp_path: Path, texts: list[str]) -> Path:
    """A folder with one small file of each type, of the words that the session's model knows."""
    texts = [t for t in texts if len(t) > 80][:24]
    halves = [(t[:40], t[40:52], t[52:60]) for t in texts]
    write_rows(tmp_path / "choice.jsonl",
               [{"query": a, "choices": [b, c, a[:9]], "gold": i % 3}
                for i, (a, b, c) in enumerate(halves)])  # fmt: skip
    write_rows(tmp_path / "language.jsonl",
               [{"context": a, "continuation": b, "category": "xy"[i % 2]}
                for i, (a, b, _) in enumerate(halves)])  # fmt: skip
    write_rows(tmp_path / "schema.jsonl",
               [{"context_options": [a + " " + b, a + " " + c], "continuation": "and " + c,
                 "gold": i % 2} for i, (a, b, c) in enumerate(halves)])  # fmt: skip
    write_rows(tmp_path / "generation.jsonl",
               [{"context": a, "answer": b[:8], "aliases": [c]} for a, b, c in halves])  # fmt: skip
    tasks = [
        kinds.Task("choice", kinds.CHOICE, 1, group="specific"),
        kinds.Task("language", kinds.LANGUAGE, 1, has_categories=True),
        kinds.Task("schema", kinds.SCHEMA, 0, group="common"),
        kinds.Task("generation", kinds.GENERATION, 0, ("generation",), "specific"),
    ]
    rows = [{k: v for k, v in vars(t).items() if v != ""} for t in tasks]
    (tmp_path / "tasks.json").write_text(json.dumps(rows))
    return tmp_path
