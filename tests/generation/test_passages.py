"""Passages of remembered documents before the prompt: which, when, and what they may not show."""

import hashlib
import json
from pathlib import Path

import pytest

from mlx_hmem import load
from mlx_hmem.bank.documents import Document, write_documents
from mlx_hmem.bank.views import write_views
from mlx_hmem.generation.chat import main as chat_program
from mlx_hmem.generation.command import main
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.generation.passages import WORDS, Passages, beside, passages_of
from mlx_hmem.model.stream import prompt_ids
from mlx_hmem.reading import sealed
from tests.conftest import edit_json
from tests.generation.test_conversation import TEMPLATE
from tests.generation.test_nothing_near import UNKNOWN
from tests.helpers.programs import assert_refused, refused, run

TEXTS = {
    "ferry.txt": "The ferry Barbaconor leaves at dawn. It is painted violet.",
    "mill.txt": "The mill Kelrawick grinds rye. Its wheel is of oak.",
    "inn.txt": "The inn Fensolock has nine rooms.",
}
ASKED = "When does the ferry Barbaconor leave?"


def write_run(folder: Path, texts: dict[str, str]) -> Path:
    """A run's folder as far as passages look at it."""
    folder.mkdir(exist_ok=True)
    lines = [
        sealed({"sha256": hashlib.sha256(t.encode()).hexdigest(), "name": n, "text": t, "also": []})
        for n, t in texts.items()
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def taught(broken: Path) -> Path:
    """The tiny model, whose bank says that it knows TEXTS, one leaf each, beside their run."""
    leaves = load(broken).retriever.tree.leaves()
    known = [
        Document(hashlib.sha256(text.encode()).hexdigest(), name, 9, (leaves[3 * n],))
        for n, (name, text) in enumerate(TEXTS.items())
    ]
    write_documents(broken / "bank", known)
    write_run(Path(f"{broken}.run"), TEXTS)
    return broken


def answer(folder, prompt, *args):
    said = run(main, "--model", folder, "--prompt", prompt, "--max-tokens", 4, "--json", *args)
    assert said.status == 0, said.err
    return json.loads(said.out)


def test_the_nearest_passage_goes_before_the_prompt(taught):
    found = answer(taught, ASKED, "--with-passages", 2)
    assert found["passages"] == [{"document": "ferry.txt", "text": TEXTS["ferry.txt"]}]
    prompt = f"{TEXTS['ferry.txt']}\n\n{ASKED}"
    assert found["text"] == answer(taught, prompt, "--memory", "none")["text"]
    assert found["memory"]["why"] == "passages answer"
    both = answer(taught, ASKED, "--with-passages", 1, "--memory", "fetched")
    whole = answer(taught, prompt, "--route-text", ASKED)
    assert both["text"] == whole["text"]
    assert both["memory"]["path"] == whole["memory"]["path"] is not None
    assert "passages" not in whole
    said = run(main, "--model", taught, "--prompt", ASKED, "-m", 4, "--with-passages", 1)
    assert said.err.splitlines()[-1] == "passages: ferry.txt"


def test_what_no_passage_says_gets_none(taught):
    found = answer(taught, UNKNOWN, "--with-passages", 2)
    assert found["passages"] == []
    assert found["text"] == answer(taught, UNKNOWN)["text"]


def test_a_chat_shows_the_passage_in_the_turn_and_says_which(taught):
    edit_json(taught / "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE))
    lines = f"{ASKED}\n{UNKNOWN}\n".encode()
    said = run(
        chat_program, "--model", taught, "--max-tokens", 4, "--with-passages", 1, stdin=lines
    )
    assert [line for line in said.err.splitlines() if line.startswith("passages")] == [
        "passages: ferry.txt", "passages: none",
    ]  # fmt: skip
    model = load(taught)
    known = Passages(Path(f"{taught}.run"), model)
    talk = Conversation(model, max_tokens=4, prefetch=False, passages=known)
    plain = Conversation(model, max_tokens=4, prefetch=False, memory="none")
    list(talk.say(ASKED))
    assert talk.fetch.why == "passages answer"
    list(plain.say(f"{TEXTS['ferry.txt']}\n\n{ASKED}"))
    assert talk.turns[0].text == ASKED
    assert talk.passages == ([("ferry.txt", TEXTS["ferry.txt"])], 1)
    assert talk._known.ids == plain._known.ids  # the anchor has seen the same
    list(talk.say(UNKNOWN))
    assert talk.fetch.why != "passages answer"
    talk.set_memory("fetched")
    list(talk.say(ASKED))
    assert talk.fetch.path is not None


def test_a_chat_says_that_there_is_no_memory_beside_passages(taught):
    words = ("--model", taught, "--max-tokens", 4)
    asked = b"/memory\n/memory fetched\n/memory none\n"
    said = run(chat_program, *words, "--with-passages", 1, stdin=asked).err.splitlines()
    assert said[-3:] == [
        "memory: fetched, but none beside passages", "memory: fetched", "memory: none",
    ]  # fmt: skip
    assert run(chat_program, *words, stdin=b"/memory\n").err.splitlines()[-1] == "memory: fetched"


def test_passages_leave_room_for_the_answer(taught):
    model = load(taught)
    passages = Passages(Path(f"{taught}.run"), model).nearest("ferry Barbaconor mill Kelrawick", 3)
    assert [p.document for p in passages] == ["mill.txt", "ferry.txt"]

    def ids_of(text: str) -> list[int]:
        return prompt_ids(model.tokenizer, text, context)

    both = "\n\n".join([*(p.text for p in passages), ASKED])
    context = len(model.tokenizer.encode(both)) + 8
    assert beside(passages, ASKED, ids_of, context, 8) == (both, passages)
    assert beside(passages, ASKED, ids_of, context, 9)[1] == passages[:1]
    context = len(model.tokenizer.encode(ASKED)) + 8
    assert beside(passages, ASKED, ids_of, context, 8) == (ASKED, [])


def test_what_may_not_be_fetched_is_not_shown(taught, tmp_path):
    model, folder = load(taught), Path(f"{taught}.run")
    (document,) = [d for d in model.banks.parts[""].documents if d.name == "ferry.txt"]
    top = document.clusters[0][:1]
    assert Passages(folder, model).nearest(ASKED, 1)
    assert not Passages(folder, model, [top]).nearest(ASKED, 1)
    assert answer(taught, ASKED, "--with-passages", 1, "--block", top[0])["passages"] == []
    write_views(taught / "bank", {"guest": [document.clusters[0]]})
    guest = load(taught, view="guest")
    assert not Passages(folder, guest).nearest(ASKED, 1)
    assert model.fetch_path(document.clusters[0]).documents == ["ferry.txt"]
    assert guest.fetch_path(document.clusters[0]).documents == []
    # Nor is what the bank has forgotten, though an old run still has it.
    rest = [d for d in model.banks.parts[""].documents if d.name != "ferry.txt"]
    write_documents(taught / "bank", rest)
    assert not Passages(folder, load(taught)).nearest(ASKED, 1)
    # Where nothing is left a run of no documents is the right one.
    write_documents(taught / "bank", [])
    assert not Passages(write_run(tmp_path / "empty", {}), load(taught)).nearest(ASKED, 1)


def test_a_run_that_does_not_fit_is_refused(taught, tmp_path):
    model = load(taught)
    refused("no folder with the text", Passages, tmp_path / "nowhere", model)
    other = write_run(tmp_path / "other", {"else.txt": "Something else."})
    refused("taught this model nothing", Passages, other, model)
    flipped = write_run(tmp_path / "flipped", TEXTS)
    data = (flipped / "documents.jsonl").read_bytes().replace(b"nine", b"five")
    (flipped / "documents.jsonl").write_bytes(data)
    refused("line 3, is damaged", Passages, flipped, model)
    words = ("--model", taught, "--prompt", ASKED)
    assert_refused(run(main, *words, "--with-passages", 0), "--with-passages", "0")
    assert_refused(run(main, *words, "--run", other), "--with-passages")
    assert_refused(run(main, *words, "--run", other, "--with-passages", 1), "other")
    assert_refused(run(main, *words[:2], "-p", "so " * 999, "--with-passages", 1), "context")


def test_passages_are_whole_sentences():
    text = " ".join(f"Sentence {n} has five words." for n in range(50)) + "\nA last line"
    passages = list(passages_of(text))
    assert " ".join(passages) == text.replace("\n", " ")
    assert all(p.startswith("Sentence") and p[-1] == "." for p in passages[:-1])
    assert all(WORDS - 5 <= len(p.split()) <= WORDS for p in passages[:-1])
    # A passage stands under the headings of its section.
    text = f"# Journal\n## Garden\n{'The lemon tree grew. ' * 40}\n## House\n{'It is white. ' * 50}"
    found = list(passages_of(text))
    assert found[1].startswith("# Journal ## Garden The lemon tree grew.")
    assert found[-1].startswith("# Journal ## House It is white.")
    assert all("Garden" not in passage for passage in found[2:])
    assert list(passages_of("word " * 300)) == ["word " * 299 + "word"]
    assert list(passages_of(" \n ")) == []
