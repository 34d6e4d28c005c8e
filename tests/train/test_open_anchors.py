"""Memory for anchors of other architectures: from a folder with a model to one with a memory."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import quantize_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlx_hmem import load
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.texts import records
from mlx_hmem.files import save_safetensors
from tests.helpers.programs import refused
from tests.helpers.tiny_anchors import LLAMA_LIKE, OTHER_KEYS
from tests.train.test_paper_recipes import FOLDER, MEMORY, SMALL
from train.corpus.facts import make_facts
from train.data.tokenizer import eot_of, load_tokenizer
from train.data.windows import load_windows
from train.recipe.recipe import Recipe, load_recipe
from train.stages import STAGES, run_stages

FACTS = {"kind": "invented", "topics": 4, "entities_per_topic": 4, "frequencies": [1, 8]}
FACTS |= {"plain_documents": 80}
SCALED = [*SMALL, *MEMORY, "memories.training.steps=16", "memories.training.learning_rate=2e-2"]
SHIFT = 66_000  # ids that 16 bits do not hold


def save_tokenizer(folder: Path, begins: bool, shift: int = 0) -> int:
    """A byte-level BPE tokenizer as published models have it; returns the size of its vocabulary.

    ``begins``: it puts a token of its own in front of a text, as Llama's and Gemma's do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    documents, _ = make_facts(FACTS, seed=1)
    tokenizer.train_from_iterator([document["text"] for document in documents], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    values = json.loads(tokenizer.to_str())
    for token in values["added_tokens"]:
        token["id"] += shift
    for token in ((values["post_processor"] or {}).get("special_tokens") or {}).values():
        token["ids"] = [i + shift for i in token["ids"]]
    values["model"]["vocab"] = {t: i + shift for t, i in values["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    config |= {"bos_token": "<|begin|>"} if begins else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return shift + tokenizer.get_vocab_size()


def save_model(
    folder: Path, name: str, begins: bool, shift: int = 0, dtype: mx.Dtype = mx.float32,
    bits: int | None = None, shards: int = 1,
) -> Path:  # fmt: skip
    """A tiny random model of mlx-lm in a folder, as it would come from the Hub."""
    folder.mkdir()
    vocab_size = save_tokenizer(folder, begins, shift)
    values: dict[str, Any] = dict(LLAMA_LIKE, model_type=name, **OTHER_KEYS.get(name, {}))
    values |= {"vocab_size": vocab_size, "eos_token_id": shift, "tie_word_embeddings": False}
    code = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = code.Model(code.ModelArgs.from_dict(values))
    model.set_dtype(dtype)
    if bits is not None:
        model, values = quantize_model(model, values, group_size=32, bits=bits)
    weights = list(named_parameters(model).items())
    for i in range(shards):
        part = "" if shards == 1 else f"-{i + 1:05}-of-{shards:05}"
        save_safetensors(folder / f"model{part}.safetensors", dict(weights[i::shards]))
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def recipe_of(file: str, source: Path, *more: str) -> Recipe:
    return load_recipe(FOLDER / file, [*SCALED, f"anchor.path={source}", *more])


MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b.yaml": dict(name="llama", begins=True, shards=2),
    "qwen-2.5-0.5b.yaml": dict(name="qwen2", begins=False, bits=4),
    "gemma-3-270m.yaml": dict(name="gemma3_text", begins=True, dtype=mx.bfloat16),
}


@pytest.mark.parametrize("file", MODELS)
def test_a_frozen_model_gets_a_memory_and_stays_as_it_was(tmp_path, file):
    source, run = save_model(tmp_path / "source", **MODELS[file]), tmp_path / "run"
    before = {f.name: f.read_bytes() for f in source.iterdir()}
    recipe = recipe_of(file, source)
    run_stages(recipe, run, [name for name in STAGES if name != "report"])
    assert {f.name: f.read_bytes() for f in source.iterdir()} == before
    windows, text = load_windows(run), next(iter(records(run / "corpus" / "train.jsonl")))
    assert windows.begin == ((0, 1) if MODELS[file]["begins"] else (0,))
    assert windows.tokens.dtype == np.uint16
    assert text.startswith(next(windows.texts(load_tokenizer(run))))
    losses = [json.loads(line)["loss"] for line in (run / "memories" / "loss.jsonl").open()]
    assert np.mean(losses[-4:]) < losses[0] - 0.1

    shutil.rmtree(source)  # the model directory stands alone
    model = load(run / "model")
    for name, data in before.items():
        assert (run / "model" / name).read_bytes() == data, name
    path = model.retriever.route(text)
    ids = mx.array([model.tokenizer.encode(text)[:40]])
    anchor, _ = load_anchor(run / "anchor")
    alone = anchor(ids)
    assert mx.array_equal(model(ids, memory="none"), alone)
    for memory in ("fetched", "generic"):
        assert mx.abs(model(ids, [path], memory) - alone).max().item() > 0.05
        assert len(list(model.stream(text[:20], max_tokens=4, memory=memory))) >= 1


def test_ids_beyond_16_bits_come_through_to_training(tmp_path):
    source = save_model(tmp_path / "source", "llama", begins=True, shift=SHIFT)
    short = ["memories.training.steps=1", "memories.group_by_subtree=false"]
    recipe, run = recipe_of("llama-3.2-1b.yaml", source, *short), tmp_path / "run"
    run_stages(recipe, run, list(STAGES)[: list(STAGES).index("memories") + 1])
    assert (load_windows(run).begin, eot_of(run)) == ((SHIFT, SHIFT + 1), SHIFT)
    for folder in ("windows", "anchor-sequences", "sequences"):
        tokens = np.load(run / folder / "tokens.npy")
        assert tokens.dtype == np.uint32
        assert tokens.min() == SHIFT
        assert tokens.max() > SHIFT + 300
    (line,) = (run / "memories" / "loss.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(np.log(SHIFT + 380), abs=0.5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_another_architecture_is_trained_along_and_trained_on(tmp_path, name):
    """In float32, though it is stored as bfloat16."""
    source = save_model(tmp_path / "source", name, begins=True, dtype=mx.bfloat16)
    recipe = recipe_of(
        "llama-3.2-1b.yaml", source, "memories.group_by_subtree=false",
        "anchor.training={steps: 4, batch_size: 4, document_mask: false}",
        "memories.cotrain={generic_probability: 0.3}",
        "dense.training={steps: 4, batch_size: 4, document_mask: false}",
    )  # fmt: skip
    run_stages(recipe, tmp_path / "run", list(STAGES))
    start = named_parameters(load_anchor(source)[0])
    trained = named_parameters(load_anchor(tmp_path / "run" / "anchor")[0])
    model = load(tmp_path / "run" / "model")
    for key, weight in named_parameters(model.anchor).items():
        assert trained[key].dtype == weight.dtype == mx.float32
        assert not mx.array_equal(trained[key], start[key].astype(mx.float32)), key
        assert not mx.array_equal(trained[key], weight), key
    results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())
    scores = {p["memory"]: p["per_token"] for p in results["perplexity"]}
    assert scores["fetched"] < scores["anchor alone"] < 380


def test_the_text_of_a_document_makes_no_special_token(tmp_path):
    save_model(tmp_path / "source", "qwen2", begins=False)
    recipe = recipe_of("qwen-2.5-0.5b.yaml", tmp_path / "source")
    run_stages(recipe, tmp_path / "run", ["corpus", "tokenizer"])
    tokenizer = load_tokenizer(tmp_path / "run")
    ids = tokenizer.encode("one <|end|> two")
    assert eot_of(tmp_path / "run") == 0
    assert 0 not in ids
    assert tokenizer.decode(ids) == "one <|end|> two"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["memories.training.document_mask=true"], "memories.training.document_mask to false"),
        (["anchor.training={}"], "anchor.training.document_mask to false"),
        (["anchor.training={document_mask: false}"], "set anchor.training to null"),
        (["memories.cotrain={}"], "set memories.cotrain to null"),
        (["windows.context=256"], "use at most 128"),
        (["tokenizer.path=some/where"], "leave tokenizer.path out"),
        (["memories.kind=moe"], "unknown memory kind"),
        (["memories.layers=last 9"], "no such placement"),
    ],
)
def test_what_such_an_anchor_cannot_do_is_said_before_anything_starts(tmp_path, more, words):
    source = save_model(tmp_path / "source", "qwen2", begins=False, bits=4)
    refused(words, recipe_of, "qwen-2.5-0.5b.yaml", source, *more)


def test_an_unknown_anchor_and_a_tokenizer_with_more_ids_than_embeddings_are_refused(tmp_path):
    for path, words in ((tmp_path / "none", "no such model directory"), (tmp_path, "config.json")):
        refused(words, recipe_of, "qwen-2.5-0.5b.yaml", path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    refused("", recipe_of, "qwen-2.5-0.5b.yaml", tmp_path)
    # As transformers 5 writes it: said before hours of preparing text, not after.
    rope = {"model_type": "llama", "rope_parameters": {"rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps(rope))
    refused(f"rope_parameters in {tmp_path}", recipe_of, "qwen-2.5-0.5b.yaml", tmp_path)
    source = save_model(tmp_path / "source", "qwen2", begins=False)
    values = json.loads((source / "config.json").read_text()) | {"vocab_size": 300}
    (source / "config.json").write_text(json.dumps(values))
    recipe = recipe_of("qwen-2.5-0.5b.yaml", source)
    with pytest.raises(UserError, match="ids that the anchor does not know"):
        run_stages(recipe, tmp_path / "run", ["corpus", "tokenizer", "windows"])
