"""Rows of a batch, each with its memory, give what each gives alone, whoever joins or leaves."""

import copy
import gc
import math
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import RotatingKVCache, can_trim_prompt_cache, make_prompt_cache

from mlx_hmem import MemoryModel
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.bank import Bank
from mlx_hmem.config import KINDS
from mlx_hmem.generation.batch import BatchModel, batch_generate
from tests.conftest import save_bank
from tests.helpers.programs import refused
from tests.helpers.references import PAIRS, config_of
from tests.helpers.tiny_anchors import VOCAB, make_anchor

PROMPT = "The old lighthouse of the bay"
WINDOW = 8  # of gemma3_text's rotating caches: rows outgrow it
# Row by row: length of the prompt, tokens to make, route.
ROWS = [
    (5, 9, (0, 1, 2)),
    (1, 3, (1, 2, 4)),
    (12, 6, (0, 1, 3)),  # shares level 1 with the first
    (3, 12, (0, 1, 2)),  # all that the first has
    (9, 1, (1, 3, 7)),
    (2, 8, "generic"),
    (7, 5, (1, 3, 6)),
]


def make_model(name: str, kind: str, folder, **options) -> MemoryModel:
    """A tiny anchor of mlx-lm with a memory, neither tokenizer nor retriever."""
    anchor = make_anchor(name)
    # Louder layers than embeddings: a tied head would say the same token again and again.
    loud = [
        (n, w * 4)
        for n, w in named_parameters(anchor).items()
        if w.ndim > 1 and (".layers." in n or ".h." in n)
    ]
    anchor.load_weights(loud, strict=False)
    if name == "gemma3_text":
        anchor.args.sliding_window = anchor.model.window_size = WINDOW
        assert isinstance(make_prompt_cache(anchor)[0], RotatingKVCache)
    save_bank(folder, config_of(anchor, kind), "", "", size=1.0, seed=5, **options)
    bank = Bank.open(folder, cache_bytes=0)  # what is read twice is counted twice
    return MemoryModel(anchor, {}, None, bank=bank)


def prompt(index: int) -> list[int]:
    return np.random.default_rng(index).integers(0, VOCAB, ROWS[index][0]).tolist()


def says(model: MemoryModel, ids: list[int], tokens: list[int], route) -> list[int]:
    """The greedy choice at the place of each token, from one whole pass without a cache.

    Equal to ``tokens`` exactly if the row alone, token by token, gives them.
    """
    memory = {"memory": route} if isinstance(route, str) else {"paths": [route]}
    logits = model(mx.array([ids + tokens]), **memory)[0]
    return logits[len(ids) - 1 : -1].argmax(axis=-1).tolist()


class Run:
    """A BatchGenerator that takes in few rows at a time, and what it has said so far."""

    def __init__(self, model: MemoryModel, **options):
        self.batch = BatchModel(model)
        sizes = {"completion_batch_size": 4, "prefill_batch_size": 2, "prefill_step_size": 4}
        self.generator = BatchGenerator(self.batch, **sizes | options)
        self.tokens: dict[int, list[int]] = {}
        self.caches: dict[int, list] = {}
        self.most_rows = 0

    def insert(self, ids, counts, routes) -> None:
        caches = [self.batch.make_cache(route) for route in routes]
        for uid in self.generator.insert(ids, counts, caches=caches):
            self.tokens[uid] = []

    def next(self, times: int = 1) -> None:
        for _ in range(times):
            responses = self.generator.next()[1]
            self.most_rows = max(self.most_rows, len(responses))
            for response in responses:
                self.tokens[response.uid].append(response.token)
                if response.finish_reason:
                    self.caches[response.uid] = response.prompt_cache

    def finish(self) -> None:
        for _ in range(200):
            if len(self.caches) == len(self.tokens):
                return
            self.next()
        raise AssertionError("rows do not end")


def run_in_turns(model: MemoryModel, rows: list[int]) -> Run:
    run = Run(model)
    for start, end, steps in ((0, 3, 4), (3, 5, 3), (5, 7, 0)):
        some = rows[start:end]
        run.insert([prompt(i) for i in some], [ROWS[i][1] for i in some],
                   [ROWS[i][2] for i in some])  # fmt: skip
        run.next(steps)
    run.finish()
    return run


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_rows_that_join_and_leave_give_what_they_give_alone(name, kind, tmp_path):
    model = make_model(name, kind, tmp_path)
    run = run_in_turns(model, list(range(len(ROWS))))
    assert run.most_rows > 2
    for i, tokens in run.tokens.items():
        assert len(tokens) == ROWS[i][1]
        assert says(model, prompt(i), tokens, ROWS[i][2]) == tokens
    # Another's memory says something else: each row had its own. One random row may be deaf.
    others = [says(model, prompt(i), run.tokens[i], ROWS[1][2]) for i in (0, 2, 3, 6)]
    assert sum(said != run.tokens[i] for i, said in zip((0, 2, 3, 6), others, strict=True)) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_memory_are_the_anchor_alone_beside_others(kind, tmp_path):
    model = make_model("llama", kind, tmp_path)
    run = Run(model)
    run.insert([prompt(0), prompt(2)], [9, 6], [ROWS[0][2], "none"])
    run.next(3)
    (uid,) = run.generator.insert([prompt(3)], [5])  # no cache given: no memory
    run.tokens[uid] = []
    run.finish()
    for i, row, route in ((0, 0, ROWS[0][2]), (1, 2, "none"), (uid, 3, "none")):
        assert says(model, prompt(row), run.tokens[i], route) == run.tokens[i]
    assert says(model, prompt(2), run.tokens[1], ROWS[0][2]) != run.tokens[1]


