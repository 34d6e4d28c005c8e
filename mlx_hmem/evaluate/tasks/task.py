"""The benchmark tasks: their settings and the rows of their files, read and checked.

Settings are LLM-Foundry v0.9's (``tasks_v0.3.yaml``) with its names; the number of examples shown
is the paper's (section 7). A data folder may hold ``tasks.json``, a list of objects with the fields
of :class:`Task`, for tasks of one's own; one with a known label takes that one's place.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.texts import numbered_jsonl
from mlx_hmem.reading import read_json

CHOICE, SCHEMA = "multiple_choice", "schema"
LANGUAGE, GENERATION = "language_modeling", "generation_task_with_answers"
TYPES = (CHOICE, SCHEMA, LANGUAGE, GENERATION)
GROUPS = {"common": "Avg-CK", "specific": "Avg-SK"}


@dataclass(frozen=True)
class Task(JsonConfig):
    """One task. ``files`` are names in the data folder, without ``.jsonl`` or ``.jsonl.gz``, of
    which the first that is there is read; ``group`` says in which average it counts."""

    label: str
    icl_task_type: str
    num_fewshot: int = 0
    files: tuple[str, ...] = ()  # the label, unless given
    group: str = ""
    prompt_string: str = ""
    example_delimiter: str = "\n"
    continuation_delimiter: str = " "
    question_prelimiter: str = ""
    fewshot_random_seed: int = 1234
    do_normalization: bool = True
    early_stopping_criteria: tuple[str, ...] = ()
    cot_delimiter: str = ""
    has_categories: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.label, str) and self.label and not self.files:
            object.__setattr__(self, "files", (self.label,))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            right = type(value) is field.type
            if not isinstance(field.type, type):  # a tuple of texts
                right = isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)
            if not right:
                what = f"`{field.name}` of task {self.label!r} is wrong"
                raise UserError(what, repr(value), "correct it")
        if not self.label:
            raise UserError("a task has no label", repr(self.label), "name it")
        if self.icl_task_type not in TYPES:
            raise UserError(
                f"unknown task type of {self.label}",
                repr(self.icl_task_type),
                f"use one of {', '.join(TYPES)}",
            )
        if self.group not in ("", *GROUPS):
            raise UserError(
                f"unknown group of task {self.label}", repr(self.group), f"use {', '.join(GROUPS)}"
            )
        if self.num_fewshot < 0:
            raise UserError(
                f"num_fewshot of task {self.label} is negative", self.num_fewshot, "correct it"
            )

    @property
    def name(self) -> str:
        return f"{self.label}, {self.num_fewshot}-shot"


ANSWER = "\nAnswer: "
TASKS = (
    Task("lambada_openai", LANGUAGE, 0, group="common"),
    Task("boolq", CHOICE, 0, group="common", continuation_delimiter=ANSWER),
    Task("squad", LANGUAGE, 3, ("squad", "squad_xquad_en", "squad_train_sample"), "common"),
    Task("winograd", SCHEMA, 3, ("winograd_wsc", "winograd"), "common"),
    Task("winogrande", SCHEMA, 5, group="common"),
    Task("coqa", LANGUAGE, 0, group="common"),
    Task("hellaswag", CHOICE, 0, group="specific"),
    Task("arc_easy", CHOICE, 3, group="specific", continuation_delimiter=ANSWER),
    Task("arc_challenge", CHOICE, 3, group="specific", continuation_delimiter=ANSWER),
    Task("triviaqa_sm_sub", GENERATION, 3, group="specific"),
    Task("nq_open", GENERATION, 0, ("nq_open_dev", "nq_open"), "specific"),
    Task("piqa", CHOICE, 0, group="specific", continuation_delimiter=ANSWER),
    Task("openbook_qa", CHOICE, 10, group="specific"),
    Task(
        "jeopardy",
        LANGUAGE,
        3,
        ("jeopardy_all", "jeopardy"),
        continuation_delimiter=ANSWER,
        has_categories=True,
    ),
    Task("bigbench_qa_wikidata", LANGUAGE, 3),
)


@dataclass(frozen=True)
class Example:
    """One row. ``contexts`` has one text, or a schema task's options; ``answers`` one text, or a
    multiple choice's choices; ``gold`` is the index of the right one of whichever has several."""

    line: int
    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int = 0
    aliases: tuple[str, ...] = ()
    chain_of_thought: str = ""
    category: str = ""

    @property
    def gold_context(self) -> str:
        return self.contexts[self.gold if len(self.contexts) > 1 else 0]

    @property
    def gold_answer(self) -> str:
        return self.answers[self.gold if len(self.answers) > 1 else 0]


class TaskData(NamedTuple):
    """A task, its file and all rows of it."""

    task: Task
    file: Path
    examples: list[Example]


