"""Files that are damaged, cut or taken away in the middle of a session, and what turns leave."""

import os
from pathlib import Path

import pytest

from mlx_hmem import load
from mlx_hmem.generation.conversation import Conversation
from tests.generation.test_conversation import OPTIONS, tokens, turns_of
from tests.helpers.faults import flip
from tests.helpers.programs import refused

TASKS_AND_FILES = (Path("/proc/self/task"), Path("/proc/self/fd"))


def shard_of(folder: Path, level: int) -> Path:
    return folder / "bank" / f"level-{level}.00000.safetensors"


def damage_by_flip(folder: Path, leaf: int) -> None:
    flip(shard_of(folder, 3), (1 + leaf) * 16384)


def damage_by_cut(folder: Path, leaf: int) -> None:
    os.truncate(shard_of(folder, 3), 16384)


@pytest.mark.parametrize("damage", [damage_by_flip, damage_by_cut])
def test_an_answer_goes_on_with_the_levels_that_are_sound_and_says_so(broken, texts, damage):
    model, said = load(broken), []
    turns = turns_of(model, texts)
    start, near = turns["start"][0], turns["near"][0]
    talk = Conversation(model, notify=said.append, **OPTIONS)
    list(talk.say(start))
    path = model.retriever.route(near)
    damage(broken, path[2])
    talk.turns.clear()
    found = tokens(talk.say(near))
    assert talk.route == path
    assert [b["level"] for b in talk.fetch.blocks] == [1]
    assert len(said) == 1
    assert said[0].startswith("the answer goes on without level 3: ")
    assert "\n" not in said[0]
    barred = load(broken) if damage is damage_by_flip else model
    assert found == tokens(barred.stream(near, blocked=[path], max_tokens=8))
    talk.turns.clear()
    list(talk.say(near))  # tried again, and not said again
    assert len(said) == 1
    assert talk.stats.damaged == 2
    talk.turns.clear()
    assert tokens(talk.say(start)) == tokens(model.stream(start, max_tokens=8))  # kept in memory
    assert talk.fetch.damage == []


def test_a_block_that_is_mended_is_used_again(broken, texts):
    model, said = load(broken), []
    turns = turns_of(model, texts)
    near = turns["near"][0]
    path = model.retriever.route(near)
    damage_by_flip(broken, path[2])
    talk = Conversation(model, notify=said.append, **OPTIONS)
    list(talk.say(near))
    assert len(said) == 1
    damage_by_flip(broken, path[2])
    talk.turns.clear()
    assert tokens(talk.say(near)) == tokens(load(broken).stream(near, max_tokens=8))
    assert (len(said), talk.fetch.damage) == (1, [])


def test_without_any_sound_block_the_anchor_answers_alone(broken, texts):
    model, said = load(broken), []
    for level in (1, 3):
        os.truncate(shard_of(broken, level), 16384)
    talk = Conversation(model, notify=said.append, **OPTIONS)
    found = tokens(talk.say(texts[0][:50]))
    assert found == tokens(model.stream(texts[0][:50], memory="none", max_tokens=8))
    assert len(said) == 1
    assert "without level 1: " in said[0]
    assert "without level 3: " in said[0]


def test_a_damaged_generic_memory_is_left_out_too(broken):
    model, said = load(broken), []
    os.truncate(broken / "bank" / "generic.safetensors", 16384)
    talk = Conversation(model, memory="generic", notify=said.append, **OPTIONS)
    assert tokens(talk.say("The bay")) == tokens(
        model.stream("The bay", memory="none", max_tokens=8)
    )
    assert said[0].startswith("the answer goes on without generic memory: ")


def test_a_strict_conversation_stops_and_goes_on_with_the_next_turn(broken, texts):
    model = load(broken)
    turns = turns_of(model, texts)
    start, near = turns["start"][0], turns["near"][0]
    talk = Conversation(model, damaged="stop", **OPTIONS)
    list(talk.say(start))
    damage_by_flip(broken, model.retriever.route(near)[2])
    talk.turns.clear()
    refused(r"level 3, cluster .* damaged", lambda: list(talk.say(near)))
    assert talk.turns == []
    assert tokens(talk.say(start)) == tokens(model.stream(start, max_tokens=8))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reads through /proc")
@pytest.mark.parametrize("back", [True, False])
def test_a_disk_that_was_away_is_opened_anew(broken, texts, back):
    """Every read of the open file fails with EIO, as of a disk that was pulled out."""
    model, said = load(broken), []
    shard = shard_of(broken, 3)
    dead = os.open("/proc/self/mem", os.O_RDONLY)  # nothing is mapped at a block's offset
    for name in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd") / name
        if link.is_symlink() and link.resolve() == shard.resolve():
            os.dup2(dead, int(name))
    os.close(dead)
    if not back:
        (broken / "bank").rename(broken / "gone")
    talk = Conversation(model, notify=said.append, **OPTIONS)
    text = texts[0][:50]
    found = tokens(talk.say(text))
    if back:
        assert said == []
        assert found == tokens(load(broken).stream(text, max_tokens=8))
    else:
        assert len(said) == 1
        assert "without level 3: " in said[0]
        assert [b["level"] for b in talk.fetch.blocks] == [1]


def test_a_deleted_shard_that_is_open_is_still_read(broken, texts):
    model, said = load(broken), []
    expected = tokens(model.stream(texts[0][:50], max_tokens=8))
    model = load(broken)
    shard_of(broken, 3).unlink()
    talk = Conversation(model, notify=said.append, **OPTIONS)
    assert tokens(talk.say(texts[0][:50])) == expected
    assert said == []


def test_turns_leave_no_thread_and_no_file_behind(model_folder, texts):
    """A thread that evaluates keeps a stream of MLX's, on Metal a command queue as well: after 50
    turns, each with a thread of its own that read ahead, there were 50 more."""
    model = load(model_folder, cache_bytes=6000)
    talk = Conversation(model, max_tokens=1)

    def held(turns: range) -> list[int]:
        for turn in turns:
            list(talk.say(texts[turn * 7 % len(texts)][:40]))
            talk._prefetch.wait()
        return [len(os.listdir(folder)) for folder in TASKS_AND_FILES if folder.exists()]

    early, late = held(range(8)), held(range(8, 58))
    assert talk._prefetch.bytes_read > 0
    # One that has ended, and been joined, may be there a moment longer.
    assert all(after <= before + 1 for after, before in zip(late, early, strict=True))
