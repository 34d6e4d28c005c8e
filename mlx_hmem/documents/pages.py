"""The text of an HTML page: tags go, scripts and styles with them, blocks become lines, and lines
of headings begin with #.

One pass, in time that grows with the page's length only: no pattern here looks further than it
takes. So a comment that is never closed hides the rest, as in a browser.
"""

import html
import re

SKIPPED = {"script", "style", "template", "noscript", "svg", "nav"}
RAW = {"script", "style"}  # what they hold is no markup
INLINE = {"a", "abbr", "b", "code", "em", "font", "i", "img", "mark", "s", "small", "span",
          "strong", "sub", "sup", "tt", "u", "wbr"}  # fmt: skip
_MARKUP = re.compile(
    r"<!--.*?(?:--\s*>|\Z)|<!\[CDATA\[.*?(?:\]\]>|\Z)|<[!?][^>]*(?:>|\Z)"
    r"|</?(?P<name>[a-zA-Z][^\s/>]*+)(?:=\s*+\"[^\"]*+\"|=\s*+'[^']*+'|[^>])*+(?:>|\Z)",
    re.DOTALL,
)
HEADINGS = {"title": 1, **{f"h{level}": level for level in range(1, 7)}}
_DECLARED = re.compile(
    rb"^\s*<\?xml[^>]*?encoding=[\"']([\w.:-]{1,40})|<meta[^>]*?charset=[\"']?([\w.:-]{1,40})",
    re.IGNORECASE,
)
_TOO_LARGE = re.compile(r"&#0*[1-9]\d{7,};?")  # numbers that Python may refuse to read


def unescape(text: str) -> str:
    """``text`` with the characters that its entities stand for."""
    return html.unescape(_TOO_LARGE.sub("\ufffd", text))


def declared_encoding(data: bytes) -> str:
    """What a page, or other XML, calls its encoding at its beginning; nothing where it does not."""
    found = _DECLARED.search(data[:2048])
    return (found[1] or found[2]).decode() if found else ""


def page_text(source: str) -> str:
    """The text of a page."""
    parts, at, skipping = list[str](), 0, ""
    while found := _MARKUP.search(source, at):
        tag, name = found[0], (found["name"] or "").lower()
        if not tag.endswith(">") and not tag.startswith(("<!--", "<![")):
            break  # not a tag after all
        if not skipping:
            parts.append(_plain(source[at : found.start()]))
        at = found.end()
        if name in SKIPPED:
            if tag.startswith("</") or tag.endswith("/>"):
                skipping = "" if skipping == name else skipping
                continue
            skipping = skipping or name
            if name in RAW:
                close = re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE).search(source, at)
                at = close.start() if close else len(source)
        elif name and name not in INLINE:
            parts.append("\n\n" if tag.endswith("/>") else "\n")
            if name in HEADINGS and not tag.startswith("</"):
                parts.append("#" * HEADINGS[name] + " ")
    if not skipping:
        parts.append(_plain(source[at:]))
    return "".join(parts)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", unescape(text))
