"""A folder of everything that people have and nobody wants: what is read, and what is named.

It is read in a process of its own, which keeps a list of all that it opens.
"""

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from mlx_hmem.bank_tools.effects import read_named_texts
from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.readers import own_files, read_own
from tests.documents.test_kinds import BOMB, mail
from tests.helpers.document_files import book, open_document, paragraph, pdf, word, write_zip
from tests.helpers.places import ROOT

READ = """
import json, os, resource, sys
opened = []
sys.addaudithook(lambda event, given: event == "open" and opened.append(str(given[0])))
from pathlib import Path
from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.readers import own_files, read_own
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
faults = Faults()
texts = dict(read_own(own_files(Path(sys.argv[1]), faults), faults))
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
more *= 1 if sys.platform == "darwin" else 1024
print(json.dumps([texts, faults.named, faults.others, faults.encodings, opened, more]))
"""
GERMAN = "Der Schlüssel liegt unter der Fußmatte in der Straße."
LONG = "n" * 250 + ".html"  # 255 bytes
DECOMPOSED = unicodedata.normalize("NFD", "Büro/Grüße.txt")
MAIL = "# S\nFrom: Ü <a@b.example>\nTo: c@d.example\n\nHello."
SECRET = "nobody may know"


def write_kinds(folder: Path) -> dict[str, str]:
    """One file of each kind; by their names what is to be read of them."""
    files: dict[str, Any] = {
        "a.md": ("# Notes\n\nThe oak.", "# Notes\n\nThe oak."),
        "b.csv": ("name,city\nPiet,Utrecht\n", "name: Piet, city: Utrecht."),
        "c.tsv": ("name\tcity\nPiet\tUtrecht\n", "name: Piet, city: Utrecht."),
        "d.json": ('[{"tin": 50}, {"iron": 26}]', "tin: 50.\niron: 26."),
        "e.ipynb": ('{"cells": [{"source": "# Notebook"}]}', "# Notebook"),
        "f.html": ("<title>Page</title><p>Some <b>text</b>", "# Page\n\nSome text"),
        "g.xml": ('<?xml version="1.0" encoding="latin-1"?><a>é</a>'.encode("latin-1"), "é"),
        "h.py": ("def f():\n    return 1\n", "def f():\n    return 1"),
        "Dockerfile": ("FROM a\n\tRUN b", "FROM a\n\tRUN b"),
        "LICENCE": ("Free.", "Free."),
        "utf16.txt": (GERMAN.encode("utf-16"), GERMAN),
        "utf16.log": (GERMAN.encode("utf-16-le"), GERMAN),
        "old.txt": (GERMAN.encode("cp1252"), GERMAN),
        LONG: ("<p>A long name.", "A long name."),
        DECOMPOSED: ("e\u0301 oﬃce har\xadbour", "é office harbour"),
        "rich.rtf": (r"{\rtf1\ansi Rich {\b text} \'e9 \u1082?.}", "Rich text é к."),
        "mail.eml": (bytes(mail("Hello.", "S")), MAIL),
    }  # fmt: skip
    for name, (data, _) in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    read = {unicodedata.normalize("NFC", name): text for name, (_, text) in files.items()}
    begin = b"From a@b.example Mon Nov  2 10:11:12 2026\n"
    (folder / "box.mbox").write_bytes((begin + b"From: a@b\n\nFirst.\n\n") * 2)
    record = {"messages": [{"role": "user", "content": "Who?"}]}
    (folder / "talk.jsonl").write_text(f"{json.dumps(record)}\n[]\n")
    write_zip(folder / "word.docx", word(paragraph("In Word.")))
    write_zip(folder / "open.odt", open_document("<text:p>In Writer.</text:p>"))
    tricks = {"OEBPS/a.html": "<p>In a book.", "../../outside/secret.txt": "<p>In the archive."}
    hrefs = {"a": "a.html", "b": "../../outside/secret.txt", "c": "/outside/secret.txt"}
    write_zip(folder / "book.epub", book(tricks, **hrefs))
    (folder / "manual.pdf").write_bytes(pdf("In print."))
    return read | {
        "box.mbox:1": "From: a@b\n\nFirst.", "box.mbox:2": "From: a@b\n\nFirst.",
        "talk.jsonl:1": "User: Who?", "word.docx": "In Word.", "open.odt": "In Writer.",
        "book.epub": "In a book.", "manual.pdf": "In print.",
    }  # fmt: skip


