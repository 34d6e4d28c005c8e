"""What the server answers is what the model says to each request alone, in OpenAI's form."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlx_lm import generate
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.utils import load_model

from mlx_hmem.generation.batch import batch_generate
from mlx_hmem.model.find import DEMO
from tests.helpers.servers import events
from tests.server.conftest import PROMPTS

TIN = PROMPTS[0]


def complete(server, prompt=TIN, **fields):
    got = server.ask("/v1/completions", {"prompt": prompt} | fields)
    assert got.status == 200, got
    return got.body


def test_many_routes_at_once_answer_as_each_alone(server, demo):
    texts = [*PROMPTS, *(f"{prompt} the" for prompt in PROMPTS)]
    alone = [batch_generate(demo, [text], max_tokens=24)[0] for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        found = list(pool.map(lambda text: complete(server, text, max_tokens=24), texts))
    for answer, one in zip(found, alone, strict=True):
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (one.text, one.finish_reason)
        assert answer["memory"]["path"] == list(one.path)
        assert answer["usage"]["completion_tokens"] == len(one.tokens)
    assert len({one.path for one in alone}) >= 6
    assert server.metric("hmem_rows") == 0


def test_without_memory_it_says_what_mlx_lm_says_with_the_anchor(server, demo):
    anchor, _ = load_model(DEMO, get_model_classes=lambda config: _openlm())
    for prompt in PROMPTS[:3]:
        said = generate(anchor, demo.tokenizer, prompt, max_tokens=16)
        answer = complete(server, prompt, max_tokens=16, memory="none")
        assert answer["choices"][0]["text"] == said
        assert answer["memory"]["mode"] == "none"
    assert complete(server, max_tokens=16)["choices"][0]["text"] != said


def test_a_repetition_penalty_is_mlx_lms(server, demo):
    anchor, _ = load_model(DEMO, get_model_classes=lambda config: _openlm())
    penalty = make_logits_processors(repetition_penalty=1.3)
    said = generate(anchor, demo.tokenizer, PROMPTS[1], max_tokens=24, logits_processors=penalty)
    for value, same in ((1.3, True), (1, False)):
        answer = complete(
            server, PROMPTS[1], max_tokens=24, memory="none", repetition_penalty=value
        )
        assert (answer["choices"][0]["text"] == said) == same


def _openlm():
    from mlx_hmem.anchors.openlm import Model, ModelArgs

    return Model, ModelArgs


def test_the_openai_package_gets_an_answer_and_a_stream(open_ai):
    asked = {"model": "demo", "messages": [{"role": "user", "content": TIN}], "max_tokens": 6}
    answer = open_ai.chat.completions.create(**asked)
    assert "50" in answer.choices[0].message.content
    assert answer.memory["path"] == [8, 136]
    options = {"include_usage": True}
    *chunks, last = open_ai.chat.completions.create(stream=True, stream_options=options, **asked)
    said = "".join(each.choices[0].delta.content or "" for each in chunks)
    assert said == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert chunks[-1].memory["path"] == [8, 136]
    assert last.usage == answer.usage
    assert [model.id for model in open_ai.models.list()] == ["demo"]
    plain = open_ai.completions.create(
        model="demo", prompt=TIN, max_tokens=6, extra_body={"memory": {"mode": "generic"}}
    )
    assert plain.memory["mode"] == "generic"


@pytest.mark.parametrize("chat", [True, False])
def test_a_stop_text_ends_an_answer_and_is_never_sent(server, chat):
    whole = complete(server, "The city lies", max_tokens=30)["choices"][0]["text"]
    stop = whole[9:16]  # across tokens
    assert len(server_tokens(server, stop)) > 1
    fields = {"stop": [stop, "never said"], "max_tokens": 30}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    fields |= {"messages": [{"role": "user", "content": "The city lies"}]} if chat else {}
    fields |= {} if chat else {"prompt": "The city lies"}
    got = server.ask(path, fields).body["choices"][0]
    text = got["message"]["content"] if chat else got["text"]
    assert (text, got["finish_reason"]) == (whole[: whole.find(stop)], "stop")
    stream = server.ask(path, fields | {"stream": True}).body
    found = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    choices = [choice for each in found for choice in each["choices"]]
    pieces = [c["delta"].get("content", "") if chat else c["text"] for c in choices]
    assert "".join(pieces) == text
    assert choices[-1]["finish_reason"] == "stop"
    assert stream.endswith("data: [DONE]\n\n")


def server_tokens(server, text):
    answer = complete(server, "The city lies", max_tokens=30, logprobs=0)["choices"][0]
    tokens = answer["logprobs"]["tokens"]
    assert "".join(tokens) == answer["text"]
    start = answer["text"].find(text)
    offsets = answer["logprobs"]["text_offset"]
    return [o for o in offsets if start <= o < start + len(text)]


def test_logprobs_are_those_of_the_tokens_and_of_the_likeliest(server, open_ai):
    answer = complete(server, max_tokens=5, logprobs=3)["choices"][0]["logprobs"]
    for token, value, top in zip(
        answer["tokens"], answer["token_logprobs"], answer["top_logprobs"], strict=True
    ):
        assert top[token] == value == max(top.values()) <= 0  # greedy
        assert len(top) == 3
    found = open_ai.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": TIN}], max_tokens=5, logprobs=True,
        top_logprobs=2,
    ).choices[0].logprobs.content  # fmt: skip
    assert [each.token for each in found] == answer["tokens"]
    assert [each.logprob for each in found] == pytest.approx(answer["token_logprobs"], abs=1e-4)
    assert all(len(each.top_logprobs) == 2 for each in found)


def test_a_seed_gives_the_same_answers_whoever_else_asks(server):
    fields = {"temperature": 1.2, "seed": 7, "n": 3, "max_tokens": 20, "top_p": 0.95, "top_k": 50}
    alone = complete(server, "The city", **fields)["choices"]
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(complete, server, p, max_tokens=40) for p in PROMPTS[:3]]
        beside = pool.submit(complete, server, "The city", **fields).result()["choices"]
        assert [each.result() for each in others]
    assert [c["text"] for c in beside] == [c["text"] for c in alone]
    assert [c["index"] for c in alone] == [0, 1, 2]
    assert len({c["text"] for c in alone}) == 3
    assert complete(server, "The city", **fields | {"seed": 8})["choices"] != alone


def test_of_several_answers_in_one_stream_each_piece_says_whose_it_is(server, open_ai):
    messages = [{"role": "user", "content": "The city"}]
    asked = {"model": "demo", "messages": messages, "n": 3, "seed": 7, "temperature": 1.2}
    asked |= {"max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = open_ai.chat.completions.create(**asked)
    options = {"include_usage": True}
    *chunks, last = open_ai.chat.completions.create(stream=True, stream_options=options, **asked)
    assert all(len(each.choices) == 1 and each.usage is None for each in chunks)
    for choice in whole.choices:
        own = [each.choices[0] for each in chunks if each.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert [each.finish_reason for each in own if each.finish_reason] == [choice.finish_reason]
        said = [one for each in own if each.logprobs for one in each.logprobs.content]
        assert said == choice.logprobs.content
    assert last.choices == []
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens == sum(len(c.logprobs.content) for c in whole.choices)


def test_several_prompts_each_with_its_memory_and_ids_in_place_of_text(server, demo):
    answer = complete(server, PROMPTS[:3], max_tokens=4, n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    for number, choice in enumerate(answer["choices"]):
        one = batch_generate(demo, [PROMPTS[number // 2]], max_tokens=4)[0]
        assert choice["text"] == one.text
        assert choice["memory"]["path"] == list(one.path)
    ids = demo.tokenizer.encode(TIN)
    assert complete(server, ids, max_tokens=4)["choices"][0]["text"] == answer["choices"][0]["text"]


def test_memory_is_chosen_by_body_or_headers_and_the_body_goes_first(server, demo):
    city = list(demo.retriever.route(PROMPTS[1]))
    assert complete(server, route_text=PROMPTS[1])["memory"]["path"] == city
    assert complete(server, memory={"route_text": PROMPTS[1]})["memory"]["path"] == city
    body = {"prompt": TIN, "max_tokens": 3}
    headers = {"X-Memory-Route-Text": PROMPTS[1]}
    got = server.ask("/v1/completions", body, headers)
    assert got.body["memory"]["path"] == city
    got = server.ask("/v1/completions", body | {"route_text": TIN}, headers)
    assert got.body["memory"]["path"] == [8, 136]
    got = server.ask("/v1/completions", body | {"memory": "none"}, {"X-Memory": "generic"})
    assert got.body["memory"]["mode"] == "none"
    barred = complete(server, bar=["8,136"], max_tokens=3)["memory"]
    assert [block["level"] for block in barred["blocks"]] == [1]
    route = server.ask("/v1/memory/route", {"text": TIN, "bar": [[8]]}).body["memory"]
    assert (route["path"], route["blocks"]) == ([8, 136], [])


def test_without_a_template_each_turn_is_a_text_of_its_own_that_those_before_route(server, demo):
    """As in mlx_hmem.chat: an anchor of single documents is lost after another (docs/chat.md)."""
    turns = ["The atomic number of iron is", " 26.", TIN]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": [{"type": "text", "text": t}]}
                for r, t in zip(roles, turns, strict=True)]  # fmt: skip
    got = server.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 5}).body
    assert got["usage"]["prompt_tokens"] == len(demo.tokenizer.encode(TIN))
    alone = complete(server, max_tokens=5)["choices"][0]["text"]
    assert got["choices"][0]["message"]["content"] == alone
    it = [*messages[:2], {"role": "user", "content": "And of it?"}]
    routed = server.ask("/v1/chat/completions", {"messages": it, "max_tokens": 1}).body["memory"]
    own = server.ask("/v1/chat/completions", {"messages": it[2:], "max_tokens": 1}).body["memory"]
    assert routed["path"][0] == 8 != own["path"][0]


def test_a_stream_on_a_socket_ends_with_done(server):
    found = list(events(server.stream({"prompt": TIN, "max_tokens": 12})))
    assert found[-1] is None
    assert found[-2]["choices"][0]["finish_reason"] in ("stop", "length")
