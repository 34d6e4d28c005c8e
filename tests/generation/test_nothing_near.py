"""A question about nothing that the documents say gets no memory, and all faces say so."""

import json

import pytest

from mlx_hmem import load
from mlx_hmem.bank.documents import Document, write_documents
from mlx_hmem.generation.batch import batch_generate
from mlx_hmem.generation.chat import main as chat_program
from mlx_hmem.generation.command import main
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.model.fetch import NOTHING_NEAR
from tests.helpers.programs import run

KNOWN = "Where does the ferry Barbaconor leave?"
UNKNOWN = "Who painted the portrait of Admiral Quennebrick?"
OPTIONS = {"max_tokens": 4, "prefetch": False}


def teach(folder, tops):
    """Says of each leaf under the clusters ``tops`` of level 1, all without, that a document has
    taught it; of the first that it is about the ferry."""
    leaves = load(folder).retriever.tree.leaves()
    leaves = [leaf for leaf in leaves if tops is None or leaf[0] in tops]
    words = ["barbaconor ferry leave the", *["something else"] * (len(leaves) - 1)]
    pairs = enumerate(zip(leaves, words, strict=True))
    documents = [Document(f"{n:064x}", f"{n}.txt", 1, (leaf,), (), (w,)) for n, (leaf, w) in pairs]
    write_documents(folder / "bank", documents)
    return leaves[0]


@pytest.fixture
def leaf(broken):
    """The leaf of the ferry, in a model of which documents have taught all."""
    return teach(broken, None)


def answer(folder, prompt, *args):
    said = run(main, "--model", folder, "--prompt", prompt, "--max-tokens", 4, "--json", *args)
    assert said.status == 0
    return json.loads(said.out)


def test_generate_fetches_nothing_and_says_so(broken, leaf):
    near, far = answer(broken, KNOWN), answer(broken, UNKNOWN)
    assert near["memory"]["path"] == list(leaf)
    assert near["memory"]["documents"] == ["0.txt"]
    assert far["memory"].items() >= {"mode": "none", "why": "nothing near", "path": None}.items()
    assert far["memory"]["blocks"] == []
    assert far["text"] == answer(broken, UNKNOWN, "--memory", "none")["text"]
    assert "why" not in answer(broken, UNKNOWN, "--memory", "none")["memory"]
    assert answer(broken, UNKNOWN, "--route-text", KNOWN)["memory"]["path"] == list(leaf)
    said = run(main, "--model", broken, "--prompt", UNKNOWN, "--max-tokens", 4)
    assert "memory: none: nothing near, 0 bytes read" in said.err
    said = run(main, "--model", broken, "--prompt", KNOWN, "--max-tokens", 4)
    assert ", taught by 0.txt, " in said.err


def test_chat_says_it_at_each_such_turn(broken, leaf):
    lines = f"{UNKNOWN}\n{UNKNOWN}\n{KNOWN}\n/route {UNKNOWN}\n"
    said = run(chat_program, "--model", broken, "--max-tokens", 4, stdin=lines.encode())
    assert said.status == 0
    shown = said.err.splitlines()
    assert shown[:2] == ["memory: none: nothing near"] * 2
    assert shown[2].startswith(f"memory: fetched {leaf}")
    assert shown[3] == "nothing near"


def test_a_conversation_keeps_the_document_it_is_about_and_leaves_it(broken, leaf):
    talk = Conversation(load(broken), **OPTIONS)
    list(talk.say(KNOWN))
    assert talk.route == leaf
    talk.turns[-1].answer = ""  # what the tiny model says is noise
    list(talk.say("When does the ferry leave?"))
    assert talk.route == leaf
    list(talk.say(UNKNOWN))
    assert talk.route is None
    assert talk.fetch.why == NOTHING_NEAR


def test_python_and_batches_say_it(broken, leaf):
    model = load(broken)
    assert model.fetch(UNKNOWN).why == NOTHING_NEAR
    assert model.fetch(UNKNOWN).rows is None
    assert model.fetch(KNOWN).path == leaf
    # Who asks for a route gets the nearest.
    assert model.route(UNKNOWN)[1] == model.retriever.route(UNKNOWN)
    found = batch_generate(model, [KNOWN, UNKNOWN], max_tokens=4)
    assert [each.path for each in found] == [leaf, None]
    alone = [each.text for each in model.stream(UNKNOWN, max_tokens=4, memory="none")]
    assert found[1].text == "".join(alone)


def test_what_no_document_is_near_goes_to_the_clusters_that_were_there_before(broken):
    before = load(broken)
    top = before.retriever.route(UNKNOWN)[0]
    teach(broken, {top})
    model = load(broken)
    path = model.fetch(UNKNOWN).path
    assert path[0] != top
    assert path == before.retriever.tree.route(before.retriever.vector(UNKNOWN), [(1, top)])
    assert model.fetch(KNOWN).path[0] == top
    talk = Conversation(model, **OPTIONS)
    routes = []
    for text in (UNKNOWN, KNOWN, UNKNOWN):
        list(talk.say(text))
        routes.append(talk.route[0])
    assert routes[0] != top == routes[1] != routes[2]


def test_a_document_whose_words_are_unknown_leaves_all_as_it_was(broken):
    before = load(broken).fetch(UNKNOWN).path
    leaves = load(broken).retriever.tree.leaves()
    write_documents(broken / "bank", [Document("0" * 64, "old.txt", 1, tuple(leaves))])
    assert b"words" not in (broken / "bank" / "documents.jsonl").read_bytes()
    assert load(broken).fetch(UNKNOWN).path == before
