"""The engine: all of MLX, in the main thread. What is asked comes through a queue as plain Python,
what is answered goes back through the event loop of the thread that serves HTTP.

A request is prepared (ids, route), its blocks are fetched from the Hub if they are not here, and
read into the page cache, by a thread that knows no MLX; its rows join the batch as others leave.
"""

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_hmem.bank import Bank
from mlx_hmem.budget.resident import trim
from mlx_hmem.errors import UserError
from mlx_hmem.server.asked import Begun, Piece, RefusedError
from mlx_hmem.server.served import UNREADABLE, Served, Ticket, cause_of

Event = Begun | Piece | RefusedError
Deliver = Callable[[list[tuple[Ticket, Event]]], None]
ENDING = "the server is about to end"
PREPARE_SECONDS = 0.02  # between two tokens of the others
LOOK_SECONDS = 1.0  # a signal may reach another thread: this one sees it when it wakes
MOST = "this server takes at most"
FULL = "too many requests wait; try again soon"


class Engine:
    """``open_model`` opens the model; as many rows as ``waiting`` wait beside those that it answers
    at once. ``log`` takes a line."""

    def __init__(
        self,
        open_model: Callable[[], Served],
        waiting: int,
        log: Callable[[str], None],
        detailed: bool = False,
    ):
        self._open, self.waiting = open_model, waiting
        self._log, self._detailed = log, detailed
        self.served = open_model()
        self._opened = 0.0  # when the present model began to be opened
        self._old: list[Served] = []  # of before a reload, with rows yet
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock, self._inside = threading.Lock(), 0  # rows of requests not over yet
        self.draining = False
        self._new: deque[Ticket] = deque()
        self._ready: deque[Ticket] = deque()
        self._num_reading = 0
        self._to_read: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self.deliver: Deliver = lambda events: None
        self.counts: Counter[str] = Counter()

    # For the thread of HTTP.

    def submit(self, ticket: Ticket) -> None:
        """Takes a request in, or raises RefusedError: 429 when too many wait, 503 at the end."""
        wanted, most = ticket.asked.num_rows, self.rows + self.waiting
        with self._lock:
            if self.draining:
                raise RefusedError(503, ENDING)
            if wanted > most:  # it would be asked again and again
                raise RefusedError(400, f"n: {wanted} answers in one request; {MOST} {most}", "n")
            if self._inside + wanted > most:
                raise RefusedError(429, FULL, code="too_many_waiting", headers={"Retry-After": "1"})
            self._inside += wanted
        self._queue.put(lambda: self._new.append(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """The client of a request has gone away."""
        self._queue.put(lambda: self._end(ticket, "gone"))

    def call(self, work: Callable[[Served], Any]) -> Future[Any]:
        """What ``work`` makes of the present model, in the engine's thread."""
        if self.draining:
            raise RefusedError(503, ENDING)
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work(self.served))
            except Exception as error:
                future.set_exception(error)

        self._queue.put(run)
        return future

    def drain(self) -> None:
        """No new requests from now on; the engine ends with the last of those in it."""
        self.draining = True
        self._queue.put(lambda: None)

    @property
    def rows(self) -> int:
        """How many are answered at once, at most."""
        return self.served.most

    @property
    def num_inside(self) -> int:
        """Rows of all requests that are answered or wait."""
        return self._inside

    @property
    def num_rows(self) -> int:
        """Rows that are in a batch."""
        return sum(map(len, [self.served, *self._old]))

    @property
    def prompt_cache_bytes(self) -> int:
        """Of keys and values that are kept for prompts that begin alike."""
        return sum(served.prompts.nbytes for served in [self.served, *self._old])

    # For the main thread.

    def run(self) -> None:
        """Answers until it is drained."""
        reader = threading.Thread(target=self._read, name="reader", daemon=True)
        reader.start()
        try:
            while True:
                self._take_messages()
                with self._lock:
                    if self.draining and not self._inside:
                        return
                self._prepare_next()
                self._insert_ready()
                self._step()
        finally:
            self._to_read.put(None)
            reader.join()

    def reload(self, asked: float, _: Served) -> None:
        """Opens the model anew, for the requests that are not prepared yet, unless it has been
        since ``asked``, in time.monotonic(): many who ask at once get one."""
        if self._opened > asked:
            return
        begun = time.monotonic()
        self.served.let_go()
        self._close_old()
        try:
            new = self._open()
        except (UserError, OSError) as error:
            self._log(f"reload: {error if self._detailed else type(error).__name__}")
            raise RefusedError(
                500, "the model cannot be opened; the one of before goes on"
            ) from None
        self._old.append(self.served)
        self.served, self._opened = new, begun
        self.counts["reloads"] += 1

    def _take_messages(self) -> None:
        """What has come; waits for it where nothing else is to be done."""
        idle = not (self.num_rows or self._ready or (self._new and self._may_prepare()))
        if idle and self._queue.empty():
            mx.clear_cache()
        while True:
            try:
                work = self._queue.get(idle, LOOK_SECONDS)
            except queue.Empty:
                return
            idle = False
            work()

    def _may_prepare(self) -> bool:
        return len(self._ready) + self._num_reading < self.rows

    def _prepare_next(self) -> None:
        """As many requests as so many seconds allow, so that the rows that speak do not wait."""
        end = time.perf_counter() + PREPARE_SECONDS
        while self._new and self._may_prepare() and time.perf_counter() < end:
            ticket = self._new.popleft()
            if ticket.over:
                continue
            try:
                ticket.take(self.served)
            except Exception as error:
                self._refuse(ticket, error)
            else:
                self.deliver([(ticket, Begun(sum(len(p.ids) for p in ticket.prompts)))])
                self._num_reading += 1
                if all(map(self.served.has_all, ticket.prompts)):
                    self._is_read(ticket)
                else:
                    self._to_read.put(ticket)

    def _insert_ready(self) -> None:
        while self._ready and self.num_rows < self.rows:
            ticket = self._ready[0]
            if not ticket.wanted:
                self._ready.popleft()
                continue
            try:
                reused = served_of(ticket).insert(ticket)
                self.counts["prompt_cache_hits"] += reused > 0
                self.counts["prompt_cache_tokens"] += reused
            except Exception as error:
                self._refuse(ticket, error)

    def _step(self) -> None:
        for served in filter(len, (self.served, *self._old)):
            before = served.num_tokens
            said: list[tuple[Ticket, Event]] = []
            for ticket, event in served.next():
                if isinstance(event, RefusedError):
                    self._refuse(ticket, event)
                    continue
                said.append((ticket, event))
                if not ticket.uids and not ticket.wanted:
                    self._over(ticket, "answered")
            self.counts["tokens"] += served.num_tokens - before
            if said:
                self.deliver(said)
        self._close_old()

    def _close_old(self) -> None:
        """Closes the models of before that no request needs any more, and gives back what memory
        they took."""
        wanted = {id(ticket.served) for ticket in self._ready}
        over = [s for s in self._old if not len(s) and id(s) not in wanted]
        if over and not self._num_reading:
            self._old = [s for s in self._old if s not in over]
            while over:
                over.pop().close()
            trim()

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        if not isinstance(error, RefusedError):
            refusal = RefusedError(500, "this request failed")
            refusal.__cause__ = error
            error = refusal
        if error.status >= 500:
            self._log(f"a request failed: {error.message}: {cause_of(error)}")
        if not ticket.over:
            self.deliver([(ticket, error)])
        self._end(ticket, "failed")

    def _end(self, ticket: Ticket, how: str) -> None:
        """Ends a request wherever it is."""
        if ticket.served is not None:
            ticket.served.remove(ticket)
        self._over(ticket, how)

    def _over(self, ticket: Ticket, how: str) -> None:
        if not ticket.over:
            ticket.over = True
            ticket.wanted.clear()
            self.counts[how] += 1
            with self._lock:
                self._inside -= ticket.asked.num_rows

    # The thread that reads ahead.

    def _read(self) -> None:
        while (ticket := self._to_read.get()) is not None:
            try:
                for prompt in ticket.prompts:
                    found = prompt.found
                    if found.keys and not ticket.over:
                        _read_ahead(found.user.require_banks().bank(found.bank), found.keys)
            except Exception as error:
                self._queue.put(partial(self._is_read, ticket, error))
            else:
                self._queue.put(partial(self._is_read, ticket))

    def _is_read(self, ticket: Ticket, error: Exception | None = None) -> None:
        """``error``: of files that cannot be had; those that cannot be read are said when the row
        joins."""
        self._num_reading -= 1
        if error is None:
            self._ready.append(ticket)
            return
        refusal = RefusedError(500, UNREADABLE)
        refusal.__cause__ = error
        self._refuse(ticket, refusal)


def served_of(ticket: Ticket) -> Served:
    assert ticket.served is not None
    return ticket.served


def _read_ahead(bank: Bank, keys: list[tuple[int, int]]) -> None:
    bank.obtain(keys)
    for key in keys:
        for _ in bank.read_ahead(key):
            if not threading.main_thread().is_alive():
                return
