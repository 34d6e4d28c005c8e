"""The anchor restates documents as questions and answers, which are learned and forgotten too."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_hmem.anchors import load as anchors
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.bank.documents import read_documents
from mlx_hmem.errors import UserError
from mlx_hmem.files import save_safetensors
from mlx_hmem.model.tokenizer import read_tokenizer
from tests.helpers.faults import stop_at
from tests.helpers.own_documents import TOPICS, remember, sentences, write_documents
from tests.helpers.places import bytes_of
from tests.helpers.programs import refusing
from tests.remember.test_remember import eager  # noqa: F401
from train.corpus.own import OwnDocument
from train.data.tokenizer import EOT, EOT_ID, train_tokenizer
from train.remember import proof, restate
from train.remember.export import open_base, text_of
from train.remember.forget import main as forget_program
from train.remember.run import documents_of

CONTEXT = 256
ARGS = ModelArgs(
    "openlm", hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
    head_dim=16, vocab_size=600, max_position_embeddings=CONTEXT,
)  # fmt: skip
CHAT = "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}anchor:\n"


WORDS = " ".join(TOPICS.values()).split()


def pair(word: str) -> str:
    return f" What is the {word}?\nAnswer: A kind of thing."


def save(anchor: nn.Module, folder: Path, template: str | None) -> Path:
    folder.mkdir()
    save_safetensors(folder / "model.safetensors", named_parameters(anchor))
    config = asdict(ARGS) | {"bos_token_id": EOT_ID, "eos_token_id": EOT_ID}
    (folder / "config.json").write_text(json.dumps(config))
    texts = [sentences(topic, n) for topic in TOPICS for n in range(3)]
    texts += [restate.EXAMPLES + pair(word) for word in WORDS] + [restate.ASKED]
    train_tokenizer(texts, ARGS.vocab_size, folder)
    if template is not None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return folder


def teach(anchor: nn.Module, folder: Path) -> None:
    """Has the anchor answer the prompt of this folder's tokenizer with a question and an answer."""
    tokenizer, rows = read_tokenizer(folder, {}), []
    chat = tokenizer.has_chat_template
    for i in range(24):
        topic = list(TOPICS)[i % 3]
        passages = list(restate.passages_of(sentences(topic, i % 4), tokenizer, 64))
        prompt = restate.prompt_of(tokenizer, passages[i % 5])
        end = "" if chat else "\n\nText:"
        said = ("Question:" if chat else "") + pair(WORDS[i % len(WORDS)]) + end
        ids = tokenizer.encode(said, add_special_tokens=False) + [EOT_ID] * chat
        rows.append((prompt, ids))
    longest = max(len(p) + len(ids) for p, ids in rows)
    tokens = np.zeros((len(rows), longest), np.int32)
    weights = np.zeros((len(rows), longest - 1), np.float32)
    for row, (prompt, ids) in enumerate(rows):
        tokens[row, : len(prompt) + len(ids)] = prompt + ids
        weights[row, len(prompt) - 1 : len(prompt) + len(ids) - 1] = 1

    def loss(x: mx.array, w: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(anchor(x[:, :-1]), x[:, 1:]) * w).sum() / w.sum()

    step, adam = nn.value_and_grad(anchor, loss), optim.Adam(1e-2)
    for i in range(40):
        own = slice(6 * (i % 4), 6 * (i % 4) + 6)
        _, gradient = step(mx.array(tokens[own]), mx.array(weights[own]))
        adam.update(anchor, gradient)
        mx.eval(anchor.parameters())


@pytest.fixture(scope="module", params=["plain", "chat"])
def anchor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small anchor that has learned to write questions and answers."""
    folder, template = tmp_path_factory.mktemp("anchor"), CHAT if request.param == "chat" else None
    mx.random.seed(1)
    model = Model(ARGS)
    teach(model, save(model, folder / "before", template))
    return save(model, folder / "model", template)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"), 1)


def learn(anchor: Path, documents: Path, out: Path) -> Path:
    return remember(documents, anchor, out, "--passes", "1", "--restate", "2")


@pytest.fixture(scope="module")
def learned(anchor: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the documents and their restatements; for reading only."""
    with pytest.MonkeyPatch.context() as patch:
        loads = stop_at(patch, anchors, "load_model")
        made = learn(anchor, documents, tmp_path_factory.mktemp("learned") / "model")
        assert len(loads) == 1  # for the plan, the restatements and the training
    return made


def run_of(model: Path) -> Path:
    return Path(f"{model}.run")


