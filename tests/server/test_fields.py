"""Every wrong field is refused by its name; what asks for nothing new is let through."""

import pytest
from starlette.datastructures import Headers

from mlx_hmem.errors import UserError
from mlx_hmem.server.asked import RefusedError, naming
from mlx_hmem.server.prepare import conversation_of
from mlx_hmem.server.web.fields import FLAT, IGNORED, MEMORY, NOT_DONE, NUMBERS, asked_of

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
TEXT = {"prompt": "hello"}


def refused(body, chat=True, headers=()):
    with pytest.raises(RefusedError) as error:
        asked_of(body, dict(headers), chat)
    assert error.value.status == 400
    assert len(error.value.message) < 300
    return error.value.param


PART = {"type": "text", "text": 3}
WRONG = [
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "hello"}),
    ("messages[0]", {"messages": ["hello"]}),
    ("messages[0].role", {"messages": [{"role": "tool", "content": "a"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["a"]}]}),
    ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [PART]}]}),
    ("messages", {"messages": [{"role": "assistant", "content": "a"}]}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 1.5}),
    ("max_tokens", {"max_tokens": True}),
    ("max_completion_tokens", {"max_completion_tokens": "9"}),
    ("max_tokens", {"max_tokens": 9, "max_completion_tokens": 9}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0}),
    ("top_k", {"top_k": -1}),
    ("min_p", {"min_p": 1.01}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("seed", {"seed": -(1 << 63) - 1}),
    ("seed", {"seed": 1 << 64}),
    ("n", {"n": 0}),
    ("n", {"n": 17}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ["a", ""]}),
    ("stop", {"stop": ["a", 1]}),
    ("stop", {"stop": ["a"] * 17}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": []}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
    ("logprobs", {"logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 0, "logprobs": False}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("logit_bias", {"logit_bias": {"5": 1}}),
    ("presence_penalty", {"presence_penalty": 0.5}),
    ("temprature", {"temprature": 1}),
    ("memory", {"memory": 3}),
    ("memory", {"memory": "all"}),
    ("memory.mode", {"memory": {"mode": "all"}}),
    ("memory.vew", {"memory": {"vew": "guest"}}),
    ("view", {"view": 3}),
    ("view", {"memory": {"view": "a"}, "view": "b"}),
    ("memory.bar", {"memory": {"bar": "3,51"}}),
    ("bar", {"bar": [[]]}),
    ("bar", {"bar": [1.5]}),
    ("with_passages", {"with_passages": -1}),
    ("route_text", {"route_text": " "}),
]


@pytest.mark.parametrize(("param", "fields"), WRONG)
def test_a_wrong_field_of_a_chat_is_named(param, fields):
    assert refused(CHAT | fields) == param


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [1, "a"]}),
        ("prompt", {"prompt": [[]]}),
        ("max_tokens", {"max_tokens": 0}),
        ("logprobs", {"logprobs": True}),
        ("logprobs", {"logprobs": 21}),
        ("echo", {"echo": True}),
        ("suffix", {"suffix": "."}),
        ("best_of", {"best_of": 2}),
        ("messages", {"messages": []}),
        ("n", {"prompt": ["a"] * 30, "n": 3}),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(param, fields):
    assert refused(TEXT | fields, chat=False) == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_a_part_of_a_message_that_is_no_text_is_refused_by_its_kind(kind):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:,"}}]
    with pytest.raises(RefusedError, match=f"{kind} is not done") as error:
        asked_of({"messages": [{"role": "user", "content": parts}]}, {}, True)
    assert error.value.param == "messages[0].content[1].type"


