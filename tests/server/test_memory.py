"""Which memory a request gets: by name, of which bank, beside which passages, in which chat."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_hmem.bank.documents import write_documents
from mlx_hmem.bank_tools.command import main as bank_tools
from mlx_hmem.model import rendering
from mlx_hmem.model.load import load
from mlx_hmem.server.asked import Asked, RefusedError
from mlx_hmem.server.prepare import Preparing
from tests.bank.test_views import write_views
from tests.conftest import edit_json
from tests.generation.test_conversation import TEMPLATE
from tests.generation.test_nothing_near import UNKNOWN
from tests.generation.test_passages import ASKED, TEXTS, write_run
from tests.helpers.banks import document, write_colleague
from tests.helpers.programs import refused
from tests.helpers.servers import Server, events

FERRY = TEXTS["ferry.txt"]
RAISES = (
    "{% if 'forbidden' in messages[-1]['content'] %}{{ raise_exception('line one\nline two') }}"
    "{% endif %}"
)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def rich(model_folder, texts, tmp_path_factory) -> Path:
    """The tiny model with two banks, named memories, remembered documents, views and a chat
    template."""
    place = tmp_path_factory.mktemp("rich")
    own = Path(shutil.copytree(model_folder, place / "own"))
    alone = load(own)
    leaves = alone.retriever.tree.leaves()
    known = [
        replace(document(text, [leaves[3 * n]], alone), name=name)
        for n, (name, text) in enumerate(TEXTS.items())
    ]
    write_documents(own / "bank", known)
    names = {"tides": list(leaves[1]), "ferry": list(known[0].clusters[0])}
    edit_json(own / "hmem.json", lambda values: values.update(names=names))
    other, both = write_colleague(model_folder, texts, place / "other"), place / "both"
    bank_tools(["add", str(own), str(other), "--name", "notes", "--out", str(both)])
    write_views(both, guest=[list(known[0].clusters[0])], staff=[])
    template = RAISES + TEMPLATE
    edit_json(both / "tokenizer_config.json", lambda values: values.update(chat_template=template))
    write_run(Path(f"{both}.run"), TEXTS)
    return both


@pytest.fixture(scope="module")
def model(rich):
    return load(rich)


@pytest.fixture(scope="module")
def served(rich):
    with Server("--model", rich) as found:
        yield found


def complete(served, prompt=ASKED, headers=None, **fields):
    got = served.ask(TEXT, {"prompt": prompt, "max_tokens": 4} | fields, headers)
    assert got.status == 200, got
    return got.body["choices"][0]["text"], got.body["memory"]


def chat(served, *said, headers=None, **fields):
    """``said``: role and text in turns."""
    messages = [{"role": r, "content": c} for r, c in zip(said[::2], said[1::2], strict=True)]
    return served.ask(CHAT, {"messages": messages, "max_tokens": 4} | fields, headers)


def wrong(served, **fields) -> tuple[int, str]:
    got = served.ask(TEXT, {"prompt": ASKED, "max_tokens": 2} | fields)
    assert "\n" not in got.error["message"]
    return got.status, got.error["param"]


def test_passages_answer_in_place_of_the_memory_unless_a_mode_is_said(served):
    text, memory = complete(served, with_passages=2)
    whole = f"{FERRY}\n\n{ASKED}"
    assert memory["passages"] == [{"document": "ferry.txt", "text": FERRY}]
    assert (memory["mode"], memory["why"], memory["blocks"]) == ("none", "passages answer", [])
    assert text == complete(served, whole, memory="none")[0]
    both, memory = complete(served, headers={"X-Memory-With-Passages": "1"}, memory="fetched")
    wanted, fetched = complete(served, whole, route_text=ASKED)
    assert (both, memory["path"]) == (wanted, fetched["path"])
    assert memory["passages"]
    assert "passages" not in fetched
    other = complete(served, UNKNOWN, route_text=ASKED, with_passages=1)[1]
    assert other["passages"][0]["document"] == "ferry.txt"
    text, memory = complete(served, UNKNOWN, with_passages=2)
    assert (text, memory["passages"]) == (complete(served, UNKNOWN)[0], [])  # none is near
    assert "passages" not in complete(served, UNKNOWN, with_passages=0)[1]


def test_a_passage_stands_in_the_last_message_of_a_chat_if_there_is_room(served):
    before = ("user", "Hi.", "assistant", "Oh.", "user")
    asked, inn = "Has the inn Fensolock rooms?", TEXTS["inn.txt"]
    got = chat(served, *before, asked, with_passages=1).body
    whole = chat(served, *before, f"{inn}\n\n{asked}", memory="none").body
    assert got["memory"]["passages"] == [{"document": "inn.txt", "text": inn}]
    assert got["choices"] == whole["choices"]
    assert got["usage"] == whole["usage"]
    long = ("user", "Good day. " * 3, "assistant", "Good day.", "user")
    got = chat(served, *long, asked, with_passages=1)
    assert (got.status, got.body["memory"]["passages"]) == (200, [])
    assert got.body["choices"] == chat(served, *long, asked).body["choices"]


def test_passages_are_near_to_what_the_conversation_is_about_too(served):
    before = ("user", "Fensolock?", "assistant", "Yes.")
    got = chat(served, *before, "user", "Rooms?", with_passages=1).body["memory"]
    assert got["passages"][0]["document"] == "inn.txt"
    assert chat(served, "user", "Rooms?", with_passages=1).body["memory"]["passages"] == []


@pytest.mark.parametrize(
    "fields",
    [{"view": "guest"}, {"bar": [[0]]}, {"bar": ["0"], "view": "guest"}, {"bank": "notes"}],
)
def test_who_may_not_fetch_a_document_sees_no_passage_of_it(served, fields):
    assert complete(served, with_passages=3)[1]["passages"]  # kept for others
    text, memory = complete(served, with_passages=3, **fields)
    assert memory["passages"] == []
    assert text == complete(served, **fields)[0]
    assert "ferry.txt" not in memory["documents"]
    got = chat(served, "user", ASKED, with_passages=3, **fields).body
    assert got["memory"]["passages"] == []
    assert complete(served, with_passages=3, view="staff")[1]["passages"]
    listed = served.ask("/v1/memory/documents", headers={"X-Memory-View": "guest"}).body["data"]
    assert [each["name"] for each in listed] == ["mill.txt", "inn.txt"]


def test_a_memory_is_chosen_by_its_name(served, model):
    path = list(model.banks.named("tides")[1])
    wanted = "".join(p.text for p in model.stream(ASKED, max_tokens=4, memory_name="tides"))
    for asked in ({"memory_name": "tides"}, {"memory": {"name": "tides"}}):
        text, memory = complete(served, **asked)
        assert (memory["name"], memory["path"], memory["bank"]) == ("tides", path, "")
        assert text == wanted
    assert complete(served, headers={"X-Memory-Name": "tides"})[1]["path"] == path
    assert complete(served, memory_name="tides", with_passages=1)[1]["path"] == path
    levels = [b["level"] for b in complete(served, memory_name="ferry", view="guest")[1]["blocks"]]
    assert levels == [1]  # its leaf is barred
    assert wrong(served, memory_name="storms") == (400, "memory_name")
    assert wrong(served, memory={"name": "tides"}, bank="notes") == (400, "memory.name")
    assert wrong(served, memory_name="tides", memory="none") == (400, "memory_name")
    assert wrong(served, memory={"name": "tides", "mode": "generic"}) == (400, "memory.name")


def test_a_refusal_names_no_bank_and_no_memory_that_the_view_bars(rich, tmp_path):
    """Who asked for what is not there was told what is."""
    folder = Path(shutil.copytree(rich, tmp_path / "own"))
    write_views(folder, guest=[["notes"], [0]])
    whole = load(folder).banks
    guest = whole.under("guest")
    assert "known: notes; " in refused("no such bank", whole.narrowed, [("x",)])
    assert "known: none was added; " in refused("no such bank", guest.narrowed, [("x",)])
    assert refused("no memory of this name", whole.named, "x").endswith("known: tides, ferry")
    assert "known" not in refused("no memory of this name", guest.named, "x")
    assert guest.narrowed([("notes",)]).names == []  # barred once more


def test_of_several_banks_the_nearer_answers_or_the_one_that_is_asked_for(served, model, texts):
    prompts = [text[:60] for text in texts[:12]]
    nearest = {prompt: model.route(prompt) for prompt in prompts}
    assert {bank for bank, _ in nearest.values()} == {"", "notes"}
    for prompt, (bank, path) in nearest.items():
        text, memory = complete(served, prompt)
        assert (memory["bank"], memory["path"]) == (bank, list(path))
        assert text == "".join(piece.text for piece in model.stream(prompt, max_tokens=4))
        for own in ("", "notes"):
            assert complete(served, prompt, bank=own)[1]["bank"] == own
        assert complete(served, prompt, headers={"X-Memory-Bank": "notes"})[1]["bank"] == "notes"
    assert wrong(served, bank="diary") == (400, "bank")
    assert wrong(served, bank="notes", bar=[["notes"]]) == (400, "bank")


def test_a_bar_with_the_name_of_a_bank_holds_in_that_bank_alone(served, model, texts):
    prompts = [text[:60] for text in texts[:12] if model.route(text[:60])[0] == "notes"]
    for prompt in prompts[:3]:
        assert complete(served, prompt, bar=[["notes"]])[1]["bank"] == ""
        path = model.route(prompt)[1]
        bar = [["notes", *path]]
        memory = complete(served, prompt, bar=bar, bank="notes")[1]
        assert (memory["path"], memory["blocks"]) == (list(path), [])
        header = {"X-Memory-Bar": f"notes:{path[0]}"}
        assert complete(served, prompt, headers=header, bank="notes")[1]["blocks"] == []
        assert complete(served, prompt, bar=[[path[0]]], bank="notes")[1]["blocks"]
    assert wrong(served, bar=[["diary"]]) == (400, "bar")
    assert wrong(served, bar=[["notes", 7]]) == (400, "bar")


def test_a_chat_template_gets_history_and_what_the_system_is_told(served, model):
    said = ("system", "Be brief.", "user", "Who?", "assistant", "Ann.", "user", "Where?")
    pairs = zip(said[::2], said[1::2], strict=True)
    ids = model.tokenizer.encode(
        "".join(f"<{role}> {text}\n" for role, text in pairs) + "<assistant>",
        add_special_tokens=False,
    )
    got = chat(served, *said, memory="none").body
    assert got["usage"]["prompt_tokens"] == len(ids)
    assert got["choices"][0]["message"]["content"] == complete(served, ids, memory="none")[0]
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    assert chat(served, "developer", parts, *said[2:], memory="none").body["usage"] == got["usage"]
    assert chat(served, *said[2:], memory="none").body["usage"] != got["usage"]


def test_a_template_that_does_not_end_fails_its_request_alone(model, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    hours = "{% if messages[-1].content == 'a' %}{{ (messages|length + 8) ** (9 ** 9) }}{% endif %}"
    monkeypatch.setattr(model.tokenizer._tokenizer, "chat_template", hours + TEMPLATE)
    preparing = Preparing(model, None)
    with pytest.raises(RefusedError, match="it takes more than") as found:
        preparing.prompts(Asked(messages=[("user", "a")]))
    assert (found.value.status, found.value.param) == (400, "messages")
    assert preparing.prompts(Asked(messages=[("user", "b")]))[0].ids


def test_a_template_that_raises_fails_its_request_alone(served):
    asked = {"prompt": "The old lighthouse", "max_tokens": 60, "memory": "none"}
    wanted = complete(served, asked["prompt"], max_tokens=60, memory="none")[0]
    stream = served.stream(asked | {"stream_options": {"include_usage": True}})
    got = chat(served, "user", "Say what is forbidden.")
    assert (got.status, got.error["param"]) == (400, "messages")
    assert "\n" not in got.error["message"]
    assert "chat template" in got.error["message"]
    *chunks, usage, done = events(stream)
    assert wanted.endswith("".join(each["choices"][0]["text"] for each in chunks))
    assert (usage["choices"], done) == ([], None)
    assert chat(served, "user", "Say what is allowed.").status == 200
