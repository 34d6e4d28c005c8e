"""A conversation says what the model says of the same tokens and memory, turn after turn."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_hmem import load
from mlx_hmem.bank import Bank
from mlx_hmem.bank.read.arriving import ReplacingMemory
from mlx_hmem.bank.read.prefetch import Prefetch
from mlx_hmem.config import KINDS
from mlx_hmem.errors import UserError
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.model.model import MemoryModel
from tests.bank.test_arriving import LAYERS, assert_same, config_of, layers_of, make
from tests.conftest import edit_json
from tests.helpers.programs import refused

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = {"max_tokens": 8, "prefetch": False, "margin": 0.0}


@pytest.fixture
def fresh(model_folder: Path) -> MemoryModel:
    """The tiny model with nothing read yet."""
    return load(model_folder)


@pytest.fixture
def chatty(broken: Path) -> MemoryModel:
    """The tiny model with a chat template."""
    edit_json(broken / "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE))
    return load(broken)


def tokens(pieces) -> list[int]:
    return [piece.token for piece in pieces]


def turns_of(model: MemoryModel, texts: list[str]) -> dict[str, list[str]]:
    """First sentences: of one path, of others within its top cluster, and of other top clusters."""
    firsts = sorted({text[:60] for text in texts})
    paths = {text: model.retriever.route(text) for text in firsts}
    for start in firsts:
        path = paths[start]
        near = [t for t in firsts if paths[t][:2] == path[:2] and paths[t] != path]
        far = [t for t in firsts if paths[t][0] != path[0]]
        same = [t for t in firsts if t != start and paths[t] == path]
        if near and far and same:
            return {"start": [start], "same": same, "near": near, "far": far}
    raise AssertionError("the texts lie in too few clusters")


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_levels_give_the_memory_of_the_new_path(tmp_path, kind):
    make(tmp_path, config_of(kind), dtype="float16")
    with Bank.open(tmp_path) as bank, Bank.open(tmp_path) as other:
        before = bank.begin((1, 3))
        before.wait()
        deeper = bank.begin((1, 5), above=1)
        assert [block.level for block in deeper.reads] == [2]
        replaced = ReplacingMemory(before.take(), deeper)
        assert not replaced._rows
        assert_same(replaced, layers_of(other))  # of (1, 5)
        again = ReplacingMemory(replaced.take(), bank.begin((1, 3), above=1))
        again.wait()
        first = other.begin((1, 3))
        assert_same(again, [first[layer] for layer in range(LAYERS)])


def test_only_what_changed_is_read_and_the_answers_are_those_of_whole_memories(fresh, model, texts):
    turns = turns_of(model, texts)
    talk = Conversation(fresh, **OPTIONS | {"margin": 0.0})
    sources = []
    for text in (turns["start"][0], turns["near"][0], turns["far"][0], turns["start"][0]):
        talk.turns.clear()  # so that each is routed by itself
        before = fresh.bank.bytes_read
        found = tokens(talk.say(text))
        assert talk.route == model.retriever.route(text)
        assert fresh.bank.bytes_read - before == talk.fetch.bytes_read
        assert found == tokens(model.stream(text, max_tokens=8))
        sources.append([block["source"] for block in talk.fetch.blocks])
    assert sources == [
        ["disk", "disk"], ["attached", "disk"], ["disk", "disk"], ["cache", "cache"],
    ]  # fmt: skip
    talk.turns.clear()
    assert tokens(talk.say(turns["start"][0])) == tokens(
        model.stream(turns["start"][0], max_tokens=8)
    )
    assert [block["source"] for block in talk.fetch.blocks] == ["attached", "attached"]
    assert talk.fetch.bytes_read == 0
    assert talk.stats.num_answers == 5
    assert talk.stats.sources[1, "attached"] == 2
    assert talk.stats.bytes_read == sum(talk.stats.bytes_by_level.values()) == 2304 + 768 + 2304


@pytest.mark.parametrize("memory", ["generic", "none"])
def test_turns_under_a_template_continue_the_whole_conversation(chatty, memory):
    talk = Conversation(chatty, memory=memory, **OPTIONS)
    assert talk.history
    messages, seen = [], 0
    for text in ("Who?", "Where?", "Why?"):
        messages.append({"role": "user", "content": text})
        ids = chatty.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        pieces = list(talk.say(text))
        fetch = chatty.fetch(text, memory)
        assert tokens(pieces) == tokens(chatty.stream_ids(ids, fetch, 8))
        assert pieces[0].prompt_tokens <= len(ids) - seen  # what was seen is not computed again
        seen = len(ids)
        messages.append({"role": "assistant", "content": "".join(p.text for p in pieces)})


def test_the_history_keeps_the_memory_of_its_time(chatty, texts):
    turns = turns_of(chatty, texts)
    first, second = turns["start"][0][:20], turns["far"][0][:20]
    talk = Conversation(chatty, **OPTIONS)
    list(talk.say(first))
    held, old_path = list(talk._known.ids), talk.route
    found = list(talk.say(second))
    assert talk.route[0] != old_path[0]
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": talk.turns[0].answer},
        {"role": "user", "content": second},
    ]
    ids = chatty.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    same = next(n for n, (a, b) in enumerate(zip(ids, held, strict=False)) if a != b)
    assert found[0].prompt_tokens == len(ids) - same < len(ids)
    cache, by_hand = make_prompt_cache(chatty.anchor), []
    chatty(mx.array([ids[:same]]), paths=[old_path], cache=cache)
    rest = ids[same:]
    for _ in found:
        logits = chatty(mx.array([rest]), paths=[talk.route], cache=cache)
        by_hand.append(logits[0, -1].argmax().item())
        rest = by_hand[-1:]
    assert tokens(found) == by_hand
    cache = make_prompt_cache(chatty.anchor)
    chatty(mx.array([ids[:same]]), paths=[old_path], cache=cache)
    kept = chatty(mx.array([ids[same:]]), paths=[talk.route], cache=cache)[0, -1]
    anew = chatty(mx.array([ids]), paths=[talk.route])[0, -1]
    assert mx.abs(kept - anew).max().item() > 0.01


def test_a_text_model_answers_each_turn_by_itself_unless_told_otherwise(fresh, model, texts):
    talk = Conversation(fresh, memory="generic", **OPTIONS)
    assert not talk.history
    for text in (texts[0][:40], texts[1][:40]):
        expected = tokens(model.stream(text, memory="generic", max_tokens=8))
        assert tokens(talk.say(text)) == expected
    talk = Conversation(fresh, memory="generic", history=True, **OPTIONS)
    ids: list[int] = []
    for text in (texts[0][:40], texts[1][:40]):
        own = model.tokenizer.encode(text)
        ids += own[1:] if ids[-1:] == own[:1] else own
        found = tokens(talk.say(text))
        fetch = model.fetch(text, "generic")
        assert found == tokens(model.stream_ids(ids, fetch, 8))
        ids += found


def test_the_oldest_turns_are_dropped_when_the_context_is_full_and_that_is_said_once(chatty):
    said: list[str] = []
    talk = Conversation(chatty, memory="none", notify=said.append, **OPTIONS)
    for number in range(8):
        list(talk.say(f"Question {number} of the many that there are?"))
        assert len(talk._known.ids) <= chatty.context
    assert said == ["the context of 96 tokens is full; the oldest turns are forgotten"]
    assert talk.turns[-1].text.startswith("Question 7")
    assert 1 <= len(talk.turns) < 8
    messages = [m for t in talk.turns[:-1] for m in (("user", t.text), ("assistant", t.answer))]
    messages.append(("user", talk.turns[-1].text))
    ids = chatty.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages], add_generation_prompt=True
    )
    again = tokens(chatty.stream_ids(ids, chatty.fetch("x", "none"), 8))
    assert list(talk.turns[-1].answer_ids) == again


def test_an_answer_in_flight_keeps_its_memory(fresh, model, texts):
    turns = turns_of(model, texts)
    first, second = turns["start"][0], turns["near"][0]
    talk = Conversation(fresh, **OPTIONS)
    in_flight = talk.say(first)
    begun = [next(in_flight), next(in_flight)]
    assert tokens(talk.say(second)) == tokens(model.stream(second, route_text=second, max_tokens=8))
    rest = list(in_flight)
    assert tokens([*begun, *rest]) == tokens(model.stream(first, max_tokens=8))
    assert [turn.text for turn in talk.turns] == [second]
    assert tokens(talk.say(first)) == tokens(model.stream(first, max_tokens=8))


def test_a_stopped_answer_stays_in_the_history_as_far_as_it_went(chatty):
    talk = Conversation(chatty, memory="generic", **OPTIONS)
    pieces = talk.say("Who?")
    part = [next(pieces), next(pieces)]
    pieces.close()
    assert talk.turns[0].answer == "".join(piece.text for piece in part)
    found = tokens(talk.say("Where?"))
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": talk.turns[0].answer},
        {"role": "user", "content": "Where?"},
    ]
    ids = chatty.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert found == tokens(chatty.stream_ids(ids, chatty.fetch("x", "generic"), 8))


def test_the_seed_is_set_once_and_reset_forgets(fresh):
    def draw(talk: Conversation) -> list[list[int]]:
        return [tokens(talk.say("The old lighthouse")) for _ in range(3)]

    talk = Conversation(fresh, temp=1.0, seed=5, **OPTIONS)
    first = draw(talk)
    assert len({tuple(each) for each in first}) > 1
    assert draw(Conversation(fresh, temp=1.0, seed=5, **OPTIONS)) == first
    assert talk.turns
    talk.reset()
    assert (talk.turns, talk.route) == ([], None)
    assert talk.stats.num_answers == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "all"}, "unknown memory mode"),
        ({"temp": -1}, "temp is negative"),
        ({"max_tokens": 0}, "max_tokens is not positive"),
        ({"seed": -1}, "seed is out of range"),
        ({"blocked": [(0, 5)]}, "not a cluster path"),
    ],
)
def test_wrong_options_are_refused_before_the_first_turn(model, options, words):
    refused(words, Conversation, model, **OPTIONS | options)


def test_a_turn_that_is_refused_changes_nothing(model):
    talk = Conversation(model, **OPTIONS)
    list(talk.say("The old lighthouse"))
    for text in (" ", "word " * 96):
        with pytest.raises(UserError):
            list(talk.say(text))
    assert [turn.text for turn in talk.turns] == ["The old lighthouse"]
    assert list(talk.say("The bay"))


def test_blocks_are_read_ahead(fresh, texts, monkeypatch):
    asked, begin = [], Prefetch.begin
    monkeypatch.setattr(
        Prefetch, "begin", lambda self, keys: asked.append(keys) or begin(self, keys)
    )
    talk = Conversation(fresh, max_tokens=4, margin=0.0)
    list(talk.say(texts[0][:60]))
    talk._prefetch.wait()
    read = [b["bytes"] for b in talk.fetch.blocks]
    assert fresh.bank.bytes_read == sum(read) + talk._prefetch.bytes_read
    assert talk._prefetch.bytes_read > 0
    assert talk.fetch.bytes_read == sum(read)  # nothing of what came after
    now = {(b["level"], b["cluster"]) for b in talk.fetch.blocks}
    assert not now & set(asked[0])
    for text in texts[1:6]:
        list(talk.say(text[:60]))
    new = {(b["level"], b["cluster"]) for b in talk.fetch.blocks if b["source"] == "disk"}
    assert new <= {key for keys in asked[:-1] for key in keys} | now
    assert talk.stats.bytes_read == sum(talk.stats.bytes_by_level.values())


def test_reading_ahead_reads_what_the_cache_would_hold_and_nothing_twice(model_folder):
    top, leaf = 1536, 768
    with Bank.open(model_folder / "bank", cache_bytes=3 * leaf) as bank:
        bank.fetch((0, 0, 0))
        ahead = Prefetch(bank)
        for wanted, leaves in (
            ([1, 2, 2, 3, 4], 3),
            ([2, 3, 5], 1),  # the others were read the time before
            ([5, 1], 1),  # 1 may be gone meanwhile
            ([0], 0),  # kept
        ):
            before = ahead.bytes_read
            ahead.begin([(3, n) for n in wanted])
            ahead.wait()
            assert ahead.bytes_read - before == leaves * leaf
        ahead.begin([(1, 1), (1, 2)])
        ahead.wait()
        assert bank.bytes_read == top + leaf + ahead.bytes_read


def test_reading_ahead_touches_nothing_of_mlx(model_folder):
    """MLX in a thread beside stopped programs for ever, or ended them by SIGABRT."""
    with Bank.open(model_folder / "bank") as bank:
        mx.reset_peak_memory()
        ahead = Prefetch(bank)
        ahead.begin([(3, n) for n in range(6)])
        ahead.wait()
        assert ahead.bytes_read > 0
        assert mx.get_peak_memory() == 0  # not one array was made


def test_a_program_that_is_reading_ahead_ends(model_folder, tmp_path):
    """With nothing closed, and a thread that has just ended: it ended by SIGABRT, or stopped in its
    second turn."""
    script = """
