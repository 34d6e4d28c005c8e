"""Prompts that begin alike are read once, if the memory is the same; no answer shows it but in
usage."""

import random
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.gemma3_text import Model, ModelArgs

from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.server import served as code
from mlx_hmem.server.asked import Asked, MemoryAsked
from mlx_hmem.server.command import main
from mlx_hmem.server.prompts import PromptCache
from mlx_hmem.server.served import Served, Ticket
from tests.bank.test_views import write_views
from tests.helpers.programs import assert_refused, run
from tests.helpers.servers import Server
from tests.helpers.tiny_anchors import LLAMA_LIKE

PART, PATH = 8, "/v1/completions"


def ids_of(seed: int, count: int = 61) -> list[int]:
    return random.Random(seed).choices(range(3, 60), k=count)


LONG, OTHER = ids_of(1), ids_of(2)
WAY = {"fetched": "The harbour", "generic": None, "none": None}
WHOLE = 56  # of both, in whole parts; the rest and the last token are read anew


@pytest.fixture(scope="module")
def loaded(viewed) -> MemoryModel:
    return load(viewed)


@pytest.fixture
def open_served(monkeypatch, loaded):
    monkeypatch.setattr(code, "PREFILL_TOKENS", PART)
    return lambda model=loaded, size=1 << 20: Served(model, None, 4, size)


def begin(served, *prompts, **fields) -> Ticket:
    """Has the rows of a request join the batch."""
    memory = MemoryAsked(**{"route_text": "The harbour"} | fields.pop("memory", {}))
    options = {"max_tokens": 6, "logprobs": 2, "memory": memory} | fields
    ticket = Ticket(Asked(prompts=[*prompts], **options))
    ticket.take(served)
    while ticket.wanted:
        served.insert(ticket)
    return ticket


def answers(served, *prompts, **fields):
    """Of each row its last piece, with all its text and the bits of its log-probabilities."""
    begin(served, *prompts, **fields)
    found = {}
    while len(served):
        found |= {piece.index: piece for _, piece in served.next()}
    return [found[index] for index in sorted(found)]


def said(piece) -> tuple:
    return piece.text, piece.logprobs, piece.finish_reason


@pytest.mark.parametrize("mode", ["fetched", "generic", "none"])
def test_what_was_read_before_changes_no_bit(open_served, mode):
    served, memory = open_served(), {"mode": mode, "route_text": WAY[mode]}
    first, again = (answers(served, LONG, memory=memory)[0] for _ in "ab")
    assert (first.num_reused, again.num_reused) == (0, WHOLE)
    assert said(again) == said(first)
    (longer,) = answers(served, [*LONG, *OTHER[:20]], memory=memory)
    (shorter,) = answers(served, [*LONG[:20], *OTHER[:20]], memory=memory)
    assert (longer.num_reused, shorter.num_reused) == (WHOLE, 16)
    anew = open_served(size=0)
    assert said(answers(anew, [*LONG, *OTHER[:20]], memory=memory)[0]) == said(longer)
    assert said(answers(anew, [*LONG[:20], *OTHER[:20]], memory=memory)[0]) == said(shorter)
    assert anew.prompts.nbytes == 0
    assert served.prompts.nbytes > 0


def test_the_next_turn_reads_the_answer_anew_as_it_would_be_read_without_the_turn_before(
    open_served, loaded
):
    """An answer's own keys and values, made token by token, have other bits."""
    served, encode = open_served(), loaded.tokenizer.encode
    (first,) = answers(served, LONG)
    turn = [*LONG, *encode(first.text, add_special_tokens=False), *OTHER[:5]]
    (second,) = answers(served, turn)
    assert second.num_reused == WHOLE
    assert said(second) == said(answers(open_served(), turn)[0])
    assert answers(served, [*turn, 5, 6])[0].num_reused == (len(turn) - 1) // PART * PART


def test_a_seed_gives_the_same_answer_with_what_was_read_before(open_served):
    served = open_served()
    fields = {"temperature": 1.5, "seed": 7, "n": 3, "top_p": 0.9}
    first = answers(served, LONG, **fields)
    answers(served, LONG)
    again = answers(served, LONG, **fields)
    assert [piece.num_reused for piece in again] == [WHOLE] * 3
    # At first three rows were read together, what is kept was read alone: with OpenBLAS' kernels
    # for Haswell a product of more rows has other last bits.
    assert [(p.text, p.finish_reason) for p in again] == [(p.text, p.finish_reason) for p in first]
    for one, other in zip(again, first, strict=True):
        found, wanted = ([each.logprob for each in piece.logprobs] for piece in (one, other))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_a_repetition_penalty_counts_the_tokens_that_need_not_be_read(open_served):
    ids = [*LONG[: PART * 7], 7]  # one is left to read
    fields = {"repetition_penalty": 1.9, "max_tokens": 4}
    wanted = said(answers(open_served(size=0), ids, **fields)[0])
    served = open_served()
    answers(served, ids)
    (found,) = answers(served, ids, **fields)
    assert (said(found), found.num_reused) == (wanted, PART * 7)
    assert said(answers(served, ids, max_tokens=4)[0]) != wanted


