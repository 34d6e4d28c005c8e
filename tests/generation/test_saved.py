"""A conversation goes on from its file as if it had never stopped, or is refused in a line."""

import json
import os
import random

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_hmem import load
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.files import load_safetensors, read_safetensors_header, save_safetensors
from mlx_hmem.generation.chat import main
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.generation.history import MARK, KeyValues, Saved, digest_of, read_saved
from mlx_hmem.model.fetch import Fetch
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.reading import sealed
from tests.bank.test_views import Reads, write_views
from tests.conftest import MEMORY, edit_json, save_anchor, save_bank
from tests.generation.test_conversation import OPTIONS, TEMPLATE
from tests.helpers.faults import flip
from tests.helpers.programs import refused, run
from tests.helpers.tiny_anchors import OTHER_KEYS, make_anchor

TALK = ["Who?", "The old bay", "Why?"]
NEXT = ["Where does it lie?", "And when was it?"]


@pytest.fixture
def chatty(broken):
    """The folder of the tiny model, with a chat template."""
    edit_json(broken / "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE))
    return broken


def held(model: MemoryModel, **options) -> Conversation:
    """After some turns."""
    talk = Conversation(model, **OPTIONS | options)
    for text in TALK:
        list(talk.say(text))
    return talk


def answers(talk: Conversation) -> list[tuple[int, list[float]]]:
    """What comes next, to the last bit."""
    return [(p.token, p.logprobs.tolist()) for text in NEXT for p in talk.say(text)]


@pytest.mark.parametrize("memory", ["fetched", "generic", "none"])
@pytest.mark.parametrize("history", [True, False])
def test_the_next_answers_are_those_of_the_conversation_that_went_on(
    chatty, tmp_path, memory, history
):
    talk = held(load(chatty), memory=memory, history=history, margin=0.1, system="Be brief.")
    talk.save(tmp_path / "talk")
    other = Conversation(load(chatty), **OPTIONS | {"margin": 0.1})
    list(other.say("Something else"))
    other.load(tmp_path / "talk")
    assert other.turns == talk.turns
    seen = talk._known.ids
    assert other._known.ids == seen != []
    assert answers(other) == answers(talk)
    assert (other.route, other.memory, other.system) == (talk.route, memory, "Be brief.")


def test_processing_the_history_again_gives_another_answer(chatty, tmp_path):
    """So the keys and values must be in the file."""
    talk = held(load(chatty))
    talk.save(tmp_path / "talk")
    other = Conversation(load(chatty), **OPTIONS)
    other.load(tmp_path / "talk")
    other._known = KeyValues(other.model.anchor)
    assert answers(other) != answers(talk)


def test_a_view_that_bars_more_reads_and_keeps_nothing_of_what_it_bars(
    chatty, tmp_path, monkeypatch
):
    wide = held(load(chatty))
    wide.save(tmp_path / "talk")
    path = wide.route
    write_views(chatty, guest=[list(path[:1])], all=[])

    def loaded(view: str, **options) -> Conversation:
        talk = Conversation(load(chatty, view=view, cache_bytes=0), **OPTIONS | options)
        talk.load(tmp_path / "talk")
        return talk

    for talk in (loaded("guest"), loaded("all", blocked=[path[:1]], memory="none")):
        talk.set_memory("fetched")
        assert talk._topic.present == path
        assert talk._known.ids == []  # they hold what the barred blocks said
        reads = Reads(monkeypatch)
        list(talk.say(TALK[-1]))
        talk._begin_prefetch(talk.model.retriever.vector(TALK[-1]), talk.fetch)
        assert reads.of(chatty, talk.model.bank, path[:1]) == []
    free = loaded("all")
    assert free._known.ids == wide._known.ids
    reads = Reads(monkeypatch)
    list(free.say(TALK[-1]))
    assert reads.of(chatty, free.model.bank, path[:1])  # else the test could not fail


def test_what_is_barred_from_the_start_is_not_read_ahead_later(broken):
    """``memory`` none had nothing to bar."""
    talk = Conversation(load(broken), memory="none", blocked=[(1,)], max_tokens=2)
    assert talk._barred == {(1, 1)}


def test_another_anchor_tokenizer_or_bank_is_refused(chatty, model_folder, tmp_path):
    talk = held(load(chatty))
    file = tmp_path / "talk"
    talk.save(file)
    bank = load(chatty).bank
    save_bank(chatty / "bank", MEMORY, bank.anchor_hash, bank.tree_hash, seed=1)
    changed = load(chatty)
    refused("held with another bank", Conversation(changed).load, file)
    for name in ("hmem.json", "bank", "retriever"):
        (chatty / name).rename(tmp_path / name)
    talk = held(load(chatty), memory="none")
    talk.save(tmp_path / "bare")
    assert answers(held(load(chatty), memory="none")) == answers(talk)
    refused("another bank", talk.load, file)
    save_anchor(chatty, seed=1)
    other = Conversation(load(chatty), memory="none")
    refused("held with another anchor", other.load, tmp_path / "bare")
    save_anchor(chatty, seed=0)
    edit_json(chatty / "tokenizer.json", lambda t: t["model"].update(dropout=None))
    refused("another tokenizer", Conversation(load(chatty), memory="none").load, tmp_path / "bare")


def test_a_damaged_file_is_refused_and_the_present_conversation_stays(chatty, tmp_path):
    talk, file = held(load(chatty)), tmp_path / "talk"
    talk.save(file)
    whole, rng, present = file.read_bytes(), random.Random(0), held(load(chatty))
    turns = list(present.turns)
    places = [*range(0, 40), *(rng.randrange(len(whole)) for _ in range(150)), len(whole) - 1]
    for place in places:
        flip(file, place, bit=rng.randrange(8))
        refused("", present.load, file)
        file.write_bytes(whole)
    for end in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        refused("", present.load, file)
    file.write_bytes(whole + b"0")
    refused("", present.load, file)
    assert present.turns == turns
    assert answers(present) == answers(talk)


def test_what_is_no_conversation_is_neither_loaded_nor_overwritten(chatty, tmp_path):
    talk = held(load(chatty))
    note, weights, pipe = tmp_path / "note", chatty / "model.safetensors", tmp_path / "gone"
    note.write_text("mine")
    pipe.symlink_to(tmp_path / "nowhere")
    for file in (note, weights, tmp_path, pipe):
        before = file.read_bytes() if file.is_file() else None
        refused("", talk.load, file)
        refused("this file is no conversation: .*; give another name", talk.save, file)
        assert (file.read_bytes() if file.is_file() else None) == before
    for name in (note / "below", tmp_path / "a\0b"):
        refused("cannot", talk.save, name)
        refused("", talk.load, name)
    refused("a file is missing", talk.load, tmp_path / "talk")
    talk.save(tmp_path / "talk")
    assert (tmp_path / "talk").stat().st_mode & 0o077 == 0  # as confidential as what was said
    talk.reset()
    talk.save(tmp_path / "talk")  # over its own
    assert read_saved(tmp_path / "talk", talk.model)[0].turns == ()
    assert not list(tmp_path.glob(".*"))


def resealed(file, change) -> None:
    """The file with its values and arrays changed, and a checksum that is right."""
    values = json.loads(read_safetensors_header(file)[1][MARK])
    arrays = load_safetensors(file)
    mx.eval(arrays)
    values.pop("xxh3")
    change(values, arrays)
    values["arrays"] = digest_of(arrays)
    save_safetensors(file, arrays, {MARK: json.dumps(sealed(values))})


@pytest.mark.parametrize(
    "change",
    [
        lambda v, a: a.update({"0.0": a["0.0"][:, :1]}),
        lambda v, a: a.update({"0.0": a["0.0"][..., :-1, :]}),
        lambda v, a: a.update({"0.0": a["0.0"].astype(mx.float16)}),
        lambda v, a: a.update({"0.0": mx.zeros((1, 2, 3, 4, 5))}),
        lambda v, a: a.update({"0.0": a["0.0"].reshape(-1)}),
        lambda v, a: a.pop("1.1"),
        lambda v, a: a.update({"more": a["0.0"]}),
        lambda v, a: v.update(layers=[], ids=[], blocks=[]),
        lambda v, a: a.update({"9.0": a["0.0"]}) or v["layers"].append(v["layers"][0]),
        lambda v, a: v["layers"][0]["numbers"].update({"2": 10**9}),
        lambda v, a: v["layers"][0].update(kind="RotatingKVCache"),
        lambda v, a: v["layers"][0].update(kind="QuantizedKVCache"),
        # Quantised in groups of 0, which MLX divides by.
        lambda v, a: v["layers"][0].update(kind="QuantizedKVCache", numbers={"3": 0, "4": 0}),
        lambda v, a: v["layers"][0].pop("numbers"),
        lambda v, a: v["ids"].pop(),
        lambda v, a: v["turns"][0].update(ids=[10**6]),
        lambda v, a: v["turns"][0].update(ids=["a"]),
        lambda v, a: v["turns"][0].update(ids={}),
        lambda v, a: v["turns"][0].update(text=5),
        lambda v, a: v["turns"].append({}),
        lambda v, a: v.update(memory="all"),
        lambda v, a: v.update(memory_name="nobody"),
        lambda v, a: v.update(path=[0, 1]),
        lambda v, a: v.update(path=[9, 9, 9]),
        lambda v, a: v.update(history=1),
        lambda v, a: v.update(system=[]),
        lambda v, a: v.update(format_version=2),
        lambda v, a: v.update(hashes=[]),
        lambda v, a: v.update(more=1),
        lambda v, a: v.update(blocks=[["", 1]]),
    ],
)
def test_a_forged_file_is_refused(chatty, tmp_path, change):
    """MLX reads beyond what there is where a shape is wrong."""
    talk, file = held(load(chatty)), tmp_path / "talk"
    talk.save(file)
    turns = list(talk.turns)
    resealed(file, lambda values, arrays: None)
    talk.load(file)
    resealed(file, change)
    refused("", talk.load, file)
    assert talk.turns == turns


def test_what_is_larger_than_a_conversation_is_not_read(chatty, tmp_path):
    """A file of zeros that takes nothing on the disk took as much memory as it says it has."""
    talk, file = held(load(chatty)), tmp_path / "talk"
    talk.save(file)
    values = read_safetensors_header(file)[1]
    entry = {"dtype": "F32", "shape": [1, 2, 1 << 25, 32], "data_offsets": [0, 1 << 33]}
    header = json.dumps({"__metadata__": values, "0.0": entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + (1 << 33))
    refused("not whole", talk.load, file)


@pytest.mark.parametrize("name", ["gemma3_text", "llama", "8 bits"])
@pytest.mark.parametrize("length", [3, 40])
def test_caches_that_turn_or_are_quantised_go_on(monkeypatch, name, length):
    window = OTHER_KEYS["gemma3_text"] | {"sliding_window": 16}
    monkeypatch.setitem(OTHER_KEYS, "gemma3_text", window)
    wide = ModelArgs("openlm", 64, 2, 96, 2, 32, 400)  # heads as wide as a group
    anchor = Model(wide) if name == "8 bits" else make_anchor(name)
    known = KeyValues(anchor)
    cache, ids = make_prompt_cache(anchor), [1 + n % 30 for n in range(length)]
    anchor(mx.array([ids[:2]]), cache=cache)
    if name == "8 bits":
        cache = [layer.to_quantized(group_size=32, bits=8) for layer in cache]
    for token in ids[2:]:
        anchor(mx.array([[token]]), cache=cache)
    known.give(cache, ids, Fetch("none"))
    layers, arrays = known.packed()
    layers = json.loads(json.dumps(layers))
    saved = Saved((), "none", None, True, True, None, "", None, ids, (), layers)
    again = KeyValues.unpacked(anchor, saved, arrays)
    more = mx.array([[5, 6, 7]])
    assert mx.array_equal(anchor(more, cache=again.cache), anchor(more, cache=known.cache))
    last = mx.array([[8]])
    assert mx.array_equal(anchor(last, cache=again.cache), anchor(last, cache=known.cache))


def test_from_a_pipe(chatty, tmp_path):
    def said(*lines: str):
        words = "\n".join(lines).encode()
        return run(main, "--model", chatty, "--max-tokens", 8, stdin=words)

    file = tmp_path / "my talk"
    whole = said(TALK[0], TALK[1], TALK[2])
    first = said(TALK[0], TALK[1], "/memory fetched", f"/save {file}")
    assert first.err.endswith("saved: 2 turns\n")
    rest = said("/load", "/load nothing", f"/load {file}", TALK[2])
    lines = rest.err.splitlines()
    assert lines[0] == "error: no file: ''; give its name, as in /save talk"
    assert lines[1].startswith("error: a file is missing: nothing; ")
    assert lines[2] == "loaded: 2 turns; memory: fetched, history: on"
    assert first.out + rest.out == whole.out
    assert (first.status, rest.status) == (0, 0)
