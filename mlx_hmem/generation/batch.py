"""Many texts at once, each with its own memory, over mlx-lm's ``BatchGenerator``.

A row's route, the ids of its blocks, travels as the last entry of its prompt cache, so it follows
the row through every merge, split and removal, and with it the banks as the row's user may see
them: a block that a view bars is in no route of that user. Each block is fetched and held once,
however many rows share it. The price of rows with different memories is that the joined memory has
a copy for each of them, rows × 36 MB for the paper's 18M; rows that all share one memory need but
one.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_hmem.bank import Bank
from mlx_hmem.bank.format import GENERIC
from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.model.banks import Banks
from mlx_hmem.model.fetch import check_mode, check_named
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import AnchorWithMemory, check_finite, check_length, ending, prompt_ids
from mlx_hmem.retriever.texts import check_texts

Key = tuple[str, int, int]  # of a block: its bank, level and cluster


class Route(NamedTuple):
    """The blocks of one row, none for the anchor alone, and the banks that its user may fetch them
    from."""

    keys: tuple[Key, ...]
    banks: Banks


class RouteCache:
    """The last entry of a prompt cache: one route per row of the batch.

    It holds ids alone until the model is called; then also the memory of the present rows, which
    goes when they change. What :meth:`extract` gives of a finished row is ids again, so a prompt
    cache kept for later, as mlx-lm's server keeps them, still knows its route and nothing more.
    """

    state: tuple[()] = ()  # nothing that mlx-lm must evaluate
    nbytes = 0  # the memory is no part of the prompt's state

    def __init__(self, routes: Iterable[Route]):
        self.routes = list(routes)
        self.blocks: dict[Key, FetchedMemory] = {}  # of one block each
        self.anchor: AnchorWithMemory | None = None  # bound to the memory of these rows

    @classmethod
    def merge(cls, caches: "Sequence[RouteCache]") -> "RouteCache":
        return cls(chain.from_iterable(cache.routes for cache in caches))

    def extend(self, other: "RouteCache") -> None:
        self._change(self.routes + other.routes, self.blocks | other.blocks)

    def filter(self, batch_indices: Sequence[int]) -> None:
        self._change([self.routes[index] for index in batch_indices], self.blocks)

    def extract(self, idx: int) -> "RouteCache":
        return RouteCache([self.routes[idx]])

    def _change(self, routes: list[Route], blocks: dict[Key, FetchedMemory]) -> None:
        """New rows: the blocks they still need stay, so they are not fetched again."""
        before, after = ([route.keys for route in rows] for rows in (self.routes, routes))
        # One memory for all rows has no batch axis and outlives their coming and going.
        if after != before and len({*after, *before}) > 1:
            self.anchor = None
        self.routes = routes
        self.blocks = {k: blocks[k] for k in chain.from_iterable(after) if k in blocks}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouteCache":
        return copy.copy(self)  # what it holds is replaced, never changed in place

    def prepare(self, **padding: Any) -> None:
        """Padding is nothing to a route."""

    def finalize(self) -> None:
        """As :meth:`prepare`."""

    def empty(self) -> bool:
        return False

    def size(self) -> int:
        return 0

    def is_trimmable(self) -> bool:
        return False  # the start of a prompt may have another route


class BatchModel:
    """A :class:`MemoryModel` as mlx-lm's ``BatchGenerator`` takes a model.

    ::

        batch = BatchModel(model)
        generator = BatchGenerator(batch)
        generator.insert([ids, ...], caches=[batch.make_cache(path), ...])
    """

    def __init__(self, model: MemoryModel):
        self._model, self._bank = model, model.require_bank()
        # What some RouteCache holds, for others to share: blocks, and memories joined by rows.
        self._held: WeakValueDictionary[Key, FetchedMemory] = WeakValueDictionary()
        self._bound: WeakValueDictionary[tuple[tuple[Key, ...], ...], AnchorWithMemory]
        self._bound = WeakValueDictionary()

    def make_cache(
        self,
        route: Sequence[int] | str = "none",
        *,
        bank: str = "",
        under: MemoryModel | None = None,
    ) -> list[Any]:
        """An empty prompt cache for one row, to be inserted with its prompt.

        ``route`` is a cluster path in the ``bank`` of this name, "generic" or "none". Rows of all
        three can share a batch. ``under``: the same model as the user of this row may see it
        (:meth:`MemoryModel.under`).
        """
        banks = (self._model if under is None else under).require_banks()
        keys: list[tuple[int, int]] = []
        if not isinstance(route, str):
            keys = banks.bank(bank).keys_of(tuple(route))
        elif route == "generic":
            keys = [(GENERIC, 0)]
        elif route != "none":
            raise UserError("no such route", repr(route), "use a cluster path, generic or none")
        route_keys = tuple((bank, *key) for key in keys)
        return [*make_prompt_cache(self._model.anchor), RouteCache([Route(route_keys, banks)])]

    def hold(self, cache: list[Any]) -> dict[Key, FetchedMemory]:
        """The blocks, one each, that the rows of a prompt cache need, fetched ahead of their first
        call: what cannot be read is then no fault of a batch that others share. They stay for as
        long as what is returned. UserError as :meth:`mlx_hmem.bank.Bank.blocks`."""
        routes = cache[-1].routes
        keys = set(chain.from_iterable(route.keys for route in routes))
        held = {key: block for key in keys if (block := self._held.get(key)) is not None}
        held.update(self._fetch(routes, keys - set(held)))
        self._held.update(held)
        return held

    def holds(self, key: Key) -> bool:
        """Whether some row has this block already."""
        return key in self._held

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Logits (batch, time, vocabulary) of token ids (batch, time)."""
        *states, routes = cache
        if routes.anchor is None:
            self._bind(routes)
        return routes.anchor(inputs, cache=states)

    def _bind(self, cache: RouteCache) -> None:
        """Fetches the blocks of the rows that are not held yet and joins them."""
        rows = [route.keys for route in cache.routes]
        held = self.hold([cache])
        routes = tuple(rows[:1] if len(set(rows)) == 1 else rows)
        cache.blocks, cache.anchor = held, self._bound.get(routes)
        if cache.anchor is None:
            joined = {
                route: FetchedMemory(
                    tuple(block for key in route for block in held[key].stored), self._bank.config
                )
                for route in routes
            }
            memory = self._model.rows_of([joined[route] for route in routes])
            mx.eval(memory)
            cache.anchor = self._bound[routes] = self._model.with_rows(memory)

    def _fetch(self, routes: Sequence[Route], missing: set[Key]) -> dict[Key, FetchedMemory]:
        """The missing blocks, each read for a row that may have it."""
        wanted: dict[tuple[Bank, str], list[Key]] = {}
        for route in routes:
            for key in missing.intersection(route.keys):
                missing.remove(key)
                wanted.setdefault((route.banks.bank(key[0]), key[0]), []).append(key)
        found: dict[Key, FetchedMemory] = {}
        for (bank, _), keys in wanted.items():
            blocks = bank.packed_blocks([(level, cluster) for _, level, cluster in keys])
            for key, block in zip(keys, blocks, strict=True):
                found[key] = FetchedMemory((self._model.ready(block),), bank.config)
        return found


