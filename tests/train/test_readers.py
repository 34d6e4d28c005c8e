"""Corpora of every kind: the same documents give the same sample, and damage is passed over."""

import gzip
import hashlib
import json
import os
import random
import sys
from codecs import BOM_UTF8
from pathlib import Path

import pytest

from mlx_hmem.documents.files import CorpusFile, Faults
from mlx_hmem.documents.pages import page_text
from tests.helpers.programs import refused
from tests.helpers.samples import sample_documents
from train.corpus.cleaning import clean
from train.corpus.readers import corpus_files, read_documents
from train.corpus.stage import run_corpus
from train.recipe.recipe import CorpusSection, Recipe

DOCUMENTS = [
    {
        "id": str(7 * i),
        "title": f"Title {i}",
        "text": f"Document {i} begins. " * (1 + i % 60) + "It <ref>x</ref>ends.",
    }
    for i in range(500)
]
SECTION = CorpusSection(documents=120, held_out=0.1)
MIXED = (
    "4d0b73a3d79d23b3f530e4275091e094"  # of the sample, before there was anything but JSON lines
)


def lines(documents: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(d) + "\n" for d in documents).encode()


def sample(folder: Path) -> tuple[str, Faults]:
    faults = Faults()
    parts = sample_documents(corpus_files(folder), SECTION, faults)
    return hashlib.md5(json.dumps(parts).encode()).hexdigest(), faults


def write_parquet(path: Path, documents: list[dict[str, str]], **options: object) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow, of the extra `corpora`, is missing")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(documents), path, **options)


def write_zstd(path: Path, *frames: bytes) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is missing")
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames))


def test_json_lines_give_the_sample_they_always_gave(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(lines(DOCUMENTS[:200]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(DOCUMENTS[200:])))
    # None of these is part of the corpus that the files above are.
    (tmp_path / "README.md").write_text("About the corpus.")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "c.jsonl").write_bytes(lines([{"id": "other", "text": "Another."}]))
    assert sample(tmp_path)[0] == MIXED


def test_zstd_gives_the_same_sample_from_one_frame_or_several(tmp_path):
    write_zstd(
        tmp_path / "a.jsonl.zst", *(lines(DOCUMENTS[i : i + 100]) for i in range(0, 500, 100))
    )
    assert sample(tmp_path) == (MIXED, Faults())


@pytest.mark.parametrize("titles", [True, False])
def test_parquet_gives_the_same_sample_from_many_row_groups(tmp_path, titles):
    documents = DOCUMENTS if titles else [{"id": d["id"], "text": d["text"]} for d in DOCUMENTS]
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "0.parquet", documents[:300], row_group_size=70)
    write_parquet(tmp_path / "data" / "1.parquet", documents[300:], compression="zstd")
    digest, faults = sample(tmp_path)
    assert (digest == MIXED) == titles
    assert not faults.counts
    found = list(read_documents(corpus_files(tmp_path), faults))
    assert found == [(d["id"], d.get("title", ""), d["text"]) for d in documents]


def test_truncated_zstd_gives_what_comes_before(tmp_path):
    draw = random.Random(0)
    documents = [
        {"id": str(i), "text": "".join(draw.choices("abcdef ", k=200))} for i in range(5000)
    ]
    write_zstd(tmp_path / "a.jsonl.zst", lines(documents))
    data = (tmp_path / "a.jsonl.zst").read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstd at all")
    write_zstd(tmp_path / "c.jsonl.zst", lines([{"id": "good", "text": "A text."}]))
    (tmp_path / "d.jsonl.zst").write_bytes(b"")
    faults = Faults()
    found = list(read_documents(corpus_files(tmp_path), faults))
    assert found[-1] == ("good", "", "A text.")
    assert 1000 < len(found) < 4000
    assert [text for _, _, text in found[:-1]] == [d["text"] for d in documents[: len(found) - 1]]
    assert faults.named[0] == (
        f"a.jsonl.zst:{len(found)}: broken zstd (the file ends within a frame)"
    )
    assert faults.named[1].startswith("b.jsonl.zst:1: broken zstd")
    assert faults.named[2:] == ["d.jsonl.zst: an empty file"]


