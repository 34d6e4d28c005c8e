"""Questions about what was remembered fetch what it has taught; others fetch none, or the old."""

from pathlib import Path

import pytest

from benchmarks.own.documents import make_documents
from mlx_hmem.bank.documents import read_documents
from mlx_hmem.bank_tools.command import main as bank_tools
from mlx_hmem.generation.command import main
from mlx_hmem.generation.passages import Passages
from mlx_hmem.model.load import load
from tests.helpers.own_documents import remember
from tests.helpers.programs import run
from tests.remember.test_remember import anchor, eager  # noqa: F401

COUNT = 12
OTHERS = [q.prompts["question"] for q in make_documents(12, 9)[1]]


def write(folder: Path, seed: int) -> Path:
    folder.mkdir()
    for number, document in enumerate(make_documents(COUNT, seed)[0]):
        (folder / f"{number}.txt").write_text(document.text)
    return folder


def prompts(seed: int) -> list[tuple[str, str]]:
    """Names of documents, each with a question about it."""
    return [(f"{q.document}.txt", q.prompts["question"]) for q in make_documents(COUNT, seed)[1]]


def found(model, asked) -> float:
    """How many of the questions fetch a leaf that their document has taught."""
    leaves = {d.name: d.clusters for part in model.banks.parts.values() for d in part.documents}
    return sum(model.fetch(text).path in leaves[name] for name, text in asked) / len(asked)


@pytest.fixture(scope="module")
def learned(anchor, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("asking")
    return remember(write(folder / "notes", 1), anchor, folder / "model", "--passes", "1")


def test_questions_fetch_what_their_document_has_taught(learned):
    model = load(learned)
    assert all(len(d.words) == len(d.clusters) for d in read_documents(learned / "bank"))
    assert found(model, prompts(1)) == 1
    assert sum(model.fetch(text).path is not None for text in OTHERS) <= 1
    name, text = prompts(1)[0]
    assert name in model.fetch(text).documents


def test_beside_an_existing_memory_they_do_and_others_go_where_they_went(model_folder, tmp_path):
    out = remember(write(tmp_path / "notes", 1), model_folder, tmp_path / "out", "--passes", "1")
    old, new = load(model_folder), load(out)
    assert found(new, prompts(1)) == 1
    same = [old.fetch(text).path == new.fetch(text).path for text in OTHERS]
    assert sum(same) >= len(same) - 1


def test_a_second_folder_and_a_bank_beside_are_asked_as_well(learned, anchor, tmp_path):  # noqa: F811
    notes = write(tmp_path / "notes", 2)
    twice = load(remember(notes, learned, tmp_path / "twice", "--passes", "1"))
    apart = remember(notes, anchor, tmp_path / "apart", "--passes", "1")
    both = tmp_path / "both"
    bank_tools(["add", str(learned), str(apart), "--name", "more", "--out", str(both)])
    for model in (twice, load(both)):
        # Both folders have a 0.txt: the leaves are told apart by whether they were there before.
        first = [model.fetch(text) for _, text in prompts(1)]
        second = [model.fetch(text) for _, text in prompts(2)]
        own = load(learned)
        assert [f.path for f in first] == [own.fetch(text).path for _, text in prompts(1)]
        places = {(f.bank, f.path) for f in first}
        assert all(f.path is not None and (f.bank, f.path) not in places for f in second)
        assert sum(model.fetch(text).path is not None for text in OTHERS) <= 1


def test_a_passage_comes_from_the_runs_folder_where_there_is_room(learned):
    name, text = prompts(1)[0]
    own = make_documents(COUNT, 1)[0][0].text
    (passage, *_) = Passages(Path(f"{learned}.run"), load(learned)).nearest(text, 1)
    assert passage.document == name
    assert passage.text in own
    # The tiny anchor's context is too short for it, which is said.
    said = run(main, "--model", f"{learned}/", "--prompt", text, "-m", 1, "--with-passages", 1)
    assert said.err.splitlines()[-1] == "passages: none, no room for 1 more"
