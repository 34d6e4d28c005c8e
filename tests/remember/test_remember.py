"""A folder of documents becomes a memory: of its own, or behind the clusters that a model has."""

import gzip
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.load import read_config
from mlx_hmem.bank.documents import read_documents
from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.pages import page_text
from mlx_hmem.documents.readers import own_files, read_own
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import perplexity
from mlx_hmem.files import load_safetensors, save_safetensors
from mlx_hmem.model.load import load
from tests.helpers.faults import stop_at
from tests.helpers.own_documents import TOPICS, remember, sentences, write_documents
from tests.helpers.places import bytes_of
from tests.helpers.programs import refused
from train.data.arrays import load_mapped
from train.remember import plan as remember_plan
from train.remember import rows as rows_module
from train.remember.blocks import subtree_of, subtrees_of
from train.remember.export import open_base, text_of
from train.remember.forget import main as forget_program
from train.remember.rows import Padded, Rows, Sentences
from train.remember.run import Settings, documents_of
from train.step import candidates
from train.step.memories import MemoryTrainee


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """A learning rate by which the tiny anchor's memory learns within a few passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remember_plan, "LEARNING_RATE", 0.01)
        yield


@pytest.fixture(scope="module")
def anchor(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of conftest without its memory."""
    folder = tmp_path_factory.mktemp("anchor") / "anchor"
    memory = shutil.ignore_patterns("hmem.json", "bank", "retriever")
    return Path(shutil.copytree(model_folder, folder, ignore=memory))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"), 3)