def test_a_row_that_is_taken_out_leaves_the_others_as_they_were(tmp_path):
    model = make_model("openlm", "ffn", tmp_path)
    run = Run(model, completion_batch_size=8)
    rows = [0, 2, 3, 5, 6]
    run.insert([prompt(i) for i in rows], [ROWS[i][1] for i in rows], [ROWS[i][2] for i in rows])
    run.next(3)
    removed = [0, 4]  # one that speaks, one that still waits
    run.generator.remove(removed)
    for uid in removed:
        del run.tokens[uid]
    run.finish()
    for uid, tokens in run.tokens.items():
        assert says(model, prompt(rows[uid]), tokens, ROWS[rows[uid]][2]) == tokens


def test_a_finished_rows_cache_goes_on_with_the_same_memory_among_new_rows(tmp_path):
    model = make_model("gemma3_text", "ffn", tmp_path)
    run = run_in_turns(model, [0, 1, 2])
    cache, new = copy.deepcopy(run.caches[2]), [7, 8, 9]
    assert not can_trim_prompt_cache(cache)
    other = Run(model)
    other.insert([prompt(1)], [8], [ROWS[1][2]])
    other.next(2)
    (uid,) = other.generator.insert([new], [6], caches=[cache])
    other.tokens[uid] = []
    other.finish()
    ids = prompt(2) + run.tokens[2] + new
    assert says(model, ids, other.tokens[uid], ROWS[2][2]) == other.tokens[uid]
    assert says(model, ids, other.tokens[uid], ROWS[1][2]) != other.tokens[uid]


class Watch:
    """Weak references to all that is fetched and joined for a model."""

    def __init__(self, model: MemoryModel, monkeypatch: pytest.MonkeyPatch):
        self.blocks: dict[tuple[int, int], weakref.ref] = {}
        self.num_fetched = 0
        self.rows: list[weakref.ref] = []
        self.ndims: list[int] = []
        fetch, bind = model.bank.packed_blocks, model.with_rows

        def blocks(keys):
            found = fetch(keys)
            self.num_fetched += len(found)
            self.blocks |= {k: weakref.ref(b) for k, b in zip(keys, found, strict=True)}
            return found

        def with_rows(rows):
            self.rows += [weakref.ref(group) for group in rows]
            self.ndims.append(rows[0].ndim)
            return bind(rows)

        monkeypatch.setattr(model.bank, "packed_blocks", blocks)
        monkeypatch.setattr(model, "with_rows", with_rows)

    def alive(self) -> set[tuple[int, int]]:
        gc.collect()
        return {key for key, block in self.blocks.items() if block() is not None}

    def num_rows_alive(self) -> int:
        gc.collect()
        return sum(group() is not None for group in self.rows)


def test_a_block_is_read_once_however_many_rows_share_it(tmp_path, monkeypatch):
    model = make_model("llama", "ffn", tmp_path)
    watch = Watch(model, monkeypatch)
    run = Run(model, completion_batch_size=8, prefill_batch_size=8)
    rows = [0, 1, 2, 3, 6]
    run.insert([prompt(i) for i in rows], [ROWS[i][1] for i in rows], [ROWS[i][2] for i in rows])
    run.finish()
    # Level 2 of the tiny banks has no memory; two blocks of level 1 serve the five rows.
    keys = {(1, 0), (1, 1), (3, 2), (3, 3), (3, 4), (3, 6)}
    assert set(watch.blocks) == keys
    assert watch.num_fetched == len(keys)
    config = model.bank.config
    assert model.bank.bytes_read == sum(4 * math.prod(config.block_shape(k[0])) for k in keys)


def test_a_step_without_changes_neither_fetches_nor_joins(tmp_path, monkeypatch):
    model = make_model("llama", "lora_vo", tmp_path)
    watch = Watch(model, monkeypatch)
    run = Run(model)
    run.insert([prompt(0), prompt(1)], [20, 20], [ROWS[0][2], ROWS[1][2]])
    run.next(4)
    fetched, joined = watch.num_fetched, len(watch.ndims)
    monkeypatch.setattr(BatchModel, "_bind", None)
    run.next(12)
    assert len(run.tokens[0]) > 12
    assert (watch.num_fetched, len(watch.ndims)) == (fetched, joined)


