"""The doctor: figures where all is well, a line where it is not, nothing of whose machine it is."""

import getpass
import html
import json
import platform
import signal
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_hmem.anchors.fused import FusedMemory
from mlx_hmem.config import KINDS
from mlx_hmem.doctor import checks, command, exact, programs, turns
from mlx_hmem.doctor.machine import impersonal
from mlx_hmem.doctor.models import blocks
from mlx_hmem.errors import UserError
from mlx_hmem.memory import join_blocks


def test_both_files_are_written_and_say_the_same(tmp_path, capsys):
    command.main(["--out", str(tmp_path / "new"), "--only", "rounding", "sums"])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "new" / "doctor.json").read_text())
    page = html.unescape((tmp_path / "new" / "doctor.html").read_text())
    assert [check["name"] for check in result["checks"]] == ["rounding", "sums"]
    for check in result["checks"]:
        assert check["status"] == "well"
        assert check["figures"]
        assert check["about"] in page
        assert check["name"] in said
    assert "all is well" in page
    assert "@" not in page.replace("@media", "")
    for value in result["machine"].values():
        assert str(value) in page


def test_a_check_is_made_once_and_not_for_a_folder_that_nobody_may_write(tmp_path, monkeypatch):
    made = list[str]()
    monkeypatch.setattr(
        command, "outcome_of", lambda name: made.append(name) or checks.Outcome(name, "", "well", 0)
    )
    command.main(["--out", str(tmp_path), "--only", "sums", "rounding", "sums"])
    assert made == ["sums", "rounding"]
    monkeypatch.setattr(command.os, "access", lambda *given: False)
    with pytest.raises(UserError, match="cannot be written"):
        command.main(["--out", str(tmp_path), "--only", "sums"])
    assert made == ["sums", "rounding"]