class Completion(NamedTuple):
    """What continues one prompt. ``tokens`` are without the one that ended it, if one did; ``path``
    is None without fetched memory, also where nothing is near."""

    text: str
    tokens: list[int]
    path: ClusterPath | None
    finish_reason: str  # "stop" or "length"
    bank: str = ""  # where the path lies


def batch_generate(
    model: MemoryModel,
    prompts: Sequence[str],
    *,
    max_tokens: int | Sequence[int] = 100,
    memory: str = "fetched",
    route_texts: Sequence[str] | None = None,
    memory_names: Sequence[str | None] | None = None,
    views: Sequence[str | None] | None = None,
    ids: Sequence[list[int]] | None = None,
    **options: Any,
) -> list[Completion]:
    """Continues many prompts at once, each with the memory it is routed to; in their order.

    Args:
        max_tokens: for all prompts, or for each; no text grows beyond the anchor's context.
        memory: "fetched", "generic" or "none", for all.
        route_texts: what to route by in place of each prompt.
        memory_names: of each prompt the name of its memory, None to route it.
        views: of each prompt, what its user may fetch (:meth:`MemoryModel.under`), of one open
            bank; without, all are as ``model`` is.
        ids: of each prompt the ids that are continued, where they are not just the text's.
        options: those of mlx-lm's ``BatchGenerator``: ``sampler`` (greedy without),
            ``completion_batch_size``, ``prefill_batch_size``, ...

    Raises:
        UserError: no prompts, an empty or too long one, lists of different lengths, or logits that
            are not finite.
    """
    check_mode(memory)
    ids, limits = _checked(model, prompts, max_tokens, ids)
    texts = check_texts(prompts if route_texts is None else route_texts)
    names = [None] * len(ids) if memory_names is None else memory_names
    lists = {"route_texts": texts, "views": views, "memory_names": names}
    for what, given in lists.items():
        if given is not None and len(given) != len(ids):
            raise UserError(f"{what} does not match the prompts", len(given), f"give {len(ids)}")
    for name in names:
        check_named(memory, name)
    routes: list[tuple[str, ClusterPath | None]] = [("", None)] * len(ids)
    anchor: Any = model.with_rows(None)  # all that mlx-lm asks of a model
    caches = None
    if memory != "none":
        anchor = BatchModel(model)
        by_view = {view: model.under(view) for view in views or ()}
        users = [model] * len(ids) if views is None else [by_view[view] for view in views]
        if memory == "fetched":
            routes = _routes(users, texts, names)
        missing = "none" if memory == "fetched" else "generic"
        caches = [
            anchor.make_cache(path or missing, bank=bank, under=user)
            for (bank, path), user in zip(routes, users, strict=True)
        ]
    ends = model.tokenizer.eos_token_ids
    options["sampler"] = ending(options.get("sampler") or make_sampler(), ends)
    generator = BatchGenerator(anchor, stop_tokens=[[token] for token in ends], **options)
    try:
        uids = generator.insert(ids, limits, caches=caches)
        found = _run(generator, uids, ends)
    finally:
        generator.close()
    return [
        Completion(model.tokenizer.decode(tokens), tokens, path, reason, bank)
        for (tokens, reason), (bank, path) in zip(found, routes, strict=True)
    ]


