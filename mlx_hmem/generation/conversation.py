"""A conversation with a :class:`MemoryModel`, whose memory follows the topic.

Only the levels of a memory that changed with the topic are replaced. The history's keys and values
stay as they were computed, under the memory of their time: computed anew under the present one they
cost a pass over the history and predict no better (docs/chat.md).
"""

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.generate import GenerationResponse

from mlx_hmem.bank.format import Key
from mlx_hmem.bank.read.prefetch import Prefetch
from mlx_hmem.bank.read.reader import Damaged
from mlx_hmem.bank.views import Barred
from mlx_hmem.config import ClusterPath
from mlx_hmem.generation.ending import check_stops, ids_said, until
from mlx_hmem.generation.history import KeyValues, Saved, Turn, read_saved, write_saved
from mlx_hmem.generation.passages import Passage, Passages, answer_alone, beside
from mlx_hmem.generation.session import SessionStats
from mlx_hmem.generation.template import chat_ids, check_system
from mlx_hmem.generation.topic import MARGIN, WINDOW, Topic, window_of
from mlx_hmem.model.fetch import NOTHING_NEAR, PASSAGES_ANSWER, Fetch, check_mode, check_named
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import check_length, check_options, prompt_ids
from mlx_hmem.reading import Source
from mlx_hmem.retriever.steady import likely_paths

LIKELY = 8  # paths that are prefetched (docs/chat.md)

MAX_TOKENS = 256  # as mlx-lm's chat


def check_chosen(model: MemoryModel, memory: str, name: str | None) -> None:
    """Raises UserError where the model has no such memory, or neither a name nor a tree to choose
    one by."""
    if check_mode(memory) != "none":
        model.require_bank()
    check_named(memory, name)
    if memory != "fetched":
        return
    if name is None:
        model.require_retriever()
    else:
        model.path_named(name)