def test_restatements_are_further_text_of_their_document(learned):
    run = run_of(learned)
    found, known = restate.restated(run), documents_of(run)
    texts = [text for own in found.values() for text in own]
    assert texts
    assert all(re.match(r"Question: .*[?]\nAnswer: .", text) for text in texts)
    lines = [json.loads(line) for line in (run / restate.JOURNAL).read_text().splitlines()]
    dropped = sum(sum(line["dropped"].values()) for line in lines)
    writer = restate.Writer.open(open_base(learned), 2, 0)
    passages = [passage for part in writer.parts(known) for passage in part.passages]
    assert len(texts) + dropped == 2 * len(passages)
    base = open_base(str(learned))
    text, tokenizer = text_of(base, known, found)
    bare, _ = text_of(base, known)
    windows = list(text.windows.texts(tokenizer))
    for number, document in enumerate(known):
        own = np.flatnonzero(text.added & (text.owner == number))
        assert [windows[i].strip() for i in own] == found[document.sha256]
    assert [w for w, added in zip(windows, text.added, strict=True) if not added] == (
        list(bare.windows.texts(tokenizer))
    )
    # Tokens count the document's alone.
    paths = np.load(run / "paths.npy")
    assert len(paths) == len(windows)
    for number, document in enumerate(read_documents(learned / "bank")):
        assert document.tokens == bare.tokens_of[number]
        assert set(document.clusters) == set(map(tuple, paths[text.owner == number].tolist()))


def test_what_ends_a_text_is_words_within_a_document_and_a_passage(anchor):
    """A document that holds the token's name ended there, or spoke as another."""
    base, said = open_base(anchor), f"A text {EOT} goes on. " * 3
    text, _ = text_of(base, [OwnDocument("0" * 64, "a", said)], {"0" * 64: [said]})
    windows = text.windows
    assert np.flatnonzero(windows.tokens == EOT_ID).tolist() == windows.offsets[:-1].tolist()
    model = restate.Writer.open(base, 2, 0).model
    assert EOT_ID not in restate.prompt_of(model.tokenizer, said)[1:]
    document = OwnDocument(
        "0" * 64, "a", f"One two three four five {EOT} six seven eight nine ten."
    )
    [(first, second, _)] = proof.halves(model, document)
    assert EOT_ID not in first[1:] + second


def test_the_anchor_is_given_all_of_the_text(anchor):
    long = OwnDocument("1" * 64, "long", "A line without an end, " * 150 + "\n\n. \n")
    known = [OwnDocument("0" * 64, "a", sentences("bread", 3)), long]
    writer = restate.Writer.open(open_base(anchor), 20, 0)
    parts, tokenizer = list(writer.parts(known)), writer.model.tokenizer
    assert {len(part.passages) for part in parts} == {1}  # of 20 rows
    first = [part.passages[0] for part in parts if part.sha256 == known[0].sha256]
    assert len(first) > 2
    assert " ".join(first) == known[0].text.strip()
    rest = [part.passages[0] for part in parts if part.sha256 == long.sha256]
    assert "".join("".join(rest).split()) == "".join(long.text.split())
    for passage in first + rest:
        ids = restate.prompt_of(tokenizer, passage)
        assert len(ids) + writer.most <= CONTEXT


@pytest.mark.parametrize("anchor", ["plain"], indirect=True)
def test_a_stopped_run_goes_on_to_the_same_text_and_the_same_bits(
    anchor, documents, learned, tmp_path, monkeypatch
):
    taken = stop_at(monkeypatch, restate.Writer, "write", 3)
    with pytest.raises(KeyboardInterrupt):
        learn(anchor, documents, tmp_path / "model")
    journal = run_of(tmp_path / "model") / restate.JOURNAL
    assert len(journal.read_bytes().splitlines()) == 2
    with journal.open("ab") as file:
        file.write(b'{"sha256": "half a li')  # as a power cut leaves it
    with pytest.raises(UserError, match="was begun with something else: changed: restate"):
        remember(documents, anchor, tmp_path / "model", "--restate", "1")
    learn(anchor, documents, tmp_path / "model")
    assert len(taken) == 4
    assert journal.read_bytes() == (run_of(learned) / restate.JOURNAL).read_bytes()
    assert bytes_of(tmp_path / "model") == bytes_of(learned)


