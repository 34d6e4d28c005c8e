"""The wheel has everything but tests and benchmarks, and all of it can be imported from there."""

import subprocess
import sys

import pytest

from tests.helpers.places import ROOT

PROGRAM = """
import importlib, sys
from pathlib import Path
place = Path(sys.argv[1]).resolve()
for file in sorted(place.rglob("*.py")):
    name = ".".join(file.relative_to(place).with_suffix("").parts)
    if name.endswith("__main__") or name.startswith("mlx_hmem.demo"):
        continue
    try:
        module = importlib.import_module(name.removesuffix(".__init__"))
    except ValueError as error:
        assert "lm-evaluation-harness" in str(error), (name, error)
        continue
    assert Path(module.__file__).is_relative_to(place), module.__file__
assert not [name for name in sys.modules if name.split(".")[0] in ("train", "convert")]
print(len(list(place.rglob("*.py"))))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed, with nothing beside it."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "mlx_hmem"
    files = subprocess.run(
        ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--wheel-dir", str(out)]
    built = subprocess.run([*pip, str(source)], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr.strip().splitlines()[-1]}")
    (wheel,) = out.glob("*.whl")
    folder = out / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", folder, wheel],
        check=True,
    )
    return folder


def test_every_file_is_in_the_wheel(installed):
    """Programs, recipes and data: what a module finds beside itself, it finds there."""
    for part, place in (("mlx_hmem", "."), ("train", "mlx_hmem"), ("convert", "mlx_hmem")):
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / place / path.relative_to(ROOT)).is_file(), path


def test_every_module_is_imported_from_the_wheel(installed):
    command = [sys.executable, "-c", PROGRAM, str(installed)]
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=installed, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150


@pytest.mark.parametrize("name", ["generate", "train", "convert", "bank", "evaluate", "forget"])
def test_every_program_answers_from_the_wheel(installed, name):
    script = installed / "bin" / f"mlx_hmem.{name}"
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=installed, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: mlx_hmem.{name} ")
