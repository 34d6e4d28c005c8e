"""Files of the kinds that people have, written as small as they may be."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
ODF = " ".join(
    f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
    for name in ("office", "text", "table")
)


def write_zip(
    path: Path, parts: Mapping[str, str | bytes], kind: int = zipfile.ZIP_DEFLATED
) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return path


def paragraph(text: str, style: str = "") -> str:
    """One of Word's, ``text`` in two runs."""
    properties = f'<w:pPr><w:pStyle w:val="{style}"/><w:tabs><w:tab/></w:tabs></w:pPr>'
    half = len(text) // 2
    runs = (
        f'<w:r><w:t xml:space="preserve">{each}</w:t></w:r>' for each in (text[:half], text[half:])
    )
    return f"<w:p>{properties if style else ''}{''.join(runs)}</w:p>"


def word(*body: str, **parts: str) -> dict[str, str]:
    """The parts of a Word file; ``parts``: of others by their names in ``word/``."""
    parts |= {"document": f"<w:body>{''.join(body)}</w:body>"}
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return {f"word/{name}.xml": f"{head}<w:x {W}>{part}</w:x>" for name, part in parts.items()}


def open_document(body: str) -> dict[str, str]:
    text = f"<office:body><office:text>{body}</office:text></office:body>"
    return {"content.xml": f"<office:document-content {ODF}>{text}</office:document-content>"}


def book(chapters: Mapping[str, str | bytes], **hrefs: str) -> dict[str, str | bytes]:
    """The parts of an epub; ``hrefs``: those that the table of contents names, in order."""
    items = "".join(f'<item id="{name}" href="{href}"/>' for name, href in hrefs.items())
    spine = "".join(f'<itemref idref="{name}"/>' for name in hrefs)
    roots = '<rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles>'
    return {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": f"<container>{roots}</container>",
        "OEBPS/book.opf": f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>",
        **chapters,
    }


def pdf(*pages: str | bytes, to_unicode: bytes = b"") -> bytes:
    """A PDF, each page of the lines of a text, written out by hand."""
    kids = " ".join(f"{5 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 4 0 R >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(to_unicode), to_unicode),
    ]
    for number, page in enumerate(pages):
        data = page if isinstance(page, bytes) else page.encode()
        lines = b" ".join(b"(%b) Tj 0 -14 Td" % line for line in data.split(b"\n"))
        stream = b"BT /F1 12 Tf 20 700 Td %b ET" % lines
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R /Resources << "
            b"/Font << /F1 3 0 R >> >> >>" % (6 + 2 * number)
        )
        objects.append(b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream))
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size, start = len(objects) + 1, len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % size + table
    return data + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, start)
