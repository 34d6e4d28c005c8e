"""The body of a request, checked field by field: a wrong one is a 400 that names it."""

import math
from collections.abc import Mapping
from typing import Any

from mlx_hmem.model.fetch import MODES
from mlx_hmem.server.asked import Asked, MemoryAsked, Messages, RefusedError, wrong

MOST_ROWS = 64  # of one request: prompts × n
MOST_STOPS = 16
# What OpenAI's clients send and what changes nothing here.
IGNORED = {
    "user", "store", "metadata", "parallel_tool_calls", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity",
}  # fmt: skip
# What asks for nothing, of fields that are not done, and why they are not.
NOT_DONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "tools are not done"),
    "functions": (([],), "functions are not done"),
    "tool_choice": (("none", "auto"), "tools are not done"),
    "function_call": (("none", "auto"), "functions are not done"),
    "logit_bias": (({},), "logit_bias is not done"),
    "frequency_penalty": ((0,), "not done; repetition_penalty is"),
    "presence_penalty": ((0,), "not done; repetition_penalty is"),
    "response_format": (({"type": "text"},), 'only {"type": "text"} is done'),
    "modalities": ((["text"],), "only text is done"),
    "echo": ((False,), "not done"),
    "suffix": (("",), "nothing is inserted before a suffix"),
    "best_of": ((1,), "not done; n is"),
}
NUMBERS: dict[str, tuple[type, float, float]] = {
    "max_tokens": (int, 1, 1 << 30),
    "max_completion_tokens": (int, 1, 1 << 30),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 1 << 30),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 10),
    "seed": (int, -(1 << 63), (1 << 64) - 1),
    "n": (int, 1, 16),
}
MEMORY = ("mode", "view", "route_text", "name", "bar", "bank", "with_passages")
FLAT = {"memory_name": "name"} | {k: k for k in MEMORY if k not in ("mode", "name")}
HEADERS = {"x-memory": "mode"} | {f"x-memory-{k.replace('_', '-')}": k for k in MEMORY[1:]}


def asked_of(body: Any, headers: Mapping[str, str], chat: bool) -> Asked:
    """A request for a chat's next message, or for what continues prompts.

    ``headers``: those of HTTP, names in small letters. Raises RefusedError.
    """
    values = given(body)
    asked = Asked(memory=memory_asked(values, headers))
    if chat:
        asked.messages = _messages(values.pop("messages", None))
    else:
        asked.prompts = _prompts(values.pop("prompt", None))
    asked.stream = _flag(values, "stream")
    asked.include_usage = _usage(values.pop("stream_options", None), asked.stream)
    asked.stop = _stops(values.pop("stop", None))
    asked.logprobs = _chat_logprobs(values) if chat else _logprobs(values)
    if {"max_tokens", "max_completion_tokens"} <= values.keys():
        raise wrong("max_tokens", "is given twice, as max_completion_tokens too")
    for name, (kind, low, high) in NUMBERS.items():
        if name in values:
            own = "max_tokens" if name == "max_completion_tokens" else name
            setattr(asked, own, _number(values.pop(name), name, kind, low, high))
    if asked.top_p == 0:
        raise wrong("top_p", "is 0, from which no token can be taken")
    if asked.num_rows > MOST_ROWS:
        raise wrong("n", f"{asked.num_rows} answers in one request; {MOST_ROWS} are the most")
    check_rest(values)
    return asked


