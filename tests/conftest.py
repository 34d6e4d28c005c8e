"""A tiny but whole model directory, made as a run makes it, and copies of it to damage."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants as hub_constants
import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.load import anchor_hash, named_parameters, text_hashes
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.bank.documents import write_documents
from mlx_hmem.config import FORMAT_VERSION, HmemConfig, MemoryConfig, RetrieverConfig
from mlx_hmem.files import fingerprint, save_safetensors
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever import ClusterTree, load_encoder
from tests.helpers.hub_server import TOKEN, Hub
from tests.helpers.write_bank import write_bank
from train.corpus.facts import make_facts
from train.data.tokenizer import EOT_ID, train_tokenizer

CONTEXT = 96
ARGS = ModelArgs(
    "openlm", hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
    head_dim=8, vocab_size=400, max_position_embeddings=CONTEXT,
)  # fmt: skip
MEMORY = MemoryConfig(hidden_size=16, num_hidden_layers=2, r=(4, 0, 2), branching=(3, 2, 2))
TOPICS = {"kind": "invented", "topics": 3, "entities_per_topic": 4, "frequencies": [1, 4]}


@pytest.fixture(autouse=True)
def limits_of_mlx() -> Iterator[None]:
    """A memory budget sets them for the whole process, and a low one changes what MLX takes."""
    memory, cache = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 30)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def save_anchor(folder: Path, seed: int) -> None:
    """A random anchor, strong enough that each of its answers is another."""
    mx.random.seed(seed)
    anchor = Model(ARGS)
    weights = {n: w * 3 if w.ndim > 1 else w for n, w in named_parameters(anchor).items()}
    save_safetensors(folder / "model.safetensors", weights)
    config = asdict(ARGS) | {"bos_token_id": EOT_ID, "eos_token_id": EOT_ID}
    (folder / "config.json").write_text(json.dumps(config))


def save_bank(folder: Path, config, anchor: str, tree: str, size=0.6, seed=0, **options) -> Path:
    """A bank of random blocks that change what the anchor says."""
    rng = np.random.default_rng(seed)

    def block(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(0, size, shape).astype(np.float32)

    levels = [[block(config.block_shape(level)) for _ in range(count)]
              for level, count in enumerate(config.num_clusters, 1)]  # fmt: skip
    generic = block(config.block_shape(0))
    shutil.rmtree(folder, ignore_errors=True)
    options = {"dtype": "float32", "anchor_hash": anchor, "tree_hash": tree} | options
    write_bank(folder, config, levels, generic, **options)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    documents, _ = make_facts(TOPICS | {"plain_documents": 60}, seed=1)
    return [document["text"] for document in documents]


@pytest.fixture(scope="session")
def model_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory: 18,000 parameters, 3 levels, the middle one without memory.

    For reading only; a test that changes something takes ``broken``.
    """
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(texts, ARGS.vocab_size, folder)
    save_anchor(folder, seed=0)
    (folder / "retriever").mkdir()
    encoder = load_encoder("static")
    tree = ClusterTree.fit(encoder.encode(texts), branching=MEMORY.branching)
    tree.save(folder / "retriever" / "tree.safetensors", encoder.fingerprint)
    retriever = RetrieverConfig(
        encoder="static",
        encoder_hash=encoder.fingerprint,
        tree_hash=fingerprint(folder / "retriever" / "tree.safetensors"),
    )
    hmem = HmemConfig(FORMAT_VERSION, MEMORY, retriever, anchor_hash(folder), **text_hashes(folder))
    save_bank(folder / "bank", MEMORY, hmem.anchor_hash, retriever.tree_hash)
    (folder / "hmem.json").write_text(hmem.to_json())
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> MemoryModel:
    return load(model_folder)


@pytest.fixture
def broken(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model directory that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrites a JSON file after ``change`` has altered its object in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture(scope="session")
def wide(model_folder, tmp_path_factory) -> Path:
    """A model that can be quantised, unlike ``model_folder``; for reading only."""
    from tests.convert.test_convert_quantize import make  # it imports from here

    return make(model_folder, tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="session")
def layout(model_folder, tmp_path_factory) -> Path:
    """The model of conftest in PyTorch's layout; for reading only."""
    from tests.helpers.memory_layouts import convert  # as above

    return convert(model_folder, tmp_path_factory.mktemp("torch") / "model", "--to", "pytorch")


@pytest.fixture(scope="session")
def torch_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of transformers, each in the folder of its name, with ids and logits."""
    from tests.helpers.anchor_checkpoints import HF  # as above
    from tests.helpers.programs import process

    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: pip install torch")
    folder = tmp_path_factory.mktemp("torch")
    made = process("tests/helpers/torch_models.py", "make", folder, *HF)
    assert made.status == 0, made.err[-2000:]
    return folder


@pytest.fixture
def torch_folder(layout, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(layout, tmp_path / "torch"))


@pytest.fixture
def directory(broken: Path) -> Path:
    """A model directory whose bank has many shards, with files beside it that no model needs."""
    from tests.helpers.hub_models import BLOCKS_PER_SHARD, cut_bank  # it imports from here

    cut_bank(broken, BLOCKS_PER_SHARD)
    (broken / "notes").mkdir()
    (broken / "notes" / "log.md").write_text("not for loading")
    (broken / "pytorch_model.bin").write_bytes(b"0" * 1000)
    return broken


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that huggingface_hub asks in this process, with an empty cache."""
    with Hub() as server:
        values = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_TOKEN_PATH": str(tmp_path / "no token"),
        }
        for name, value in values.items():
            monkeypatch.setattr(hub_constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def online(hub: Hub, directory: Path) -> Hub:
    from tests.helpers.hub_models import REPO  # as above

    hub.add(REPO, directory)
    return hub


@pytest.fixture
def known(broken: Path, model: MemoryModel, texts: list[str]) -> Path:
    """A model that knows what trained it: each text the leaf that it is routed to."""
    from tests.helpers.banks import document  # as above

    found = [document(text, [model.retriever.route(text)], model) for text in texts[:20]]
    write_documents(broken / "bank", found)
    return broken
