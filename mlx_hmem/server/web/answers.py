"""Answers in OpenAI's form, whole and in chunks."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_hmem.server.asked import Asked, Logprob, Piece


class Answers:
    """The answer to one request, of a ``model`` of this name."""

    def __init__(self, asked: Asked, model: str, prompt_tokens: int):
        self._asked, self._chat = asked, asked.messages is not None
        kind = "chat.completion" if self._chat else "text_completion"
        self._kind = f"{kind}.chunk" if self._chat and asked.stream else kind
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._model, self._created = model, int(time.time())
        self._prompt_tokens, self._num_tokens, self._num_reused = prompt_tokens, 0, 0
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Of the last pieces of all rows, each with all its text."""
        choices = []
        for piece in sorted(pieces, key=lambda each: each.index):
            self._count(piece)
            choice = self._choice(piece)
            text = {"role": "assistant", "content": piece.text} if self._chat else piece.text
            choice["message" if self._chat else "text"] = text
            if len(self._asked.prompts) > 1:
                choice["memory"] = piece.memory
            choices.append(choice)
        result = self._around(choices) | {"usage": self._usage()}
        return result if len(self._asked.prompts) > 1 else result | {"memory": pieces[0].memory}

    def chunks(self, piece: Piece) -> Iterator[bytes]:
        """What a piece is in a stream: nothing while all its text is held back."""
        ended = piece.finish_reason is not None
        if self._chat and piece.index not in self._begun:
            self._begun.add(piece.index)
            delta = {"role": "assistant", "content": ""}
            yield self._chunk(self._choice(Piece(piece.index)) | {"delta": delta})
        if piece.text or piece.logprobs or (ended and not self._chat):
            choice = self._choice(piece)
            if self._chat:
                choice |= {"delta": {"content": piece.text}, "finish_reason": None}
            else:
                choice["text"] = piece.text
            yield self._chunk(choice, **({"memory": piece.memory} if ended else {}))
        if ended and self._chat:
            last = self._choice(Piece(piece.index, finish_reason=piece.finish_reason))
            yield self._chunk(last | {"delta": {}}, memory=piece.memory)
        if ended:
            self._count(piece)

    def end(self) -> Iterator[bytes]:
        """What ends a stream."""
        if self._asked.include_usage:
            yield event(self._around([]) | {"usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _choice(self, piece: Piece) -> dict[str, Any]:
        wanted = self._asked.logprobs is not None and piece.logprobs
        return {
            "index": piece.index,
            "logprobs": self._logprobs(piece) if wanted else None,
            "finish_reason": piece.finish_reason,
        }

    def _chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        usage = {"usage": None} if self._asked.include_usage else {}
        return event(self._around([choice]) | usage | more)

    def _around(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _count(self, last: Piece) -> None:
        """The tokens of a row that has ended; those of a prompt once for all its answers."""
        self._num_tokens += last.num_tokens
        self._num_reused += last.num_reused if last.index % self._asked.n == 0 else 0

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": self._prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_reused},
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        if self._chat:
            content = [
                _of_chat(each.text, each.logprob)
                | {"top_logprobs": [_of_chat(*t) for t in each.top]}
                for each in piece.logprobs
            ]
            return {"content": content, "refusal": None}
        start, offsets = self._offsets.get(piece.index, 0), list[int]()
        for each in piece.logprobs:
            offsets.append(start)
            start += len(each.text)
        self._offsets[piece.index] = start
        return {
            "tokens": [each.text for each in piece.logprobs],
            "token_logprobs": [each.logprob for each in piece.logprobs],
            "top_logprobs": [_top(each) for each in piece.logprobs],
            "text_offset": offsets,
        }


def event(values: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return b"data: " + json.dumps(values, ensure_ascii=False).encode() + b"\n\n"


def _of_chat(text: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in text  # else a part of a character, whose bytes are not known
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _top(each: Logprob) -> dict[str, float]:
    """The likeliest tokens by their text, and the one that was taken."""
    return dict(each.top) | {each.text: each.logprob}