def given(body: Any) -> dict[str, Any]:
    """The fields of a body; null is as if it were not there."""
    if not isinstance(body, dict):
        raise RefusedError(400, "the body is not a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def check_rest(values: dict[str, Any]) -> None:
    """Refuses what nobody has taken out of ``values``, but for what asks for nothing."""
    for name, value in values.items():
        if name in NOT_DONE:
            free, why = NOT_DONE[name]
            if not any(value == each and type(value) in (type(each), float) for each in free):
                raise RefusedError(400, f"{name}: {why}", name, "unsupported_value")
        elif name != "model" and name not in IGNORED:
            raise RefusedError(400, f"{name[:80]}: no such field", name[:80], "unknown_parameter")


def text_of(value: Any, param: str, most: int = 1 << 30) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise wrong(param, "is no text" if not isinstance(value, str) else "is too long")
    return value


def memory_asked(values: dict[str, Any], headers: Mapping[str, str]) -> MemoryAsked:
    """Takes the settings of the memory out of a body; where it says nothing of one, the headers
    do. RefusedError as :func:`asked_of`."""
    memory = values.pop("memory", {})
    found = {"mode": memory} if isinstance(memory, str) else memory
    if not isinstance(found, dict):
        raise wrong("memory", "is neither a text nor an object")
    found = {name: value for name, value in found.items() if value is not None}
    inside = isinstance(memory, dict)
    params = {name: f"memory.{name}" if inside else "memory" for name in found}
    if unknown := set(found) - set(MEMORY):
        raise wrong(f"memory.{min(unknown)[:80]}", "no such field")
    for name, own in FLAT.items():
        if name in values:
            if own in found:
                raise wrong(name, f"is given twice, as {params[own]} too")
            found[own], params[own] = values.pop(name), name
    for name, value in headers.items():
        if name.startswith("x-memory"):
            if name not in HEADERS:  # a misspelt view would let through what it bars
                raise wrong(name[:80], f"no such header; there are {', '.join(HEADERS)}")
            own = HEADERS[name]
            if params.get(own) == name:
                raise wrong(name, "is given twice")
            if own not in found:
                found[own], params[own] = _of_header(value, own, name), name
    return _memory(found, params)


def _of_header(value: str, own: str, name: str) -> Any:
    try:
        value = value.encode("latin-1").decode()
        return value.split() if own == "bar" else int(value) if own == "with_passages" else value
    except ValueError:
        raise wrong(name, "cannot be read") from None


def _memory(found: dict[str, Any], params: dict[str, str]) -> MemoryAsked:
    asked = MemoryAsked(params=params)
    for own in ("mode", "view", "route_text", "name", "bank"):
        if own in found:
            setattr(asked, own, text_of(found[own], params[own]))
    if asked.mode is not None and asked.mode not in MODES:
        raise wrong(params["mode"], f"is none of {', '.join(MODES)}")
    if asked.route_text is not None and not asked.route_text.strip():
        raise wrong(params["route_text"], "is empty")
    if "with_passages" in found:
        count = _number(found["with_passages"], params["with_passages"], int, 0, 32)
        asked.with_passages = int(count)
    bar = found.get("bar", [])
    if not isinstance(bar, list) or len(bar) > 1000:
        raise wrong(params["bar"], "is no list of up to 1000 cluster paths")
    for path in bar:
        parts = path if isinstance(path, list) else [path]
        if not parts or not all(type(part) in (str, int) for part in parts):
            raise wrong(params["bar"], "has what is no cluster path: write 3,51 or [3, 51]")
    asked.bar = bar
    return asked


def _messages(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "is no list of messages")
    found: Messages = []
    for number, message in enumerate(value):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise wrong(place, "is no object")
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise wrong(f"{place}.role", "is none of system, developer, user, assistant")
        if message.get("tool_calls") or message.get("function_call"):
            raise wrong(f"{place}.tool_calls", "tools are not done")
        found.append((role, _content(message.get("content"), f"{place}.content")))
    if found[-1][0] != "user":
        raise wrong("messages", "does not end with what a user says")
    return found


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong(place, "is neither a text nor a list of parts")
    for number, part in enumerate(value):
        own = f"{place}[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise wrong(own, "is no part with a type")
        if part["type"] != "text":
            raise wrong(f"{own}.type", f"{part['type'][:80]} is not done, only text is")
        text_of(part.get("text"), f"{own}.text")
    return "".join(part["text"] for part in value)


def _prompts(value: Any) -> list[str | list[int]]:
    def is_ids(each: Any) -> bool:
        return isinstance(each, list) and bool(each) and all(type(i) is int for i in each)

    if isinstance(value, str) or is_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(e, str) or is_ids(e) for e in value):
        return list(value)
    raise wrong("prompt", "is neither a text, nor token ids, nor a list of them")


def _number(value: Any, param: str, kind: type, low: float, high: float) -> float:
    """``value`` as a whole number or any, if it lies within the bounds."""
    fits = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
    if not fits:
        raise wrong(param, f"is no {'whole ' if kind is int else ''}number")
    if not low <= value <= high:
        raise wrong(param, f"lies outside {low} to {high}")
    return value


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.pop(name, False)
    if not isinstance(value, bool):
        raise wrong(name, "is neither true nor false")
    return value


def _usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict) or not set(value) <= {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", "is no object, or has more than include_usage")
    if not stream:
        raise wrong("stream_options", "needs stream")
    wanted = value.get("include_usage") or False
    if not isinstance(wanted, bool):
        raise wrong("stream_options.include_usage", "is neither true nor false")
    return wanted


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise wrong("stop", "is neither a text nor a list of texts, or has an empty one")
    if len(stops) > MOST_STOPS or max(map(len, stops), default=0) > 1000:
        raise wrong("stop", f"has more than {MOST_STOPS} texts, or one of over 1000 characters")
    return stops


def _chat_logprobs(values: dict[str, Any]) -> int | None:
    wanted, top = _flag(values, "logprobs"), values.pop("top_logprobs", None)
    if top is not None and not wanted:
        raise wrong("top_logprobs", "needs logprobs")
    return int(_number(top or 0, "top_logprobs", int, 0, 20)) if wanted else None


def _logprobs(values: dict[str, Any]) -> int | None:
    if "logprobs" not in values:
        return None
    return int(_number(values.pop("logprobs"), "logprobs", int, 0, 20))