def load_tasks(names: str, data: Path) -> list[TaskData]:
    """The tasks of a comma-separated list with the rows of their files under ``data``.

    A name is a label or a file's, with ``:N`` behind it to show N examples; "all" stands for every
    task that counts in an average and has a file. Raises UserError for what is not there or
    is broken.
    """
    if not data.is_dir():
        raise UserError("no such data folder", data, "name the folder with the task files")
    tasks = {task.label: task for task in TASKS}
    if (data / "tasks.json").exists():
        tasks |= {task.label: task for task in _own_tasks(data / "tasks.json")}
    found: dict[tuple[str, int, Path], tuple[Task, Path]] = {}
    for name in filter(None, (n.strip() for n in names.split(","))):
        if name == "all":
            some = [(t, f) for t in tasks.values() if t.group and (f := _file(t, data))]
        else:
            some = [_find(name, tasks, data)]
        found |= {(task.label, task.num_fewshot, file): (task, file) for task, file in some}
    if not found and "all" in names:
        advice = "put there, for example, piqa.jsonl, or a tasks.json with groups"
        raise UserError("no file of a task that counts in an average", data, advice)
    if not found:
        raise UserError("no task to score", repr(names), f"use {', '.join(tasks)} or all")
    return [TaskData(task, file, read_examples(task, file)) for task, file in found.values()]


def _own_tasks(path: Path) -> list[Task]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list of tasks", type(rows).__name__, "write one")
    return [Task.from_dict(row, f"{path}, task {i}") for i, row in enumerate(rows, 1)]


def _find(name: str, tasks: dict[str, Task], data: Path) -> tuple[Task, Path]:
    label, colon, shots = name.partition(":")
    if colon and not shots.isdecimal():
        raise UserError("not a number of examples", repr(name), "write it as arc_easy:3")
    task = tasks.get(label)
    if task is None:
        of_file = [t for t in tasks.values() if label in t.files]
        if not of_file:
            raise UserError("no such task", repr(label), f"use one of {', '.join(tasks)}, or all")
        task = dataclasses.replace(of_file[0], files=(label,))
    if colon and int(shots) != task.num_fewshot:
        # Not the paper's setting, so it counts in no average.
        task = dataclasses.replace(task, num_fewshot=int(shots), group="")
    file = _file(task, data)
    if file is None:
        looked = " or ".join(f"{name}.jsonl" for name in task.files)
        raise UserError(f"task {task.label} has no file in {data}", looked, "put it there, or .gz")
    return task, file


def _file(task: Task, data: Path) -> Path | None:
    names = [data / f"{name}{end}" for name in task.files for end in (".jsonl", ".jsonl.gz")]
    return next((name for name in names if name.is_file()), None)


def read_examples(task: Task, path: Path) -> list[Example]:
    """The rows of ``path``, checked; UserError names the line that is wrong.

    Texts are stripped, the entries of lists are not (LLM-Foundry).
    """
    examples = [_example(task, row, f"{path}, line {n}", n) for n, row in numbered_jsonl(path)]
    if not examples:
        raise UserError("a task file has no rows", path, "restore the file")
    return examples


def _example(task: Task, row: dict[str, Any], where: str, line: int) -> Example:
    def text(name: str) -> str:
        value = _field(row, name, str, where).strip()
        if not value:
            raise UserError(f"{where}: `{name}` is empty", repr(row[name]), "correct the row")
        return value

    def texts(name: str, least: int) -> tuple[str, ...]:
        values = _field(row, name, list, where)
        if len(values) < least or not all(isinstance(v, str) for v in values):
            what = f"{where}: `{name}` is not a list of {least} or more texts"
            raise UserError(what, str(values)[:60], "correct the row")
        if least and not all(v.strip() for v in values):
            raise UserError(f"{where}: an entry of `{name}` is empty", values, "correct the row")
        return tuple(values)

    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half of a character, which no tokenizer takes
        raise UserError(f"{where} is not text", error, "correct the row") from None
    category = text("category") if task.has_categories else ""
    if task.icl_task_type == LANGUAGE:
        return Example(line, (text("context"),), (text("continuation"),), category=category)
    if task.icl_task_type == GENERATION:
        aliases = texts("aliases", 0) if "aliases" in row else ()
        chain = text("chain_of_thought") if task.cot_delimiter else ""
        context, answer = (text("context"),), (text("answer"),)
        return Example(line, context, answer, 0, aliases, chain, category)
    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    if task.icl_task_type == SCHEMA:
        contexts, answers = texts("context_options", 2), (text("continuation"),)
    else:
        contexts, answers = (text("query"),), texts("choices", 2)
    gold, count = _field(row, "gold", int, where), max(len(contexts), len(answers))
    if isinstance(gold, bool) or not 0 <= gold < count:
        raise UserError(f"{where}: `gold` is not one of 0 to {count - 1}", gold, "correct the row")
    return Example(line, contexts, answers, gold, category=category)


def _field(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in row:
        raise UserError(f"{where} has no `{name}`", f"it has {', '.join(row)}", "add the field")
    if not isinstance(row[name], kind):
        kinds = {str: "a text", list: "a list", int: "a whole number"}
        raise UserError(
            f"{where}: `{name}` is not {kinds[kind]}", repr(row[name])[:60], "correct the row"
        )
    return row[name]
