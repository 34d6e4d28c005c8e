"""Log-likelihoods of answers and greedy continuations, in batches whose rows have own memories.

The start that all choices of a question share is read once, into a KV cache whose row is then
repeated for each choice; only what differs, and the scored part, runs with the vocabulary behind
it. Rows of a batch are padded on the left before the cache and on the right after, which the
mask and the causal order hide. Questions of about one length share a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from mlx_hmem.config import ClusterPath
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import not_finite

LONGEST = 2048  # tokens of a sequence, what the paper trains memories with
TOKENS_PER_BATCH = 4096  # in all rows, padding included
MEMORY_PER_BATCH = 1 << 30  # bytes of fetched memory in all rows
T = TypeVar("T")
CHECK_EVERY = 16  # generated tokens between looks at what they say


class Candidate(NamedTuple):
    """Token ids: what is given, one or more, and what is scored, one or more."""

    context: list[int]
    answer: list[int]
    cut: int = 0  # how many tokens of the context did not fit


class Score(NamedTuple):
    """Of one candidate: summed cross-entropy of the answer in nats, its number of tokens, and
    whether each of them is the likeliest (of equally likely ones the first)."""

    nats: float
    tokens: int
    greedy: bool

    @property
    def mean(self) -> float:
        return self.nats / self.tokens


class _Question(NamedTuple):
    number: int
    prefixes: list[list[int]]
    rows: list[tuple[int, list[int], list[int]]]  # which prefix, what follows it, the answer
    order: list[int]  # the row of each candidate

    @property
    def lengths(self) -> tuple[int, int]:
        """Of the longest prefix and of the longest row behind one."""
        return max(map(len, self.prefixes)), max(len(row[1]) for row in self.rows)


def longest_sequence(model: MemoryModel, asked: int | None = None) -> int:
    """The tokens of a sequence, at most: the anchor's, 2,048, or those that were ``asked`` for."""
    return min(model.context or LONGEST, asked or LONGEST)


