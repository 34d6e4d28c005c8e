# ruff: noqa: F811 (fixtures of another module)
"""Forgetting by names after edits, of folders and copies, and the page that says so."""

import hashlib
import re
import shutil
import unicodedata
from pathlib import Path

import pytest

from mlx_hmem.bank.documents import read_documents
from tests.helpers.own_documents import remember, sentences
from tests.helpers.places import bytes_of
from tests.helpers.programs import refused
from tests.remember.test_remember import anchor, eager  # noqa: F401
from train.remember.forget import main as forget_program

NAME = "caf\N{LATIN SMALL LETTER E WITH ACUTE} <plans>.txt"
PLANS = "The vermilion gramophone is hidden beneath the bakery of Trondheim."
LETTERS = {"letters/one.txt": ("boats", 1), "letters/two.txt": ("bread", 2)}


@pytest.fixture(scope="module")
def learned(anchor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a folder in which one letter stands twice; its name is written as macOS does."""
    folder = tmp_path_factory.mktemp("names")
    texts = {name: sentences(*own) for name, own in LETTERS.items()}
    texts |= {"archive/two.txt": texts["letters/two.txt"], "other.txt": sentences("stars", 3)}
    texts[unicodedata.normalize("NFD", NAME)] = PLANS
    for name, text in texts.items():
        (folder / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "notes" / name).write_text(text)
    return remember(folder / "notes", anchor, folder / "model", "--passes", "2")


def forget(model: Path, *words: object) -> None:
    forget_program([str(model), *map(str, words)])


def names_of(model: Path) -> set[str]:
    return {d.name for d in read_documents(model / "bank")}


def test_a_folder_is_forgotten_and_what_stood_in_two(learned, tmp_path, capsys):
    forget(learned, "letters/", "--out", tmp_path / "less")
    assert names_of(tmp_path / "less") == {"other.txt", NAME}
    said = capsys.readouterr().out
    assert re.search(r"archive/two.txt = letters/two.txt", said)
    refused("knows no such document: letters/", forget, tmp_path / "less", "letters/", "--out", "x")


def test_an_edited_note_is_forgotten_by_its_name_with_what_it_was_before(learned, anchor, tmp_path):
    """Two versions of a note in one model: "several documents have that name", it was said."""
    folder = tmp_path / "edited"
    folder.mkdir()
    (folder / "other.txt").write_text(sentences("stars", 9))
    both = remember(folder, learned, tmp_path / "both", "--passes", "1")
    assert [d.name for d in read_documents(both / "bank")].count("other.txt") == 2
    runs = [word for model in (learned, both) for word in ("--run", f"{model}.run")]
    forget(both, "other.txt", *runs, "--out", tmp_path / "less")
    assert "other.txt" not in names_of(tmp_path / "less")


def test_a_file_that_was_edited_is_forgotten_after_an_update(learned, anchor, tmp_path):
    folder = Path(shutil.copytree(learned.parent, tmp_path / "life"))
    edited = folder / "notes" / unicodedata.normalize("NFD", NAME)
    edited.write_text(PLANS.replace("Trondheim", "Bergen"))
    model = remember(folder / "notes", anchor, folder / "model")
    forget(model, NAME, "--out", tmp_path / "less")
    places = [tmp_path / "less", tmp_path / "less.run"]
    for name, data in ((f, d) for place in places for f, d in bytes_of(place).items()):
        assert b"vermilion" not in data, name


def test_the_page_names_what_was_forgotten_and_holds_the_figures(learned, tmp_path):
    control = tmp_path / "control"
    control.mkdir()
    (control / "never.txt").write_text(sentences("boats", 77))
    page, out = tmp_path / "page.html", tmp_path / "less"
    words = (NAME, "letters/two.txt", "--out", out, "--control", control)
    for wrong, where in (("in the new model", out / "a.html"), ("end it in .html", out)):
        refused(wrong, forget, learned, *words, "--html", where)
    assert not out.exists()
    forget(learned, *words, "--html", page)
    text = page.read_text()
    assert hashlib.sha256(PLANS.encode()).hexdigest() in text
    assert "caf" in text
    assert "&lt;plans&gt;" in text
    assert "<plans>" not in text
    assert "archive/two.txt<br>letters/two.txt" in text
    assert "2 documents left the model <b>model</b> on " in text
    rows = re.findall(r"<tr><td>(forgotten|control): loss</td>(.*?)</tr>", text)
    assert [name for name, _ in rows] == ["forgotten", "control"]
    losses = [[float(n) for n in re.findall(r">([\d.]+)<", cells)] for _, cells in rows]
    assert losses[0][0] < losses[0][1]
    assert all(len(own) == 3 for own in losses)
    assert not re.search(r"(?:src|href)=", text)  # it needs nothing else
    for place in (out, tmp_path / "less.run"):
        assert not any(page.name in name for name in bytes_of(place))