class Conversation:
    """Turns, their answers, and the memory of the moment. For one thread.

    With the tokenizer's chat template where it has one. An anchor without one continues texts, and
    each turn is a text of its own: one that was trained on single documents is lost after another
    (docs/chat.md). With ``history`` the texts follow one another, each begun as a prompt is. When
    the context is full the oldest turns are dropped.

    Attributes:
        memory: "fetched", "generic" or "none".
        memory_name: of the memory that is fetched; None: the one that a turn is routed to.
        history: whether an answer sees the turns before; may be set between turns.
        turns: what was said and answered, as far as it is in the context.
        fetch: the :class:`Fetch` of the latest answer, None before the first.
        passages: before the latest turn, and how many were near it.
        stats: of the session so far.
    """

    def __init__(
        self,
        model: MemoryModel,
        *,
        memory: str | None = None,
        memory_name: str | None = None,
        history: bool | None = None,
        system: str | None = None,
        blocked: Collection[Barred] = (),
        max_tokens: int = MAX_TOKENS,
        stop: Sequence[str] = (),
        damaged: Damaged = "skip",
        margin: float = MARGIN,
        prefetch: bool = True,
        passages: Passages | None = None,
        with_passages: int = 1,
        notify: Callable[[str], None] = lambda line: None,
        **options: Any,
    ):
        """``memory``: None for fetched, but none where passages stand before the turn.
        ``history``: None for that of the tokenizer, see above. ``system``: how a model with a chat
        template is to behave. ``stop``: texts before which an answer ends. ``damaged``: whether an
        answer goes on without a block that cannot be read, or ends in a UserError. ``prefetch``:
        read blocks that may be asked for next between the turns. ``passages``: up to
        ``with_passages`` of them that are near go before each turn. ``notify`` is told, in a line,
        what else one should know. ``blocked`` and ``options`` are those of
        :meth:`MemoryModel.stream`."""
        check_options(max_tokens, **options)
        check_system(model.tokenizer, system)
        self._beside = memory is not None
        memory = memory or "fetched"
        check_chosen(model, memory, memory_name)
        self._barred = frozenset[Key]()
        if model.banks is not None and model.bank is not None:
            own = model.banks.blocked_in(blocked, "")
            self._barred = model.bank.config.check_blocked(own)
        self.model, self.memory, self.blocked = model, memory, blocked
        self.memory_name = memory_name
        self.system, self.stop = system, check_stops(stop)
        self.history = model.tokenizer.has_chat_template if history is None else history
        self.max_tokens, self.damaged, self.margin = max_tokens, damaged, margin
        self._notify, self._options = notify, options
        self._passages, self.with_passages = passages, with_passages if passages else 0
        self._prefetch = Prefetch(model.bank) if prefetch and model.bank is not None else None
        self.stats = SessionStats()
        self._latest = 0  # the number of the answer begun last
        self.reset()

    def reset(self) -> None:
        """Forgets what was said; the statistics go on."""
        self.stop_prefetch()
        self.turns: list[Turn] = []
        self.fetch: Fetch | None = None
        self._before: Fetch | None = None  # a fetch whose answer has ended
        self._topic = Topic(self.model, self.blocked, self.margin)
        self._known = KeyValues(self.model.anchor)
        self._latest += 1
        self._dropped = False
        self._damage: list[str] = []
        self.passages: tuple[Sequence[Passage], int] = (), 0

    @property
    def route(self) -> ClusterPath | None:
        """The cluster path of the latest answer; None without fetched memory."""
        return None if self.fetch is None else self.fetch.path

    def say(self, text: str) -> Generator[GenerationResponse, None, None]:
        """The answer to ``text``, piece by piece; it keeps the memory that it began with.

        Closing the iterator, or Ctrl-C, ends the answer: what was given of it stays in the history.

        Raises:
            UserError: the text is empty or too long, or the memory cannot be read.
        """
        self.stop_prefetch()
        start = time.perf_counter()
        turn = self._turn(text)
        ids = self._fit(turn)
        vector, self.fetch = self._remember(turn)
        fetch, self._latest = self.fetch, self._latest + 1
        number, cache = self._latest, self._take(ids)
        last, pieces, tokens, ttft_ms = None, [], [], 0.0
        try:
            for piece in until(self._stream(ids, fetch, cache), self.stop):
                if last is None:
                    ttft_ms = (time.perf_counter() - start) * 1e3
                    self._say_damage(fetch)
                last = piece
                pieces.append(piece.text)
                tokens.append(piece.token)
                yield piece
        finally:
            if last is not None:
                turn.answer = "".join(pieces)
                turn.answer_ids = ids_said(self.model.tokenizer, turn.answer, tokens, last)
                self.stats.add(fetch, ttft_ms, last)
                if number == self._latest:  # else another answer has begun meanwhile
                    self.turns.append(turn)
                    self._known.give(cache, [*ids, *tokens], fetch)
                    self._before = fetch if fetch.rows is not None else self._before
                    self._begin_prefetch(vector, fetch)

    @property
    def memory_said(self) -> str:
        """What the next answers use, for people."""
        off = answer_alone(self.with_passages, self._beside, self.memory_name)
        return f"{self.memory}, but none beside passages" if off else self.memory

    def set_memory(self, memory: str) -> None:
        """What the next answers use: "fetched", "generic" or "none"."""
        if check_mode(memory) != "none":
            self.model.require_bank()
        self.memory, self._beside = memory, True

    def set_name(self, name: str | None) -> None:
        """Which memory the next answers fetch, by its name; None: the one they are routed to."""
        check_chosen(self.model, "fetched", name)
        self.memory_name = name

    def path_of(self, text: str) -> ClusterPath | None:
        """What ``text`` would be routed to by itself, as the first of a conversation; None where
        nothing is near."""
        return self.model.require_banks().route(text)[1]

    def save(self, file: Source) -> None:
        """Puts the conversation into a file, from which :meth:`load` goes on as if it had never
        stopped. Raises UserError where something else lies there, or it cannot be written."""
        layers, arrays = self._known.packed()
        topic = self._topic
        saved = Saved(
            tuple(self.turns), self.memory, self.memory_name, self._beside, self.history,
            self.system, topic.bank, topic.present, self._known.ids if layers else (),
            sorted(self._known.blocks) if layers else (), layers,
        )  # fmt: skip
        write_saved(Path(file), saved, arrays, self.model.hashes)

    def load(self, file: Source) -> None:
        """Goes on with a saved conversation in place of this one: its turns, its memory, whether it
        sees its history, its system prompt. All else, and what is barred, is as here: keys and
        values that hold what is barred now are left out, and computed anew when they are needed.

        Raises UserError, and changes nothing, where the file is damaged or none, or was saved with
        another anchor or bank.
        """
        saved, known = read_saved(Path(file), self.model)
        check_system(self.model.tokenizer, saved.system)
        check_chosen(self.model, saved.memory, saved.memory_name)
        topic = Topic(self.model, self.blocked, self.margin)
        if saved.path is not None and saved.bank in self.model.require_banks().parts:
            config = self.model.require_banks().bank(saved.bank).config
            topic.bank, topic.present = saved.bank, config.check_path(saved.path)
        banks, context = self.model.banks, self.model.context
        bars = any(banks is None or banks.bars(*block, self.blocked) for block in saved.blocks)
        self.reset()
        self.turns, self._topic = list(saved.turns), topic
        self.memory, self._beside = saved.memory, saved.beside
        self.memory_name, self.history, self.system = saved.memory_name, saved.history, saved.system
        if not bars and (context is None or len(known.ids) <= context):
            self._known = known

    def stop_prefetch(self) -> None:
        """Ends what is being read ahead."""
        if self._prefetch is not None:
            self._prefetch.stop()

    def _turn(self, text: str) -> Turn:
        """A new turn, behind the passages that are near it and leave room for an answer."""
        tokenizer, context = self.model.tokenizer, self.model.context
        ids = prompt_ids(tokenizer, text, context)
        if self._passages is None:
            return Turn(text, text, ids)
        found = self._passages.nearest(text, self.with_passages, self._window(text))

        def ids_of(shown: str) -> list[int]:
            if tokenizer.has_chat_template:
                return check_length(chat_ids(tokenizer, self.system, [], shown), context)
            return prompt_ids(tokenizer, shown, context)

        shown, passages = beside(found, text, ids_of, context, self.max_tokens)
        self.passages = passages, len(found)
        return Turn(text, shown, prompt_ids(tokenizer, shown, context))

    def _fit(self, turn: Turn) -> list[int]:
        """The ids of history and turn; the oldest turns go until there is room for an answer."""
        context = self.model.context
        ids = self._ids(turn)
        if not self.history:
            del self.turns[:-WINDOW]  # for the route only, a word each at least
        if context is None:
            return ids
        room = min(self.max_tokens, context // 4)
        while self.history and self.turns and len(ids) + room > context:
            del self.turns[0]
            ids = self._ids(turn)
            if not self._dropped:
                self._dropped = True
                self._notify(
                    f"the context of {context} tokens is full; the oldest turns are forgotten"
                )
        return check_length(ids, context)

    def _ids(self, turn: Turn) -> list[int]:
        tokenizer, turns = self.model.tokenizer, self.turns if self.history else []
        if tokenizer.has_chat_template:
            before = [(each.shown, each.answer) for each in turns]
            return chat_ids(tokenizer, self.system, before, turn.shown)
        ids: list[int] = []
        for each in [*turns, turn]:
            # An id that both ends a text and begins one stands between two of them once.
            ids += each.ids[1:] if ids[-1:] == each.ids[:1] else each.ids
            ids += each.answer_ids
        return ids

    def _remember(self, turn: Turn) -> tuple[np.ndarray | None, Fetch]:
        """The vector that the turn is routed by, and its memory; it is not waited for."""
        if self.memory == "none":
            return None, Fetch("none")
        if answer_alone(self.passages[0], self._beside, self.memory_name):
            return None, Fetch("none", why=PASSAGES_ANSWER)
        start, vector = time.perf_counter(), None
        path, bank, window = None, "", self._window(turn.text)
        if self.memory == "fetched" and self.memory_name is not None:
            bank, path = self.model.require_banks().named(self.memory_name)
        elif self.memory == "fetched":
            vector, bank, path = self._topic.route(turn.text, window)
            if path is None:
                spent = (time.perf_counter() - start) * 1e3
                return vector, Fetch("none", why=NOTHING_NEAR, route_ms=spent)
        routed = time.perf_counter()
        before, self._before = self._before, None
        fetch = self.model.fetch_path(
            path, self.blocked, wait=False, damaged=self.damaged, before=before, bank=bank,
            about=(turn.text, window),
        )  # fmt: skip
        fetch.route_ms = (routed - start) * 1e3
        fetch.name = "" if path is None else self.memory_name or ""
        return vector, fetch

    def _window(self, text: str) -> str | None:
        """The last words of the conversation, the turn's among them; None for the first turn."""
        return window_of([(turn.text, turn.answer) for turn in self.turns], text)

    def _stream(
        self, ids: list[int], fetch: Fetch, cache: list[Any]
    ) -> Iterator[GenerationResponse]:
        options = dict(self._options)
        self._options.pop("seed", None)  # once in a session
        return self.model.stream_ids(ids, fetch, self.max_tokens, cache, **options)

    def _take(self, ids: list[int]) -> list[Any]:
        """The keys and values of the history, as far as ``ids`` begin with it."""
        if not self.history:
            self._known = KeyValues(self.model.anchor)
        return self._known.take(ids)

    def _say_damage(self, fetch: Fetch) -> None:
        if fetch.damage and fetch.damage != self._damage:
            self._notify(f"the answer goes on {', '.join(fetch.damage)}")
        self._damage = fetch.damage

    def _begin_prefetch(self, vector: np.ndarray | None, fetch: Fetch) -> None:
        if self._prefetch is None or vector is None or fetch.path is None or fetch.bank:
            return  # of the banks that were added nothing is read ahead
        keys_of = self._prefetch.bank.keys_of
        likely = likely_paths(self.model.require_retriever().tree, vector, fetch.path, LIKELY)
        here = {(block["level"], block["cluster"]) for block in fetch.blocks}
        wanted = [key for path in likely for key in keys_of(path, self._barred)]
        self._prefetch.begin([key for key in wanted if key not in here])
