"""An open model, its batch, and the rows that are in it."""

import gc
import traceback
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.generate import BatchGenerator, PromptProcessingBatch
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_hmem.budget.resident import OverBudgetError
from mlx_hmem.errors import UserError
from mlx_hmem.generation.batch import BatchModel, Key
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import check_finite, ending
from mlx_hmem.server.asked import Asked, Piece, RefusedError
from mlx_hmem.server.prepare import Found, Preparing, Prompt
from mlx_hmem.server.prompts import PromptCache
from mlx_hmem.server.row import Row, options_of

UNREADABLE = "a block of the memory cannot be read"
PREFILL_ROWS, PREFILL_TOKENS = 8, 256  # of prompts between two tokens of the others


@dataclass
class Ticket:
    """A request on its way. ``wanted``: its rows that are in no batch yet, each the number of its
    prompt and that of its answer."""

    asked: Asked
    prompts: list[Prompt] = field(default_factory=list)
    wanted: list[tuple[int, int]] = field(default_factory=list)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)  # of each prompt
    served: "Served | None" = None  # the model that answers it, once it is prepared
    uids: set[int] = field(default_factory=set)  # of its rows in that model's batch
    over: bool = False  # answered, refused or gone
    sink: Any = None  # of who waits for the answer

    def take(self, served: "Served") -> None:
        """Has it prepared; RefusedError where it cannot be answered."""
        prompts = served.preparing.prompts(self.asked)
        self.served, self.prompts = served, prompts
        self.wanted = [(p, a) for p in range(len(prompts)) for a in range(self.asked.n)]


Said = tuple[Ticket, Piece | RefusedError]


@dataclass
class Reading:
    """A prompt whose first ``ids`` are to be kept once ``left`` more of them are read."""

    memory: Hashable
    ids: list[int]
    left: int