def test_parquet_without_the_columns_with_gaps_and_damaged_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"id": "1", "body": "A text."}])
    write_parquet(
        tmp_path / "b.parquet",
        [{"id": 2, "text": "Good."}, {"id": 3, "text": None}, {"id": None, "text": "No id."}],
    )
    write_parquet(tmp_path / "c.parquet", [{"id": 4, "text": 5}])
    write_parquet(tmp_path / "d.parquet", DOCUMENTS)
    data = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "e.parquet").write_bytes(b"")
    faults = Faults()
    found = list(read_documents(corpus_files(tmp_path), faults))
    assert found == [("2", "", "Good.")]
    assert faults.named[:4] == [
        "a.parquet:1: no column `text`", "b.parquet:2: no `text`", "b.parquet:3: no `id`",
        "c.parquet:1: `text` is not a text",
    ]  # fmt: skip
    assert [named.split(" (")[0] for named in faults.named[4:]] == [
        "d.parquet:1: broken parquet",
        "e.parquet:1: broken parquet",
    ]


def test_a_folder_of_texts_is_one_document_a_file(tmp_path):
    (tmp_path / "plants" / "trees").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "plants" / "trees" / "oak.txt").write_text("An oak.\nIt grows.")
    (tmp_path / "about.md").write_bytes(b"\xef\xbb\xbfAll of it.")
    (tmp_path / "table.csv").write_text("no document")
    (tmp_path / ".git" / "description.txt").write_text("hidden")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "sound.txt").write_bytes(b"caf\xe9\x01\x02")
    os.mkfifo(tmp_path / "pipe.txt")  # would wait for ever
    os.symlink("nowhere", tmp_path / "gone.txt")
    faults = Faults()
    assert list(read_documents(corpus_files(tmp_path), faults)) == [
        ("about.md", "about", "All of it."),
        ("plants/trees/oak.txt", "oak", "An oak.\nIt grows."),
    ]
    assert faults.named == [
        "empty.txt: an empty file",
        "sound.txt: not UTF-8, and no other encoding that is known",
    ]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS allows no such file names")
def test_a_file_name_that_is_not_utf8_is_a_fault_not_a_crash(tmp_path):
    (tmp_path / "a.txt").write_text("A text.")
    with open(os.fsencode(tmp_path) + b"/b\xff.txt", "w") as file:
        file.write("B text.")
    run_corpus(
        Recipe(name="t", corpus=CorpusSection(held_out=0)), tmp_path / "run", corpus=tmp_path
    )
    report = json.loads((tmp_path / "run" / "corpus" / "report.json").read_text())
    assert report["train_documents"] == 1
    assert report["passed_over_first"] == ["b\\udcff.txt: a name that is not UTF-8"]


@pytest.mark.parametrize(
    ("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    tmp_path, monkeypatch, name, package
):
    for module in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)  # the import fails as if it were not there
    (tmp_path / name).write_bytes(b"")
    refused(rf"{name} needs the package {package}:.*pip install", corpus_files, tmp_path)


