"""An answer ends before a stop text, however it is cut; what else ends it is said."""

import itertools
import json

import pytest
from mlx_lm.generate import GenerationResponse

from mlx_hmem import load
from mlx_hmem.errors import UserError
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.generation.ending import said_of, until
from tests.conftest import CONTEXT, edit_json
from tests.generation.conftest import PROMPT
from tests.generation.test_conversation import OPTIONS, tokens
from tests.generation.test_generate import answer, refused


def pieces(*texts: str, reason: str = "length"):
    """A stream of these texts, one a token."""
    for n, text in enumerate(texts, 1):
        end = reason if n == len(texts) else None
        yield GenerationResponse(text, n, None, False, 1, 1.0, n, 1.0, 0.0, end)


def cuts(text: str):
    """Every way to cut a text into pieces."""
    for ends in itertools.product([False, True], repeat=len(text) - 1):
        places = [0, *(n for n, end in enumerate(ends, 1) if end), len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("aabaab", ["ab"], "a"), ("aabaabac", ["aabac"], "aab"),
        ("one\n\nQ:", ["\nQ", "Q"], "one\n"), ("ababab", ["abc"], "ababab"),
        ("abab", ["b", "a"], ""), ("abab", [], "abab"),
    ],
)  # fmt: skip
def test_a_stop_text_is_found_however_the_stream_is_cut_and_nothing_else_is_lost(
    text, stops, wanted
):
    for parts in cuts(text):
        found = list(until(pieces(*parts), stops))
        assert "".join(piece.text for piece in found) == wanted
        assert [piece.token for piece in found] == list(range(1, len(found) + 1))
        assert [piece.finish_reason for piece in found[:-1]] == [None] * (len(found) - 1)
        assert found[-1].finish_reason == ("length" if wanted == text else "stop")


def test_text_is_given_on_as_soon_as_it_can_be_no_stop_text():
    found = [piece.text for piece in until(pieces("a", "EN", "x", "E", "ND"), ["END"])]
    assert found == ["a", "", "ENx", "", ""]


def test_stop_texts_end_an_answer_and_are_no_part_of_it(ask):
    whole = answer(ask("--json"))
    assert whole["finish_reason"] == "length"
    text = whole["text"]
    stop = text[len(text) // 2 :][:3]
    found = answer(ask("--json", "--stop", "no such text", stop))
    assert (found["text"], found["finish_reason"]) == (text[: text.index(stop)], "stop")
    _, out, err = ask("--json", "--stop", text[0])
    assert json.loads(out)["text"] == ""
    assert json.loads(out)["num_tokens"] < whole["num_tokens"]  # a run of bytes is read as a whole
    assert err == "the answer is empty: it ended before its first word\n"
    status, out, _ = ask("--stop", stop)
    assert (status, out) == (0, text[: text.index(stop)] + "\n")
    refused(ask("--stop", "a", ""), "a stop text is empty")


def test_an_answer_that_the_context_or_nothing_ends_says_so(ask, model, broken):
    full = "the answer ends here because the context is full\n"
    status, out, err = ask("--max-tokens", CONTEXT, "--json", "--memory", "none")
    assert (status, json.loads(out)["finish_reason"], err) == (0, "length", full)
    status, out, err = ask("--max-tokens", CONTEXT, "--memory", "none")
    assert (status, err.splitlines(keepends=True)[1:]) == (0, [full])
    first = next(model.stream(PROMPT, memory="none")).token
    edit_json(broken / "config.json", lambda c: c.update(eos_token_id=[first]))
    status, out, err = ask("--model", broken, "--memory", "none", "--json")
    assert (status, json.loads(out)["text"], json.loads(out)["num_tokens"]) == (0, "", 1)
    assert err == "the answer is empty: it ended before its first word\n"


def test_what_is_said_of_an_ending():
    (last,) = pieces("a")
    assert said_of("a", last, max_tokens=1) is None  # as many tokens as were asked for
    assert "context" in said_of("a", last, max_tokens=2)
    (last,) = pieces("a", reason="stop")
    assert said_of("a", last, max_tokens=2) is None


def test_a_turn_goes_on_without_the_stop_text_of_the_one_before(model_folder):
    model = load(model_folder)
    whole = "".join(piece.text for piece in model.stream(PROMPT, max_tokens=8, memory="none"))
    stop = whole[len(whole) // 2 :][:2]
    talk = Conversation(model, memory="none", history=True, stop=[stop], **OPTIONS)
    said = "".join(piece.text for piece in talk.say(PROMPT))
    assert said == talk.turns[0].answer == whole[: whole.index(stop)]
    first, second = model.tokenizer.encode(PROMPT), model.tokenizer.encode("And?")
    middle = model.tokenizer.encode(said, add_special_tokens=False)
    ids, found = [*first, *middle, *second], tokens(talk.say("And?"))
    assert tokens(model.stream_ids(ids, model.fetch("", "none"), 8))[: len(found)] == found
    with pytest.raises(UserError, match="a stop text is empty"):
        Conversation(model, stop=[""])
