"""The one-way arrows between the rooms of the house, read from the source.

errors, files, find, config → memory → {anchors, bank}; config → retriever; anchors → generation;
{bank, retriever} → banks; bank → recall; {anchors, bank} → needs → budget; {anchors, banks, recall,
generation, budget} → model → loading → evaluate → bank_tools; model → batch; bank → prefetch;
model → {session, prefetch} → conversation → chat; mlx_hmem → {train, convert, generate.py}; torch
only under convert/ and tests/.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOTTOM = {"_blas", "config", "errors", "files", "find", "resident"}
MODEL = BOTTOM | {"memory", "anchors", "bank", "retriever", "generation", "model", "banks"}
MODEL |= {"recall", "needs", "budget"}
# What each room of mlx_hmem may import from mlx_hmem, besides itself.
ROOMS = {
    **dict.fromkeys(BOTTOM, BOTTOM),
    "memory": BOTTOM,
    "anchors": BOTTOM | {"memory"},
    "bank": BOTTOM | {"memory"},
    "retriever": BOTTOM,
    "banks": BOTTOM | {"bank", "retriever"},
    "recall": BOTTOM | {"memory", "bank"},
    "needs": BOTTOM | {"memory", "anchors", "bank"},
    "budget": BOTTOM | {"needs"},
    "model": MODEL,
    "generation": BOTTOM | {"memory", "anchors"},
    "batch": MODEL,
    "session": MODEL,
    "prefetch": BOTTOM | {"bank"},
    "conversation": MODEL | {"prefetch", "session"},
    "chat": MODEL | {"conversation"},
    "loading": MODEL | {"loading"},
    "evaluate": MODEL | {"loading"},
    "bank_tools": MODEL | {"loading", "evaluate"},
    "bank.__main__": BOTTOM | {"bank_tools"},
    "__init__": MODEL | {"loading"},
}
# What each part of the repository may import from the others.
PARTS = {
    "mlx_hmem": set(),
    "train": {"mlx_hmem"},
    "convert": {"mlx_hmem"},
    "generate": {"mlx_hmem"},
    "benchmarks": {"mlx_hmem", "train", "convert"},
}
TORCH = {"torch", "sentence_transformers"}


def imports(source: str, module: str) -> set[str]:
    """Full names that ``source``, the text of ``module``, imports, wherever in it."""
    package = module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def wrong_arrows(source: str, module: str) -> list[str]:
    """The imports of ``module`` that go against the arrows."""
    part, *rest = module.split(".")
    wrong = []
    for name in sorted(imports(source, module)):
        target, *below = name.split(".")
        if target in TORCH:
            allowed = part == "convert"
        elif part == target == "mlx_hmem":
            # `from mlx_hmem import load` within the package would close a circle.
            program = ".".join(rest)  # the face of a room above, under a shorter name
            room = program if program in ROOMS else rest[0]
            allowed = bool(below) and below[0] in {room} | ROOMS[room]
        else:
            allowed = target not in PARTS or target == part or target in PARTS[part]
        if not allowed:
            wrong.append(name)
    return wrong


def modules() -> dict[str, Path]:
    """Every module of the repository but the tests, by its dotted name."""
    paths = [path for part in PARTS for path in (ROOT / part).rglob("*.py")]
    paths += [path for path in [ROOT / "generate.py"] if path.exists()]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_follow_the_arrows(module):
    assert wrong_arrows(modules()[module].read_text(), module) == []


def test_every_room_and_program_is_known():
    rooms = {name.split(".")[1] for name in modules() if name.startswith("mlx_hmem.")}
    assert rooms - {"demo"} <= set(ROOMS)
    assert {"config", "errors", "files", "memory", "anchors", "bank", "retriever"} <= rooms
    # A module at the top that shadows the standard library would be found in its place.
    assert not {path.stem for path in ROOT.glob("*.py")} & sys.stdlib_module_names


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mlx_hmem.memory.ffn", "from mlx_hmem.bank import Bank"),
        ("mlx_hmem.memory.ffn", "from mlx_hmem import bank"),
        ("mlx_hmem.memory.ffn", "from ..bank.reader import Bank"),
        ("mlx_hmem.anchors.attach", "def f():\n    import mlx_hmem.bank.reader"),
        ("mlx_hmem.bank.reader", "from mlx_hmem.anchors.openlm import Model"),
        ("mlx_hmem.bank.reader", "from mlx_hmem.bank_tools.command import main"),
        ("mlx_hmem.banks", "from mlx_hmem.model import MemoryModel"),
        ("mlx_hmem.retriever.tree", "from mlx_hmem.memory import FetchedMemory"),
        ("mlx_hmem.config", "from mlx_hmem.model import load"),
        ("mlx_hmem.generation", "from mlx_hmem.evaluate.score import score"),
        ("mlx_hmem.model", "from mlx_hmem import load"),
        ("mlx_hmem.model", "from train.loop import run"),
        ("mlx_hmem.model", "import benchmarks.fetch"),
        ("mlx_hmem.anchors.load", "import torch.nn as nn"),
        ("train.loop", "from convert import quantise"),
        ("convert.quantise", "from train.recipe import load"),
        ("train.loop", "from torch import nn"),
        ("generate", "import train"),
        ("benchmarks.fetch", "import torch"),
    ],
)
def test_an_import_against_the_arrows_is_seen(module, line):
    assert len(wrong_arrows(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mlx_hmem.bank.reader", "from mlx_hmem.memory import FetchedMemory"),
        ("mlx_hmem.bank.reader", "from .layout import stride"),
        ("mlx_hmem.model", "from mlx_hmem.retriever import Retriever"),
        ("mlx_hmem.memory.__init__", "from .ffn import start"),
        ("convert.openlm", "import torch"),
        ("train.loop", "from mlx_hmem import load"),
        ("benchmarks.train", "from train.loop import run"),
    ],
)
def test_an_import_along_the_arrows_is_let_through(module, line):
    assert wrong_arrows(line, module) == []