def test_prompts_that_are_read_side_by_side_are_not_kept(open_served):
    """A device may sum the rows of a batch in another order: an answer would depend on who asked
    beside the one before."""
    served = open_served()
    answers(served, LONG, OTHER)
    assert served.prompts.nbytes == 0
    assert [answers(served, LONG)[0].num_reused for _ in "ab"] == [0, WHOLE]
    both = answers(served, LONG, OTHER)
    assert [piece.num_reused for piece in both] == [WHOLE, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"route_text": "A football club"}),
        ({}, {"mode": "none", "route_text": None}),
        ({"mode": "generic", "route_text": None}, {"mode": "none", "route_text": None}),
        ({}, {"bar": ["0", "1", "2"]}),
        ({}, {"view": "staff"}),
        ({"view": "guest"}, {"view": "staff"}),
    ],
)
def test_another_memory_or_view_reads_anew(open_served, one, other):
    served = open_served()
    for memory in (one, other, one, other):
        (found,) = answers(served, LONG, memory=memory)
        assert said(found) == said(answers(open_served(size=0), LONG, memory=memory)[0])
    assert found.num_reused == WHOLE
    served = open_served()
    answers(served, LONG, memory=one)
    assert answers(served, LONG, memory=other)[0].num_reused == 0
    assert answers(served, LONG, memory=one, who="ann")[0].num_reused == 0


def test_a_row_that_is_taken_out_while_it_reads_leaves_nothing(open_served):
    served = open_served()
    ticket = begin(served, LONG)
    for _ in range(3):
        assert list(served.next()) == []
    served.remove(ticket)
    assert (served.prompts.nbytes, served._reading) == (0, {})
    assert [answers(served, LONG)[0].num_reused for _ in "ab"] == [0, WHOLE]


def test_a_batch_that_fails_lets_go_of_what_is_kept(open_served, monkeypatch):
    served = open_served()
    answers(served, LONG)
    begin(served, OTHER)
    monkeypatch.setattr(served._generator, "next", lambda: 1 / 0)
    ((_, refusal),) = served.next()
    assert (refusal.status, served.prompts.nbytes) == (500, 0)
    assert [answers(served, OTHER)[0].num_reused for _ in "ab"] == [0, WHOLE]


@pytest.fixture(scope="module")
def sliding(loaded) -> MemoryModel:
    """An anchor whose layers but each third see 16 tokens, without memory."""
    mx.random.seed(3)
    values = LLAMA_LIKE | {"model_type": "gemma3_text", "sliding_window_pattern": 3}
    config = values | {"sliding_window": 16}
    return MemoryModel(Model(ModelArgs.from_dict(config)), config, loaded.tokenizer)


def test_a_sliding_window_goes_on_where_a_prompt_ended_and_not_before(open_served, sliding):
    served, memory = open_served(sliding), {"route_text": None}
    assert {type(each) for each in sliding.anchor.make_cache()} == {KVCache, RotatingKVCache}
    answers(served, LONG, memory=memory)
    for prompt, reused in (
        (LONG, WHOLE),
        ([*LONG, *OTHER[:20]], WHOLE),
        (LONG, WHOLE),
        ([*LONG[:40], *OTHER[:20]], 0),  # what it would begin with has left the window
    ):
        (found,) = answers(served, prompt, memory=memory)
        assert found.num_reused == reused
        assert said(found) == said(answers(open_served(sliding, 0), prompt, memory=memory)[0])


def states(count: int, value: float = 1.0) -> list[KVCache]:
    """32 bytes a token."""
    made = KVCache()
    made.state = mx.full((1, 1, count, 4), value), mx.full((1, 1, count, 4), value), count
    return [made]


def test_of_what_is_kept_that_goes_first_which_was_used_longest_ago():
    prompts = PromptCache(32 * 32, PART)
    for seed in range(4):
        prompts.keep("", ids_of(seed, PART), states(PART))
    assert prompts.nbytes == 32 * 32
    assert prompts.find("", ids_of(0))[1] == PART
    prompts.keep("", ids_of(4, PART), states(PART))
    found = [prompts.find("", ids_of(seed))[1] for seed in range(5)]
    assert found == [PART, 0, PART, PART, PART]
    prompts.keep("", ids_of(5, PART * 5), states(PART * 5))  # larger than all
    assert prompts.find("", ids_of(5))[1] == 0
    prompts.keep("", ids_of(5, PART * 4), states(PART * 4))
    assert [prompts.find("", ids_of(seed))[1] for seed in range(6)] == [0] * 5 + [PART * 4]
    assert prompts.nbytes == 32 * 32
    prompts.clear()
    assert (prompts.nbytes, prompts.find("", ids_of(5))) == (0, ([], 0))


