"""What a request asks for, as plain Python values: all that passes from HTTP to the engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlx_hmem.errors import UserError

MOST_SAID = 400  # characters of what is wrong: a value may be as long as a body
Messages = list[tuple[str, str]]  # role and text


class RefusedError(Exception):
    """A request that gets no answer: an HTTP status, and OpenAI's ``message``, ``param``, ``code``;
    ``headers`` go with the status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def to_dict(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, usual)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong(param: str, why: str) -> RefusedError:
    """A field of the request is not as it must be."""
    return RefusedError(400, f"{param}: {why}", param)


@contextmanager
def naming(param: str | None, status: int = 400, code: str | None = None) -> Iterator[None]:
    """A UserError inside is a refusal that names this field."""
    try:
        yield
    except UserError as error:
        said = str(error)
        if len(said) > MOST_SAID:
            said = f"{said[:MOST_SAID]} …; {error.remedy}"
        raise RefusedError(status, said, param, code) from None


@dataclass
class MemoryAsked:
    """Which memory: ``mode`` None for fetched, but none beside passages. ``params`` says by which
    field of the request each setting was given, for what is wrong with it."""

    mode: str | None = None
    view: str | None = None
    route_text: str | None = None
    name: str | None = None
    bar: list[Any] = field(default_factory=list)
    bank: str | None = None
    with_passages: int = 0
    params: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """One request for text: what to continue, how to sample, which memory.

    ``prompts``: texts or token ids; ``messages``: of a chat, in place of them. ``who``: the hash of
    the key that it was asked with, empty where none is needed.
    """

    prompts: list[str | list[int]] = field(default_factory=list)
    messages: Messages | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None  # how many alternatives beside each token; None: no log-probability
    stream: bool = False
    include_usage: bool = False
    memory: MemoryAsked = field(default_factory=MemoryAsked)
    who: str = ""

    @property
    def num_rows(self) -> int:
        return self.n * (1 if self.messages is not None else len(self.prompts))


@dataclass
class Logprob:
    """Of one token: its text, log-probability, and the likeliest tokens in its place."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass
class Begun:
    """A request is understood: so many tokens have its prompts together."""

    prompt_tokens: int


@dataclass
class Piece:
    """What one row has to say: a piece of its text; at the end why it ended, how many tokens it has
    made, how many of its prompt were read before, and with which memory."""

    index: int
    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0
    num_reused: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
