"""Mail as text: who wrote to whom, when and about what, and what the message says."""

import email
import re
from collections.abc import Iterable, Iterator
from email.message import EmailMessage, MIMEPart
from email.policy import EmailPolicy
from typing import Any

from mlx_hmem.documents.encodings import decoded
from mlx_hmem.documents.pages import declared_encoding, page_text

_BEGIN = re.compile(rb"From .*\d\d:\d\d")
HEADERS = ("From", "To", "Date")
# Headers take time with their length's square, and lines with the parts that they lie in.
MAX_HEADER, MAX_HEADERS = 1000, 1 << 18  # characters of one that are looked at, and of all
MAX_LINES, MAX_PARTS = 1 << 21, 100


class _Bounded(EmailPolicy):
    """Reads the beginnings of headers; a ValueError says that they are too many."""

    def __init__(self) -> None:
        super().__init__(message_factory=EmailMessage)
        object.__setattr__(self, "left", [MAX_HEADERS])

    def header_fetch_parse(self, name: str, value: str) -> Any:
        self.left[0] -= min(len(value), MAX_HEADER)  # type: ignore[attr-defined]
        if self.left[0] < 0:  # type: ignore[attr-defined]
            raise ValueError("too many headers")
        return super().header_fetch_parse(name, value[:MAX_HEADER])


def mail_text(data: bytes) -> str:
    """Of an ``.eml``: its subject as heading, a line for each of ``HEADERS``, and its text, else
    that of its page; attachments are not read. ValueError where it is none."""
    try:
        if data.count(b"\n") > MAX_LINES or data.lower().count(b"boundary=") > MAX_PARTS:
            raise ValueError("too many lines or parts")
        message = email.message_from_bytes(data, policy=_Bounded())
        assert isinstance(message, EmailMessage)
        subject = str(message["Subject"] or "")
        lines = [f"{name}: {message[name]}" for name in HEADERS if message[name]]
        body = message.get_body(("plain", "html"))
        text = "" if body is None else _content(body)
    except Exception as error:  # the parser meets what no program wrote with anything
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"damaged mail ({said})") from None
    if not lines:
        raise ValueError("mail without a sender")
    return "\n".join([*([f"# {subject}"] if subject else []), *lines, "", text])


def _content(body: MIMEPart) -> str:
    data = body.get_payload(decode=True)
    data = data if isinstance(data, bytes) else b""
    page = body.get_content_subtype() == "html"
    charset = body.get_content_charset() or (declared_encoding(data) if page else "")
    text = decoded(data, charset)[0]
    return page_text(text) if page else text


def messages_of(lines: Iterable[bytes], most_bytes: int) -> Iterator[bytes]:
    """The messages of an ``.mbox``, of one over ``most_bytes`` its beginning: each begins behind a
    line ``From WHOM WHEN`` behind an empty one."""
    message, empty = bytearray(), True
    for line in lines:
        if empty and _BEGIN.match(line):
            if message:
                yield bytes(message)
            message.clear()
        elif len(message) + len(line) <= most_bytes:
            message += line[1:] if line.startswith(b">From ") else line
        empty = not line.strip()
    if message.strip():
        yield bytes(message)
