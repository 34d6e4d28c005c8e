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
from mlx_hmem.bank_tools.command import main as bank_main
from mlx_hmem.generation.batch import batch_generate
from mlx_hmem.generation.chat import main as chat_main
from mlx_hmem.generation.command import main as generate_main
from mlx_hmem.generation.conversation import Conversation
from tests.helpers.faults import stop_at
from tests.helpers.mlx_adapters import ADAPTERS as NAMES
from tests.helpers.mlx_adapters import adapters
from tests.helpers.places import ROOT, bytes_of
from tests.helpers.programs import refused

IDS = mx.array([[5, 17, 200, 3, 99, 31, 8], [1, 2, 3, 4, 5, 6, 7]])
TEXTS = {
    "sql": "select the rows of a table where the key is null",
    "law": "the court finds that the contract is void",
    "verse": "the moon and the sea and a song of the night",
}


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


def test_one_adapter_alone_has_the_one_cluster(anchor, saved, tmp_path):
    out = adapters(f"one={saved[0]}", anchor=anchor, out=tmp_path / "out")
    model = load(out)
    assert model.bank.config.branching == (1,)
    assert not mx.array_equal(model(IDS, [(0,)]), model(IDS, memory="none"))
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
