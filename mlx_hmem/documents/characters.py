"""Text as a person would type it: composed characters, no ligatures, nothing that is not seen."""

import re
import unicodedata

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\ufeff]")
_LINE_ENDS = re.compile(r"[\v\f\x1c-\x1e\x85\u2028\u2029]")
_LIGATURES = re.compile(r"[\ufb00-\ufdff\ufe70-\ufefc]+")  # and forms that a letter has in a word
# Soft hyphens, spaces and joiners without width, what turns the direction of writing.
_UNSEEN = re.compile(r"[\xad\u034f\u180e\u200b\u202a-\u202e\u2060-\u206f]")
# Between letters of Arabic script, of India's, and in emoji these two are part of what is written.
_JOINERS = re.compile(r"(?<![\u0600-\u1dff\u2190-\u2bff\u3000-\U0010ffff])[\u200c\u200d]+")
# Characters without a meaning of their own: private use, none at all, and glyphs by their number.
_GLYPH = r"\(cid:\d+\)|/(?:g|gid|glyph|cid|uni|C)\d+\b"
_NO_MEANING = re.compile(rf"[\ue000-\uf8ff\ufffd\U000f0000-\U0010ffff]|{_GLYPH}")
MOST_UNREADABLE = 0.2


def without_control(text: str) -> str:
    """``text`` without control characters, its lines ended by a newline each."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def composed(text: str) -> str:
    """``text`` in NFC."""
    return unicodedata.normalize("NFC", text)


def tidy(text: str, indented: bool = False) -> str:
    """``text`` in NFC, ligatures as letters, without control and zero-width characters, spaces at
    line ends and more than one empty line; the spaces that a line begins with only stay where it
    is ``indented``, as source code."""
    # Maps, entities and headers may give halves of characters.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    text = composed(without_control(_LINE_ENDS.sub("\n", text)))
    text = _LIGATURES.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = _JOINERS.sub("", _UNSEEN.sub("", text))
    if indented:
        lines = (re.sub(r"(?<=\S)\s+", " ", line).rstrip() for line in text.split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def is_unreadable(text: str) -> bool:
    """Whether so much of a page is private-use characters or numbers of glyphs that nobody can
    read it."""
    found = sum(1 for _ in _NO_MEANING.finditer(text))
    others = len(re.sub(r"\s+", "", _NO_MEANING.sub("", text)))
    return found > MOST_UNREADABLE * (found + others)