def test_what_is_skipped_is_not_called_well(tmp_path, monkeypatch):
    monkeypatch.setattr(
        command, "outcome_of", lambda name: checks.Outcome(name, "", "skipped", 0, "no lmdb")
    )
    command.main(["--out", str(tmp_path), "--only", "training"])
    assert "all is well; not checked: training" in (tmp_path / "doctor.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_it_is_as_ctrl_c(number):
    """Its check would go on without it: it is in a group of its own."""
    with pytest.raises(KeyboardInterrupt), command._ended_by_signals():
        signal.raise_signal(number)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nothing_personal_is_written(tmp_path, monkeypatch):
    secret = Path.home() / "diary"
    said = impersonal(
        f"{secret}: no; {tmp_path}/x and {getpass.getuser()} on {platform.node()}", tmp_path
    )
    assert said == "~/diary: no; WORK/x and USER on MACHINE"
    monkeypatch.setenv("HOME", "/data/Jo Doe")
    said = impersonal(
        'File "/data/Jo Doe/My Plans/run.py" of /data/Jo Doe/plans/a.py: '
        "no '/opt/acme/a b.so', /opt/acme/x, 4 tokens/s of https://x.org/a/b\x1b[2J",
        tmp_path,
    )
    assert said == (
        'File ".../run.py" of .../a.py: '
        "no '.../a b.so', .../x, 4 tokens/s of https://x.org/a/b\\x1b[2J"
    )
    monkeypatch.setenv("HOME", "")
    assert impersonal("/x", tmp_path) == "/x"


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A check whose process is run with this program before its own."""

    def check_with(program: str, limit: float = 60) -> checks.Outcome:
        (tmp_path / "sitecustomize.py").write_text(program)
        environment = {"PYTHONPATH": str(tmp_path)}
        monkeypatch.setitem(
            checks.CHECKS, "sums", checks.CHECKS["sums"]._replace(environment=environment)
        )
        return checks.outcome_of("sums", limit)

    return check_with


def test_a_crash_is_a_line_of_the_report(broken, tmp_path, capsys):
    outcome = broken(
        "import os, sys; print('device lost', file=sys.stderr, flush=True); os.abort()"
    )
    assert (outcome.status, outcome.figures) == ("failed", {})
    assert outcome.said.startswith("SIGABRT: device lost")
    with pytest.raises(SystemExit) as end:
        command.main(["--out", str(tmp_path), "--only", "sums"])
    assert end.value.code == 1
    assert "not well: sums" in (tmp_path / "doctor.html").read_text()


def test_what_hangs_is_ended(broken):
    outcome = broken("import time; time.sleep(100)", limit=0.5)
    assert (outcome.status, outcome.said) == ("failed", "not done after 0.5 seconds")


def test_programs_that_a_check_has_started_end_with_it(broken, tmp_path):
    outcome = broken(
        "import pathlib, subprocess, time\n"
        "started = subprocess.Popen(['sleep', '100'])\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).write_text(str(started.pid))\n"
        "time.sleep(100)",
        limit=2,
    )
    assert outcome.said == "not done after 2 seconds"
    started = int((tmp_path / "started").read_text())
    asked = ["ps", "-o", "stat=", "-p", str(started)]
    for _ in range(50):
        state = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.1)
    pytest.fail(f"it goes on: {state}")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os._exit(0)", "it said nothing"),
        ("import os; os.write(1, b'\\xff\\n'); os._exit(0)", "\ufffd"),
        ("import os; os.kill(os.getpid(), 40)", "signal 40: "),
    ],
)
def test_an_end_that_no_check_has_is_a_line_too(broken, program, said):
    if "40" in program and platform.system() != "Linux":
        pytest.skip("Linux has signals that Python does not name")
    outcome = broken(program)
    assert (outcome.status, outcome.said) == ("failed", said.strip())


def test_what_is_printed_behind_a_result_leaves_it(broken):
    outcome = broken("import atexit, os; atexit.register(os.write, 1, b'0\\ndevice closed\\n')")
    assert outcome.status == "well"


def test_the_folder_in_which_it_is_called_shadows_nothing(tmp_path, monkeypatch):
    for name in ("json", "numpy", "mlx_hmem"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert checks.outcome_of("rounding").status == "well"


def test_a_program_that_fails_says_why(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="ended with 2: error: no such program"):
        programs.run(programs.program("xyzzy"))


def test_what_raises_is_named_with_its_last_words(broken):
    outcome = broken("import sys, mlx.core as mx\nmx.grad = None")
    assert outcome.status == "failed"
    assert outcome.said.endswith("TypeError: 'NoneType' object is not callable")


def test_a_way_that_computes_something_else_is_found(tmp_path, monkeypatch):
    assert exact.ways(tmp_path).wrong == ""

    def without_a_level(config, seed, dtype):
        """A memory that is not whole, where numbers are short."""
        some = blocks(config, seed, dtype)
        return join_blocks([some[0], some[1] * (dtype == mx.float32)], config)

    monkeypatch.setattr(exact, "rows", without_a_level)
    monkeypatch.setattr(FusedMemory, "set", lambda self, blocks: None)
    wrong = exact.ways(tmp_path).wrong
    assert "ffn fused in float32: off by" in wrong
    for kind in KINDS:
        for name in ("bfloat16", "float16"):
            assert f"{kind} device in {name}: off by" in wrong


def test_what_grows_from_turn_to_turn_is_found(tmp_path, monkeypatch):
    kept, held = list[object](), turns._held

    def leaking() -> dict[str, float]:
        kept.extend(open(__file__) for _ in range(4))  # noqa: SIM115
        return held()

    monkeypatch.setattr(turns, "TURNS", 12)
    monkeypatch.setattr(turns, "EARLY", 4)
    assert turns.turns(tmp_path).wrong == ""
    monkeypatch.setattr(turns, "_held", leaking)
    assert turns.turns(tmp_path).wrong.startswith("open files: ")


def test_other_bits_after_a_kill_are_found(tmp_path, monkeypatch):
    """A program that is killed and goes on elsewhere than it was: here one that counts its runs."""
    script = tmp_path / "counting.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "run = pathlib.Path(f'{out}.run')\n"
        "run.mkdir(exist_ok=True)\n"
        "(run / f'{len(list(run.iterdir()))}').touch()\n"
        "time.sleep(1)\n"
        "out.mkdir()\n"
        "(out / 'model').write_text(str(len(list(run.iterdir()))))\n"
    )
    words = lambda *given: [programs.sys.executable, str(script), *map(str, given)]  # noqa: E731
    monkeypatch.setattr(programs, "program", words)
    found = programs.training(tmp_path)
    assert found.wrong == "killed and gone on, other bits: model"


def test_training_that_cannot_be_run_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(programs.SkippedError, match="pip install"):
        programs.training(tmp_path)
