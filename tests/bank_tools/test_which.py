# ruff: noqa: F811 (fixtures of another module)
"""Which documents said it: the same, and in the same order, on every face."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_hmem.bank.documents import read_documents, write_documents
from mlx_hmem.bank.views import write_views
from mlx_hmem.generation.chat import main as chat_program
from mlx_hmem.generation.command import main as generate_program
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.model.load import load
from mlx_hmem.retriever.words import words_of
from tests.generation.test_passages import ASKED, TEXTS, taught  # noqa: F401
from tests.helpers.banks import said
from tests.helpers.programs import run

MILL = "Of what is the wheel of the mill Kelrawick?"


@pytest.fixture
def together(taught: Path) -> Path:
    """The ferry and the mill in one leaf, the mill first; the words of all are known."""
    tokenizer = load(taught).retriever.encoder.tokenizer
    ferry, mill, inn = read_documents(taught / "bank")
    mill = replace(mill, clusters=ferry.clusters)
    words = {d: (" ".join(words_of(tokenizer, TEXTS[d.name])),) for d in (mill, ferry, inn)}
    write_documents(taught / "bank", [replace(d, words=own) for d, own in words.items()])
    return taught


@pytest.mark.parametrize(("asked", "first"), [(ASKED, "ferry.txt"), (MILL, "mill.txt")])
def test_every_face_names_the_document_that_says_most_first(together, asked, first, capsys):
    second = ({"ferry.txt", "mill.txt"} - {first}).pop()
    lines = said(capsys, "which", together, asked).splitlines()
    assert [line.split()[1] for line in lines[1::2]] == [first, second]
    assert lines[2].strip() == TEXTS[first]
    assert int(lines[1].split("%")[0]) > int(lines[3].split("%")[0])
    model = load(together)
    assert model.fetch(asked).documents == [first, second]
    talk = Conversation(model, max_tokens=1, prefetch=False)
    list(talk.say(asked))
    assert talk.fetch.documents == [first, second]
    words = ["--model", together, "--prompt", asked, "-m", 1]
    assert f", taught by {first}, {second}, " in run(generate_program, *words).err
    found = json.loads(run(generate_program, *words, "--json").out)
    assert found["memory"]["documents"] == [first, second]


def test_a_chat_says_when_another_document_of_the_same_blocks_answers(together):
    lines = f"{ASKED}\n{ASKED}\n{MILL}\n".encode()
    told = run(chat_program, "--model", together, "--max-tokens", 1, stdin=lines).err
    memory = [line for line in told.splitlines() if line.startswith("memory: ")]
    assert [line.partition("taught by ")[2].split(",")[0] for line in memory] == [
        "ferry.txt", "mill.txt",
    ]  # fmt: skip


def test_what_no_document_says_and_what_is_barred_is_said(together, capsys):
    leaf = read_documents(together / "bank")[0].clusters[0]
    write_views(together / "bank", {"guest": [leaf]})
    told = said(capsys, "which", together, ASKED, "--view", "guest")
    assert "ferry" not in told
    assert "no document is known to have taught it" in told
    Path(f"{together}.run").rename(together.with_name("elsewhere"))
    assert "Barbaconor" not in said(capsys, "which", together, ASKED)  # no text, but the name
    options = ("--run", together.with_name("elsewhere"))
    assert TEXTS["ferry.txt"] in said(capsys, "which", together, ASKED, *options)