def _routes(
    users: Sequence[MemoryModel], texts: Sequence[str], names: Sequence[str | None]
) -> list[tuple[str, ClusterPath | None]]:
    """The bank and the cluster path of each name, or else of the text, for its user."""
    rows = list(zip(users, texts, names, strict=True))
    rest = [(user, text) for user, text, name in rows if name is None]
    routed = _routed(*zip(*rest, strict=True)) if rest else iter(())
    return [next(routed) if n is None else user.require_banks().named(n) for user, _, n in rows]


def _routed(
    users: Sequence[MemoryModel], texts: Sequence[str]
) -> Iterator[tuple[str, ClusterPath | None]]:
    """The bank and the cluster path of each text, for its user; None where nothing is near."""
    banks = [user.require_banks() for user in users]
    rows = zip(banks, texts, banks[0].retriever().vectors(texts), strict=True)
    return (each.near(text) or each.nearest(vector) for each, text, vector in rows)


def _checked(
    model: MemoryModel,
    prompts: Sequence[str],
    max_tokens: int | Sequence[int],
    given: Sequence[list[int]] | None,
) -> tuple[list[list[int]], list[int]]:
    """The token ids of each prompt and how many tokens may follow it."""
    if not check_texts(prompts):
        raise UserError("there are no prompts", "an empty list", "give at least one")
    if given is None:
        ids = [prompt_ids(model.tokenizer, prompt, model.context) for prompt in prompts]
    else:
        ids = [check_length(each, model.context) for each in given]
    limits = [max_tokens] * len(ids) if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != len(ids):
        raise UserError("max_tokens does not match the prompts", len(limits), f"give {len(ids)}")
    if min(limits) < 1:
        raise UserError("max_tokens is not positive", min(limits), "ask for 1 or more")
    if model.context is not None:
        limits = [min(n, model.context - len(i)) for n, i in zip(limits, ids, strict=True)]
    return ids, limits


def _run(
    generator: BatchGenerator, uids: Sequence[int], ends: Collection[int]
) -> list[tuple[list[int], str]]:
    """The tokens of each row and why it ended, once all have."""
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    reasons: dict[int, str] = {}
    while len(reasons) < len(uids):
        for response in generator.next_generated():
            check_finite(response.token, response.logprobs, ends)
            if response.finish_reason != "stop":
                tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                reasons[response.uid] = response.finish_reason
    return [(tokens[uid], reasons[uid]) for uid in uids]