def test_a_row_group_is_never_in_memory_as_a_whole(tmp_path):
    """One of 64 MB."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow, of the extra `corpora`, is missing")
    documents = [{"id": str(i), "text": os.urandom(8000).hex()} for i in range(4000)]
    write_parquet(tmp_path / "a.parquet", documents, use_dictionary=False)
    del documents
    before = arrow.total_allocated_bytes()
    held = [
        arrow.total_allocated_bytes() - before
        for _ in read_documents(corpus_files(tmp_path), Faults())
    ]
    assert len(held) == 4000
    assert 0 < max(held) < 40_000_000  # 20 measured


def test_names_in_capitals_are_read_as_those_in_small_letters(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(lines(DOCUMENTS[:1])))
    write_zstd(tmp_path / "B.Jsonl.ZST", lines(DOCUMENTS[1:2]))
    (tmp_path / "C.JSONL").write_bytes(lines(DOCUMENTS[2:3]))
    found = list(read_documents(corpus_files(tmp_path), faults := Faults()))
    assert [identity for identity, _, _ in found] == ["0", "7", "14"]
    assert not faults.counts


def test_a_byte_order_mark_is_none_of_the_text(tmp_path):
    """The first document of such a file was passed over as no JSON."""
    (tmp_path / "a.jsonl").write_bytes(BOM_UTF8 + lines(DOCUMENTS[:2]))
    found = list(read_documents(corpus_files(tmp_path), faults := Faults()))
    assert [identity for identity, _, _ in found] == ["0", "7"]
    assert not faults.counts


def test_only_files_inside_the_folder_are_read_and_others_are_named(tmp_path, capsys):
    """A link to a person's keys, or to the kernel's log, was learned or waited for."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (outside / "secret.txt").write_text("A secret.")
    folder.mkdir()
    (folder / "a.txt").write_text("A text.")
    os.symlink("a.txt", folder / "b.txt")
    os.symlink(outside / "secret.txt", folder / "c.txt")
    os.symlink(outside, folder / "d")
    os.symlink("f.txt", folder / "e.txt")
    os.symlink("e.txt", folder / "f.txt")
    os.mkfifo(folder / "g.txt")
    os.symlink("/dev/zero", folder / "h.txt")
    os.symlink(outside / "notes.doc", folder / "i.doc")  # of a kind that nobody asked for
    files = corpus_files(folder)
    assert [file.name for file in files] == ["a.txt", "b.txt"]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "passed over c.txt: a link that leads out of the folder",
        "passed over d: a link that leads out of the folder",
        "passed over e.txt: it cannot be read (a circle of links)",
        "passed over f.txt: it cannot be read (a circle of links)",
        "passed over g.txt: not a file",
        "passed over h.txt: a link that leads out of the folder",
    ]
    (folder / "b.txt").unlink()
    os.mkfifo(folder / "b.txt")  # between the listing and the reading
    faults = Faults()
    assert [d[2] for d in read_documents(files, faults)] == ["A text."]
    assert len(faults.named) == 1
    (folder / "a.txt").unlink()
    (folder / "c.jsonl").mkdir()
    assert files[0].state == (0, 0)
    gone = [files[0], CorpusFile(folder / "c.jsonl", "c.jsonl")]
    assert list(read_documents(gone, faults)) == []
    assert [line.split(":")[0] for line in faults.named] == ["b.txt", "a.txt", "c.jsonl"]


SLOW = [
    "<!--",
    "<a",
    "<a b='",
    '<a b="',
    "<!",
    "</",
    "<ref/",
    "<svg></nav>",
    "<script></scrip",
    "\n",
]


@pytest.mark.parametrize("part", SLOW)
def test_the_time_to_read_a_text_grows_with_its_length_only(part):
    """With its square, which two megabytes would not end in this life."""
    text = part * (2_000_000 // len(part))
    assert len(page_text(text)) <= len(text)
    assert len(clean(text)) <= len(text)


def test_a_line_without_an_end_is_one_fault_and_the_next_is_read(tmp_path):
    """A few kilobytes of zstd were copied once for each 64 KB that they stand for."""
    write_zstd(tmp_path / "a.jsonl.zst", b"a" * (1 << 28) + b"\n", lines(DOCUMENTS[:1]))
    found = list(read_documents(corpus_files(tmp_path), faults := Faults()))
    assert [identity for identity, _, _ in found] == ["0"]
    assert faults.named == ["a.jsonl.zst:1: a line over 67108864 bytes"]


def test_what_is_named_is_short(tmp_path):
    """An id may be as long as a line."""
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": "x" * 10**6, "title": "", "text": "<p>"}]))
    _, faults = sample(tmp_path)
    assert [len(named) for named in faults.named] == [len("id : no text") + 297]


def test_entities_of_any_number_are_text():
    assert clean("a &#" + "9" * 5000 + "; b &#xD800; &#0065; &amp;") == "a \ufffd b \ufffd A &"
