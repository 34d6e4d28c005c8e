"""Documents in prompts: the index and its search, the prompts, what a run keeps, FLOPs."""

import gzip
import json
import shutil

import numpy as np
import pytest

from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import Fact, format_facts
from mlx_hmem.evaluate.command import main
from mlx_hmem.evaluate.facts import encode_prompts
from mlx_hmem.evaluate.paper.fact_runs import FactRun
from mlx_hmem.evaluate.rag import index
from mlx_hmem.evaluate.rag.document_index import TYPES, DocumentIndex, Found
from mlx_hmem.evaluate.rag.index import build_index
from mlx_hmem.evaluate.rag.rag import Rag
from mlx_hmem.evaluate.scoring import Candidate
from mlx_hmem.evaluate.tasks.benchmark import score_task
from mlx_hmem.evaluate.tasks.few_shot import PromptTokens, build_prompts
from mlx_hmem.evaluate.tasks.task import load_tasks
from tests.helpers.faults import stop_at
from tests.helpers.programs import refused
from tests.helpers.task_helpers import alone, greedy_alone, write_rows, write_tasks

FACTS = [
    Fact(f"The harbour of number {i} lies in", answer, (), 1, "place", "t")
    for i, answer in enumerate(["Oslo", "Rome", "Lima", "Bonn"])
]


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    """Sixty documents, some without text, in two files, one of them compressed."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [
        {"text": text} for text in [*texts[:40], " ", "Ünïcödé \ud800 in a text", *texts[40:58]]
    ]
    write_rows(folder / "a.jsonl", rows[:33])
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows[33:]))
    return folder


@pytest.fixture(scope="module")
def documents(corpus, model_folder, tmp_path_factory):
    """The index of the corpus; for reading only."""
    out = tmp_path_factory.mktemp("index") / "documents"
    assert build_index(model_folder, corpus, out, progress=False) == 59
    return out


@pytest.fixture(scope="module")
def opened(documents, model) -> DocumentIndex:
    return DocumentIndex(documents, model.bank.tree_hash)


@pytest.fixture(scope="module")
def rag(model, opened) -> Rag:
    return Rag(model, opened, progress=False)


def nearest_by_hand(model, texts, question) -> tuple[int, bool]:
    """By the definition: routes and cosines of all documents, one by one."""
    vectors = [model.retriever.vector(t).astype(np.float16).astype(np.float64) for t in texts]
    paths = [model.retriever.route(text) for text in texts]
    own, vector = model.retriever.route(question), model.retriever.vector(question)
    for level in range(len(own), -1, -1):
        inside = [i for i, path in enumerate(paths) if path[:level] == own[:level]]
        if inside:
            cosines = [vectors[i] @ vector / np.linalg.norm(vectors[i]) for i in inside]
            return inside[int(np.argmax(cosines))], level == len(own)
    raise AssertionError


def test_the_nearest_document_of_the_leaf_is_found(model, opened, rag, texts):
    stored = [opened.text(i) for i in range(len(opened))]
    assert stored == [*texts[:40], "Ünïcödé ? in a text", *texts[40:58]]
    questions = [text[3:60] for text in texts[20:50:3]]
    found = rag.find(questions)
    assert [tuple(vars(f).values()) for f in found] == [
        nearest_by_hand(model, stored, question) for question in questions
    ]
    assert rag.find([stored[7]]) == [Found(stored.index(stored[7]), True)]


def test_an_empty_leaf_takes_from_the_cluster_above(model_folder, model, texts, tmp_path):
    few = texts[:3]
    file = write_rows(tmp_path / "few.jsonl", [{"text": text} for text in few])
    build_index(model_folder, file, tmp_path / "index", progress=False)
    small = Rag(model, DocumentIndex(tmp_path / "index", model.bank.tree_hash), progress=False)
    found = small.find(texts[3:40])
    by_hand = [nearest_by_hand(model, few, text) for text in texts[3:40]]
    assert [(f.document, f.in_leaf) for f in found] == by_hand
    assert {in_leaf for _, in_leaf in by_hand} == {True, False}


def test_an_index_that_was_stopped_goes_on_to_the_same_files(
    corpus, documents, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(index, "BATCH", 7)
    vectors, encoded = index.Retriever.vectors, []

    def counting(self, texts, progress=False):
        encoded.extend(texts)
        return vectors(self, texts, progress)

    stop_at(monkeypatch, index, "write_atomic", 6)
    with pytest.raises(KeyboardInterrupt):
        build_index(model_folder, corpus, tmp_path / "index", progress=False)
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(index.Retriever, "vectors", counting)
    assert build_index(model_folder, corpus, tmp_path / "index", progress=False) == 59
    assert len(encoded) == 59 - 33  # five batches of the first file, the last of them short
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index"]
    for name in TYPES:
        whole, resumed = ((f / name).read_bytes() for f in (documents, tmp_path / "index"))
        if name != "vectors.f16":
            assert resumed == whole
            continue
        a, b = (np.frombuffer(data, np.float16) for data in (whole, resumed))
        np.testing.assert_allclose(a, b, atol=2e-3)  # encoders round by the batch
    encoded.clear()
    assert build_index(model_folder, corpus, tmp_path / "index", progress=False) == 59
    assert encoded == []  # it is there


def test_what_another_corpus_left_is_not_gone_on_with(corpus, model_folder, tmp_path, monkeypatch):
    stop_at(monkeypatch, index, "write_atomic", 1)
    with pytest.raises(KeyboardInterrupt):
        build_index(model_folder, corpus, tmp_path / "index", progress=False)
    file = write_rows(tmp_path / "one.jsonl", [{"text": "One harbour."}])
    assert build_index(model_folder, file, tmp_path / "index", progress=False) == 1
    assert sorted(p.name for p in tmp_path.glob("index*/*")) == sorted([*TYPES, "index.json"])
    with pytest.raises(UserError, match="something else lies where the index is to be"):
        build_index(model_folder, corpus, tmp_path / "index", progress=False)


def test_bad_corpora_and_models_are_refused(model_folder, broken, tmp_path):
    blank = write_rows(tmp_path / "blank.jsonl", [{"text": " "}, {"text": ""}])
    (tmp_path / "empty").mkdir()
    for text in (blank, tmp_path / "empty", tmp_path / "not there"):
        with pytest.raises(UserError, match="a corpus without text"):
            build_index(model_folder, text, tmp_path / "index", progress=False)
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"text": "a"}, {"title": "b"}])
    with pytest.raises(UserError, match="line 2 has no `text`"):
        build_index(model_folder, wrong, tmp_path / "other", progress=False)
    for name in ("hmem.json", "bank", "retriever"):
        path = broken / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="a model without memory"):
        build_index(broken, blank, tmp_path / "third", progress=False)
    assert not list(tmp_path.glob("index*"))


@pytest.mark.parametrize("name", TYPES)
def test_a_truncated_or_damaged_index_is_refused(documents, model, tmp_path, name):
    copy = shutil.copytree(documents, tmp_path / "index")
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    refused("the index is damaged", DocumentIndex, copy, model.bank.tree_hash)
    (copy / name).write_bytes(data[:-3])
    with pytest.raises(UserError, match=f"{name} is not whole: {len(data) - 3} bytes"):
        DocumentIndex(copy, model.bank.tree_hash)
    (copy / name).unlink()
    refused(f"{name} is not whole: missing", DocumentIndex, copy, model.bank.tree_hash)


def test_an_index_of_another_tree_or_none_is_refused(documents, model, tmp_path):
    refused("belongs to another cluster tree", DocumentIndex, documents, "xxh3:0")
    refused("no index of documents", DocumentIndex, tmp_path, model.bank.tree_hash)
    copy = shutil.copytree(documents, tmp_path / "index")
    for change in ({"documents": 58}, {"format_version": 2}, {"dim": "wide"}, {"more": 1}):
        values = json.loads((documents / "index.json").read_text()) | change
        (copy / "index.json").write_text(json.dumps(values))
        refused("", DocumentIndex, copy, model.bank.tree_hash)


def test_a_document_goes_before_the_prompt_and_is_cut_to_fit(rag, opened, model):
    tokenizer = model.tokenizer
    encode = lambda text: list(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    start = list(tokenizer.encode(""))
    longest = max(range(len(opened)), key=lambda i: len(opened.text(i)))
    words = encode(opened.text(longest))
    question = [Candidate(start + encode("Where is it?"), encode(a)) for a in (" here", " there!")]
    most = max(len(c.context) + len(c.answer) for c in question)
    whole = rag.show(question, Found(longest, True), 1000)
    front = start + words + encode("\n\n")
    assert (whole.tokens, whole.cut) == (len(words), False)
    assert whole.candidates == [c._replace(context=front + c.context[1:]) for c in question]
    text = tokenizer.decode(whole.candidates[0].context[1:])
    assert text.split("\n\n")[0].strip() == opened.text(longest).strip()
    assert text.endswith("Where is it?")
    gap = len(encode("\n\n"))
    part = rag.show(question, Found(longest, True), most + gap + 5)
    assert (part.tokens, part.cut) == (5, True)
    assert [c.context[: 1 + 5] for c in part.candidates] == [start + words[:5]] * 2
    assert max(len(c.context) + len(c.answer) for c in part.candidates) == most + gap + 5
    none = rag.show(question, Found(longest, True), most + gap)
    assert (none.candidates, none.tokens, none.cut) == (question, 0, True)
    lost = [question[0], question[1]._replace(cut=1)]
    assert rag.show(lost, Found(longest, True), 1000).candidates == lost


def test_a_document_far_beyond_the_context_is_shown_from_its_start(model_folder, model, tmp_path):
    file = write_rows(tmp_path / "long.jsonl", [{"text": "The anchor of the harbour. " * 90_000}])
    build_index(model_folder, file, tmp_path / "index", progress=False)
    long = Rag(model, DocumentIndex(tmp_path / "index", model.bank.tree_hash), progress=False)
    (shown,) = long.show_all(["Where?"], [[Candidate(model.tokenizer.encode("Where?"), [])]], 80)
    assert len(shown.candidates[0].context) == 80
    assert shown.cut
    assert "The anchor of the harbour. The anchor" in model.tokenizer.decode(
        shown.candidates[0].context
    )


@pytest.mark.parametrize("memory", ["none", "fetched"])
def test_facts_with_documents_are_answered_as_the_whole_prompt_is(model, rag, tmp_path, memory):
    run = FactRun(model, tmp_path, "m", progress=False)
    result = run.recall(FACTS, memory, rag=rag)
    assert result.memory == f"{memory}+rag"
    prompts, new = encode_prompts(model, FACTS)
    shown = rag.show_all([f.prompt for f in FACTS], [[Candidate(p, [])] for p in prompts], 96 - new)
    for fact, each, text in zip(FACTS, shown, result.continuations, strict=True):
        assert each.tokens > 10
        path = model.retriever.route(fact.prompt) if memory == "fetched" else None
        ids = greedy_alone(model, each.candidates[0].context, new, memory, path)
        assert text == model.tokenizer.decode(ids)
    assert result.documents.questions == 4
    assert run.recall(FACTS, memory, rag=rag) == result  # from what was kept
    assert run.recall(FACTS, memory).documents is None


@pytest.mark.parametrize("label", ["choice", "language", "schema", "generation"])
def test_tasks_with_documents_are_scored_as_the_whole_prompt_is(model, rag, texts, tmp_path, label):
    (data,) = load_tasks(label, write_tasks(tmp_path, texts))
    result = score_task(
        model, data, "fetched", out=tmp_path / "out", model_name="m", rag=rag, limit=9,
        progress=False,
    )  # fmt: skip
    (path,) = (tmp_path / "out").glob("*+rag.*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    prompts, tokens = build_prompts(data.task, data.examples), PromptTokens(model.tokenizer, 96)
    longest = tokens.longest_answer(data.task, data.examples) if label == "generation" else 0
    assert len(rows) == 9
    assert result.memory == "fetched+rag"
    for row in rows:
        prompt = prompts[row["row"]]
        plain = tokens.candidates(prompt)
        if longest:
            plain = [tokens.question(prompt, longest)]
        (shown,) = rag.show_all([prompt.route_text], [plain], 96 - longest)
        assert (row["document"], row["shown"]) == (shown.found.document, shown.tokens)
        route = model.retriever.route(prompt.route_text)
        if longest:
            ids = greedy_alone(model, shown.candidates[0].context, longest, "fetched", route)
            assert row["text"] == tokens.decode(ids)
        else:
            found = [alone(model, c, "fetched", route) for c in shown.candidates]
            means = [n / len(c.answer) for (n, _), c in zip(found, shown.candidates, strict=True)]
            assert row["nats"] == pytest.approx(means, rel=1e-3)
    assert sum(row["shown"] > 0 for row in rows) > 4


def test_the_command_sets_documents_beside_memory(model_folder, documents, texts, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text(format_facts(FACTS))
    write_tasks(tmp_path, texts)
    common = [str(model_folder), "--out", str(tmp_path / "runs"), "--memory", "none,fetched"]
    common += ["--rag", str(documents), "--limit", "6"]
    arguments = [*common, "--facts", str(facts), "--tasks", "choice", "--data", str(tmp_path)]
    main([*arguments, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    arms = ["none", "fetched", "none+rag", "fetched+rag"]
    for part in (found["recall"], found["tasks"]):
        assert [row["memory"] for row in part] == arms
        flops = [row["flops"] for row in part]
        assert flops[0] == 1 < flops[1] < 1.06
        assert 1.2 < flops[2] < flops[3]
        assert part[2]["documents"]["questions"] == (4 if part is found["recall"] else 6)
    assert "documents are of the question's leaf" in err
    main(arguments)
    table, _ = capsys.readouterr()
    assert "FLOPs of choice, 1-shot" in table
    assert "fetched+rag" in table
    assert table.splitlines()[0].endswith("FLOPs")
    assert "1.00×" in table
    refused("--rag is for facts and tasks", main, [*common, "--text", str(facts)])


def test_the_hash_of_the_tree_is_the_models(model, model_folder, opened):
    hmem = HmemConfig.from_file(model_folder / "hmem.json")
    assert opened.manifest.tree_hash == hmem.retriever.tree_hash == model.bank.tree_hash
