"""The wheel has everything but tests and benchmarks, and all of it can be imported from there."""

import importlib.util
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.helpers.places import ROOT

NAMES = [
    "bank",
    "chat",
    "convert",
    "doctor",
    "evaluate",
    "forget",
    "generate",
    "remember",
    "server",
    "train",
]
PROGRAM = """
import importlib, runpy, sys
from pathlib import Path
place = Path(sys.argv[1]).resolve()
for script in sorted((place / "bin").iterdir()):
    sys.argv = [str(script), "--help"]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
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
    left_out = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(out), str(source)]
    found = importlib.util.find_spec("setuptools") and version("setuptools")
    if found and int(found.partition(".")[0]) >= 77:  # as in pyproject.toml; else it is fetched
        build.append("--no-build-isolation")
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr.strip().splitlines()[-1]}")
    (wheel,) = out.glob("*.whl")
    folder = out / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, wheel], check=True)
    return folder


def test_every_file_is_in_the_wheel(installed):
    """Programs, recipes and data: what a module finds beside itself, it finds there."""
    for part, place in (("mlx_hmem", "."), ("train", "mlx_hmem"), ("convert", "mlx_hmem")):
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / place / path.relative_to(ROOT)).is_file(), path


def test_every_program_answers_and_every_module_is_imported_from_the_wheel(installed):
    command = [sys.executable, "-c", PROGRAM, str(installed)]
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=installed, env=environment)
    assert done.returncode == 0, done.stderr
    *said, count = done.stdout.splitlines()
    usages = [line.split()[1] for line in said if line.startswith("usage: ")]
    assert usages == ["mlx_hmem", *(f"mlx_hmem.{name}" for name in NAMES)]
    assert int(count) > 150