def test_a_longer_prompt_takes_the_place_of_those_that_begin_it():
    prompts, ids = PromptCache(1 << 20, PART), ids_of(1)
    prompts.keep("", ids[:PART], states(PART))
    prompts.keep("other", ids[:PART], states(PART))
    prompts.keep("", ids[: PART * 4], states(PART * 4, 2.0))
    prompts.keep("", ids[: PART * 4], states(PART * 4, 3.0))
    assert prompts.nbytes == 32 * PART * 5
    (found,), count = prompts.find("", [*ids[:20], *OTHER])
    assert (count, found.offset, found.keys_and_values()[0].shape[2]) == (16, 16, 16)
    assert prompts.find("", [*ids[: PART * 4], 5])[0][0].offset == PART * 4  # left as it was
    assert prompts.find("", ids[: PART * 4])[1] == PART * 3  # one token is left to read


def test_a_wrong_size_is_one_line():
    assert_refused(run(main, "--prompt-cache-bytes", "much", "--port", "0"), "--prompt-cache-bytes")


@pytest.fixture(scope="module")
def opened(viewed, keys, tmp_path_factory):
    """A server with keys that reads prompts in parts of so few tokens, on a model that may be
    changed."""
    folder = Path(shutil.copytree(viewed, tmp_path_factory.mktemp("opened") / "model"))
    first = f"import mlx_hmem.server.served as served; served.PREFILL_TOKENS = {PART}"
    words = ("--model", folder, "--api-keys", keys["file"])
    with Server(*words, worker="tests.helpers.quick_worker", FIRST=first) as found:
        found.folder = folder
        yield found


def ask(opened, key, **fields):
    """The answer with its log-probabilities, how many tokens were not read, and the blocks."""
    body = {"prompt": LONG, "max_tokens": 8, "logprobs": 2} | fields
    got = opened.ask(PATH, body, {"Authorization": key})
    assert got.status == 200, got
    details = got.body["usage"]["prompt_tokens_details"]
    return got.body["choices"][0], details["cached_tokens"], got.body["memory"]["blocks"]


def test_a_key_gets_nothing_that_was_made_with_what_its_view_bars(opened, keys, texts):
    ann, bob, bars = keys["ann"], keys["bob"], {"route_text": texts[0]}

    def reload() -> None:
        assert opened.ask("/v1/memory/reload", {}, {"Authorization": bob}).status == 200

    alone = ask(opened, ann, **bars)
    assert alone[1:] == (0, [])
    reload()
    first, again = (ask(opened, bob, **bars) for _ in "ab")
    assert (first[0], first[1], again[1]) == (again[0], 0, WHOLE)
    assert first[0] != alone[0]
    assert first[2] != []
    assert ask(opened, bob, view="guest", **bars) == alone
    assert ask(opened, ann, **bars) == alone
    assert ask(opened, ann, **bars) == (alone[0], WHOLE, [])
    before = (opened.folder / "bank" / "views.json").read_text()
    write_views(opened.folder, guest=[])
    reload()
    assert ask(opened, ann, **bars) == first
    assert ask(opened, ann, **bars) == again
    (opened.folder / "bank" / "views.json").write_text(before)
    reload()
    assert ask(opened, ann, **bars) == alone


def test_usage_and_metrics_say_what_was_not_read(opened, keys):
    bob = {"Authorization": keys["bob"]}
    body = {"prompt": OTHER, "max_tokens": 2, "memory": "generic"}
    hits = metric(opened, bob, "hmem_prompt_cache_hits_total")
    opened.ask(PATH, body, bob)
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    said = opened.ask(PATH, stream | {"n": 2}, bob).body
    assert f'"prompt_tokens_details": {{"cached_tokens": {WHOLE}}}' in said
    assert metric(opened, bob, "hmem_prompt_cache_hits_total") == hits + 2
    assert metric(opened, bob, "hmem_prompt_cache_tokens_total") >= 2 * WHOLE
    assert metric(opened, bob, "hmem_prompt_cache_bytes") > 0
    assert opened.ask("/v1/memory/reload", {}, bob).status == 200
    assert metric(opened, bob, "hmem_prompt_cache_bytes") == 0


def metric(opened, headers, name: str) -> float:
    lines = opened.ask("/metrics", headers=headers).body.splitlines()
    return float(dict(line.rsplit(" ", 1) for line in lines)[name])
