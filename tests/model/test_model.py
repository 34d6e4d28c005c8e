"""load(): a MemoryModel computes what its parts do by hand, alone, in batches and in streams."""

import itertools
import json
import math
import shutil
import sys
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_hmem import MemoryModel, load
from mlx_hmem.anchors.attach import memory_config
from mlx_hmem.anchors.load import load_anchor
from mlx_hmem.bank import Bank
from mlx_hmem.config import HmemConfig
from mlx_hmem.evaluate import Fact, perplexity, recall
from mlx_hmem.generation.batch import batch_generate
from tests.conftest import MEMORY, save_bank
from tests.helpers.faults import in_threads
from tests.helpers.programs import refused

PROMPT = "The old lighthouse of the bay"


@pytest.fixture(scope="module")
def ids(model: MemoryModel, texts: list[str]) -> mx.array:
    """The starts of four texts, (4, 12)."""
    return mx.array([model.tokenizer.encode(text)[:12] for text in texts[:4]])


@pytest.fixture(scope="module")
def alone(model_folder):
    """The anchor as mlx-lm loads it: nothing attached."""
    return load_anchor(model_folder)[0]


def by_hand(anchor, ids: mx.array, rows: np.ndarray) -> mx.array:
    """The forward pass with every FFN widened by ``rows`` (layers, 3, R, hidden), written out."""
    h = anchor.model.embed_tokens(ids)
    for layer, (gate, up, down) in zip(anchor.layers, rows, strict=True):
        h = h + layer.self_attn(layer.input_layernorm(h), "causal")
        x = layer.post_attention_layernorm(h)
        wide = [mx.concatenate([layer.mlp.gate_proj.weight, mx.array(gate)]),
                mx.concatenate([layer.mlp.up_proj.weight, mx.array(up)]),
                mx.concatenate([layer.mlp.down_proj.weight.T, mx.array(down)])]  # fmt: skip
        a = x @ wide[0].T
        h = h + (a * mx.sigmoid(a) * (x @ wide[1].T)) @ wide[2]
    return anchor.lm_head(anchor.model.norm(h))


