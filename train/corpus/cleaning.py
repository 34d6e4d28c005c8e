"""Cleaning: what an encyclopaedia extractor leaves behind goes, long texts end at a sentence."""

import re

from mlx_hmem.documents.characters import without_control
from mlx_hmem.documents.pages import unescape

_MARKS = [
    (re.compile(r"<!--.*?(-->|$)", re.DOTALL), ""),
    (re.compile(r"<ref[^<>]*/>|<ref[^<>]*>[^<>]*</ref>"), ""),
    (re.compile(r"</?[a-zA-Z][^<>\n]{0,200}>"), ""),
    (re.compile(r"__[A-Z]+__"), ""),
    (re.compile(r"\{\{[^{}]*\}\}"), ""),
    (re.compile(r"\[ ?\[ ?update\]\]"), ""),
    (re.compile(r"^.*(#if:|\{\{|\}\}|\[\[|\]\]|\{\||\|\}).*$", re.MULTILINE), ""),
    (re.compile(r"^[^\S\n]*[|!].*$", re.MULTILINE), ""),
    # A sentence around a lost formula says nothing any more.
    (re.compile(r"(?<![^.!?\n])[^.!?\n]*formula_\d[^.!?\n]*[.!?]?"), ""),
    (re.compile(r"\(\s*(?:[;,:]\s*)+"), "("),
    (re.compile(r" ?\(\s*\)"), ""),
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r" +([,;])|(?<=\w) +(\.)(?=\s|$)"), r"\1\2"),
    (re.compile(r"\s*\n\s*"), "\n"),
    # Headings of lists that the extractor left out.
    (re.compile(r"\n(References|External links|See also|Notes|Further reading)\.(?=\n|$)"), ""),
]
BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]?(?=\s)")


def clean(text: str) -> str:
    """Takes out what an encyclopaedia extractor leaves behind: marks, templates, empty brackets."""
    text = without_control(unescape(text))
    for pattern, replacement in _MARKS:
        text = pattern.sub(replacement, text)
    return text.strip()


def cut(text: str, max_characters: int) -> str:
    """``text``, or its start up to the last sentence (else word) end within ``max_characters``."""
    if len(text) <= max_characters:
        return text
    ends = [m.end() for m in _SENTENCE_END.finditer(text[: max_characters + 1])]
    if ends:
        return text[: ends[-1]]
    return text[: max_characters + 1].rsplit(None, 1)[0][:max_characters]
