"""A :class:`MemoryModel`: anchor, retriever and memory bank, ready to call."""

import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.fused import FusedMemory, is_fused
from mlx_hmem.anchors.load import float_dtype
from mlx_hmem.bank import Bank
from mlx_hmem.bank.documents import Document
from mlx_hmem.bank.read.reader import Damaged
from mlx_hmem.bank.views import Barred, Views
from mlx_hmem.budget.plan import BudgetPlan
from mlx_hmem.budget.resident import Watch
from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.memory import Block, FetchedMemory, Rows, stack_rows
from mlx_hmem.memory.packed import ready
from mlx_hmem.model.banks import Banks, RoutedBank
from mlx_hmem.model.fetch import NOTHING_NEAR, Fetch, Memory, begin, check_mode, check_named
from mlx_hmem.model.stream import AnchorWithMemory, first_or, num_held, prompt_ids, stream_text
from mlx_hmem.retriever import Retriever


class MemoryModel:
    """An anchor with its memory.

    Attributes:
        anchor: the mlx ``nn.Module``, usable by mlx-lm as it is.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        retriever, bank: None for an anchor without memory; retriever, too, where memories are
            chosen by name alone.
        banks: that bank and those beside it, as the view that was asked for allows them.
        context: the longest sequence in tokens, None if the anchor's config does not say.
        plan: how a memory budget is kept, None without one.
        hashes: of the files that its answers follow from, as far as it was loaded from some.
    """

    def __init__(
        self,
        anchor: nn.Module,
        anchor_config: dict[str, Any],
        tokenizer: TokenizerWrapper,
        retriever: Retriever | None = None,
        bank: Bank | None = None,
        beside: Mapping[str, RoutedBank] | None = None,
        views: Views | None = None,
        names: Mapping[str, ClusterPath] | None = None,
        documents: Sequence[Document] = (),
    ):
        self.anchor, self.anchor_config, self.tokenizer = anchor, anchor_config, tokenizer
        self.retriever, self.bank = retriever, bank
        self.context: int | None = anchor_config.get("max_position_embeddings")
        self.banks: Banks | None = None
        if bank is not None:
            parts = {"": RoutedBank(retriever, bank, names or {}, documents), **(beside or {})}
            self.banks = Banks(parts, views or {})
        self._slot = attach_memory(anchor, bank.config) if bank is not None else None
        self._dtype = float_dtype(anchor)
        self.plan: BudgetPlan | None = None
        self.hashes: dict[str, str] = {}
        self.bound = True  # hmem.json names config and tokenizer; those of before do not
        self._watch: Watch | None = None

    def __repr__(self) -> str:
        name = self.anchor_config.get("model_type", type(self.anchor).__name__)
        return f"MemoryModel({name}, {self.bank or 'no bank'})"

    def keep_to(
        self, plan: BudgetPlan, base: int, let_go: Callable[[], None] | None = None
    ) -> None:
        """Keeps to a memory budget from now on: ``base`` are the resident bytes that it does not
        count. A call that finds it used up, and nothing more to ``let_go`` of (without, the kept
        blocks), raises OverBudgetError."""
        self.plan, self.context = plan, plan.context
        remedy = f"give a larger one, or a context of less than {plan.context} tokens"
        self._watch = Watch(plan.budget, base, let_go or self.let_go, remedy, plan.wired)

    def let_go(self) -> None:
        """Lets go of the kept blocks."""
        for part in self.banks.parts.values() if self.banks is not None else ():
            part.bank.let_go()

    @property
    def options(self) -> dict[str, Any]:
        """What a memory budget has chosen for mlx-lm's ``generate_step``."""
        return {} if self.plan is None else self.plan.options

    def under(self, view: str | None) -> "MemoryModel":
        """The same model, with the same open banks, for someone who may fetch no more than this
        view allows; None for the view "default" where there is one, else for all. A view that was
        asked for by name is not left so: another bars more beside it.

        Raises UserError: there is no such view.
        """
        model = copy.copy(self)
        model.banks = self.require_banks().under(view)
        model.bank = model.banks.bank()
        return model

    def __call__(
        self,
        ids: mx.array,
        paths: Sequence[ClusterPath] | None = None,
        memory: str = "fetched",
        cache: list[Any] | None = None,
    ) -> mx.array:
        """Logits (batch, time, vocabulary) of token ids (batch, time).

        ``paths`` holds one cluster path for the whole batch or one per row; needed with
        ``memory="fetched"`` only.
        """
        return self.with_memory(ids.shape[0], memory, paths)(ids, cache=cache)

    def with_memory(
        self, batch: int, memory: str = "fetched", paths: Sequence[ClusterPath] | None = None
    ) -> AnchorWithMemory:
        """The anchor bound to the memory of a batch of so many rows, which is fetched once; as
        :meth:`__call__`."""
        if check_mode(memory) == "none":
            rows = None
        elif memory == "generic":
            rows = self.rows_of([self.require_bank().generic()])
        else:
            rows = self._rows_of_paths(batch, paths)
        return self.with_rows(rows)

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 100,
        memory: str = "fetched",
        route_text: str | None = None,
        memory_name: str | None = None,
        blocked: Collection[Barred] = (),
        **options: Any,
    ) -> Iterator[GenerationResponse]:
        """Pieces of text that continue ``prompt``, each with ``.text`` (mlx-lm's responses).

        The memory is the one of ``memory_name``, or else is routed by ``route_text``, by the prompt
        itself if that is None. ``options``:
        ``temp``, ``top_p``, ``top_k``, ``min_p``, ``seed``, those of mlx-lm's ``generate_step``.
        """
        ids = prompt_ids(self.tokenizer, prompt, self.context)
        text = prompt if route_text is None else route_text
        fetch = self.fetch(text, memory, blocked, memory_name=memory_name)
        return self.stream_ids(ids, fetch, max_tokens=max_tokens, **options)

    def stream_ids(
        self,
        ids: list[int],
        fetch: Fetch,
        max_tokens: int,
        cache: list[Any] | None = None,
        **options: Any,
    ) -> Iterator[GenerationResponse]:
        """As :meth:`stream`, of token ids and a memory fetched before. ``cache``: a prompt cache
        that holds the first of them, or none yet."""
        if self.context is not None:
            max_tokens = min(max_tokens, self.context - len(ids))
        options = self.options | options
        if cache is not None:
            options["prompt_cache"] = cache

        def start() -> Iterator[GenerationResponse]:
            model, rest = self.with_rows(fetch.rows), ids[num_held(cache or []) or 0 :]
            return stream_text(model, self.tokenizer, rest, max_tokens, **options)

        def mended() -> Iterator[GenerationResponse]:
            self.mend(fetch)
            if cache is not None:
                cache[:] = make_prompt_cache(self.anchor)  # it has seen the damage
            return start()

        arriving = fetch.rows is not None and not isinstance(fetch.rows, tuple)
        if fetch.damaged == "stop" or not arriving:
            return start()
        if cache is None and "prompt_cache" in options:  # it has the damaged memory in it then
            raise UserError("prompt_cache given", "damaged skip", "fetch with wait, or stop")
        return first_or(start(), mended)

    def fetch(
        self,
        text: str,
        memory: str = "fetched",
        blocked: Collection[Barred] = (),
        wait: bool = True,
        damaged: Damaged = "stop",
        memory_name: str | None = None,
    ) -> Fetch:
        """Routes ``text`` and fetches its memory, or fetches the one of ``memory_name``.

        Without ``wait`` a fetched memory is read while the prompt is processed, layer by layer: for
        one stream, which raises the UserError of a damaged block before its first token.
        ``blocked`` holds clusters that may not be fetched, each as the path that leads to it:
        ``(3,)`` bars the whole subtree, ``(3, 51)`` one cluster of level 2 and what is below,
        ``("NAME", 3)`` and ``("NAME",)`` those of a bank that was added, and all of it.
        With ``damaged`` "skip" a block that cannot be read at a second try either is left out, and
        ``Fetch.damage`` says so; a stream that has begun to use it begins again.

        Where the memory is of documents whose words are known, and none of them is near the text,
        there is no memory, and ``Fetch.why`` says so (docs/own_documents.md).
        """
        check_named(memory, memory_name)
        if check_mode(memory) == "none":
            return Fetch("none")
        self.require_bank()
        start, name, path = time.perf_counter(), "", None
        if memory_name is not None:
            name, path = self.require_banks().named(memory_name)
        elif memory == "fetched":
            name, path = self.require_banks().route(text, blocked)
            if path is None:
                spent = (time.perf_counter() - start) * 1e3
                return Fetch("none", why=NOTHING_NEAR, route_ms=spent)
        routed = time.perf_counter()
        about = None if path is None else (text, None)
        fetch = self.fetch_path(path, blocked, wait, damaged, bank=name, about=about)
        fetch.route_ms, fetch.name = (routed - start) * 1e3, memory_name or ""
        return fetch

    def path_named(self, name: str) -> ClusterPath:
        """The cluster path of a memory that has a name; UserError says which there are."""
        return self.require_banks().named(name)[1]

    def route(self, text: str, blocked: Collection[Barred] = ()) -> tuple[str, ClusterPath]:
        """The bank that answers ``text``, "" the first, and the cluster path in it: the nearest
        one also where :meth:`fetch` finds nothing near."""
        name, path = self.require_banks().route(text, blocked)
        return name, self.require_retriever().route(text) if path is None else path

    def fetch_path(
        self,
        path: ClusterPath | None,
        blocked: Collection[Barred] = (),
        wait: bool = True,
        damaged: Damaged = "stop",
        before: Fetch | None = None,
        bank: str = "",
        about: tuple[str, str | None] | None = None,
    ) -> Fetch:
        """As :meth:`fetch`, of a cluster path, or of the generic memory for None, in the ``bank``
        of this name.

        ``about``: what is asked, and the last words of a conversation if it stands in one: the
        documents that say the most of it are named first.

        ``before`` is a fetch that no stream uses any more: of the levels that it shares with this
        one nothing is read or moved, and their source is "attached".
        """
        start, banks = time.perf_counter(), self.require_banks()
        source, before = banks.bank(bank), before if before and before.bank == bank else None
        barred = source.config.check_blocked(banks.blocked_in(blocked, bank))
        fetch = Fetch("generic" if path is None else "fetched", path, bank=bank)
        fetch.blocked, fetch.damaged = blocked, damaged
        if path is not None:
            taught_by = banks.taught_by(bank, path, barred, *(about or ()))
            fetch.documents = [document.name for document in taught_by]
        if path is not None and not wait:
            try:
                fetch.rows, fetch.blocks = begin(source, path, barred, before, self._dtype)
            except UserError:
                if damaged == "stop":
                    raise
                return self.fetch_path(path, blocked, damaged=damaged, bank=bank, about=about)
        else:
            memory = (
                source.generic(damaged) if path is None else source.fetch(path, barred, damaged)
            )
            fetch.rows, fetch.damage = self.rows_of([memory]), list(memory.damage)
            fetch.blocks = [asdict(read) for read in memory.reads]
            if fetch.rows is not None:
                mx.eval(*fetch.rows)
        fetch.bytes_read = sum(b["bytes"] for b in fetch.blocks if b["source"] == "disk")
        fetch.fetch_ms = (time.perf_counter() - start) * 1e3
        return fetch

    def mend(self, fetch: Fetch) -> None:
        """Fetches anew what could not be read to the end, and leaves out what cannot be read."""
        again = self.fetch_path(fetch.path, fetch.blocked, damaged="skip", bank=fetch.bank)
        fetch.rows, fetch.blocks, fetch.damage = again.rows, again.blocks, again.damage
        fetch.bytes_read += again.bytes_read

    def with_rows(self, rows: Memory | None) -> AnchorWithMemory:
        """The anchor bound to a memory, or to one per row of a batch (see mlx_hmem.memory)."""
        if is_fused(self.anchor):
            raise UserError(
                "a fused memory is in the anchor's weights",
                "no other can be attached",
                "call the anchor itself, or clear the fused memory",
            )
        return AnchorWithMemory(self.anchor, self._slot, rows, self._watch)

    def fuse(self, path: ClusterPath | None = None) -> FusedMemory:
        """The memory of ``path``, the generic one without, inside the anchor's own weights.

        For one stream through mlx-lm: it costs what its parameters cost. Until it is cleared this
        model's own calls are refused; as a context manager it is cleared at the end::

            with model.fuse(model.retriever.route(text)) as fused:
                mlx_lm.generate(fused.anchor, model.tokenizer, text)
                fused.set(model.bank.fetch(path).blocks)  # another topic

        Raises:
            UserError: the memory is not of kind ffn, or the anchor is quantised.
        """
        fused = FusedMemory(self.anchor, self.require_bank().config)
        memory = self.require_bank().generic() if path is None else self.require_bank().fetch(path)
        fused.set(memory.blocks)
        return fused

    def rows_of(self, memories: Sequence[FetchedMemory]) -> Rows | None:
        """Memories joined, ready for the anchor; with a batch axis in front for several."""
        made = {memory: memory.ready(self._dtype) for memory in dict.fromkeys(memories)}
        return stack_rows([made[memory] for memory in memories])

    def ready(self, block: Block) -> Block:
        """A block for many a join; a quantised one as :meth:`rows_of` has it."""
        return ready(block, self._dtype) if isinstance(block, tuple) else block

    def _rows_of_paths(self, batch: int, paths: Sequence[ClusterPath] | None) -> Rows | None:
        bank = self.require_bank()
        checked = [bank.config.check_path(path) for path in (() if paths is None else paths)]
        if len(checked) not in (1, batch):
            raise UserError(
                "paths do not match the rows of the batch",
                f"{len(checked)} paths, {batch} rows",
                "give one path, or one per row",
            )
        fetched = {path: bank.fetch(path) for path in dict.fromkeys(checked)}
        return self.rows_of([fetched[path] for path in (checked if len(fetched) > 1 else fetched)])

    def require_bank(self) -> Bank:
        """The bank; UserError if this is an anchor without memory."""
        if self.bank is None:
            raise UserError(
                "this model has no memory bank", "anchor alone", "use memory none, or add a bank"
            )
        return self.bank

    def require_retriever(self) -> Retriever:
        """The first bank's retriever; UserError as :meth:`require_bank`."""
        return self.require_banks().retriever()

    def require_banks(self) -> Banks:
        """The bank and those beside it; UserError as :meth:`require_bank`."""
        self.require_bank()
        assert self.banks is not None
        return self.banks
