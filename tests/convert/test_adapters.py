"""Adapters of PEFT and mlx-lm say beside one anchor what their own library makes of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from convert.adapters import bank
from convert.command import main
from mlx_hmem import load
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.bank_tools.command import main as bank_main
from mlx_hmem.files import save_safetensors
from mlx_hmem.generation.batch import batch_generate
from mlx_hmem.generation.chat import main as chat_main
from mlx_hmem.generation.command import main as generate_main
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.memory import split_block
from tests.conftest import edit_json
from tests.helpers.faults import stop_at
from tests.helpers.mlx_adapters import save_adapter
from tests.helpers.places import ROOT, bytes_of
from tests.helpers.programs import refused
from tests.helpers.tiny_anchors import LLAMA_LIKE, make_anchor

LLAMA = LLAMA_LIKE | {"model_type": "llama", "vocab_size": 400, "eos_token_id": 0, "head_dim": 8}
NAMES = ("sql", "law", "verse")
IDS = mx.array([[5, 17, 200, 3, 99, 31, 8], [1, 2, 3, 4, 5, 6, 7]])
TEXTS = {
    "sql": "select the rows of a table where the key is null",
    "law": "the court finds that the contract is void",
    "verse": "the moon and the sea and a song of the night",
}


def adapters(*words, anchor: Path, out: Path, texts=()) -> Path:
    options = ["--texts", *texts] if texts else []
    main(["adapters", *map(str, words), "--anchor", str(anchor), str(out), *options])
    return out


@pytest.fixture(scope="module")
def anchor(model_folder, tmp_path_factory) -> Path:
    """A tiny llama with a tokenizer; for reading only."""
    folder = tmp_path_factory.mktemp("anchor") / "llama"
    folder.mkdir()
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    weights = named_parameters(make_anchor("llama"))
    mx.random.seed(3)
    weights["model.embed_tokens.weight"] = mx.random.normal((400, 32)) * 0.1
    save_safetensors(folder / "model.safetensors", {n: w * 2 for n, w in weights.items()})
    return folder


@pytest.fixture(scope="module")
def saved(anchor, tmp_path_factory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    keys = {"sql": {}, "law": {"keys": ["self_attn.q_proj"]}, "verse": {"scale": 2.5}}
    return [save_adapter(anchor, place / n, i, **keys[n]) for i, n in enumerate(NAMES)]


@pytest.fixture(scope="module")
def named(anchor, saved, tmp_path_factory) -> Path:
    """The three beside one anchor, chosen by name; for reading only."""
    return adapters(*saved, anchor=anchor, out=tmp_path_factory.mktemp("named") / "model")


@pytest.fixture(scope="module")
def routed(anchor, saved, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("routed")
    (place / "sql").mkdir()
    (place / "sql" / "a.txt").write_text(TEXTS["sql"])
    for name in NAMES[1:]:
        (place / f"{name}.jsonl").write_text(json.dumps({"text": TEXTS[name]}))
    texts = [f"sql={place / 'sql'}", *(f"{n}={place / n}.jsonl" for n in NAMES[1:])]
    return adapters(*saved, anchor=anchor, out=place / "model", texts=texts)


@pytest.mark.parametrize("name", NAMES)
def test_mlx_lms_adapter_says_what_mlx_lm_makes_of_it(anchor, saved, named, name):
    model = load(named)
    wanted, _ = mlx_lm.load(str(anchor), adapter_path=str(saved[NAMES.index(name)]))
    logits = model(IDS, [model.path_named(name)])
    assert mx.abs(logits - wanted(IDS)).max().item() < 1e-5
    assert mx.abs(logits - model(IDS, memory="none")).max().item() > 1e-2
    assert model.bank.config.layers == (1, 2)


@pytest.fixture(scope="module")
def of_peft(model_folder, tmp_path_factory) -> Path:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("peft", reason="PEFT is not installed")
    place, script = tmp_path_factory.mktemp("peft"), ROOT / "tests/helpers/peft_adapters.py"
    words = [sys.executable, script, place, "llama", "qwen3", "phi3"]
    subprocess.run(words, check=True, capture_output=True)
    for name in ("llama", "qwen3", "phi3"):
        for file in model_folder.glob("tokenizer*"):
            shutil.copy(file, place / name)
        main([str(place / name), str(place / f"{name}.mlx")])
    return place


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_pefts_adapters_say_what_peft_makes_of_them(of_peft, tmp_path, capsys, name):
    folders = sorted(f for f in of_peft.glob(f"{name}-*"))
    out = adapters(*folders, anchor=of_peft / f"{name}.mlx", out=tmp_path / "out")
    said = capsys.readouterr().err
    assert "no power of two, is rounded to float32" in said
    assert "dropout 0.1 is for training" in said
    model = load(out)
    ids = mx.array(np.load(of_peft / name / "ids.npy"))
    alone = np.array(model(ids, memory="none"))
    for folder in folders:
        logits = np.array(model(ids, [model.path_named(folder.name)]))
        assert np.abs(logits - alone).max() > 1e-3
        for file in ("logits.npy", "merged.npy"):
            assert np.abs(logits - np.load(folder / file)).max() < 1e-5, (folder.name, file)


def test_one_adapter_alone_is_exact_and_leaves_the_other_cluster_without_effect(
    anchor, saved, tmp_path
):
    out = adapters(f"one={saved[0]}", anchor=anchor, out=tmp_path / "out")
    model = load(out)
    assert model.bank.config.branching == (2,)
    assert mx.array_equal(model(IDS, [(1,)]), model(IDS, memory="none"))
    hmem = json.loads((out / "hmem.json").read_text())
    assert hmem["names"] == {"one": [0]}
    assert hmem["retriever"] is None
    assert hmem["memory"]["targets"] == ["query", "key", "value", "output", "gate", "up", "down"]


def test_texts_choose_the_adapter_that_they_belong_to_and_a_name_still_does(routed):
    model = load(routed)
    for index, name in enumerate(NAMES):
        assert model.retriever.route(TEXTS[name]) == model.path_named(name) == (index,)
    by_text = model.fetch(TEXTS["law"])
    by_name = model.fetch(TEXTS["law"], memory_name="verse")
    assert (by_text.path, by_name.path) == ((1,), (2,))
    assert by_name.line().startswith("memory: fetched verse (2,)")
    assert by_name.to_dict()["name"] == "verse"


def test_what_is_made_of_a_routed_model_keeps_the_names(routed, tmp_path, capsys):
    bank_main(["split", str(routed), "1", "--out", str(tmp_path / "law")])
    model, alone = load(routed), load(tmp_path / "law")
    assert alone.require_banks().names == ["law"]
    logits = alone(IDS, [alone.path_named("law")])
    assert mx.array_equal(logits, model(IDS, [model.path_named("law")]))
    main([str(routed), str(tmp_path / "torch"), "--to", "pytorch"])
    assert "left out: the names of memories" in capsys.readouterr().err
    main([str(tmp_path / "torch"), str(tmp_path / "back")])
    assert mx.array_equal(load(tmp_path / "back")(IDS, [(1,)]), logits)


def test_rows_of_a_batch_have_a_name_each_and_say_what_each_says_alone(named):
    model, prompts = load(named), ["The contract", "A song of", "select the", "The contract"]
    names = ["law", "verse", "sql", "sql"]
    together = batch_generate(model, prompts, memory_names=names, max_tokens=[9, 2, 5, 7],
                              completion_batch_size=2)  # fmt: skip
    limits = [9, 2, 5, 7]
    for prompt, name, found, limit in zip(prompts, names, together, limits, strict=True):
        (alone,) = batch_generate(model, [prompt], memory_names=[name], max_tokens=limit)
        assert (found.tokens, found.path) == (alone.tokens, model.path_named(name))
        pieces = model.stream(prompt, memory_name=name, max_tokens=limit)
        assert "".join(piece.text for piece in pieces) == found.text
    assert together[0].tokens[:7] != together[3].tokens
    refused("known: sql, law, verse", batch_generate, model, ["a"], memory_names=["cook"])
    refused("memory_names does not match", batch_generate, model, ["a"], memory_names=["a", "b"])
    refused("no cluster tree.*sql, law, verse", batch_generate, model, ["a"])


def test_a_conversation_keeps_its_answer_while_the_name_changes(named):
    model = load(named)
    alone = "".join(piece.text for piece in model.stream("The court", memory_name="law",
                                                         max_tokens=8))  # fmt: skip
    talk = Conversation(model, memory_name="law", max_tokens=8)
    pieces = talk.say("The court")
    said = [next(pieces).text, next(pieces).text]
    talk.set_name("verse")
    model.fetch("", memory_name="sql")
    assert "".join([*said, *(piece.text for piece in pieces)]) == alone
    talk.reset()
    list(talk.say("The court"))
    assert (talk.fetch.name, talk.fetch.path) == ("verse", (2,))
    refused("known: sql, law, verse", talk.set_name, "cook")
    refused("no cluster tree", talk.set_name, None)
    refused("no cluster tree", Conversation, model)


def test_generate_and_chat_take_a_name_and_say_which_there_are(named, capsys, monkeypatch):
    words = ["--model", str(named), "-p", "The court", "-m", "4"]
    generate_main([*words, "--memory-name", "law", "--json"])
    assert json.loads(capsys.readouterr().out)["memory"]["name"] == "law"
    refused("chosen by name: sql, law, verse; .*--memory-name", generate_main, words)
    refused("no memory of this name: .*cook.*known: sql, law, verse", generate_main,
            [*words, "--memory-name", "cook"])  # fmt: skip
    refused("memory none is not chosen by name", generate_main,
            [*words, "--memory-name", "law", "--memory", "none"])  # fmt: skip
    generate_main([*words, "--memory", "none"])
    refused("chosen by name: sql, law, verse", chat_main, ["--model", str(named)])


def test_the_bank_is_inspected_and_verified_without_a_tree(named, tmp_path, capsys):
    bank_main(["inspect", str(named)])
    assert "chosen by name: sql (0,), law (1,), verse (2,)" in capsys.readouterr().out
    bank_main(["verify", str(named)])
    assert "sound" in capsys.readouterr().out
    words = ["split", str(named), "0", "--out", str(tmp_path / "out")]
    refused("no cluster tree: it is chosen by name: sql", bank_main, words)


@pytest.mark.parametrize("place", ["copy_missing", "rewrite_bank", "write_atomic"])
def test_stopped_it_is_no_model_and_goes_on_with_the_same_command(
    anchor, saved, named, tmp_path, monkeypatch, place
):
    stop_at(monkeypatch, bank, place, 1)
    with pytest.raises(KeyboardInterrupt):
        adapters(*saved, anchor=anchor, out=tmp_path / "out")
    monkeypatch.undo()
    refused("", load, tmp_path / "out.part")
    assert not (tmp_path / "out").exists()
    assert bytes_of(adapters(*saved, anchor=anchor, out=tmp_path / "out")) == bytes_of(named)
    assert not (tmp_path / "out.part").exists()
    refused("exists", adapters, *saved, anchor=anchor, out=tmp_path / "out")


def test_damaged_files_of_an_adapter_are_one_line(anchor, saved, tmp_path):
    whole = (saved[0] / "adapters.safetensors").read_bytes()
    header = b'{"a.lora_a":{"dtype":"F32","shape":[1152921504606846976,16],"data_offsets":[0,4]}}'
    huge = len(header).to_bytes(8, "little") + header + bytes(4)
    for number, data in enumerate((b"", whole[:-1], whole + b"0", huge, b"\x80\x02" + whole)):
        wrong = Path(shutil.copytree(saved[0], tmp_path / f"wrong-{number}"))
        (wrong / "adapters.safetensors").write_bytes(data)
        refused("", adapters, wrong, anchor=anchor, out=tmp_path / "out")
    for number, text in enumerate(("", "[1]", "[" * 9000, '{"peft_type":1}', '{"a":1,"a":2}')):
        wrong = Path(shutil.copytree(saved[0], tmp_path / f"wrong-json-{number}"))
        (wrong / "adapter_config.json").write_text(text)
        refused("", adapters, wrong, anchor=anchor, out=tmp_path / "out")


@pytest.mark.parametrize(
    "names", [{}, [], {"a": [0, 1]}, {"a": [9]}, {"a": ["0"]}, {"a": 0}, {"": [0]}, None], ids=repr
)
def test_wrong_names_in_hmem_json_are_refused(named, tmp_path, names):
    copy = Path(shutil.copytree(named, tmp_path / "model"))
    edit_json(copy / "hmem.json", lambda values: values.update(names=names))
    refused("", load, copy)


def changed(folder: Path, place: Path, **keys) -> Path:
    """A copy of an adapter whose config has other values."""
    copy = Path(shutil.copytree(folder, place))
    edit_json(copy / "adapter_config.json", lambda values: values.update(keys))
    return copy


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type 'dora'; merge it"),
        ({"fine_tune_type": "full"}, "fine_tune_type 'full'"),
        ({"lora_parameters": {"rank": 3}}, "scale of lora_parameters is not a number"),
        ({"lora_parameters": {"rank": 3, "scale": True}}, "scale"),
        ({"lora_parameters": {"rank": 3, "scale": 1e300}}, "scale"),
        ({"lora_parameters": {"rank": 5, "scale": 1.0}}, "another rank than its weights: 5"),
        ({"lora_parameters": [1]}, "scale"),
        ({"peft_type": "LORA"}, "it needs adapter_model.safetensors or adapter_model.bin"),
    ],
    ids=repr,
)
def test_what_mlx_lms_config_says_otherwise_is_refused(anchor, saved, tmp_path, keys, words):
    wrong = changed(saved[0], tmp_path / "wrong", **keys)
    refused(words, adapters, wrong, anchor=anchor, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", "bias": "none"}
Q = "base_model.model.model.layers.1.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.default.weight": (2, 32), f"{Q}.lora_B.default.weight": (32, 2)}


def save_peft(folder: Path, shapes=PAIR, **keys) -> Path:
    folder.mkdir()
    tensors = {name: mx.ones(shape) for name, shape in shapes.items()}
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | keys))
    return folder


@pytest.mark.parametrize(
    ("dtype", "alpha", "stored"),
    [("bfloat16", 4, "bfloat16"), ("bfloat16", 8, "bfloat16"), ("bfloat16", 6, "float32"),
     ("float16", 4, "float16"), ("float16", 2, "float32"), ("float32", 6, "float32")],
)  # fmt: skip
def test_the_bank_has_a_dtype_in_which_the_adapter_is_exact(anchor, tmp_path, dtype, alpha, stored):
    folder = save_peft(tmp_path / "one", lora_alpha=alpha)  # of rank 2
    mx.random.seed(0)
    a, b = (mx.random.normal(shape).astype(getattr(mx, dtype)) for shape in PAIR.values())
    tensors = dict(zip(PAIR, (a, b), strict=True))
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    with load(adapters(folder, anchor=anchor, out=tmp_path / "out")).bank as opened:
        assert opened.dtype == stored
        groups = split_block(opened.blocks([(1, 0)])[0].astype(mx.float32), opened.config)
        assert mx.array_equal(groups[0][0, 0], a.astype(mx.float32))
        assert mx.array_equal(groups[1][0, 0], b.astype(mx.float32).T * (alpha / 4))
        assert not opened.blocks([(1, 1)])[0].any()


def renamed(old: str, new: str) -> dict:
    return {name.replace(old, new): shape for name, shape in PAIR.items()}


@pytest.mark.parametrize(
    ("shapes", "keys", "words"),
    [
        (PAIR, {"peft_type": "IA3"}, "peft_type 'IA3'"),
        (PAIR, {"use_dora": True}, "use_dora True; merge it into the model"),
        (PAIR, {"modules_to_save": ["lm_head"]}, "modules_to_save .*merge_and_unload"),
        (PAIR, {"bias": "all"}, "bias 'all'"),
        # PEFT subtracts it from the anchor's weights, in training and whenever it loads.
        (PAIR, {"init_lora_weights": "pissa_niter_4"}, "changing the anchor's .*merge it into"),
        (PAIR, {"target_modules": ["q_proj"]}, "missing: layers.0.self_attn.q_proj"),
        (PAIR, {"layer_replication": [[0, 2]]}, "layer_replication"),
        (PAIR, {"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        (PAIR, {"rank_pattern": {"(a+)+$": 3}}, "rank_pattern names no modules"),
        (PAIR, {"rank_pattern": {"q_proj": 3}}, "another rank than its weights: 3"),
        (PAIR, {"alpha_pattern": {"q_proj": "much"}}, "lora_alpha is not a number"),
        (PAIR, {"lora_alpha": 1e400}, "is not valid JSON"),
        (PAIR, {"r": 0}, "another rank"),
        (renamed("model.layers.1.self_attn.q_proj", "lm_head"), {}, "no projection .*lm_head"),
        (renamed("layers.1", "layers.7"), {}, "no projection of a layer: .*layers.7"),
        (renamed("lora_A", "lora_embedding_A"), {}, "left over: .*lora_embedding_A"),
        ({n: s for n, s in PAIR.items() if "_A" in n}, {}, "missing: .*lora_B"),
        (PAIR | {f"{Q}.lora_B.default.weight": (48, 2)}, {}, "32 to 48 .*the anchor's 32 to 32"),
        (PAIR | {f"{Q}.lora_A.default.weight": (3, 32)}, {}, "rank 3 and 2"),
        (PAIR | {f"{Q}.lora_magnitude_vector": (32,)}, {}, "left over: .*magnitude"),
        ({}, {}, "without tensors"),
    ],
    ids=str,
)  # fmt: skip
def test_what_pefts_adapter_has_beyond_lora_is_refused_by_name(
    anchor, tmp_path, shapes, keys, words
):
    wrong = save_peft(tmp_path / "wrong", shapes, **keys)
    refused(words, adapters, wrong, anchor=anchor, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_words_of_the_command_are_refused(anchor, saved, tmp_path):
    def run(words, *given, texts=()):
        out = tmp_path / "out"
        refused(words, adapters, *given, anchor=anchor, out=out, texts=texts)

    run("two adapters of one name", saved[0], f"sql={saved[1]}")
    run("wrong name of a memory", f"1 2={saved[0]}")
    run("no such folder", tmp_path / "none")
    run("no adapter_config.json", anchor)
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "empty.txt").write_text("\n")
    run("--texts names no adapter", saved[0], texts=[f"law={tmp_path / 'a.txt'}"])
    run("cannot be routed to: law", *saved[:2], texts=[f"sql={tmp_path / 'a.txt'}"])
    run("no texts to route by", saved[0], texts=[f"sql={tmp_path / 'empty.txt'}"])
    run("nothing to convert")