import sys, threading
from mlx_hmem import Conversation, load
model = load(sys.argv[1])
for n in range(5):
    list(Conversation(model, max_tokens=2).say(f"The old lighthouse {n}"))
    list(model.stream("The bay", max_tokens=2))
thread = threading.Thread(target=lambda: list(model.stream("The bay", max_tokens=2)))
thread.start()
thread.join()
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script, model_folder], check=True, timeout=60)


def test_reading_ahead_stops_and_survives_damage_and_a_closed_bank(broken):
    shard = broken / "bank" / "level-3.00000.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    refused("", Bank.open, broken / "bank")
    os.truncate(shard, shard.stat().st_size + 1)
    bank = Bank.open(broken / "bank")
    os.truncate(shard, 16384)
    ahead = Prefetch(bank)
    ahead.begin([(3, n) for n in range(6)])
    ahead.wait()
    assert ahead.bytes_read == 0
    bank.close()
    ahead.begin([(1, 0)])
    ahead.stop()
    assert ahead.bytes_read == 0


def test_many_topics_leave_memory_and_files_as_they_are(fresh, texts):
    talk = Conversation(fresh, max_tokens=2, margin=0.0)
    for text in texts[:20]:
        list(talk.say(text[:50]))
    talk.stop_prefetch()
    mx.clear_cache()
    files, active = len(os.listdir("/dev/fd")), mx.get_active_memory()
    for text in texts[:60]:
        list(talk.say(text[:50]))
    talk.stop_prefetch()
    mx.clear_cache()
    assert len(os.listdir("/dev/fd")) == files
    assert mx.get_active_memory() < active + 100_000
    assert len(talk.turns) <= 33