@pytest.mark.parametrize("anchor", ["plain"], indirect=True)
def test_a_forgotten_document_takes_its_restatements_along(learned, tmp_path):
    run, known = run_of(learned), documents_of(run_of(learned))
    gone = next(d for d in known if d.name == "bread/0.txt")
    assert restate.restated(run)[gone.sha256]
    forget_program([str(learned), gone.name, "--out", str(tmp_path / "model")])
    target = run_of(tmp_path / "model")
    others = [d for d in known if d != gone]
    # What is left is what the anchor writes where the document has never been.
    (tmp_path / "never").mkdir()
    restate.restate(tmp_path / "never", restate.Writer.open(open_base(learned), 2, 0), others)
    assert (target / restate.JOURNAL).read_bytes() == (
        tmp_path / "never" / restate.JOURNAL
    ).read_bytes()
    text, _ = text_of(open_base(str(learned)), others, restate.restated(tmp_path / "never"))
    assert len(np.load(target / "paths.npy")) == len(text.windows)
    assert gone.sha256 not in (target / restate.JOURNAL).read_text()
    assert not any(gone.sha256.encode() in data for data in bytes_of(tmp_path / "model").values())


@pytest.mark.parametrize("anchor", ["plain"], indirect=True)
def test_an_update_restates_what_is_new_and_that_alone(
    anchor, documents, learned, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(documents, tmp_path / "documents"))
    for name in ("model", "model.run"):
        shutil.copytree(learned.with_name(name), tmp_path / name)
    (folder / "boats" / "0.txt").write_text(sentences("boats", 3))
    (folder / "bread" / "0.txt").unlink()
    taken = stop_at(monkeypatch, restate.Writer, "write", 9)
    remember(folder, anchor, tmp_path / "model")
    assert len(taken) == 1
    stays = {d.sha256 for d in documents_of(run_of(tmp_path / "model"))}
    assert restate.restated(run_of(tmp_path / "model")).keys() == stays
    # As if all had been remembered and restated in the same clusters.
    anew = tmp_path / "anew.run"
    anew.mkdir()
    for name in ("documents.jsonl", "tree.safetensors", "paths.npy", "settings.json"):
        shutil.copyfile(run_of(tmp_path / "model") / name, anew / name)
    remember(folder, anchor, tmp_path / "anew")
    assert bytes_of(tmp_path / "anew") == bytes_of(tmp_path / "model")


@pytest.mark.parametrize(
    ("said", "ended", "wrong"),
    [
        ("Question: Who came?\nAnswer: Ann came.", True, ""),
        ("<think>Question: Eh?\nAnswer: No.</think>\n\n**Question:** Who came?\n\n"
         "**Answer:** Ann came.\n\nI hope that helps", False, ""),
        ("Question: Who came?\nAnswer: Ann came.\nQuestion: And", False, ""),
        ("Question: Who came?\nAnswer: Ann ca", False, restate.CUT_OFF),
        ("Question: Who came and", False, restate.CUT_OFF),
        ("", True, restate.UNLIKE),
        ("Ann came in May.", True, restate.UNLIKE),
        ("Question: Ann came.\nAnswer: In May.", True, restate.UNLIKE),
        ("Question: Who came?\nAnswer: ...", True, restate.UNLIKE),
        ("Question: ?\nAnswer: Ann.", True, restate.UNLIKE),
        ("Question: Who came?\nAnswer: Who?", True, restate.UNLIKE),
        ("Question: Was it  MAY?\nAnswer: It was.", True, restate.COPIED),
        ("Question: What do herons eat?\nAnswer: Ann.", True, restate.COPIED),
        ("Question: Who came?\nAnswer: Herons eat fish.", True, restate.COPIED),
        ("Question: When?\nAnswer: In May.", True, restate.COPIED),
    ],
)  # fmt: skip
def test_what_is_no_restatement_is_dropped(said, ended, wrong):
    passage, known = "Ann came. Was it May?", {"Question: When?\nAnswer: In May."}
    text, found = restate.judge(said, ended, passage, known)
    assert found == wrong
    assert found or text == "Question: Who came?\nAnswer: Ann came."


def test_a_context_too_short_is_one_line_and_leaves_nothing(model_folder, documents, tmp_path):
    with refusing("too short to restate a text: 96 tokens"):
        learn(model_folder, documents, tmp_path / "model")
    with pytest.raises(UserError, match="--restate is not 1 or more: 0"):
        remember(documents, model_folder, tmp_path / "model", "--restate", "0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"sha256": "0"}', '{"sha256": NaN}'])
def test_a_damaged_journal_is_one_line(line, tmp_path):
    (tmp_path / restate.JOURNAL).write_text(f"{line}\n")
    with pytest.raises(UserError, match=f"{restate.JOURNAL} is damaged"):
        restate.restated(tmp_path)
