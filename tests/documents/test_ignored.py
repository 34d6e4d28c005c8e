"""What an ignore file names is not read, and what programs keep for themselves is not either."""

from pathlib import Path

import pytest

from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.ignored import IGNORE
from mlx_hmem.documents.readers import own_files
from tests.helpers.programs import refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = (
        "a.txt", "draft.txt", "drafts/b.txt", "letters/c.txt", "letters/d.md", "letters/keep.txt",
        "letters/old/e.txt", "node_modules/x/readme.md", "deep/node_modules/f.txt",
        "node_modules.txt",
    )  # fmt: skip
    for name in names:
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name).write_text("text")
    return tmp_path / "notes"


def read(folder: Path) -> set[str]:
    return {file.name for file in own_files(folder, Faults())}


def test_what_programs_keep_is_left_out_as_a_rule_and_may_be_taken_back(folder):
    everything = {f.relative_to(folder).as_posix() for f in folder.rglob("*.*") if f.is_file()}
    own = {name for name in everything if "node_modules/" not in name}
    assert read(folder) == own
    own_files(folder, faults := Faults())
    assert faults.kinds == {"packages": 2}
    pytest.importorskip("pathspec")
    (folder / IGNORE).write_text("!node_modules/\n")
    assert read(folder) == everything


def test_an_ignore_file_is_read_as_git_reads_one(folder):
    pytest.importorskip("pathspec")
    (folder / IGNORE).write_text("# mine\n/draft*\nletters/*.txt\n!letters/keep.txt\n\\#a\n")
    assert read(folder) == {
        "a.txt", "letters/d.md", "letters/keep.txt", "letters/old/e.txt", "node_modules.txt",
    }  # fmt: skip
    # One further down goes before those above; what lies in a folder that is out stays out.
    (folder / "letters" / IGNORE).write_text("*.md\nkeep.txt\n!/c.txt\nold\n!old/e.txt\n")
    assert read(folder) == {"a.txt", "letters/c.txt", "node_modules.txt"}
    (folder / IGNORE).write_bytes(b"\xff\xfe")
    refused("cannot be read", read, folder)
    (folder / IGNORE).unlink()
    (folder / IGNORE).mkdir()
    refused("not a file", read, folder)
