"""The one-way arrows between the rooms of the house, read from the source, strings included.

Each table goes from the ground up: a room may import from the rooms that it names and from those
that they may import from. The faces (``__main__``, ``generate.py``) stand above all of their part.
Torch may be imported under convert/ and tests/ only, and by the benchmark that times it.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

GROUND = ("_blas", "config", "errors", "files", "folders", "reading")
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "mlx_hmem": {
        **dict.fromkeys(GROUND, GROUND),
        "memory": GROUND,
        "documents": GROUND,
        "retriever": GROUND,
        "anchors": ("memory",),
        "bank": ("memory",),
        "budget": ("anchors", "bank"),
        "model": ("budget", "retriever"),
        "generation": ("model",),
        "server": ("generation",),
        "evaluate": ("model",),
        "bank_tools": ("documents", "evaluate", "generation"),
        "doctor": ("generation",),
        "__init__": ("generation",),
    },
    "train": {
        "ranks": (),
        "padding": (),
        "recipe": (),
        "corpus": ("ranks", "recipe"),
        "store": ("ranks", "recipe"),
        "data": ("corpus", "padding"),
        "tree": ("data",),
        "step": ("padding", "store"),
        "cost": ("data", "step"),
        "loop": ("data", "step"),
        "export": ("loop",),
        "report": ("export",),
        "stages": ("report", "tree"),
        "parallel": ("stages",),
        "remember": ("cost", "stages"),
        "study": ("cost", "stages"),
        "command": ("cost", "parallel", "remember", "study"),
    },
    "convert": {
        "torch_files": (),
        "anchors": ("torch_files",),
        "gguf": ("anchors",),
        "memory": ("anchors",),
        "adapters": ("gguf", "memory"),
        "quantize": (),
        "bundle": (),
        "upload": (),
        "command": ("adapters", "quantize", "bundle", "upload"),
    },
}
FACES = {"__init__", "__main__"}
# What each part of the repository may import from the others.
PARTS = {
    "mlx_hmem": set(),
    "train": {"mlx_hmem"},
    "convert": {"mlx_hmem"},
    "generate": {"mlx_hmem"},
    "benchmarks": {"mlx_hmem", "train", "convert"},
}
INSTALLED = {"mlx_hmem.train": "train", "mlx_hmem.convert": "convert"}  # their names in the wheel
TORCH = {"torch", "sentence_transformers"}
MODULE = re.compile(r"\.?[a-z_]+(\.[a-z_]+)+(:\w+)?")


def modules() -> dict[str, Path]:
    """Every module of the repository but the tests, by its dotted name."""
    paths = [path for part in PARTS for path in (ROOT / part).rglob("*.py")]
    paths.append(ROOT / "generate.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


KNOWN = set(modules()) | {name.removesuffix(".__init__") for name in modules()}


def as_in_the_checkout(name: str) -> str:
    for installed, part in INSTALLED.items():
        if name == installed or name.startswith(f"{installed}."):
            return part + name[len(installed) :]
    return name


def imports(source: str, module: str) -> set[str]:
    """Full names that ``source``, the text of ``module``, imports, or names in a string."""
    package = module.split(".")[:-1]

    def absolute(name: str, level: int) -> str:
        base = package[: len(package) - level + 1] if level else []
        return ".".join([*base, *([name] if name else [])])

    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.partition(":")[0]
            if MODULE.fullmatch(node.value):
                name = absolute(text.lstrip("."), len(text) - len(text.lstrip(".")))
                # `mlx_hmem.train` alone is what a program is called.
                found |= {name, as_in_the_checkout(name)} & KNOWN - set(PARTS)
    return {as_in_the_checkout(name) for name in found}


def below(part: str, room: str) -> set[str]:
    """The rooms that ``room`` may import from, itself among them."""
    found, wanted = {room}, list(ROOMS[part][room])
    while wanted:
        if (each := wanted.pop()) not in found:
            found.add(each)
            wanted += ROOMS[part][each]
    return found


def wrong_arrows(source: str, module: str) -> list[str]:
    """The imports of ``module`` that go against the arrows."""
    part, *rest = module.split(".")
    wrong = []
    for name in sorted(imports(source, module)):
        target, *inner = name.split(".")
        face = part in ROOMS and rest[-1] in FACES and (len(rest) == 1 or rest[-1] == "__main__")
        if target in TORCH:
            allowed = part == "convert" or module == "benchmarks.own.step"
        elif face and rest != ["__init__"]:
            allowed = True
        elif part == target and part in ROOMS:
            # `from mlx_hmem import load` within the package would close a circle.
            allowed = bool(inner) and inner[0] in below(part, rest[0])
        else:
            allowed = target not in PARTS or target == part or target in PARTS[part]
        if not allowed:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_follow_the_arrows(module):
    assert wrong_arrows(modules()[module].read_text(), module) == []


@pytest.mark.parametrize("part", ROOMS)
def test_every_room_is_known_and_none_is_a_circle(part):
    inside = {name.split(".")[1] for name in modules() if name.startswith(f"{part}.")}
    assert inside - FACES == set(ROOMS[part]) - FACES
    for room in set(ROOMS[part]) - set(GROUND):
        assert all(room not in below(part, other) for other in below(part, room) - {room})
    # A module at the top that shadows the standard library would be found in its place.
    assert not {path.stem for path in ROOT.glob("*.py")} & sys.stdlib_module_names


def test_train_has_nine_floors_below_its_face():
    def floor(room: str) -> int:
        return 1 + max(map(floor, ROOMS["train"][room]), default=0)

    assert max(map(floor, ROOMS["train"])) == 9


def test_no_folder_is_too_full():
    folders = [path.parent for path in modules().values()]
    assert {str(f): folders.count(f) for f in set(folders) if folders.count(f) > 12} == {}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mlx_hmem.memory.ffn", "from mlx_hmem.bank import Bank"),
        ("mlx_hmem.memory.ffn", "from ..bank.reader import Bank"),
        ("mlx_hmem.anchors.attach", "def f():\n    import mlx_hmem.bank.read.reader"),
        ("mlx_hmem.bank.read.reader", "from mlx_hmem.anchors.openlm import Model"),
        ("mlx_hmem.bank_tools.command", "find('mlx_hmem.train.remember.forget:main')"),
        ("mlx_hmem.model.model", "from mlx_hmem import load"),
        ("mlx_hmem.anchors.load", "import torch.nn as nn"),
        ("train.loop.loop", "from ..stages import STAGES"),
        ("train.step.adamw", "load('.stages:run_stages')\nload('train.loop.loop')"),
        ("generate", "import train"),
        ("benchmarks.fetch", "import torch"),
    ],
)
def test_an_import_against_the_arrows_is_seen(module, line):
    assert len(wrong_arrows(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mlx_hmem.memory.__init__", "from .ffn import start"),
        ("mlx_hmem.__main__", "run('mlx_hmem.train.command')"),
        ("convert.anchors.openlm", "import torch"),
    ],
)
def test_an_import_along_the_arrows_is_let_through(module, line):
    assert wrong_arrows(line, module) == []
