"""Servers for the tests of this folder; each is started once."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_hmem import load
from mlx_hmem.bank.documents import write_documents
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.server.web.keys import new_key
from tests.bank.test_views import write_views
from tests.helpers.banks import document
from tests.helpers.servers import Server

PROMPTS = [
    "The atomic number of tin is",
    "The city lies on the river",
    "The album was released by the band",
    "The species of beetle is found in",
    "The football club won the league",
    "The king was crowned in the year",
    "The railway station was opened",
    "The novel tells the story of",
]


@pytest.fixture(scope="session")
def demo() -> MemoryModel:
    return load()


@pytest.fixture(scope="session")
def server():
    with Server("--model", "demo") as found:
        yield found


@pytest.fixture(scope="session")
def open_ai(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def viewed(model_folder: Path, texts, tmp_path_factory) -> Path:
    """The tiny model with documents, and a view that bars the first half of them at level 1."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("viewed") / "model"))
    model = load(folder)
    write_documents(
        folder / "bank", [document(t, [model.retriever.route(t)], model) for t in texts[:20]]
    )
    write_views(folder, guest=[[model.retriever.route(texts[0])[0]]], staff=[])
    return folder


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> dict[str, str]:
    """The keys of ann, who is a guest, and of bob; and the file of both."""
    made = {"ann": new_key("ann", "guest"), "bob": new_key("bob", None)}
    file = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    file.write_text("".join(f"{line}\n" for _, line in made.values()))
    return {name: f"Bearer {key}" for name, (key, _) in made.items()} | {"file": str(file)}


@pytest.fixture(scope="session")
def guarded(viewed, keys, tmp_path_factory):
    """A server with keys, which records what it reads in the file ``reads``."""
    reads = tmp_path_factory.mktemp("reads") / "reads"
    words = ("--model", viewed, "--api-keys", keys["file"])
    with Server(*words, worker="tests.helpers.server_worker", READS=str(reads)) as found:
        found.reads = reads
        yield found


def line_of(values: dict) -> str:
    return json.dumps(values) + "\n"