def test_headers_are_named_too_and_a_body_that_is_no_object_is_refused():
    headers = {"x-memory-with-passages": "two"}
    assert refused(CHAT, headers=headers) == "x-memory-with-passages"
    assert refused(CHAT, headers={"x-memory": "all"}) == "x-memory"
    # Passed over, a misspelt view or a second one would have let through what it bars.
    assert refused(CHAT, headers={"x-memory-veiw": "guest"}) == "x-memory-veiw"
    twice = Headers(raw=[(b"x-memory-view", b"guest"), (b"x-memory-view", b"staff")])
    with pytest.raises(RefusedError, match="x-memory-view: is given twice"):
        asked_of(CHAT, twice, True)
    for body in (None, [], "text", 3):
        assert refused(body) is None


def test_a_field_of_an_address_is_refused_if_it_is_there_twice(server):
    """Of two views the first was passed over."""
    for query, status in (("bank=", 200), ("bank=&bank=", 400)):
        got = server.ask(f"/v1/memory/documents?{query}")
        assert got.status == status
    assert got.error["param"] == "bank"


def test_what_clients_send_and_what_asks_for_nothing_is_let_through():
    extra = dict.fromkeys(IGNORED, "anything") | {
        "model": "demo", "tools": [], "tool_choice": "auto", "logit_bias": {}, "seed": None,
        "response_format": {"type": "text"}, "frequency_penalty": 0.0, "presence_penalty": 0,
    }  # fmt: skip
    asked = asked_of(CHAT | extra, {}, True)
    assert (asked.max_tokens, asked.temperature, asked.seed, asked.memory.mode) == (
        256, 0.0, None, None,
    )  # fmt: skip
    asked = asked_of(
        TEXT | {"stop": "\n", "logprobs": 0, "echo": False, "max_completion_tokens": 5, "n": 2},
        {"x-memory-bar": "3 4,17 handbook:2", "x-memory-route-text": "caf\u00c3\u00a9"},
        False,
    )
    assert (asked.stop, asked.logprobs, asked.max_tokens, asked.num_rows) == (["\n"], 0, 5, 2)
    assert asked.memory.bar == ["3", "4,17", "handbook:2"]
    assert asked.memory.route_text == "café"


@pytest.mark.parametrize(("body", "chat"), [(CHAT, True), (TEXT, False)])
def test_null_is_as_if_the_field_were_not_there(body, chat):
    known = [*NUMBERS, *NOT_DONE, *IGNORED, *FLAT, "memory", "model", "stop", "stream", "logprobs"]
    absent = dict.fromkeys([*known, "stream_options", *(["top_logprobs"] if chat else [])])
    assert asked_of(body | absent, {}, chat) == asked_of(body, {}, chat)
    inside = {"stream": True, "stream_options": {"include_usage": None}}
    inside |= {"memory": dict.fromkeys(MEMORY)}
    assert asked_of(body | inside, {}, chat) == asked_of(body | {"stream": True}, {}, chat)


def test_parts_of_text_are_one_text_and_more_stops_than_openai_takes_are_taken():
    parts = [{"type": "text", "text": "Two "}, {"type": "text", "text": "parts"}]
    message = {"role": "user", "content": parts, "name": "ann"}
    stops = ["a", "b", "c", "d", "e"]
    asked = asked_of({"messages": [message], "stop": stops, "seed": -1}, {}, True)
    assert (asked.messages, asked.stop, asked.seed) == ([("user", "Two parts")], stops, -1)


def test_what_is_wrong_is_said_without_all_of_it():
    with pytest.raises(RefusedError) as error, naming("view"):
        raise UserError("no such view", "a" * 10**6, "known: none")
    assert len(error.value.message) < 500
    assert error.value.message.endswith("; known: none")


def test_messages_become_a_conversation_or_are_refused():
    messages = [("system", "a"), ("developer", "b"), ("user", "c"), ("user", "d"),
                ("assistant", "e"), ("user", "f")]  # fmt: skip
    assert conversation_of(messages) == ("a\n\nb", [("c\n\nd", "e")], "f")
    for wrong in ([("assistant", "a"), ("user", "b")], [("user", "a"), ("system", "b")]):
        with pytest.raises(RefusedError, match="take turns"):
            conversation_of([*wrong, ("user", "c")])