def furthest(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


def three_paths(model: MemoryModel, texts: list[str]) -> list[tuple[int, ...]]:
    return sorted({model.retriever.route(text) for text in texts})[::3][:3]


def test_the_public_face_is_as_promised(model, texts):
    path = model.retriever.route(texts[0])
    assert isinstance(model, MemoryModel)
    assert type(path) is tuple
    assert [type(i) for i in path] == [int, int, int]
    assert model.retriever.route(texts[0]) == path
    assert [b is None for b in model.bank.fetch(path).blocks] == [False, True, False]
    pieces = list(model.stream(PROMPT, max_tokens=3))
    assert pieces
    assert all(isinstance(piece.text, str) for piece in pieces)


def test_route_fetch_and_call_equal_widened_ffns(model, alone, model_folder, ids, texts):
    path = model.retriever.route(texts[0])
    with Bank.open(model_folder / "bank") as bank:
        blocks = [np.array(b) for b in bank.fetch(path).blocks if b is not None]
    expected = by_hand(alone, ids, np.concatenate(blocks, axis=2))
    assert furthest(model(ids, paths=[path]), expected) < 1e-4
    assert furthest(model(ids, memory="none"), expected) > 0.1


def test_generic_memory_is_the_banks_generic_block(model, alone, ids):
    (generic,) = model.bank.generic().blocks
    assert generic.shape == (2, 3, 6, 16)
    assert furthest(model(ids, memory="generic"), by_hand(alone, ids, np.array(generic))) < 1e-4


def test_without_memory_the_anchor_is_bit_for_bit_itself(model, alone, ids):
    expected = np.array(alone(ids))
    assert np.array_equal(np.array(model(ids, memory="none")), expected)
    assert np.array_equal(np.array(model.anchor(ids)), expected)
    model(ids, paths=[model.retriever.route(PROMPT)])
    assert np.array_equal(np.array(model.anchor(ids)), expected)  # nothing stays attached


def test_a_row_among_other_paths_equals_the_row_alone(model, ids, texts):
    paths = [*three_paths(model, texts), model.retriever.route(texts[0])]
    assert len(set(paths)) > 2
    together = model(ids, paths=paths)
    for row, path in enumerate(paths):
        assert furthest(together[row], model(ids[row : row + 1], paths=[path])[0]) < 1e-5
    swapped = model(ids, paths=[paths[1], paths[0], *paths[2:]])
    assert furthest(swapped[0], together[0]) > 0.1


def test_one_path_for_the_batch_is_the_same_path_for_each_row(model, ids, texts):
    path = model.retriever.route(texts[0])
    one = model(ids, paths=[path])
    assert np.array_equal(np.array(one), np.array(model(ids, paths=[path] * 4)))
    assert np.array_equal(np.array(one), np.array(model(ids, paths=[list(path)])))
    assert np.array_equal(np.array(one), np.array(model(ids, paths=np.array([path]))))
    each = model.rows_of([model.bank.fetch(path)] * 4)
    assert each[0].ndim == 5
    assert furthest(model.with_rows(each)(ids), one) < 1e-5


def test_a_cache_in_pieces_equals_one_pass(model, ids, texts):
    path = model.retriever.route(texts[0])
    cache = make_prompt_cache(model.anchor)
    parts = [model(ids[:, a:b], paths=[path], cache=cache) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert furthest(mx.concatenate(parts, axis=1), model(ids, paths=[path])) < 1e-4


def greedy(model, prompt: str, memory: str, count: int) -> list[int]:
    """Tokens by the argmax of whole forward passes, no cache; they end at the end token."""
    ids, paths, found = model.tokenizer.encode(prompt), [model.retriever.route(prompt)], []
    while len(found) < count and 0 not in found:
        found.append(model(mx.array([ids + found]), paths=paths, memory=memory)[0, -1].argmax())
        found[-1] = found[-1].item()
    return found


@pytest.mark.parametrize("memory", ["fetched", "generic", "none"])
def test_greedy_streams_are_the_argmax_of_whole_passes(model, memory):
    stream = model.stream(PROMPT, max_tokens=15, memory=memory)
    assert [piece.token for piece in stream] == greedy(model, PROMPT, memory, 15)


def test_the_three_modes_say_different_things_and_mlx_lm_what_the_anchor_does(model):
    assert len({tuple(greedy(model, PROMPT, m, 8)) for m in ("fetched", "generic", "none")}) == 3
    expected = "".join(p.text for p in model.stream(PROMPT, max_tokens=15, memory="none"))
    assert mlx_lm.generate(model.anchor, model.tokenizer, PROMPT, max_tokens=15) == expected


def test_interleaved_streams_keep_their_own_memories(model, texts):
    routes = {model.retriever.route(text): text for text in texts}
    options = [{"route_text": routes[path]} for path in three_paths(model, texts)]
    options += [{"memory": "generic"}, {"memory": "none"}]

    def open_streams():
        return [model.stream(PROMPT, max_tokens=20, **o) for o in options]

    one_by_one = [[piece.token for piece in stream] for stream in open_streams()]
    taken: list[list[int]] = [[] for _ in options]
    for round_ in itertools.zip_longest(*open_streams()):
        for tokens, piece in zip(taken, round_, strict=True):
            tokens += [piece.token] if piece else []
    assert taken == one_by_one
    assert len({tuple(tokens) for tokens in taken}) == len(options)


@pytest.mark.parametrize("kind", ["ffn", "kv"])
def test_threads_keep_their_own_memories(broken, kind, texts):
    """A thread that came in between used to answer with the memory of the other."""
    hmem = HmemConfig.from_file(broken / "hmem.json")
    memory = memory_config(load_anchor(broken)[0], MEMORY.r, MEMORY.branching, kind)
    hmem = replace(hmem, memory=memory)
    (broken / "hmem.json").write_text(hmem.to_json())
    shutil.rmtree(broken / "bank")
    save_bank(broken / "bank", hmem.memory, hmem.anchor_hash, hmem.retriever.tree_hash, size=3.0)
    model = load(broken)
    routes = {model.retriever.route(text): text for text in texts}
    chosen = [routes[path] for path in three_paths(model, texts)]

    def tokens(text):
        return [p.token for p in model.stream(PROMPT, route_text=text, max_tokens=12)]

    alone, found = [tokens(text) for text in chosen], {}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(lambda n: found.update({n: [tokens(chosen[n]) for _ in range(3)]}), len(chosen))
    finally:
        sys.setswitchinterval(before)
    assert found == {n: [each] * 3 for n, each in enumerate(alone)}
    assert len({tuple(each) for each in alone}) == len(chosen)


def test_route_text_chooses_the_memory_in_place_of_the_prompt(model, texts):
    other = next(
        t for t in texts if model.retriever.route(t)[0] != model.retriever.route(PROMPT)[0]
    )
    fetch = model.fetch(other)
    assert fetch.path == model.retriever.route(other)
    ids = model.tokenizer.encode(PROMPT)
    by_ids = [p.token for p in model.stream_ids(ids, fetch, max_tokens=8)]
    assert [p.token for p in model.stream(PROMPT, route_text=other, max_tokens=8)] == by_ids


def test_blocked_clusters_are_not_read_and_the_path_ends_above_them(model_folder):
    model = load(model_folder, cache_bytes=0)
    path = model.retriever.route(PROMPT)
    top, leaf = 2 * 3 * 4 * 16 * 4, 2 * 3 * 2 * 16 * 4  # layers, 3, r, hidden, float32
    for blocked, levels, size in (
        ([], [1, 3], top + leaf),
        ([path], [1], top),
        ([path[:2]], [1], top),  # a level without memory bars what is below it
        ([path[:1]], [], 0),
        ([((path[0] + 1) % 3,)], [1, 3], top + leaf),
    ):
        before = model.bank.bytes_read
        fetch = model.fetch(PROMPT, blocked=blocked)
        assert (fetch.path, [b["level"] for b in fetch.blocks]) == (path, levels)
        assert (fetch.bytes_read, model.bank.bytes_read - before) == (size, size)
    tokens = [p.token for p in model.stream(PROMPT, blocked=[path[:1]], max_tokens=10)]
    assert tokens == greedy(model, PROMPT, "none", 10)


def test_a_second_fetch_comes_from_the_cache_and_says_so(model_folder):
    model = load(model_folder)
    first, second = model.fetch(PROMPT), model.fetch(PROMPT)
    assert [b["source"] for b in first.blocks] == ["disk", "disk"]
    assert [b["source"] for b in second.blocks] == ["cache", "cache"]
    assert (first.bytes_read, second.bytes_read) == (2304, 0)
    assert np.array_equal(np.array(first.rows[0]), np.array(second.rows[0]))
    assert json.loads(json.dumps(second.to_dict()))["path"] == list(second.path)


def test_a_prompt_cache_passes_through_to_mlx_lm(model):
    cache = make_prompt_cache(model.anchor)
    tokens = [p.token for p in model.stream(PROMPT, max_tokens=6, prompt_cache=cache)]
    assert tokens == greedy(model, PROMPT, "fetched", 6)
    length = len(model.tokenizer.encode(PROMPT))
    assert length + 5 <= cache[0].offset <= length + 6


def test_generation_stops_with_the_context_and_the_same_seed_draws_the_same_text(model):
    ids = model.tokenizer.encode(PROMPT)
    fetch = model.fetch(PROMPT, memory="generic")
    pieces = list(model.stream_ids(ids * 3, fetch, max_tokens=10_000))
    assert model.context == 96
    assert len(ids) * 3 + pieces[-1].generation_tokens <= 96
    assert pieces[-1].finish_reason == "stop" or len(ids) * 3 + len(pieces) == 96

    def draw(seed):
        return [p.token for p in model.stream(PROMPT, max_tokens=12, temp=1.0, seed=seed)]

    assert draw(7) == draw(7)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("options", [{"temp": 1e-300}, {"temp": 1e-45}, {"top_p": 1e-300}])
def test_a_temperature_or_top_p_that_float32_does_not_have_is_greedy(model, options):
    """mlx-lm divides by it, or leaves no token: what came was drawn from noise."""

    def tokens(**options):
        return [p.token for p in model.stream(PROMPT, max_tokens=8, seed=1, **options)]

    assert tokens(**{"temp": 1.0} | options) == tokens()


WRONG_CALLS = {
    "an empty prompt": (lambda m: m.stream(" \n"), "prompt is empty"),
    "a prompt beyond the context": (lambda m: m.stream("word " * 96), "longer than the context"),
    "an unknown mode": (lambda m: m.stream(PROMPT, memory="all"), "unknown memory mode: 'all'"),
    "an empty text to route by": (lambda m: m.stream(PROMPT, route_text=""), "empty text"),
    "no tokens": (lambda m: m.stream(PROMPT, max_tokens=0), "max_tokens is not positive"),
    "a temperature beyond float32": (lambda m: m.stream(PROMPT, temp=1e300), "temp is too large"),
    "a negative temperature": (lambda m: m.stream(PROMPT, temp=-1), "temp is negative"),
    "a seed that is none": (lambda m: m.stream(PROMPT, seed=-1), "seed is out of range"),
    "a mode of a call": (lambda m: m(mx.zeros((1, 2), mx.int32), memory=""), "unknown memory mode"),
    "no paths": (lambda m: m(mx.zeros((2, 3), mx.int32)), "0 paths, 2 rows"),
    "too few paths": (lambda m: m(mx.zeros((3, 3), mx.int32), [(0, 0, 0)] * 2), "2 paths, 3 rows"),
    "a short path": (lambda m: m(mx.zeros((1, 3), mx.int32), [(0, 0)]), "needs 3 levels"),
    "a cluster beyond": (lambda m: m(mx.zeros((1, 3), mx.int32), [(3, 0, 0)]), "on level 1: 3"),
    "a crooked path": (lambda m: m(mx.zeros((1, 3), mx.int32), [(0, 5, 0)]), "not a cluster path"),
    "a path of words": (lambda m: m(mx.zeros((1, 3), mx.int32), ["abc"]), "whole numbers"),
    "a crooked block": (lambda m: m.fetch(PROMPT, blocked=[(0, 5)]), "not a cluster path"),
    "no block": (lambda m: m.fetch(PROMPT, blocked=[()]), "needs 1 to 3 levels"),
}


@pytest.mark.parametrize(("call", "words"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_are_refused_in_one_line_before_anything_runs(model, call, words):
    refused(words, call, model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_logits_that_are_not_finite_end_a_text_with_one_line(model_folder, texts, value, temp):
    """They made empty answers with status 0, and a recall of 0.0."""
    model = load(model_folder)
    ask = lambda: list(model.stream(texts[0][:80], max_tokens=4, temp=temp, seed=1))  # noqa: E731
    assert len(ask()) > 1
    model.anchor.model.norm.weight[3] = value
    what = "the model's logits are not finite: NaN or infinity; restore"
    refused(what, ask)
    refused(what, batch_generate, model, [texts[0][:80], texts[1][:80]])
    fact = Fact("The lighthouse of the bay is", "old", (), 1, "kind", "topic")
    refused(what, recall, model, [fact], progress=False)
    refused(what, perplexity, model, texts[:2], progress=False)
    model.tokenizer.eos_token_ids = []  # with no end of text to choose, every token is looked at
    refused(what, ask)
