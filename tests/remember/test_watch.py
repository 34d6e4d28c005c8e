"""A folder is watched: what is done is done again when it has changed and rested."""

import pytest

from mlx_hmem.errors import UserError
from tests.helpers.programs import refused
from train.remember.command import main
from train.remember.sync.watch import LOOK_EVERY, watch


def test_it_is_done_again_when_the_folder_has_changed_and_rested(tmp_path, capsys):
    note, done, slept = tmp_path / "a.txt", [], []
    note.write_text("one")

    def do() -> None:
        done.append((len(slept), note.read_text()))
        if len(done) == 2:
            raise UserError("a file changed while it was read", note, "wait")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        at = len(slept)
        if at in (3, 5, 6):  # a change, and two more before it has rested
            note.write_text("two" * at)
        if at == 20:
            (tmp_path / "b.txt").write_text("new")
        if at == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch([tmp_path], 3 * LOOK_EVERY, do, sleep)
    assert done == [(0, "one"), (9, "two" * 6), (23, "two" * 6)]
    assert slept == [LOOK_EVERY] * 30
    assert "error: a file changed while it was read" in capsys.readouterr().err


def test_a_folder_that_vanishes_is_waited_for(tmp_path, capsys):
    folder, done, slept = tmp_path / "notes", [], []
    folder.mkdir()
    (folder / "a.txt").write_text("one")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            folder.rename(tmp_path / "away")
        if len(slept) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch([folder], LOOK_EVERY, lambda: done.append(folder.exists()), sleep)
    assert done == [True, False]  # which says so


def test_watching_goes_with_no_plan_alone(tmp_path):
    words = [str(tmp_path), "--model", "demo", "--out", str(tmp_path / "m"), "--watch", "--dry-run"]
    refused("--watch goes with neither", main, words)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-3"])
def test_a_rest_is_so_many_seconds(tmp_path, seconds):
    words = [str(tmp_path), "--model", "demo", "--out", str(tmp_path / "m"), f"--watch={seconds}"]
    refused("--watch is no time", main, words)


def test_quick_is_a_number_of_passes_and_goes_with_no_other(tmp_path):
    """It was passed over without a word."""
    words = [str(tmp_path), "--model", "demo", "--out", str(tmp_path / "m")]
    refused("--quick: not allowed with argument --passes", main, [*words, "--passes=2", "--quick"])