@pytest.fixture(scope="module")
def learned(anchor: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the documents in a bank of its own; for reading only."""
    out = tmp_path_factory.mktemp("learned") / "model"
    return remember(documents, anchor, out, "--passes", "3")


def test_a_model_without_memory_learns_the_documents(learned, anchor, documents):
    model = load(learned)
    texts = [file.read_text() for file in sorted(documents.rglob("*.txt"))]
    before = perplexity(load(anchor), texts, "none", progress=False).per_token
    after = perplexity(model, texts, "fetched", progress=False).per_token
    assert after < 0.8 * before
    # The generic memory of a new bank says nothing: it is the anchor.
    assert perplexity(model, texts, "generic", progress=False).per_token == pytest.approx(before)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (learned / name).read_bytes() == (anchor / name).read_bytes()


def test_provenance_names_the_documents_and_the_leaves_that_they_route_to(learned, documents):
    model = load(learned)
    found = read_documents(learned / "bank", model.bank.config)
    assert len(found) == 9
    assert {d.name for d in found} == {f"{t}/{n}.txt" for t in TOPICS for n in range(3)}
    for document in found:
        assert document.tokens > 100
        assert set(document.terms) & {word for words in TOPICS.values() for word in words.split()}
    # These documents share nearly all their words; which of two is meant a few numbers say.
    texts = {d.name: (documents / d.name).read_text() for d in found}
    own = [model.retriever.route(texts[d.name])[0] in {p[0] for p in d.clusters} for d in found]
    assert sum(own) >= 7


def test_the_text_lies_in_the_run_and_not_in_the_model(learned):
    secret = sentences("boats", 2).split(".")[0].encode()
    assert secret in (Path(f"{learned}.run") / "documents.jsonl").read_bytes()
    assert not any(secret in data for data in bytes_of(learned).values())


def test_a_model_with_memory_gets_new_clusters_behind_its_own(model_folder, documents, tmp_path):
    before = bytes_of(model_folder)
    out = remember(documents, model_folder, tmp_path / "model", "--passes", "2")
    assert bytes_of(model_folder) == before
    old, new = load(model_folder), load(out)
    assert new.bank.config.branching[0] > old.bank.config.branching[0]
    assert new.bank.config.branching[1:] == old.bank.config.branching[1:]
    assert new.bank.config.r == old.bank.config.r
    for level in (1, 3):
        for cluster in range(old.bank.config.num_clusters[level - 1]):
            (mine,), (theirs,) = (m.bank.blocks([(level, cluster)]) for m in (old, new))
            assert mx.array_equal(mine, theirs)
        assert np.array_equal(
            new.retriever.tree.centroids[level - 1][: old.bank.config.num_clusters[level - 1]],
            old.retriever.tree.centroids[level - 1],
        )
    shard = "bank/level-1.00000.safetensors"
    assert (out / shard).read_bytes() == before[shard]
    first = old.bank.config.branching[0]
    found = read_documents(out / "bank", new.bank.config)
    assert len(found) == 9
    assert all(path[0] >= first for document in found for path in document.clusters)
    texts = [file.read_text() for file in sorted(documents.rglob("*.txt"))]
    assert sum(new.route(text)[1][0] >= first for text in texts) >= 7  # not to the old ones
    assert perplexity(new, texts, progress=False).per_token < 0.9 * (
        perplexity(new, texts, "none", progress=False).per_token
    )
    # Once more on top: what is known is not learned again.
    more = write_documents(tmp_path / "more", 3)
    refused("nothing to remember: 9 known already", remember, more, out, tmp_path / "third")
    (more / "new.md").write_text(sentences("boats", 9))
    third = remember(more, out, tmp_path / "third", "--passes", "1")
    assert len(read_documents(third / "bank", load(third).bank.config)) == 10


def test_a_stopped_run_goes_on_to_the_same_bits(anchor, documents, learned, tmp_path, monkeypatch):
    stop_at(monkeypatch, MemoryTrainee, "step", 8, 20)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            remember(documents, anchor, tmp_path / "model", "--passes", "3")
        assert not (tmp_path / "model").exists()
    remember(documents, anchor, tmp_path / "model", "--passes", "3")
    assert bytes_of(tmp_path / "model") == bytes_of(learned)


def test_with_some_of_the_vocabulary_the_text_is_learned_and_a_stopped_run_goes_on_to_the_same_bits(
    anchor, documents, learned, tmp_path, monkeypatch
):
    """As with a vocabulary too large to be looked at whole: perplexity is that of the whole one."""
    size = read_config(anchor)["vocab_size"] // 4
    monkeypatch.setattr(candidates, "FEWEST", size)
    monkeypatch.setattr(candidates, "LARGE", 1)
    texts = [file.read_text() for file in sorted(documents.rglob("*.txt"))]
    out = remember(documents, anchor, tmp_path / "whole", "--passes", "3")
    assert bytes_of(out) != bytes_of(learned)  # it was drawn indeed
    found, same = (
        perplexity(load(model), texts, "fetched", progress=False).per_token
        for model in (out, learned)
    )
    assert found == pytest.approx(same, rel=0.1)
    stop_at(monkeypatch, MemoryTrainee, "step", 8)
    with pytest.raises(KeyboardInterrupt):
        remember(documents, anchor, tmp_path / "stopped", "--passes", "3")
    remember(documents, anchor, tmp_path / "stopped", "--passes", "3")
    assert bytes_of(tmp_path / "stopped") == bytes_of(out)


def test_what_is_said_to_be_known_is_what_the_model_ends(anchor, tmp_path, capsys, monkeypatch):
    """Counted on the way, from the losses of the last pass; here by asking the finished model."""
    monkeypatch.setattr(rows_module, "SHARE", 0.1)  # soon known
    (tmp_path / "few").mkdir()
    for number in range(2):
        short = " ".join(sentences("boats", number).split(".")[:2]) + "."
        (tmp_path / "few" / f"{number}.txt").write_text(short)
    out = remember(tmp_path / "few", anchor, tmp_path / "model", "--passes", "300")
    printed = capsys.readouterr().out
    run = tmp_path / "model.run"
    settings, base = Settings.load(run), open_base(str(out))
    text, tokenizer = text_of(base, documents_of(run))
    paths, model = load_mapped(run / "paths.npy"), load(out)
    known, count = 0, 0
    for number in subtrees_of(paths):
        rows = subtree_of(text, paths, settings, tokenizer, number).rows
        for i in range(rows.windows):
            row, path = rows.tokens[np.array([i])][0, : rows.lengths[i]], rows.paths[i]
            single = Rows(Padded.of([row]), np.ones(1), np.array([len(row)]), path[None], 1, [])
            ids = mx.array(row[None].astype(np.int32))
            memory = model.with_rows(model.fetch_path(tuple(path.tolist())).rows)
            likeliest = np.array(memory(ids[:, :-1]).argmax(-1)) == row[1:]
            sentences_of = Sentences(single, tokenizer)
            known, count = known + sentences_of.known(likeliest), count + len(sentences_of.halves)
    assert count
    assert f"of whose {count} sentences it can end {known / count:.0%}" in printed
    assert known > 0


def test_a_run_of_other_documents_is_refused(anchor, learned, documents, tmp_path):
    run = Path(shutil.copytree(f"{learned}.run", tmp_path / "run"))
    other = write_documents(tmp_path / "other", 2)
    with pytest.raises(UserError, match="was begun with something else: changed: source"):
        remember(other, anchor, tmp_path / "model", "--run", str(run))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (".hidden.txt", b"text", "a folder without text"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0", "a folder without text"),
        ("empty.txt", b"", "nothing to remember: 1 passed over"),
        ("broken.pdf", b"%PDF-1.4 nothing", "nothing to remember: 1 passed over"),
        ("page.html", b"<script>let a = 1</script>", "nothing to remember: 1 passed over"),
    ],
)
def test_a_folder_without_text_is_one_line_and_leaves_nothing(
    anchor, tmp_path, name, data, says, capsys
):
    if name.endswith("pdf"):
        pytest.importorskip("pypdf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(data)
    refused(says, remember, tmp_path / "folder", anchor, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
    if "passed over" in says:
        assert f"passed over {name}" in capsys.readouterr().err


def test_a_file_by_itself_is_remembered_by_its_name_and_forgotten(learned, tmp_path, capsys):
    file = tmp_path / "log.md"
    file.write_text(sentences("boats", 9))
    model = remember(file, learned, tmp_path / "model", "--passes", "1")
    assert f"documents       1, from {file}\n" in capsys.readouterr().out
    config = load(model).bank.config
    known = {
        document.name for document in read_documents(learned / "bank", load(learned).bank.config)
    }
    assert {d.name for d in read_documents(model / "bank", config)} == known | {"log.md"}
    forget_program([str(model), "log.md", "--out", str(tmp_path / "without")])
    assert {d.name for d in read_documents(tmp_path / "without" / "bank", config)} == known


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing.txt", "no such file or folder: "),
        ("picture.png", "a file of another kind: "),
        ("empty.txt", "nothing to remember: 1 passed over"),
    ],
)
def test_a_file_that_is_no_text_is_one_line_and_leaves_nothing(anchor, tmp_path, name, says):
    if name != "nothing.txt":
        (tmp_path / name).write_bytes(b"")
    refused(says, remember, tmp_path / name, anchor, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} <= {name}


def test_text_that_does_not_fit_is_refused_before_anything_is_written(anchor, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with (folder / "huge.jsonl").open("wb") as file:
        file.truncate(8 << 40)  # a hole
    with pytest.raises(UserError, match=r"8.8TB of text are too much .*give --max-bytes \d+"):
        remember(folder, anchor, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_what_unpacks_to_more_than_fits_is_refused(anchor, tmp_path, monkeypatch):
    """Its size on the disk says nothing: a megabyte of zstd may stand for thirty gigabytes."""
    (tmp_path / "folder").mkdir()
    lines = (json.dumps({"id": i, "text": f"{i} " + "a" * 5000}) + "\n" for i in range(500))
    (tmp_path / "folder" / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    monkeypatch.setattr("train.remember.sync.folder.machine_bytes", lambda: 8_000_000)
    words = (
        "unpack to more text than this machine can hold: more than 1MB; give --max-bytes 1000000"
    )
    refused(words, remember, tmp_path / "folder", anchor, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_max_bytes_bounds_what_is_read(anchor, documents, tmp_path, capsys):
    size = len(sentences("boats", 0).encode())
    out = remember(
        documents, anchor, tmp_path / "model", "--max-bytes", str(3 * size), "--passes", "1"
    )
    assert 1 <= len(read_documents(out / "bank")) <= 3
    assert "left out by --max-bytes" in capsys.readouterr().out


def test_the_plan_says_what_was_taken_what_was_left_and_what_the_encoder_cannot_read(
    anchor, tmp_path, capsys
):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("รหัสผ่านของท่าเรือเก่าคือนกนางนวล อย่าบอกใคร " * 3)
    (folder / "b.txt").write_bytes("Die Straße heißt Möwenweg.".encode("cp1252"))
    (folder / "c.jsonl").write_text('{"body": "A harbour."}\n{"text": "A ship."}\n')
    for name in ("d.png", "e.PNG", ".hidden"):
        (folder / name).write_bytes(b"\x89PNG\0")
    out = tmp_path / "model"
    options = ("--passes", "1", "--text-key", "body", "--dry-run", "--passed-over")
    remember(folder, anchor, out, *options)
    assert not out.exists()
    said, names = capsys.readouterr()
    assert "documents       3 (4 passed over)" in said
    assert "encodings       1 windows-1252, else UTF-8" in said
    assert "left out        2 *.png, 1 hidden, 1 no `body`" in said
    assert re.search(r"language +.* pieces a word, \d+% of them unknown to the encoder", said)
    for line in ("c.jsonl:2: no `body`", "d.png: *.png", "e.PNG: *.png", ".hidden: hidden"):
        assert f"passed over {line}\n" in names


def test_duplicates_are_dropped_and_counted(anchor, tmp_path, capsys):
    folder = write_documents(tmp_path / "folder", 1)
    shutil.copyfile(folder / "boats" / "0.txt", folder / "again.txt")
    out = remember(folder, anchor, tmp_path / "model", "--passes", "1")
    assert len(read_documents(out / "bank")) == 3
    assert "3 (1 duplicate)" in capsys.readouterr().out


def test_the_run_may_not_lie_in_the_model(anchor, documents, tmp_path):
    with pytest.raises(UserError, match="the run's folder lies in the model directory"):
        remember(documents, anchor, tmp_path / "m", "--run", str(tmp_path / "m" / "run"))


def test_a_folder_of_something_else_is_no_run(anchor, documents, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "own.txt").write_text("mine")
    given = ("--run", str(tmp_path / "run"))
    refused("holds something else: .*own.txt", remember, documents, anchor, tmp_path / "m", *given)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["own.txt"]


def test_a_model_that_nobody_could_ask_is_not_taught(anchor, documents, tmp_path):
    """Its template would have been met when all had been learned."""
    broken = Path(shutil.copytree(anchor, tmp_path / "broken"))
    file = broken / "tokenizer_config.json"
    template = {"chat_template": "{{ raise_exception('no') }}"}
    file.write_text(json.dumps(json.loads(file.read_text()) | template))
    refused("chat template fails: no", remember, documents, broken, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_one_short_document_can_be_remembered(anchor, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.md").write_text("The password of the old harbour is seagull.")
    model = load(remember(tmp_path / "folder", anchor, tmp_path / "model"))
    text = "The password of the old harbour is seagull."
    assert perplexity(model, [text], progress=False).per_token < (
        perplexity(model, [text], "none", progress=False).per_token
    )


def test_the_command_of_a_finished_run_says_so_and_that_of_another_is_refused(
    anchor, learned, documents, tmp_path, capsys
):
    """Its passes need not be said again."""
    before = bytes_of(learned)
    remember(documents, anchor, learned)
    assert f"up to date: {learned}; your text is in {learned}.run" in capsys.readouterr().out
    changed = ("--passes", "4")
    refused("changed: passes; give another --out", remember, documents, anchor, learned, *changed)
    elsewhere = ("--run", str(tmp_path / "run"))
    refused("the destination exists", remember, documents, anchor, learned, *elsewhere)
    assert bytes_of(learned) == before


def test_an_anchor_that_is_not_finite_learns_nothing(anchor, tmp_path):
    """It did, it was said, and the model that was made knew nothing."""
    write_documents(tmp_path / "folder")
    shutil.copytree(anchor, tmp_path / "broken")
    weights = load_safetensors(anchor / "model.safetensors")
    broken = {name: array + math.nan for name, array in weights.items()}
    save_safetensors(tmp_path / "broken" / "model.safetensors", broken)
    out = tmp_path / "model"
    refused("numbers that are not finite", remember, tmp_path / "folder", tmp_path / "broken", out)
    assert not out.exists()


def test_each_kind_of_file_is_read(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    (tmp_path / "a.txt").write_text("plain\r\ntext")
    (tmp_path / "b.MD").write_text("# Title\n\nmarked")
    (tmp_path / "c.html").write_text(
        "<html><head><title>Page</title><style>p {}</style></head><body><p>One <b>bold</b>\nword"
        "&amp;<br>line<script>x()</script></p></body></html>"
    )
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"id": "1", "title": "T", "text": "record"}) + "\nnot json\n"
    )
    writer = pypdf.PdfWriter()
    writer.add_blank_page(72, 72)
    writer.write(tmp_path / "scan.pdf")
    (tmp_path / "e.pdf").write_bytes(_pdf("A page of the manual"))
    faults = Faults()
    found = dict(read_own(own_files(tmp_path, faults), faults))
    assert found == {
        "a.txt": "plain\ntext",
        "b.MD": "# Title\n\nmarked",
        "c.html": "# Page\n\nOne bold word&\nline",
        "T": "record",
        "e.pdf": "A page of the manual",
    }
    assert sorted(faults.named) == ["d.jsonl:2: not JSON", "scan.pdf: a PDF without text (a scan?)"]


def test_what_a_file_calls_text_is_text_or_passed_over(tmp_path, monkeypatch):
    """Half characters, and encodings that are none, ended the run in a traceback."""
    pytest.importorskip("pypdf")
    page = "<meta charset={}><p>old {}harbour"
    for name, charset in {"a": "unicode_escape", "b": "utf-7", "c": "punycode", "d": "x"}.items():
        (tmp_path / f"{name}.html").write_text(page.format(charset, "\\ud800 "))
    if sys.platform != "darwin":  # macOS allows no such file names
        with open(os.fsencode(tmp_path) + b"/\xff.jsonl", "w") as file:
            file.write('{"id": 1, "text": "A record."}')
    (tmp_path / "e.html").write_bytes(page.format("shift_jis", "港").encode("shift_jis"))
    halves = b"1 beginbfchar <41> <D800> endbfchar 1 beginbfchar <42> <D83DDE00> endbfchar"
    (tmp_path / "f.pdf").write_bytes(_pdf("A harBour", halves))
    faults = Faults()
    found = dict(read_own(own_files(tmp_path, faults), faults))
    assert found.pop("\\udcff.jsonl:1", "A record.") == "A record."
    assert found == {"e.html": "old 港harbour", "f.pdf": "\ufffd har😀our"}
    assert [name.split(":")[0] for name in faults.named] == ["a.html", "b.html", "c.html", "d.html"]
    monkeypatch.setattr("mlx_hmem.documents.pdf.SECONDS", -100)
    assert dict(read_own(own_files(tmp_path / "f.pdf", faults), faults)) == {}
    assert faults.named[-1] == "f.pdf: an unreadable PDF (it takes too long)"


def _pdf(text: str, to_unicode: bytes = b"") -> bytes:
    """A PDF of one page with one line, written out by hand."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R /Resources << /Font "
        b"<< /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 5 0 R >> >> >> >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream),
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(to_unicode), to_unicode),
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(data)
    data += b"xref\n0 6\n0000000000 65535 f \n" + table
    return data + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start


def test_html_keeps_what_stands_between_tags():
    assert page_text("a<script>b</p>c</script>d").split() == ["ad"]
    assert page_text("<nav>menu<script>x</nav>text").strip() == ""  # a script runs to its end