def write_strange(folder: Path, outside: Path) -> None:
    """What is not read: for its content, for what it is, or for where it leads."""
    pypdf = pytest.importorskip("pypdf")
    (outside / "secret.txt").write_text(SECRET)
    for name, target in {"loop": ".", "out": "../outside", "out.txt": "../outside/secret.txt",
                         "one.txt": "two.txt", "two.txt": "one.txt", "zero": "/dev/zero",
                         "gone.txt": "nowhere.txt"}.items():  # fmt: skip
        os.symlink(target, folder / name)
    os.mkfifo(folder / "pipe")
    writer = pypdf.PdfWriter(io.BytesIO(pdf("A secret page.")))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(folder / "locked.pdf")
    write_zip(folder / "bomb.docx", word(paragraph("a" * (70 << 20))))
    write_zip(folder / "entities.odt", {"content.xml": BOMB})
    (folder / "broken.docx").write_bytes(b"PK\x03\x04 nothing")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / "photo.JPG").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "empty.txt").write_text("")
    for name in (".git/config", "node_modules/a/README.md", "env/pyvenv.cfg", "env/a.txt",
                 "web/package.json", "web/dist/a.js", "web/src.js", "__pycache__/a.txt",
                 "dist/kept.txt"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("made of something")
    (folder / "barred").write_text("for somebody else")
    os.chmod(folder / "barred", 0)


def test_what_is_read_is_text_and_all_else_is_named(tmp_path):
    pytest.importorskip("striprtf", reason="striprtf, of the extra `remember`, is missing")
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    read = write_kinds(folder)
    write_strange(folder, outside)
    # A hang would be ended; none asserts how long it takes.
    command = [sys.executable, "-c", READ, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    texts, named, others, encodings, opened, more = json.loads(done.stdout)
    made = dict.fromkeys(("web/package.json", "web/src.js", "dist/kept.txt"), "made of something")
    if os.geteuid() == 0:  # whom nothing is barred
        made["barred"] = "for somebody else"
        named.append("barred: it cannot be read")
    assert texts == read | made
    assert sorted(named)[0].startswith("barred: it cannot be read")
    assert sorted(named)[1:] == [
        "bomb.docx: it unpacks to more than 67108864 bytes",
        "broken.docx: a damaged archive, or one of too many parts",
        "empty.txt: an empty file",
        "entities.odt: XML that declares entities",
        "gone.txt: it cannot be read (No such file or directory)",
        "locked.pdf: an encrypted PDF",
        "loop: a link to a folder",
        "one.txt: it cannot be read (a circle of links)",
        "out.txt: a link that leads out of the folder",
        "out: a link that leads out of the folder",
        "pipe: not a file",
        "talk.jsonl:2: not a JSON object",
        "two.txt: it cannot be read (a circle of links)",
        "zero: a link that leads out of the folder",
    ]
    assert sorted(others) == [
        ".git: hidden", "__pycache__: a cache", "drawing.svg: *.svg", "env: packages",
        "node_modules: packages", "photo.JPG: *.jpg", "picture.png: *.png",
        "web/dist: build output",
    ]  # fmt: skip
    assert encodings == {"utf-16": 1, "utf-16-le": 1, "windows-1252": 2}
    below = {str(Path(path).resolve()) for path in opened if path.startswith(str(tmp_path))}
    assert below
    assert all(path.startswith(f"{folder}/") for path in below)
    assert "/dev/zero" not in opened
    assert SECRET not in done.stdout
    assert more < 400e6  # bytes


def test_models_and_what_they_were_taught_from_are_no_documents(tmp_path):
    """They lie among the notes of who works in that folder. The text of a run is that of before:
    what was deleted or forgotten would be learned from it once more."""
    for name in ("model/hmem.json", "cut/unfinished.json", "a.run/settings.json", "b.run/lock"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
        (tmp_path / name).with_name("documents.jsonl").write_text('{"text": "A deleted note."}')
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "documents.jsonl").write_text('{"text": "A note."}')
    faults = Faults()
    assert [f.name for f in own_files(tmp_path, faults)] == ["records/documents.jsonl"]
    assert faults.kinds == {"a model": 2, "what a model was taught from": 2}


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS allows no such file names")
@pytest.mark.parametrize("end", [b".txt", b".json"])
def test_a_name_that_is_not_utf_8_is_named_as_that(tmp_path, end):
    """It was said of its text; and an object of JSON was learned by a name that none can write."""
    with open(os.fsencode(tmp_path) + b"/\xff" + end, "w") as file:
        file.write('{"town": "Trell"}')
    faults = Faults()
    assert list(read_own(own_files(tmp_path, faults), faults)) == []
    wrong = "a name that is not UTF-8"
    assert faults.named == [f"\\udcff{end.decode()}: {wrong}"]


def test_inspect_reads_what_remember_reads(tmp_path):
    """Each had a list of its own."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a").write_text("Of no kind.")
    (tmp_path / "b.csv").write_text("name\nPiet\n")
    (tmp_path / ".hidden.txt").write_text("hidden")
    write_zip(tmp_path / "c.docx", word(paragraph("In Word.")))
    read = [("b.csv", "name: Piet."), ("c.docx", "In Word."), ("notes/a", "Of no kind.")]
    faults = Faults()
    assert read_named_texts(tmp_path) == read == list(read_own(own_files(tmp_path, faults), faults))
