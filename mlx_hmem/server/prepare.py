"""A request as the model takes it: token ids, and the memory that is fetched for them.

For the engine's thread: an encoder may run in MLX, and a tokenizer changes itself as it encodes.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hmem.bank.documents import DOCUMENTS
from mlx_hmem.bank.format import GENERIC
from mlx_hmem.bank.views import Barred, barred_path
from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.generation.passages import Passage, Passages, answer_alone, beside
from mlx_hmem.generation.template import chat_ids, check_system, expect_chat
from mlx_hmem.generation.topic import MARGIN, Topic, window_of
from mlx_hmem.model.fetch import NOTHING_NEAR, PASSAGES_ANSWER, check_named
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import check_length, prompt_ids
from mlx_hmem.server.asked import Asked, MemoryAsked, Messages, naming, wrong

NO_BANK = "no bank"  # why an anchor alone answers where nobody asked for memory
MOST_VIEWS = 8  # of which the passages are kept
Context = tuple[str, str | None]  # what is asked, and the last words of its conversation


@dataclass
class Found:
    """The memory of one prompt: ``route`` is a cluster path in the bank ``bank``, "generic" or
    "none"; ``user`` is the model as who asks may see it; ``passages``: None where none were asked
    for."""

    user: MemoryModel
    route: ClusterPath | str = "none"
    bank: str = ""
    why: str = ""
    name: str = ""
    documents: tuple[str, ...] = ()
    passages: tuple[Passage, ...] | None = None

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(level, cluster) of the blocks, none that is barred."""
        if isinstance(self.route, str):
            return [(GENERIC, 0)] if self.route == "generic" else []
        return self.user.require_banks().bank(self.bank).keys_of(self.route)

    def to_dict(self, read: Collection[tuple[int, int]] | None = None) -> dict[str, Any]:
        """As JSON values; ``read``: of the blocks those that came from disk."""
        mode = self.route if isinstance(self.route, str) else "fetched"
        size = self.user.require_banks().bank(self.bank).block_bytes if self.keys else lambda n: 0
        result: dict[str, Any] = {
            "mode": mode,
            "path": None if isinstance(self.route, str) else list(self.route),
            "bank": self.bank,
            "name": self.name,
            "why": self.why,
            "documents": list(self.documents),
            "blocks": [{"level": n, "cluster": c, "bytes": size(n)} for n, c in self.keys],
        }
        if read is not None:
            result["bytes_read"] = sum(size(level) for level, _ in read)
        if self.passages is not None:
            result["passages"] = [each._asdict() for each in self.passages]
        return result


@dataclass
class Prompt:
    """Token ids, and how many may follow them."""

    ids: list[int]
    max_tokens: int
    found: Found


