"""A model directory whose parts do not belong together is refused in one line, never gibberish."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem import load
from mlx_hmem.anchors.attach import attach_memory, memory_config
from mlx_hmem.anchors.load import INDEX, anchor_hash, load_anchor
from mlx_hmem.config import KINDS, HmemConfig, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, save_safetensors
from mlx_hmem.model.find import DEMO, find_model
from mlx_hmem.retriever import ClusterTree, load_encoder
from mlx_hmem.retriever.encoder import STATIC_FOLDER
from tests.conftest import ARGS, MEMORY, edit_json, save_anchor, save_bank
from tests.helpers.faults import flip
from tests.helpers.programs import refusing
from tests.helpers.references import of_kind
from train.data.tokenizer import train_tokenizer


def refused(folder: Path, *words: str) -> str:
    """Loads ``folder``; the error must be one line of three parts that holds ``words``."""
    with refusing("") as error:
        load(folder)
    text = str(error.value)
    assert all(part for part in (error.value.what, str(error.value.value), error.value.remedy))
    for word in words:
        assert word in text
    return text


def hmem_of(folder: Path) -> HmemConfig:
    return HmemConfig.from_file(folder / "hmem.json")


def replace_tree(folder: Path, tree: ClusterTree, encoder_hash: str) -> None:
    """Puts in another tree and ties hmem.json and the bank to it."""
    file = folder / "retriever" / "tree.safetensors"
    tree.save(file, encoder_hash)
    hash_ = fingerprint(file)
    edit_json(folder / "hmem.json", lambda h: h["retriever"].update(tree_hash=hash_))
    edit_json(folder / "bank" / "bank.json", lambda b: b.update(tree_hash=hash_))


def test_an_untouched_copy_loads_and_answers_as_the_original(broken, model, texts):
    copy = load(str(broken))
    path = copy.retriever.route(texts[0])
    ids = mx.array([copy.tokenizer.encode(texts[0])[:20]])
    assert path == model.retriever.route(texts[0])
    assert np.array_equal(np.array(copy(ids, [path])), np.array(model(ids, [path])))


@pytest.mark.parametrize("layers", ["all", "last 1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_with_any_kind_of_memory_loads_and_uses_it(broken, kind, layers, texts):
    anchor, _ = load_anchor(broken)
    config = memory_config(anchor, MEMORY.r, MEMORY.branching, **of_kind(kind)).placed(layers)
    hmem = hmem_of(broken)
    save_bank(broken / "bank", config, hmem.anchor_hash, hmem.retriever.tree_hash)
    (broken / "hmem.json").write_text(replace(hmem, memory=config).to_json())
    model, slot = load(broken), attach_memory(anchor, config)
    path = model.retriever.route(texts[0])
    ids = mx.array([model.tokenizer.encode(texts[0])[:12]])
    for memory, fetched in (("fetched", model.bank.fetch(path)), ("generic", model.bank.generic())):
        with slot.using(fetched.rows):
            wanted = anchor(ids)
        assert mx.abs(model(ids, [path], memory) - wanted).max().item() < 1e-5
        assert mx.abs(model(ids, memory="none") - wanted).max().item() > 0.05
    rows = model(mx.concatenate([ids, ids]), [path, (0, 0, 0)])
    assert mx.abs(rows[:1] - model(ids, [path])).max().item() < 1e-5
    pieces = list(model.stream(texts[0][:30], max_tokens=5))
    assert len(pieces) == 5


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("hmem.json", "hmem.json is missing"),
        ("config.json", "no config.json"),
        ("model.safetensors", "no anchor weights"),
        ("bank", "bank.json"),
        ("bank/bank.json", "bank.json"),
        ("bank/level-1.00000.safetensors", "lacks a file of level 1"),
        ("bank/generic.safetensors", "lacks a file of level 0"),
        ("retriever", "tree.safetensors"),
        ("retriever/tree.safetensors", "tree.safetensors"),
    ],
)
def test_a_missing_part_is_named(broken, part, words):
    path = broken / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(broken, words, str(broken))


def test_a_missing_tokenizer_is_named(broken):
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (broken / name).unlink()
    refused(broken, "no tokenizer", str(broken))


def test_the_demo_has_a_name_that_a_folder_may_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("demo") == DEMO
    (tmp_path / "demo").mkdir()
    assert find_model("demo") == Path("demo")


def test_an_anchor_without_memory_speaks_alone_and_says_so(broken, model, texts):
    (broken / "hmem.json").unlink()
    refused(broken, "hmem.json is missing")  # memory that nothing ties to the anchor
    shutil.rmtree(broken / "bank")
    shutil.rmtree(broken / "retriever")
    alone = load(broken)
    assert (alone.bank, alone.retriever) == (None, None)
    prompt = texts[0][:30]
    tokens = [p.token for p in alone.stream(prompt, max_tokens=9, memory="none")]
    assert tokens == [p.token for p in model.stream(prompt, max_tokens=9, memory="none")]
    for mode in ("fetched", "generic"):
        with pytest.raises(UserError, match="no memory bank"):
            alone.stream(prompt, memory=mode)
    with pytest.raises(UserError, match="no memory bank"):
        alone(mx.zeros((1, 2), mx.int32), [(0, 0, 0)])
    with pytest.raises(UserError, match="budget is too small"):
        load(broken, memory_budget=10)


def test_the_weights_of_another_anchor_are_refused(broken):
    save_anchor(broken, seed=1)
    refused(broken, "the anchor is not the one this memory was made for", "model.safetensors")


def test_another_config_or_tokenizer_is_refused(broken, texts):
    """They gave garbage, with status 0; a model of before names neither."""
    edit_json(broken / "config.json", lambda c: c.update(rope_theta=7.0))
    refused(broken, "the config is not the one this memory was made with", "config_hash")
    edit_json(broken / "hmem.json", lambda h: h.update(config_hash=None))
    load(broken)
    train_tokenizer([text[::-1] for text in texts], ARGS.vocab_size, broken)
    refused(broken, "the tokenizer is not the one this memory was made with", "tokenizer_hash")
    edit_json(broken / "hmem.json", lambda h: h.pop("tokenizer_hash"))
    assert not load(broken).bound


def test_a_weight_file_that_is_none_of_the_anchors_is_refused(broken, model, texts):
    """mlx-lm loads whatever is called model*.safetensors, the last over all before."""
    shutil.copy(broken / "model.safetensors", broken / "model-00001-of-00002.safetensors")
    refused(broken, "model-00001-of-00002.safetensors: model.safetensors is there")
    weights = mx.load(str(broken / "model.safetensors"))
    (broken / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-{n:05}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, own in files.items():
        save_safetensors(broken / file, {name: weights[name] for name in own})
    where = {name: file for file, own in files.items() for name in own}
    (broken / INDEX).write_text(json.dumps({"weight_map": where}))
    edit_json(broken / "hmem.json", lambda h: h.update(anchor_hash=anchor_hash(broken)))
    edit_json(broken / "bank" / "bank.json", lambda b: b.update(anchor_hash=anchor_hash(broken)))
    sharded = load(broken)
    assert [p.token for p in sharded.stream(texts[0][:30], max_tokens=9)] == [
        p.token for p in model.stream(texts[0][:30], max_tokens=9)
    ]
    save_anchor(broken, seed=1)
    refused(broken, f"model.safetensors: {INDEX} does not name it")
    (broken / "model.safetensors").unlink()
    (broken / "model-00002-of-00002.safetensors").unlink()
    refused(broken, "model-00002-of-00002.safetensors")


def test_a_bank_of_another_anchor_tree_or_shape_is_refused(broken):
    anchor, tree = hmem_of(broken).anchor_hash, hmem_of(broken).retriever.tree_hash
    for config, given, words in (
        (MEMORY, ("xxh3:another", tree), ["made for another anchor", "xxh3:another", anchor]),
        (MEMORY, (anchor, "xxh3:other"), ["made for another cluster tree", "xxh3:other", tree]),
        (
            MemoryConfig(16, 2, (2, 0, 2), MEMORY.branching), (anchor, tree),
            ["different memories", "r=(4, 0, 2)", "r=(2, 0, 2)"],
        ),
    ):  # fmt: skip
        save_bank(broken / "bank", config, *given)
        refused(broken, *words)
    save_bank(broken / "bank", MemoryConfig(24, 3, MEMORY.r, MEMORY.branching), anchor, tree)
    wider = {"hidden_size": 24, "num_hidden_layers": 3}
    edit_json(broken / "hmem.json", lambda h: h["memory"].update(wider))
    both = "memory: num_hidden_layers 3, hidden_size 24", "num_hidden_layers 2"
    refused(broken, "another anchor", *both)


def test_another_tree_or_the_tree_of_another_encoder_is_refused(broken, texts):
    encoder = load_encoder("static")
    vectors, hash_ = encoder.encode(texts), encoder.fingerprint
    other = ClusterTree.fit(vectors[::2], branching=MEMORY.branching)
    other.save(broken / "retriever" / "tree.safetensors", hash_)
    refused(broken, "the cluster tree is not the one this memory was made for")
    replace_tree(broken, ClusterTree.fit(vectors, branching=MEMORY.branching), "xxh3:another")
    refused(broken, "belongs to another encoder than static", "xxh3:another")
    replace_tree(broken, ClusterTree.fit(vectors, branching=(2, 2, 2)), hash_)
    refused(broken, "different clusters", "tree (2, 2, 2)", "bank (3, 2, 2)")


def test_a_changed_encoder_is_refused_and_its_copy_is_not(broken, model, texts):
    own = Path(shutil.copytree(STATIC_FOLDER, broken / "retriever" / "encoder"))
    edit_json(broken / "hmem.json", lambda h: h["retriever"].update(encoder="retriever/encoder"))
    assert load(broken).retriever.route(texts[0]) == model.retriever.route(texts[0])
    flip(own / "encoder.safetensors", -1000)
    refused(broken, "the encoder is not the one this memory was routed with", "retriever/encoder")
    shutil.rmtree(own)
    refused(broken, "no such encoder", str(own))
    hash_ = hmem_of(broken).retriever.encoder_hash
    edit_json(broken / "hmem.json", lambda h: h["retriever"].update(encoder="static"))
    assert load(broken).retriever.encoder.fingerprint == hash_


def test_a_shard_cut_short_is_refused_when_opened(broken):
    shard = broken / "bank" / "level-3.00000.safetensors"
    size = shard.stat().st_size
    with open(shard, "rb+") as file:
        file.truncate(size - 1)
    refused(broken, str(shard), f"{size - 1} bytes instead of {size}")


def test_a_flipped_bit_in_a_block_is_found_when_the_block_is_used(broken, model, texts):
    path = model.retriever.route(texts[0])
    other = next(t for t in texts if model.retriever.route(t)[0] != path[0])
    stride, shard = 16384, broken / "bank" / "level-1.00000.safetensors"
    flip(shard, stride * (1 + path[0]) + 77, bit=2)
    damaged = load(broken)
    assert damaged.fetch(other).bytes_read
    assert damaged.fetch(texts[0], memory="generic").bytes_read
    with pytest.raises(UserError, match=f"level 1, cluster {path[0]} of the bank is damaged"):
        damaged.fetch(texts[0])
    fetch = damaged.fetch(texts[0], blocked=[path[:1]])
    assert (fetch.blocks, fetch.bytes_read) == ([], 0)


@pytest.mark.parametrize("name", ["hmem.json", "bank/bank.json"])
@pytest.mark.parametrize("version", [2, 0, True, 1.0, "1", None])
def test_another_format_version_is_refused(broken, name, version):
    edit_json(broken / name, lambda values: values.update(format_version=version))
    text = refused(broken, str(broken / name), repr(version), "it reads version 1")
    assert "update mlx_hmem" in text


def test_a_place_that_is_no_model_directory_is_refused(tmp_path, model_folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "not a model directory", str(tmp_path / "empty"))
    refused(tmp_path / "nowhere", "no such model directory", str(tmp_path / "nowhere"))
    refused(model_folder / "hmem.json", "no such model directory")
    refused(Path("~nobody-of-this-name/model"), "no such model directory")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(Path("nobody/of-this-name"), "nobody/of-this-name", "the Hub does not give it")
    refused(Path("nobody!/of this name"), "the Hub does not give it")


def test_an_encoder_outside_the_model_is_refused(broken: Path) -> None:
    edit_json(broken / "hmem.json", lambda v: v["retriever"].update(encoder="../elsewhere"))
    with pytest.raises(UserError, match="outside the model"):
        load(broken)