class Served:
    """One model with a batch of up to ``most`` rows, and up to ``prompt_bytes`` of keys and values
    of prompts that were read. For the engine's thread."""

    def __init__(self, model: MemoryModel, run: Path | None, most: int, prompt_bytes: int):
        self.most = most
        self.model, self.preparing = model, Preparing(model, run)
        self.prompts = PromptCache(prompt_bytes, PREFILL_TOKENS)
        self._reading: dict[int, Reading] = {}
        self._ends = sorted(model.tokenizer.eos_token_ids)
        self.batch = None if model.bank is None else BatchModel(model)
        anchor: Any = self.batch or model.with_rows(None)
        self._new_generator = partial(
            BatchGenerator,
            anchor,
            stop_tokens=[[token] for token in self._ends],
            sampler=ending(make_sampler(), self._ends),
            completion_batch_size=most,
            prefill_batch_size=min(PREFILL_ROWS, most),
            prefill_step_size=PREFILL_TOKENS,
        )
        self._generator = self._new_generator()
        self._rows: dict[int, tuple[Ticket, Row]] = {}
        self.num_tokens = 0  # made so far

    def __len__(self) -> int:
        return len(self._rows)

    def insert(self, ticket: Ticket) -> int:
        """The next of a request's rows joins the batch; how many of its prompt's tokens need not be
        read. RefusedError where its memory cannot be read."""
        number, answer = ticket.wanted.pop(0)
        prompt, asked = ticket.prompts[number], ticket.asked
        new = [key for key in prompt.found.keys if not self._has(prompt, key)]
        cache, held = self._memory(prompt.found)
        ticket.memory.setdefault(number, prompt.found.to_dict(read=new))
        # Who asks, too: how many tokens need not be read says what was asked before.
        memory, ids = (asked.who, asked.memory.view, frozenset(held)), prompt.ids
        states, reused = self.prompts.find(memory, ids)
        cache[: len(states)] = states
        (uid,) = self._generator.insert(
            [ids[reused:]],
            [prompt.max_tokens],
            caches=[cache],
            all_tokens=[ids[:reused]],
            **options_of(asked, answer, self._ends),
        )
        if left := self.prompts.whole(ids) - reused:
            self._reading[uid] = Reading(memory, ids[: left + reused], left)
        index, tokenizer = number * asked.n + answer, self.model.tokenizer
        self._rows[uid] = ticket, Row(asked, index, tokenizer, held, reused)
        ticket.uids.add(uid)
        return reused

    def _memory(self, found: Found) -> tuple[list[Any], dict[Key, FetchedMemory]]:
        """An empty prompt cache with the route of a memory, and its blocks."""
        if self.batch is None:
            return list(make_prompt_cache(self.model.anchor)), {}
        cache = self.batch.make_cache(found.route, bank=found.bank, under=found.user)
        try:
            return cache, self.batch.hold(cache)
        except (UserError, OSError) as error:
            raise RefusedError(500, UNREADABLE) from error

    def has_all(self, prompt: Prompt) -> bool:
        """Whether no block of a prompt need be read."""
        return all(self._has(prompt, key) for key in prompt.found.keys)

    def next(self) -> Iterator[Said]:
        """What the rows have to say after one more step. What fails in it fails all of them."""
        try:
            read, responses = self._generator.next()
            self._keep([each for each in read if not each.end_of_prompt])
        except Exception as error:
            tickets = {id(ticket): ticket for ticket, _ in self._rows.values()}
            self._rows.clear()
            self._reading.clear()
            self.prompts.clear()
            self._generator.close()
            self._generator = self._new_generator()
            refusal = RefusedError(500, "the batch failed")
            if isinstance(error, OverBudgetError):
                refusal = RefusedError(503, error.what)
            refusal.__cause__ = error
            for ticket in tickets.values():
                ticket.uids.clear()
                yield ticket, refusal
            return
        self.num_tokens += len(responses)
        for response in responses:
            if response.uid not in self._rows:
                continue  # another row of its request has just failed
            ticket, row = self._rows[response.uid]
            try:
                check_finite(response.token, response.logprobs, self._ends)
            except UserError as error:
                self._forget(ticket, response.uid)
                yield ticket, RefusedError(500, error.what)
                continue
            piece = row.add(response.token, response.logprobs, response.finish_reason)
            if piece.finish_reason is not None:
                if response.finish_reason is None:
                    self._generator.remove([response.uid])
                self._forget(ticket, response.uid)
                piece.memory = ticket.memory[row.index // ticket.asked.n]
            if ticket.asked.stream or piece.finish_reason is not None:
                yield ticket, piece

    def remove(self, ticket: Ticket) -> None:
        """Takes what is left of a request out of the batch."""
        if uids := list(ticket.uids):
            self._generator.remove(uids)
            for uid in uids:
                self._forget(ticket, uid)

    def let_go(self) -> None:
        """Lets go of what is kept for requests to come: prompts and blocks."""
        self.prompts.clear()
        self.model.let_go()

    def close(self) -> None:
        """Closes generator and banks."""
        self._generator.close()
        self.prompts.clear()
        for part in self.model.banks.parts.values() if self.model.banks is not None else ():
            part.bank.close()
        del self._generator, self._new_generator, self.batch
        gc.collect()

    def _keep(self, read: Sequence[PromptProcessingBatch.Response]) -> None:
        """Keeps the keys and values of the prompts of which the last whole part was just read.
        Where several are read at once the device may sum in another order: none of them is kept,
        for no answer is to depend on who asked beside the one before."""
        for each in read:
            reading = self._reading.get(each.uid)
            if reading is None or len(read) > 1:
                self._reading.pop(each.uid, None)
            elif each.progress[0] == reading.left:
                del self._reading[each.uid]
                cache, _ = self._generator.extract_cache([each.uid])[each.uid]
                states = cache if self.batch is None else cache[:-1]
                self.prompts.keep(reading.memory, reading.ids, states)

    def _forget(self, ticket: Ticket, uid: int) -> None:
        self._rows.pop(uid, None)
        self._reading.pop(uid, None)
        ticket.uids.discard(uid)

    def _has(self, prompt: Prompt, key: tuple[int, int]) -> bool:
        """Whether a block is in memory."""
        assert self.batch is not None
        bank = prompt.found.user.require_banks().bank(prompt.found.bank)
        return bank.keeps(key) or self.batch.holds((prompt.found.bank, *key))


def cause_of(error: BaseException) -> str:
    """What happened where, without the paths of this machine and what an error says of values."""
    cause = error.__cause__ or error
    frames = list(traceback.walk_tb(cause.__traceback__))
    where = ""
    if frames:
        frame, line = frames[-1]
        where = f" in {frame.f_globals.get('__name__', '?')}, line {line}"
    return f"{type(cause).__name__}{where}"