class Preparing:
    """Prepares requests for one open model; ``run`` is the folder with the text of remembered
    documents, None where there is none."""

    def __init__(self, model: MemoryModel, run: Path | None):
        self.model, self._run = model, run
        self._passages: dict[Any, Passages] = {}
        expect_chat(model.tokenizer)

    def prompts(self, asked: Asked) -> list[Prompt]:
        """Raises RefusedError for what this model cannot take."""
        user = self.user(asked.memory)
        if asked.messages is not None:
            system, turns, text = conversation_of(asked.messages)
            if not text.strip():
                raise wrong("messages", "the last message is empty")
            with naming("messages"):
                check_system(self.model.tokenizer, system)
            ids_of: Callable[[str], list[int]] = partial(self._chat_ids, system, turns)
            window = window_of(turns, text)
            return [self._prompt(asked, user, "messages", (text, window), ids_of)]
        return [self._continued(asked, user, prompt) for prompt in asked.prompts]

    def user(self, memory: MemoryAsked) -> MemoryModel:
        """The model as whoever asks may see it, without what is barred, with the bank that was
        asked for alone; the model itself where it has no bank."""
        if self.model.bank is None:
            return self.model
        with naming(memory.params.get("view", "view")):
            user = self.model.under(memory.view)
        if memory.bar or memory.bank is not None:
            with naming(memory.params.get("bar")):
                bar = [_barred(path) for path in memory.bar]
            with naming(memory.params.get("bank", memory.params.get("bar"))):
                banks = user.require_banks().narrowed(bar, memory.bank)
            user = copy.copy(user)
            user.banks, user.bank = banks, next(iter(banks.parts.values())).bank
        return user

    def memory(
        self, memory: MemoryAsked, user: MemoryModel, about: Context, param: str, passages: bool
    ) -> Found:
        """The memory for what is asked, a field called ``param``; ``passages``: some stand before
        it."""
        found = Found(user)
        own = memory.params.get("mode", "memory")
        with naming(memory.params.get("name")):
            check_named(memory.mode or "fetched", memory.name)
        if user.bank is None and memory.mode is None and memory.name is None:
            found.why = NO_BANK
            return found
        if memory.mode == "none":
            return found
        if answer_alone(passages, memory.mode is not None, memory.name):
            found.why = PASSAGES_ANSWER
            return found
        with naming(own):
            banks = user.require_banks()
        if memory.mode == "generic":
            found.route = "generic"
            found.bank = next(iter(banks.parts))
            return found
        if memory.name is not None:
            with naming(memory.params.get("name")):
                found.bank, found.route = banks.named(memory.name)
            found.name = memory.name
        else:
            if memory.route_text is not None:
                about, param = (memory.route_text, None), memory.params.get("route_text", param)
            with naming(own):
                banks.retriever()
            with naming(param):
                _, found.bank, path = Topic(user, (), MARGIN).route(*about)
            if path is None:
                found.bank, found.why = "", NOTHING_NEAR
                return found
            found.route = path
        taught = banks.taught_by(found.bank, found.route, frozenset(), *about)
        found.documents = tuple(document.name for document in taught)
        return found

    def documents(self, memory: MemoryAsked) -> list[dict[str, str]]:
        """Of the documents of which this user may fetch all blocks, the names and the banks."""
        user = self.user(memory)
        parts = {} if user.bank is None else user.require_banks().parts
        return [
            {"name": document.name, "bank": bank}
            for bank, part in parts.items()
            for document in part.documents
            if not any(part.bank.bars(*key) for key in document.keys)
        ]

    def _continued(self, asked: Asked, user: MemoryModel, prompt: str | list[int]) -> Prompt:
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            ids_of = partial(prompt_ids, tokenizer, context=None)
            return self._prompt(asked, user, "prompt", (prompt, None), ids_of)
        most = getattr(tokenizer, "_vocab_size", None) or len(tokenizer)
        if not 0 <= min(prompt) <= max(prompt) < most:
            raise wrong("prompt", f"has ids that are none of the {most} tokens")
        text = tokenizer.decode(prompt)
        return self._prompt(asked, user, "prompt", (text, None), lambda _: prompt)

    def _prompt(
        self,
        asked: Asked,
        user: MemoryModel,
        param: str,
        about: Context,
        ids_of: Callable[[str], list[int]],
    ) -> Prompt:
        context, text = self.model.context, about[0]

        def checked(shown: str) -> list[int]:
            return check_length(ids_of(shown), context)

        near = self._near(asked.memory, user, about)
        shown, passages = beside(near, text, checked, context, asked.max_tokens)
        with naming(param):
            ids = ids_of(shown)
        with naming(param, code="context_length_exceeded"):
            check_length(ids, context)
        found = self.memory(asked.memory, user, about, param, bool(passages))
        found.passages = tuple(passages) if asked.memory.with_passages else None
        room = asked.max_tokens if context is None else min(asked.max_tokens, context - len(ids))
        return Prompt(ids, room, found)

    def _near(self, memory: MemoryAsked, user: MemoryModel, about: Context) -> list[Passage]:
        if not memory.with_passages:
            return []
        param = memory.params["with_passages"]
        if self._run is None or user.bank is None:
            raise wrong(param, "there is no folder with the text of remembered documents")
        place = (memory.view, memory.bank, repr(memory.bar))
        if place not in self._passages:
            if len(self._passages) >= MOST_VIEWS:
                del self._passages[next(iter(self._passages))]
            with naming(param):
                self._passages[place] = Passages(self._run, user)
        if memory.route_text is not None:
            about = memory.route_text, None
        text, window = about
        return self._passages[place].nearest(text, memory.with_passages, window)

    def _chat_ids(self, system: str | None, turns: list[tuple[str, str]], text: str) -> list[int]:
        if not self.model.tokenizer.has_chat_template:  # as in mlx_hmem.chat
            return prompt_ids(self.model.tokenizer, text, None)
        return chat_ids(self.model.tokenizer, system, turns, text)


def run_of(given: Path | None, model: str) -> Path | None:
    """The folder with the text of remembered documents: the one that was named, or the one beside
    the model, if it is there."""
    if given is not None:
        if not (given / DOCUMENTS).is_file():
            raise UserError("no folder with the text of a remembering", given, "name another")
        return given
    beside_it = Path(f"{Path(model)}.run")
    return beside_it if (beside_it / DOCUMENTS).is_file() else None


def conversation_of(messages: Messages) -> tuple[str | None, list[tuple[str, str]], str]:
    """What the system is told, the turns so far, and what is asked; neighbours of one role are one
    message. RefusedError for what is no conversation."""
    joined: list[tuple[str, str]] = []
    for role, text in messages:
        role = "system" if role == "developer" else role
        if joined and joined[-1][0] == role:
            joined[-1] = role, f"{joined[-1][1]}\n\n{text}"
        else:
            joined.append((role, text))
    system = joined.pop(0)[1] if joined[0][0] == "system" else None
    roles = [role for role, _ in joined]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise wrong("messages", "user and assistant do not take turns, behind what is for system")
    texts = [text for _, text in joined]
    return system, list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


def _barred(path: Any) -> Barred:
    return tuple(path) if isinstance(path, list) else barred_path(str(path))