def score_candidates(
    model: MemoryModel,
    questions: Sequence[Sequence[Candidate]],
    memory: str,
    paths: Sequence[ClusterPath] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[list[tuple[int, list[Score]]]]:
    """Scores the candidates of each question, a batch of questions at a time, longest first.

    ``memory`` is "fetched", with one path per question, "generic" or "none". Yields the index of
    each question with its scores. Equal candidates of a question get equal scores.
    """
    plans = [plan_question(index, candidates) for index, candidates in enumerate(questions)]
    plans.sort(key=lambda plan: plan.lengths, reverse=True)
    sizes = [(sum(plan.lengths), max(len(plan.rows), len(plan.prefixes))) for plan in plans]
    for part in _batches(model, sizes, memory, tokens_per_batch):
        batch = plans[part]
        scores = iter(_score(model, batch, memory, paths))
        found = []
        for plan in batch:
            own = [next(scores) for _ in plan.rows]
            found.append((plan.number, [own[row] for row in plan.order]))
        yield found


def one_by_one(
    batches: Iterable[Sequence[T]], total: int, desc: str, unit: str, progress: bool = True
) -> Iterator[T]:
    """What ``batches`` have, under a progress bar."""
    with tqdm(total=total, desc=desc, unit=unit, disable=not progress) as bar:
        for batch in batches:
            yield from batch
            bar.update(len(batch))


def plan_question(index: int, candidates: Sequence[Candidate]) -> _Question:
    """Splits candidates into prefixes to read once and rows behind them.

    The last token of a context is in the row: it predicts the answer's first.
    """
    keys = [(tuple(c.context), tuple(c.answer)) for c in candidates]
    places = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    contexts, answers = zip(*([list(c), list(a)] for c, a in places), strict=True)
    shared = len(common_start([context[:-1] for context in contexts]))
    if 2 * shared >= max(map(len, contexts)) or len(contexts) == 1:
        prefixes = [contexts[0][:shared]]
    else:  # cut from the left, say: every one for itself
        prefixes = [context[:-1] for context in contexts]
    rows = []
    for i, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        prefix = min(i, len(prefixes) - 1)
        rows.append((prefix, context[len(prefixes[prefix]) :] + answer[:-1], answer))
    return _Question(index, prefixes, rows, [places[key] for key in keys])


def common_start(lists: Iterable[Sequence[T]]) -> list[T]:
    """The longest start that all of ``lists`` share."""
    columns = zip(*lists, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _batches(
    model: MemoryModel, sizes: Sequence[tuple[int, int]], memory: str, tokens: int
) -> Iterator[slice]:
    """Runs of questions, each of (tokens per row, rows), that fit a batch and a memory budget; one
    at least."""
    most = MEMORY_PER_BATCH
    if model.plan is not None:
        tokens = min(tokens, model.plan.tokens_per_batch or tokens)
        most = model.plan.memory_per_batch or most
    if memory == "fetched":
        most //= 4 * max(1, model.require_bank().config.fetched_parameters)
    start, rows, longest = 0, 0, 0
    for i, (length, count) in enumerate(sizes):
        longest, rows = max(longest, length), rows + count
        if i > start and (rows > max(1, most) or rows * longest > tokens):
            yield slice(start, i)
            start, rows, longest = i, count, length
    if start < len(sizes):
        yield slice(start, len(sizes))


def _score(
    model: MemoryModel, batch: Sequence[_Question], memory: str, paths: Sequence[ClusterPath] | None
) -> list[Score]:
    """The scores of all rows of a batch of questions, in their order."""
    prefixes = [prefix for plan in batch for prefix in plan.prefixes]
    owners = [plan.number for plan in batch for _ in plan.prefixes]
    rows = [row for plan in batch for row in plan.rows]
    first, sources = 0, []
    for plan in batch:
        sources += [first + prefix for prefix, _, _ in plan.rows]
        first += len(plan.prefixes)
    cache = None
    if any(prefixes):
        some = paths and [paths[i] for i in owners]
        cache = _read(model.with_memory(len(prefixes), memory, some), prefixes)
        if sources != list(range(len(prefixes))):
            for layer in cache:
                layer.filter(mx.array(sources))  # repeats rows, too
    longest = max(len(suffix) for _, suffix, _ in rows)
    ids = [suffix + [0] * (longest - len(suffix)) for _, suffix, _ in rows]
    # -1 where nothing is scored; the answers end where the rows end.
    targets = [
        [-1] * (len(suffix) - len(answer)) + answer + [-1] * (longest - len(suffix))
        for _, suffix, answer in rows
    ]
    row_paths = paths and [paths[owners[source]] for source in sources]
    logits = model.with_memory(len(rows), memory, row_paths)(mx.array(ids), cache=cache)
    nats, greedy = _compare(logits.astype(mx.float32), mx.array(targets))
    if not mx.isfinite(nats).all().item():
        raise not_finite()
    counts = [len(answer) for _, _, answer in rows]
    return [Score(*found) for found in zip(nats.tolist(), counts, greedy.tolist(), strict=True)]  # type: ignore[arg-type]


def _compare(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Summed cross-entropy and whether all targets are the likeliest, of each row."""
    scored = targets >= 0
    chosen = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = mx.logsumexp(logits, axis=-1) - chosen
    likeliest = mx.argmax(logits, axis=-1) == targets
    nats = mx.where(scored, losses, 0).sum(axis=1)
    greedy = (likeliest | ~scored).all(axis=1)
    mx.eval(nats, greedy)
    return nats, greedy


def _read(anchor: Any, rows: Sequence[list[int]]) -> list[Any]:
    """A prompt cache that has read ``rows``, padded on the left; empty ones are nothing but that.

    The logits are never computed.
    """
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    empty: Any = make_prompt_cache(anchor)
    cache = [layer.merge([layer] * len(rows)) for layer in empty]
    if longest:
        for layer in cache:
            layer.prepare(left_padding=padding)
        ids = mx.array([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
        anchor(ids, cache=cache)
        mx.eval([layer.state for layer in cache])
    return cache


def continue_greedily(
    model: MemoryModel,
    prompts: Sequence[list[int]],
    max_tokens: int,
    memory: str,
    paths: Sequence[ClusterPath] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    enough: Callable[[list[int]], bool] = lambda tokens: False,
) -> Iterator[list[tuple[int, list[int]]]]:
    """The likeliest ``max_tokens`` tokens after each prompt, or fewer, up to an end-of-text token.

    ``prompts`` are ids, one or more in each. ``enough`` may end a row early: now and then it is
    shown what the row has. Yields batches as :func:`score_candidates` does.
    """
    # Those of one memory side by side: a batch makes it ready once.
    where = paths or [()] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), where[i]), reverse=True)
    sizes = [(len(prompts[i]) + max_tokens, 1) for i in order]
    for part in _batches(model, sizes, memory, tokens_per_batch):
        batch = order[part]
        some = paths and [paths[i] for i in batch]
        rows = [prompts[i] for i in batch]
        found = _continue(model, rows, max_tokens, memory, some, enough)
        yield list(zip(batch, found, strict=True))


def _continue(
    model: MemoryModel,
    rows: Sequence[list[int]],
    max_tokens: int,
    memory: str,
    paths: Sequence[ClusterPath] | None,
    enough: Callable[[list[int]], bool],
) -> list[list[int]]:
    ends = sorted(model.tokenizer.eos_token_ids)
    anchor = model.with_memory(len(rows), memory, paths)
    cache = _read(anchor, [row[:-1] for row in rows])
    last = mx.array([row[-1:] for row in rows])
    ended = mx.zeros((len(rows), 1), mx.bool_)
    steps: list[mx.array] = []
    finite = mx.array(True)
    while len(steps) < max_tokens and not ended.all().item():
        logits = anchor(last, cache=cache)
        last = mx.argmax(logits[:, -1:], axis=-1)
        finite = finite & mx.isfinite(mx.max(logits[:, -1], axis=-1)).all()
        steps.append(last)
        if ends:
            ended = ended | (last[..., None] == mx.array(ends)).any(axis=-1)
        if len(steps) % CHECK_EVERY == 0:
            ended = ended | mx.array([[enough(row)] for row in _until_end(steps, ends)])
    if not finite.item():
        raise not_finite()
    return _until_end(steps, ends)


def _until_end(steps: Sequence[mx.array], ends: Sequence[int]) -> list[list[int]]:
    rows: Any = mx.concatenate(list(steps), axis=1).tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]
