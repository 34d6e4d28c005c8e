"""A model with a chat template is asked in it, unless that is not wanted."""

import json
from pathlib import Path

import pytest

from mlx_hmem import load
from mlx_hmem.errors import UserError
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import prompt_ids
from mlx_hmem.model.tokenizer import read_tokenizer
from tests.conftest import edit_json
from tests.generation.conftest import PROMPT
from tests.generation.test_conversation import OPTIONS, TEMPLATE, tokens
from tests.generation.test_generate import answer, refused

SYSTEM = "Be brief."
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)


@pytest.fixture
def instruct(broken: Path) -> Path:
    return with_template(broken, TEMPLATE)


def with_template(folder: Path, template: str) -> Path:
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    return folder


def expected(model: MemoryModel, *messages: tuple[str, str]) -> str:
    """What the model says to these messages, with the memory of the prompt itself."""
    asked = [{"role": role, "content": text} for role, text in messages]
    ids = model.tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    pieces = model.stream_ids(ids, model.fetch(PROMPT), 8)
    return "".join(piece.text for piece in pieces)


def test_the_prompt_becomes_a_message_and_the_memory_is_that_of_the_words_alone(ask, instruct):
    model = load(instruct)
    found = answer(ask("--json", "--model", instruct))
    assert found["text"] == expected(model, ("user", PROMPT))
    assert found["memory"]["path"] == list(model.retriever.route(PROMPT))
    found = answer(ask("--json", "--model", instruct, "--system-prompt", SYSTEM))
    assert found["text"] == expected(model, ("system", SYSTEM), ("user", PROMPT))
    assert found["memory"]["path"] == list(model.retriever.route(PROMPT))


def test_raw_and_a_model_without_a_template_continue_the_text(ask, instruct):
    plain = answer(ask("--json"))["text"]
    assert answer(ask("--json", "--raw"))["text"] == plain
    assert answer(ask("--json", "--raw", "--model", instruct))["text"] == plain
    assert answer(ask("--json", "--model", instruct))["text"] != plain


def test_an_answer_ends_where_the_generation_config_ends_a_turn(ask, instruct):
    model = load(instruct)
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )
    said = tokens(model.stream_ids(ids, model.fetch(PROMPT), 8))
    end = next(token for token in said[1:] if token != said[0])
    (instruct / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    text = answer(ask("--json", "--model", instruct))["text"]
    assert text == model.tokenizer.decode(said[: said.index(end)])
    assert load(instruct).tokenizer.eos_token_ids == model.tokenizer.eos_token_ids | {end}
    # mlx-lm puts the generation config's over the config's.
    edit_json(instruct / "config.json", lambda c: c.update(eos_token_id=5))
    assert {5, end} <= load(instruct).tokenizer.eos_token_ids
    (instruct / "generation_config.json").write_text("{")
    refused(ask("--model", instruct), "generation_config.json is not valid JSON")


@pytest.mark.parametrize(
    "how",
    [
        lambda name: {"eot_token": name},
        lambda name: {"eot_token": {"content": name}},
        lambda name: {"extra_special_tokens": {"eot_token": name}},
    ],
)
def test_what_ends_a_text_is_the_union_of_config_generation_config_and_tokenizer(broken, how):
    added = {"id": 0, "content": "", "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}  # fmt: skip
    edit_json(broken / "tokenizer.json", lambda t: t["added_tokens"].append(
        added | {"id": len(t["model"]["vocab"]), "content": "<|eot|>"}))  # fmt: skip
    edit_json(broken / "config.json", lambda c: c.update(eos_token_id=5))
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    plain = tokenizer_in(broken)
    assert plain.eos_token_ids == {5, 6, 7, plain.eos_token_id}
    edit_json(broken / "tokenizer_config.json", lambda c: c.update(how("<|eot|>")))
    end = plain.convert_tokens_to_ids("<|eot|>")
    assert tokenizer_in(broken).eos_token_ids == {5, 6, 7, plain.eos_token_id, end}


def tokenizer_in(folder):
    return read_tokenizer(folder, json.loads((folder / "config.json").read_text()))


def test_a_prompt_that_begins_with_the_beginning_of_a_text_has_it_once(model, ask):
    begin, name = model.tokenizer.bos_token_id, model.tokenizer.bos_token
    ids = prompt_ids(model.tokenizer, PROMPT, None)
    assert (ids[0], ids.count(begin)) == (begin, 1)
    assert prompt_ids(model.tokenizer, name + PROMPT, None) == ids
    assert answer(ask("--json", "--prompt", name + PROMPT))["text"] == answer(ask("--json"))["text"]
    twice = prompt_ids(model.tokenizer, name + name + PROMPT, None)
    assert (twice.count(begin), model.tokenizer.decode(twice[1:])) == (1, name + PROMPT)
    # A document's own words stay.
    assert model.tokenizer.decode(model.tokenizer.encode(name + "a")[1:]) == name + "a"


def test_a_template_that_does_not_take_it_is_one_line(ask, broken):
    model = with_template(broken, NO_SYSTEM + TEMPLATE)
    assert answer(ask("--json", "--model", model))
    words = "the model's chat template fails: no system role; leave the system prompt out"
    refused(ask("--model", model, "--system-prompt", SYSTEM), words)
    for template in ("{{ raise_exception('never') }}", "{{ nothing.of.this }}", "{% if", ""):
        refused(ask("--model", with_template(broken, template)), "the model's chat template fails")
    assert answer(ask("--json", "--raw", "--model", broken))


def test_a_system_prompt_without_a_place_for_it_is_one_line(ask, instruct, model):
    refused(ask("--system-prompt", SYSTEM), "needs a chat template, and this model has none")
    refused(ask("--model", instruct, "--raw", "--system-prompt", SYSTEM), "--raw takes no system")
    with pytest.raises(UserError, match="needs a chat template"):
        Conversation(model, system=SYSTEM)


def test_a_prompt_that_only_its_template_makes_too_long_is_one_line(ask, broken):
    model = with_template(broken, "{{ messages[0]['content'] }}" + " word" * 200)
    refused(ask("--model", model), "shorten it to less than 96 tokens")
    refused(ask("--model", model, "--prompt", " "), "the prompt is empty")


def test_a_conversation_begins_with_its_system_prompt(instruct):
    model = load(instruct)
    talk, text = Conversation(model, system=SYSTEM, **OPTIONS), ""
    for piece in talk.say(PROMPT):
        text += piece.text
    assert text == expected(model, ("system", SYSTEM), ("user", PROMPT))
    messages = [("system", SYSTEM), ("user", PROMPT), ("assistant", text), ("user", PROMPT)]
    again = "".join(piece.text for piece in talk.say(PROMPT))
    assert again == expected(model, *messages)
