"""An open model, its batch, and the rows that are in it."""

import gc
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from mlx_hmem.errors import UserError
from mlx_hmem.generation.batch import BatchModel
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import check_finite, ending
from mlx_hmem.server.asked import Asked, Piece, RefusedError
from mlx_hmem.server.prepare import Preparing, Prompt
from mlx_hmem.server.row import Row, options_of

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


class Served:
    """One model with a batch of up to ``most`` rows. For the engine's thread."""

    def __init__(self, model: MemoryModel, run: Path | None, most: int):
        self.model, self.preparing = model, Preparing(model, run)
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

    def insert(self, ticket: Ticket) -> None:
        """The next of a request's rows joins the batch; RefusedError where its memory cannot be
        read."""
        number, answer = ticket.wanted.pop(0)
        prompt, asked, held, caches = ticket.prompts[number], ticket.asked, None, None
        if self.batch is not None:
            found = prompt.found
            cache = self.batch.make_cache(found.route, bank=found.bank, under=found.user)
            new = [key for key in found.keys if not self._has(prompt, key)]
            try:
                held, caches = self.batch.hold(cache), [cache]
            except (UserError, OSError) as error:
                raise RefusedError(500, "a block of the memory cannot be read") from error
            ticket.memory.setdefault(number, found.to_dict(read=new))
        else:
            ticket.memory.setdefault(number, prompt.found.to_dict(read=()))
        (uid,) = self._generator.insert(
            [prompt.ids],
            [prompt.max_tokens],
            caches=caches,
            **options_of(asked, answer, self._ends),
        )
        index, tokenizer = number * asked.n + answer, self.model.tokenizer
        self._rows[uid] = ticket, Row(asked, index, tokenizer, held)
        ticket.uids.add(uid)

    def has_all(self, prompt: Prompt) -> bool:
        """Whether no block of a prompt need be read."""
        return all(self._has(prompt, key) for key in prompt.found.keys)

    def next(self) -> Iterator[Said]:
        """What the rows have to say after one more step. What fails in it fails all of them."""
        try:
            responses = self._generator.next()[1]
        except Exception as error:
            tickets = {id(ticket): ticket for ticket, _ in self._rows.values()}
            self._rows.clear()
            self._generator.close()
            self._generator = self._new_generator()
            refusal = RefusedError(500, "the batch failed")
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

    def close(self) -> None:
        """Closes generator and banks, and gives back what memory they took."""
        self._generator.close()
        for part in self.model.banks.parts.values() if self.model.banks is not None else ():
            part.bank.close()
        del self._generator, self._new_generator, self.batch
        gc.collect()
        mx.clear_cache()

    def _forget(self, ticket: Ticket, uid: int) -> None:
        self._rows.pop(uid, None)
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
