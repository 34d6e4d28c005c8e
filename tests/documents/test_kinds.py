"""Of each kind of file what a person reads in it, and of what is none a line that says so."""

import io
import json
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pytest

from mlx_hmem.documents import office
from mlx_hmem.documents.mail import mail_text, messages_of
from mlx_hmem.documents.office import office_text
from mlx_hmem.documents.pages import page_text
from mlx_hmem.documents.pdf import pdf_text
from mlx_hmem.documents.tables import Records, array_items, array_text, notebook_text, table_text
from tests.helpers.document_files import book, open_document, paragraph, pdf, word, write_zip


def text_in(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return office_text(file, path.suffix)


def test_word_gives_headings_tables_and_notes_and_not_what_was_deleted(tmp_path):
    """The style of a heading is called as the language of the program has it."""
    cells = "".join(f"<w:tc>{paragraph(text)}</w:tc>" for text in ("Piet", "Utrecht"))
    deleted = "<w:p><w:del><w:r><w:delText>secret</w:delText></w:r></w:del></w:p>"
    drawing = "<w:p><w:r><w:drawing><w:posOffset>12345</w:posOffset></w:drawing></w:r></w:p>"
    twice = "<w:Fallback><w:p><w:r><w:t>Again</w:t></w:r></w:p></w:Fallback>"
    parts = word(
        paragraph("The plan", "berschrift2"), paragraph("It is short."), deleted, drawing, twice,
        f"<w:tbl><w:tr>{cells}</w:tr></w:tbl>",
        styles='<w:style w:styleId="berschrift2"><w:name w:val="Heading 2"/></w:style>',
        footnotes=paragraph("A note."),
    )  # fmt: skip
    text = text_in(write_zip(tmp_path / "a.docx", parts))
    assert text.split("\n\n")[:2] == ["##  The plan", "It is short."]
    assert "Piet  | Utrecht  | \n" in text
    assert text.endswith("A note.\n\n")
    for gone in ("secret", "12345", "Again"):
        assert gone not in text


def test_open_document_gives_headings_and_paragraphs(tmp_path):
    body = (
        '<text:tracked-changes><text:p>deleted</text:p></text:tracked-changes><text:h text:outline-'
        'level="3">Plan</text:h><text:p>A<text:s/>short<text:line-break/>one &amp; <text:span>good'
        "</text:span>.</text:p>"
    )  # fmt: skip
    text = text_in(write_zip(tmp_path / "a.odt", open_document(body)))
    assert text == "### Plan\n\nA short\none & good.\n\n"


def test_a_book_is_read_in_its_order_and_from_within_itself(tmp_path):
    (tmp_path / "secret.xhtml").write_text("<p>outside</p>")
    chapters = {
        "OEBPS/one 1.xhtml": "<h1>One</h1><p>First.</p>",
        "OEBPS/two.xhtml": "<?xml version='1.0' encoding='latin-1'?><p>Café</p>".encode("latin-1"),
        "OEBPS/unnamed.xhtml": "<p>not in the book</p>",
    }
    hrefs = {
        "b": "two.xhtml", "a": "one%201.xhtml", "c": "../../secret.xhtml", "e": "../secret.xhtml",
        "d": str(tmp_path / "secret.xhtml"), "f": "file:///etc/passwd",
    }  # fmt: skip
    text = text_in(write_zip(tmp_path / "a.epub", book(chapters, **hrefs)))
    assert text.split() == ["Café", "#", "One", "First."]


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>'


@pytest.mark.parametrize(
    ("name", "parts", "says"),
    [
        ("a.docx", {"word/document.xml": BOMB}, "XML that declares entities"),
        ("a.docx", {"word/document.xml": OUTSIDE}, "XML that declares entities"),
        ("a.odt", {"content.xml": BOMB}, "XML that declares entities"),
        ("a.epub", {"META-INF/container.xml": BOMB}, "XML that declares entities"),
        ("a.epub", {"META-INF/container.xml": "<container/>"}, "a book without contents"),
        ("a.epub", {"mimetype": ""}, "a damaged \\*.epub file"),
        ("a.docx", {"word/document.xml": "<a><b></a>"}, "a damaged \\*.docx file \\(mismatched"),
        ("a.docx", {"word/document.xml": "<a>" * 2000}, "nested too deeply"),
        ("a.docx", {"[Content_Types].xml": "<a/>"}, "no document of Word"),
        ("a.odt", {}, "a damaged \\*.odt file"),
    ],
)
def test_damaged_archives_and_entities_are_a_line(tmp_path, name, parts, says):
    with pytest.raises(ValueError, match=says):
        text_in(write_zip(tmp_path / name, parts))


def test_an_archive_unpacks_to_no_more_than_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(office, "MAX_UNPACKED", 1 << 20)
    path = write_zip(tmp_path / "a.docx", word(paragraph("a" * (office.MAX_UNPACKED + 1))))
    assert path.stat().st_size < 1 << 14
    with pytest.raises(ValueError, match="unpacks to more than"):
        text_in(path)
    # Of all parts together, and no part of which the unpacker cannot be held back.
    half = "a" * (office.MAX_UNPACKED // 2)
    chapters = {f"OEBPS/{name}": half for name in "abc"}
    with pytest.raises(ValueError, match="unpacks to more than"):
        text_in(write_zip(tmp_path / "a.epub", book(chapters, a="a", b="b", c="c")))
    parts = word(paragraph("text"))
    with pytest.raises(ValueError, match="packed in a way"):
        text_in(write_zip(tmp_path / "b.docx", parts, zipfile.ZIP_BZIP2))
    monkeypatch.setattr(office, "MAX_NAMES", 100)
    with pytest.raises(ValueError, match="too many parts"):
        text_in(write_zip(tmp_path / "c.docx", word(paragraph("text"), other="x")))


def test_a_row_is_a_sentence():
    assert table_text('name,phone\n"Janssen, Piet",065\n\nMaria,\n') == (
        "name: Janssen, Piet, phone: 065.\nname: Maria."
    )
    assert table_text("Name;Ort\nPiet;Utrecht\n") == "Name: Piet, Ort: Utrecht."
    assert table_text("a\tb\n1\t2,5\n", "\t") == "a: 1, b: 2,5."
    assert table_text("a,b\n1,2,3\n4\n") == "a: 1, b: 2, 3.\na: 4."
    assert table_text("12,7\n3,4\n") == "12, 7.\n3, 4."  # no names of columns
    assert table_text('a,b\n"two\nlines",x!') == "a: two lines, b: x!"
    assert table_text("") == ""
    with pytest.raises(ValueError, match="a damaged table"):
        table_text("a,b\n" + "x" * 200_000 + ",1")


def test_json_is_documents_or_rows_or_itself():
    assert array_items('[{"text": "a"}]') == [{"text": "a"}]
    for text in ('{"a": 1}', "not JSON", "[" * 100_000, '["\\ud800"]', "[]"):
        assert array_items(text) == []
    rows = [{"name": "tin", "number": 50, "more": None, "of": ["a", "b"]}, "a line", 7]
    assert array_text(rows) == 'name: tin, number: 50, of: ["a", "b"].\na line.\n7.'


def test_a_record_is_a_text_or_what_was_said():
    records = Records()
    assert records.document({"text": "It.", "title": "T"}, 3) == ("3", "T", "It.")
    assert records.document({"text": "It.", "id": 0}, 3) == ("0", "", "It.")
    assert Records("body").document({"body": "It.", "text": 1}, 1)[2] == "It."
    said = "User: Who?\n\nAssistant: Me."
    asked = [{"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image"}]},
             {"role": "assistant", "content": "Me."}]  # fmt: skip
    assert records.text({"messages": asked}) == said
    assert records.text({"prompt": "Who?", "completion": "Me."}) == said
    for wrong, says in (
        ({"body": "It."}, "no `text`"), ({"text": None}, "`text` is not a"), (["text"], "no `"),
        ({"messages": "a"}, "not a list"), ({"messages": [{"role": "user"}]}, "a message without"),
        ({"messages": [7]}, "a message without"), ({"prompt": 1, "completion": ""}, "a message"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            records.text(wrong)


def test_a_notebook_is_what_its_cells_say():
    cells = [{"cell_type": "markdown", "source": ["# T\n", "Text"]},
             {"cell_type": "code", "source": "x = 1", "outputs": [{"text": "no"}]}]  # fmt: skip
    assert notebook_text(json.dumps({"cells": cells})) == "# T\nText\n\nx = 1"
    old = {"worksheets": [{"cells": [{"input": "y = 2"}]}]}
    assert notebook_text(json.dumps(old)) == "y = 2"
    for wrong in ("[]", "{}", '{"cells": [7]}', "x", '{"cells": [{"source": 7}]}'):
        with pytest.raises(ValueError, match="no notebook"):
            notebook_text(wrong)


def mail(text: str, subject: str = "Räder") -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "Ü <a@b.example>", "c@d.example", subject
    message.set_content(text, charset="iso-8859-1")
    return message


def test_mail_is_its_subject_who_wrote_and_its_text():
    message = mail("Es geht um Räder.")
    message.add_alternative("<p>page", subtype="html")
    message.add_attachment(b"\0" * 100, maintype="image", subtype="png", filename="a.png")
    assert mail_text(bytes(message)) == (
        "# Räder\nFrom: Ü <a@b.example>\nTo: c@d.example\n\nEs geht um Räder.\n"
    )
    page = EmailMessage()
    page["From"] = "a@b.example"
    page.set_content("<p>One<p>Two", subtype="html")
    assert mail_text(bytes(page)).split() == ["From:", "a@b.example", "One", "Two"]
    deep = b"From: a\n" + b"".join(
        b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n" % (i, i) for i in range(3000)
    )
    for wrong, says in (
        (b"", "without a sender"), (b"No mail.\n\nx", "without a sender"), (deep, "damaged mail"),
        (b"From: a\nContent-Type: text/plain; charset=utf-7\n\nx", "not utf-7"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            mail_text(wrong)


def test_mail_takes_no_time_that_grows_with_a_square():
    """Python's parser took two minutes for a header of 64 KB."""
    long = b"From: a\nTo: " + b'"' * (1 << 20) + b"\nSubject: " + b"\\" * (1 << 20) + b"\n\nText."
    assert mail_text(long).endswith("Text.")
    deep = b"".join(
        b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n" % (i, i) for i in range(200)
    )
    types = b"".join(b"--a\nContent-Type: %b\n\nx\n" % (b'"' * 5000) for _ in range(1000))
    head = b"From: a\nContent-Type: multipart/mixed; boundary=a\n\n"
    for wrong in (b"From: a\n" + deep, b"From: a\n\n" + b"\n" * (1 << 22), head + types):
        with pytest.raises(ValueError, match="too many"):
            mail_text(wrong)


def test_a_mailbox_is_its_messages():
    begin = b"From a@b.example Mon Nov  2 10:11:12 2026\n"
    body = b"Subject: S\nFrom: a@b.example\n\nOne.\n\nFrom here on it is text.\n>From the sea.\n\n"
    box = io.BytesIO(begin + body + begin + b"From: c\n\n" + b"x" * 5000 + b"\n")
    first, second = messages_of(box, 1000)
    assert first == body.replace(b">From", b"From")
    assert second == b"From: c\n\n"  # its line is longer than is kept
    assert list(messages_of(io.BytesIO(b""), 10)) == []


def test_headings_of_pages_are_marked():
    page = "<title>T &amp; U</title><h2 class=x>A <i>b</i></h2><p>Text"
    assert page_text(page).split("\n") == ["", "# T & U", "", "## A b", "", "Text"]


def test_what_every_page_of_a_pdf_repeats_is_left_out():
    pytest.importorskip("pypdf")
    pages = [
        f"The pump manual\nText {'abcd'[i]} of it.\nMore text.\nPage {i + 1} of 4" for i in range(4)
    ]
    text = pdf_text(pdf(*pages), lambda number: None)
    assert "manual" not in text
    assert "Page" not in text
    assert all(f"Text {letter} of it." in text for letter in "abcd")
    assert "manual" in pdf_text(pdf(*pages[:2]), lambda number: None)
    rows = pdf(*(f"{i} 2 3\n4 {i} 6\n7 8 {i}" for i in range(5)))
    assert len(pdf_text(rows, lambda number: None).split()) == 45  # a table of numbers


def test_a_page_without_meaning_is_named_and_the_others_are_read():
    pytest.importorskip("pypdf")
    private = b"2 beginbfchar <41> <E041> <42> <E042> endbfchar"
    unread = list[int]()
    text = pdf_text(pdf("It is good.", "ABAB BABA", to_unicode=private), unread.append)
    assert (text.strip(), unread) == ("It is good.", [2])
    with pytest.raises(ValueError, match="whose characters have no meaning"):
        pdf_text(pdf("ABAB", to_unicode=private), unread.append)