def test_a_rows_memory_goes_when_the_row_goes(tmp_path, monkeypatch):
    model = make_model("llama", "ffn", tmp_path)
    watch = Watch(model, monkeypatch)
    run = Run(model)
    run.insert([prompt(i) for i in (0, 1, 2)], [20, 2, 12], [ROWS[i][2] for i in (0, 1, 2)])
    while 1 not in run.caches:
        run.next()
    run.next(3)
    assert watch.alive() == {(1, 0), (3, 2), (3, 3)}
    assert watch.num_rows_alive() == 1
    while 2 not in run.caches:
        run.next()
    assert watch.alive() == {(1, 0), (3, 2)}
    run.finish()
    assert len(run.caches) == 3  # kept, and no memory in them
    assert watch.alive() == set()
    assert watch.num_rows_alive() == 0


def test_rows_that_all_share_one_memory_have_one_copy_of_it(tmp_path, monkeypatch):
    model = make_model("llama", "ffn", tmp_path)
    watch = Watch(model, monkeypatch)
    run = Run(model)
    run.insert([prompt(i) for i in range(6)], [7 + i for i in range(6)], ["generic"] * 6)
    run.finish()
    assert (watch.num_fetched, watch.ndims) == (1, [4])  # joined once, without a batch axis
    for i, tokens in run.tokens.items():
        assert says(model, prompt(i), tokens, "generic") == tokens


@pytest.mark.parametrize("memory", ["fetched", "generic", "none"])
def test_batch_generate_gives_what_streams_give_in_order(model, texts, memory):
    prompts = [text[: 15 + 9 * i] for i, text in enumerate(texts[:14:2])]
    counts = [3 + 5 * (i % 4) for i in range(len(prompts))]
    options = {"completion_batch_size": 3, "prefill_batch_size": 2}
    found = batch_generate(model, prompts, max_tokens=counts, memory=memory, **options)
    for prompt_, count, completion in zip(prompts, counts, found, strict=True):
        pieces = list(model.stream(prompt_, max_tokens=count, memory=memory))
        assert completion.text == "".join(piece.text for piece in pieces)
        assert completion.finish_reason == pieces[-1].finish_reason
        stopped = pieces[-1].finish_reason == "stop"
        assert completion.tokens == [p.token for p in pieces][: -1 if stopped else None]
        path = model.retriever.route(prompt_) if memory == "fetched" else None
        assert completion.path == path
    assert len({completion.text for completion in found}) > len(prompts) // 2


def test_route_texts_choose_the_memories_of_a_batch(model, texts):
    routes = {model.retriever.route(text): text for text in texts}
    found = batch_generate(
        model, [PROMPT] * len(routes), route_texts=list(routes.values()), max_tokens=12
    )
    assert [completion.path for completion in found] == list(routes)
    for completion, text in zip(found, routes.values(), strict=True):
        pieces = model.stream(PROMPT, route_text=text, max_tokens=12)
        assert completion.text == "".join(piece.text for piece in pieces)
    assert len({completion.text for completion in found}) > 2


def test_a_batch_ends_with_the_context_and_needs_no_memory(model):
    prompts = ["the bay " * 20, "the bay"]
    for prompt_, completion in zip(
        prompts, batch_generate(model, prompts, max_tokens=1000), strict=True
    ):
        length = len(model.tokenizer.encode(prompt_)) + len(completion.tokens)
        assert length == model.context or completion.finish_reason == "stop"
    bare = MemoryModel(model.anchor, model.anchor_config, model.tokenizer)
    (found,) = batch_generate(bare, [PROMPT], memory="none", max_tokens=8)
    assert found.text == batch_generate(model, [PROMPT], memory="none", max_tokens=8)[0].text
    refused("no memory bank", batch_generate, bare, [PROMPT])


WRONG_CALLS = {
    "no prompts": (lambda m: batch_generate(m, []), "no prompts: an empty list"),
    "one text": (lambda m: batch_generate(m, PROMPT), "one string"),
    "an empty prompt": (lambda m: batch_generate(m, [PROMPT, " "]), "prompt is empty"),
    "a long prompt": (lambda m: batch_generate(m, ["word " * 96]), "longer than the context"),
    "an unknown mode": (lambda m: batch_generate(m, [PROMPT], memory="all"), "mode: 'all'"),
    "no tokens": (lambda m: batch_generate(m, [PROMPT], max_tokens=0), "not positive: 0"),
    "too few limits": (lambda m: batch_generate(m, [PROMPT] * 2, max_tokens=[3]), "prompts: 1"),
    "too few route texts": (
        lambda m: batch_generate(m, [PROMPT] * 2, route_texts=[PROMPT]), "prompts: 1; give 2",
    ),
    "an empty route text": (lambda m: batch_generate(m, [PROMPT], route_texts=[""]), "empty text"),
    "a crooked path": (lambda m: BatchModel(m).make_cache((0, 5, 0)), "not a cluster path"),
    "an unknown route": (lambda m: BatchModel(m).make_cache("fetched"), "no such route"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_are_refused_in_one_line(model, call, words):
    refused(words, call, model)
