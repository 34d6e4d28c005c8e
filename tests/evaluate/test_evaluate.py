"""Evaluation agrees with plain loops over the model, with generation and with hand-made cases."""

import gzip
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.bank import Bank
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import Fact, format_facts, perplexity, read_facts, read_texts, recall
from mlx_hmem.evaluate.command import main
from mlx_hmem.evaluate.facts import fact_paths, is_right
from mlx_hmem.evaluate.perplexity import first_sentence
from mlx_hmem.evaluate.tables import perplexity_table, recall_table
from mlx_hmem.files import save_safetensors
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever import ClusterTree, Retriever
from tests.conftest import save_bank
from tests.helpers.programs import refused, run
from train.corpus.facts import make_facts
from train.data.tokenizer import train_tokenizer

FACTS = {"kind": "invented", "topics": 3, "entities_per_topic": 4, "frequencies": [1, 4]}
CONTEXT = 320
ARGS = ModelArgs("openlm", 32, 2, 64, 2, 16, 400, max_position_embeddings=CONTEXT)


class LetterPairs:
    """A small encoder of its own: counts of neighbouring letters, hashed to 64 dimensions."""

    name, dim, fingerprint = "letter pairs", 64, "none"

    def encode(self, texts, progress=False):
        vectors = np.full((len(texts), self.dim), 1e-3, np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for a, b in itertools.pairwise(text):
                row[(ord(a) * 31 + ord(b)) % self.dim] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def corpus():
    documents, facts = make_facts(FACTS | {"plain_documents": 60}, seed=1)
    texts = [d["text"] for d in documents]
    return texts, facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model directory without memory: a trained tokenizer and a random anchor."""
    out = tmp_path_factory.mktemp("anchor")
    train_tokenizer(corpus()[0], ARGS.vocab_size, out)
    mx.random.seed(0)
    anchor = Model(ARGS)
    save_safetensors(out / "model.safetensors", dict(tree_flatten(anchor.parameters())))
    config = vars(ARGS) | {"eos_token_id": 0}
    (out / "config.json").write_text(json.dumps(config))
    return out


def build(folder: Path, bank: Bank | None = None, retriever: Retriever | None = None):
    anchor = Model(ARGS)
    anchor.load_weights(str(folder / "model.safetensors"))
    config = {"max_position_embeddings": CONTEXT}
    return MemoryModel(anchor, config, load_tokenizer(folder), retriever, bank)


@pytest.fixture(scope="module")
def dense(folder) -> MemoryModel:
    return build(folder)


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory) -> MemoryModel:
    """The same anchor with a bank of random blocks, strong enough to change what it says."""
    out = tmp_path_factory.mktemp("model") / "bank"
    save_bank(out, MemoryConfig(32, 2, (4, 2), (4, 2)), "a", "t")
    encoder = LetterPairs()
    tree = ClusterTree.fit(encoder.encode(corpus()[0]), branching=(4, 2))
    return build(folder, Bank.open(out), Retriever(encoder, tree))


def nats_one_by_one(model, text, memory):
    """Cross-entropy of one text, alone, by NumPy."""
    ids = model.tokenizer.encode(text)
    paths = [model.retriever.route(text)] if memory == "fetched" else None
    logits = np.array(model(mx.array([ids[:-1]]), paths=paths, memory=memory)[0], np.float64)
    logs = logits - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) - logits.max()
    return -logs[np.arange(len(ids) - 1), ids[1:]].sum(), len(ids) - 1


@pytest.mark.parametrize("memory", ["none", "generic", "fetched"])
def test_perplexity_in_batches_equals_each_document_alone(model, memory):
    texts = corpus()[0][:23]
    nats, tokens = np.transpose([nats_one_by_one(model, text, memory) for text in texts])
    found = perplexity(model, texts, memory, tokens_per_batch=500, progress=False)
    size = sum(len(text.encode()) for text in texts)
    assert (found.documents, found.tokens, found.bytes) == (23, tokens.sum(), size)
    assert found.per_token == pytest.approx(math.exp(nats.sum() / tokens.sum()), rel=1e-4)
    assert found.per_byte == pytest.approx(math.exp(nats.sum() / size), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats.sum() / size / math.log(2), rel=1e-4)


def test_each_kind_of_memory_gives_another_perplexity_with_the_error_of_the_jackknife(model):
    texts = corpus()[0][:10]
    found = [perplexity(model, texts, m, progress=False) for m in ("none", "generic", "fetched")]
    assert len({round(f.per_token, 2) for f in found}) == 3
    texts = corpus()[0][:40]
    nats, tokens = np.transpose([nats_one_by_one(model, text, "none") for text in texts])
    left_out = (nats.sum() - nats) / (tokens.sum() - tokens)
    jackknife = np.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())
    found = perplexity(model, texts, "none", progress=False)
    assert found.per_token_error == pytest.approx(found.per_token * jackknife, rel=0.05)
    same = perplexity(model, texts[:1] * 5, "none", progress=False)
    assert same.per_token_error < 1e-3 * same.per_token
    assert math.isnan(perplexity(model, texts[:1], "none", progress=False).per_token_error)


def test_a_long_document_is_the_sum_of_its_windows_each_routed_by_itself(model):
    text = " ".join(corpus()[0][:8])
    start, *tokens = model.tokenizer.encode(text)
    nats, size = 0.0, -(-len(tokens) // -(-len(tokens) // 31))
    assert len(tokens) > 200
    for i in range(0, len(tokens), size):
        part = tokens[i : i + size]
        path = model.retriever.route(model.tokenizer.decode(part))
        logits = model(mx.array([[start, *part[:-1]]]), paths=[path])[0]
        nats += nn.losses.cross_entropy(logits, mx.array(part), reduction="sum").item()
    found = perplexity(model, [text], "fetched", context=32, progress=False)
    assert found.tokens == len(tokens)
    assert found.per_token == pytest.approx(math.exp(nats / len(tokens)), rel=1e-4)


def test_routing_by_the_first_sentence_is_routing_the_document_by_it(model):
    texts = corpus()[0][:12]
    expected = []
    for text in texts:
        ids = mx.array([model.tokenizer.encode(text)])
        logits = model(ids[:, :-1], paths=[model.retriever.route(first_sentence(text))])
        expected.append(nn.losses.cross_entropy(logits, ids[:, 1:], reduction="sum").item())
    found = perplexity(model, texts, "fetched", route_by="first_sentence", progress=False)
    assert found.per_token == pytest.approx(math.exp(sum(expected) / found.tokens), rel=1e-4)
    assert first_sentence(" One of 3.5 m. Two.") == "One of 3.5 m."
    assert first_sentence("Title\nText.") == "Title"


def generated(model, facts, fact, memory, route_text=None):
    longest = max(len(model.tokenizer.encode(" " + f.answer)) for f in facts)
    options = {"max_tokens": longest + 2, "memory": memory, "route_text": route_text}
    ids = [piece.token for piece in model.stream(fact.prompt, **options)]
    return model.tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)


@pytest.mark.parametrize("memory", ["none", "generic", "fetched"])
def test_continuations_are_those_of_generation(model, memory):
    facts = corpus()[1]
    found = recall(model, facts, memory, progress=False)
    for fact, continuation in zip(facts, found.continuations, strict=True):
        assert continuation == generated(model, facts, fact, memory)


def test_facts_can_be_routed_by_another_text(model):
    facts, texts = corpus()[1][:6], corpus()[0][:6]
    paths = [model.retriever.route(text) for text in texts]
    assert paths != [model.retriever.route(fact.prompt) for fact in facts]
    found = recall(model, facts, routed_by=texts, progress=False)
    for fact, text, continuation in zip(facts, texts, found.continuations, strict=True):
        assert continuation == generated(model, facts, fact, "fetched", text)
    refused("one text per fact", lambda: recall(model, facts, routed_by=texts[:2], progress=False))


def test_facts_are_routed_by_prompt_statement_or_random_leaf(model):
    facts = corpus()[1][:6]
    route = model.retriever.route
    for name, texts in (
        ("prompt", [f.prompt for f in facts]),
        ("statement", [f.statement for f in facts]),
    ):
        assert fact_paths(model, facts, route=name) == [route(text) for text in texts]
        assert recall(model, facts, route=name, progress=False) == recall(
            model, facts, routed_by=texts, progress=False
        )
    leaves = model.retriever.tree.leaves()
    paths = [fact_paths(model, facts, route="random", seed=s) for s in (1, 1, 2)]
    assert paths[0] == paths[1] != paths[2]
    assert all(path in leaves for path in paths[0])
    drawn = fact_paths(model, facts * 100, route="random")
    assert set(drawn) == set(leaves)
    found = recall(model, facts, route="random", seed=1, progress=False)
    assert found == recall(model, facts, paths=paths[0], progress=False)
    for memory in ("none", "generic", "fetched"):
        refused("unknown route", recall, model, facts, memory, route="title", progress=False)


def test_an_anchor_that_learnt_some_facts_recalls_those_and_no_others(folder):
    model = build(folder)
    facts = corpus()[1]
    learnt = [f for f in facts if f.times == 4]
    rows = [model.tokenizer.encode(f.statement) for f in learnt]
    longest = max(map(len, rows))
    ids = mx.array([row + [0] * (longest - len(row)) for row in rows])
    optimizer = optim.Adam(5e-3)

    def loss(anchor):
        losses = nn.losses.cross_entropy(anchor(ids[:, :-1]), ids[:, 1:], reduction="none")
        return (losses * (ids[:, 1:] != 0)).mean()

    for _ in range(120):
        _, gradients = nn.value_and_grad(model.anchor, loss)(model.anchor)
        optimizer.update(model.anchor, gradients)
        mx.eval(model.anchor.parameters())
    found = recall(model, facts, "none", progress=False)
    assert found.bucket(times=4).accuracy == 1
    assert found.bucket(times=1).accuracy < 0.3
    wrong = [replace(f, answer="none of these") for f in learnt]
    assert recall(model, wrong, "none", progress=False).bucket().right == 0
    aliased = [replace(f, answer="none of these", aliases=(f.answer,)) for f in learnt]
    assert recall(model, aliased, "none", progress=False).bucket().accuracy == 1
    assert sum(b.total for b in found.buckets() if b.of["kind"] == "all" and b.of["times"]) == len(
        facts
    )
    assert "100.0 ± 0.0" in recall_table([found])


@pytest.mark.parametrize(
    ("answer", "continuation", "right"),
    [
        ("26", " 26.", True), ("26", "about 26, then 27", True), ("26", " 27, not 26", False),
        ("26", " 260", False), ("26", " 126", False), ("26", "", False),
        ("Oslo", " Oslo. The", True), ("Oslo", "Oslo", True), ("Oslo", " Oslob", False),
        ("Oslo", " in Oslo", False), ("Fe", " fe", False),
        ("Dale R. Corson", " Dale R. Corson.", True),
    ],
)  # fmt: skip
def test_what_counts_as_a_right_answer(answer, continuation, right):
    assert is_right(Fact("The answer is", answer, (), 1, "k", "t"), continuation) is right


def test_facts_survive_the_way_through_a_file_and_texts_are_read_plain_and_gzip(tmp_path):
    facts = corpus()[1]
    facts[0] = replace(facts[0], aliases=("Ørsted", "two"))
    (tmp_path / "facts.jsonl").write_text(format_facts(facts))
    assert read_facts(tmp_path / "facts.jsonl") == facts
    lines = "".join(json.dumps({"id": i, "text": f"text {i}"}) + "\n" for i in range(5))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read_texts(tmp_path / name, limit=3) == ["text 0", "text 1", "text 2"]
        assert len(read_texts(tmp_path / name)) == 5


@pytest.mark.parametrize(
    "line",
    ["{", "3", '{"prompt": "a"}', '{"text": 5}', "[" * 100_000,
     '{"prompt": "", "answer": "b", "aliases": [], "times": 1, "kind": "k", "topic": "t"}',
     '{"prompt": "a", "answer": "b", "aliases": [], "times": "1", "kind": "k", "topic": "t"}',
     '{"prompt": "a", "answer": "b", "aliases": [2], "times": 1, "kind": "k", "topic": "t"}'],
)  # fmt: skip
def test_wrong_files_are_user_errors(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    refused("", read_facts, path)
    refused("", read_texts, path)
    (tmp_path / "rows.jsonl.gz").write_bytes(b"not gzip")
    refused("", read_texts, tmp_path / "rows.jsonl.gz")


def test_a_text_that_cannot_be_read_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"id": "1", "title": "b"}\n')
    refused(r"rows\.jsonl, line 3 has no `text`: it has id, title;", read_texts, path)
    refused(r"not a file but a folder: .*; name a text", read_texts, tmp_path)
    refused(r"a file is missing: .*none; name a text", read_texts, tmp_path / "none")


def test_what_a_model_cannot_do_is_a_user_error(dense, model):
    texts, facts = corpus()
    for memory in ("fetched", "generic"):
        refused("no memory bank", perplexity, dense, texts, memory, progress=False)
        refused("no memory bank", recall, dense, facts, memory, progress=False)
    refused("unknown memory mode", perplexity, model, texts, "some", progress=False)
    refused("route_by", perplexity, model, texts, route_by="title", progress=False)
    refused("no text", perplexity, model, ["", " \n"], progress=False)
    refused("no facts", recall, model, [], progress=False)
    with pytest.raises(UserError, match="longer than the context"):
        recall(model, [replace(facts[0], prompt="long " * 200)], progress=False)


@pytest.fixture
def files(tmp_path):
    texts, facts = corpus()
    (tmp_path / "facts.jsonl").write_text(format_facts(facts))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    command = ["--facts", str(tmp_path / "facts.jsonl"), "--text", str(tmp_path / "text.jsonl")]
    return [*command, "--out", str(tmp_path / "out")]


def test_the_command_prints_what_the_functions_find(folder, dense, files, capsys):
    texts, facts = corpus()
    main([str(folder), *files, "--memory", "none", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["recall"] == [recall(dense, facts, "none", progress=False).to_dict()]
    score = perplexity(dense, texts, "none", progress=False)
    assert found["perplexity"][0]["per_token"] == pytest.approx(score.per_token, rel=1e-5)
    main(["--model", str(folder), *files, "--memory", "none", "--limit", "7"])
    table = capsys.readouterr().out
    assert "perplexity, 7 documents" in table
    assert f"{score.per_token:.2f}" in perplexity_table([score])
    lines = table.split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "change",
    [["--memory", "some"], ["--memory", "fetched"], ["--limit", "0"], ["--route-by", "title"],
     ["--facts", "missing.jsonl"], ["--route", "title"], ["--corpus", "."],
     ["--block-best", "1", "--route", "random"], ["--encoder", "static"]],
)  # fmt: skip
def test_a_wrong_command_ends_in_one_line_and_status_2(folder, files, change):
    said = run(main, folder, *files, *change)
    assert said[:2] == (2, "")
    assert said.err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("option", ["--facts", "--text"])
def test_a_file_that_holds_nothing_is_named(folder, tmp_path, option):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl has no " in run(main, folder, option, tmp_path / "empty.jsonl").err
