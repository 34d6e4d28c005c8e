"""Bytes to text: by a mark at the beginning, by what the file says of itself, as UTF-8, and else by
what the bytes look like; and whether they look like text at all."""

import codecs
import re
import unicodedata

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# All that browsers know but UTF-7, and none of Python's own, which are no encodings.
KNOWN = ("utf-8", "utf-16", "utf-32", "ascii", "iso", "cp", "koi8", "mac", "shift", "euc", "gb",
         "big5", "johab", "tis", "hz")  # fmt: skip
# What is meant by a narrower name, as browsers take it.
WIDER = {"ascii": "cp1252", "iso8859-1": "cp1252", "shift_jis": "cp932", "gb2312": "gb18030",
         "gbk": "gb18030", "euc_kr": "cp949"}  # fmt: skip
# Of files that say nothing; where several fit as well, the one that comes first.
LIKELY = ("cp1252", "mac_roman", "cp850", "cp1250", "iso8859_2", "cp1255", "cp1251", "koi8_r",
          "cp866", "cp1253", "cp1256", "cp932", "cp949", "euc_jp", "gb18030", "big5")  # fmt: skip
JAPANESE = ("cp932", "euc_jp")
KANA = re.compile("[\u3040-\u30ff]")
# The most frequent characters of Chinese.
FREQUENT = set(
    "的一是不了在人有我他這这個个們们來来上大為为和国國地到以说說时時要就出会會可也你对對生能而"
)
SEEN = 1 << 14  # bytes of a file that are looked at
# Bytes that no text has.
_NO_TEXT = bytes({*range(32), 127} - {*b"\t\n\v\f\r\b\x1b"})


def decoded(data: bytes, declared: str = "") -> tuple[str, str]:
    """The text of ``data``, and the name of its encoding. ``declared``: what the file itself says.

    Raises ValueError where there is none.
    """
    for mark, name in MARKS:
        if data.startswith(mark):
            return _strictly(data, name), name.removesuffix("-sig")
    if declared:
        try:
            found = codecs.lookup(declared).name
        except LookupError:
            found = ""
        if not found.startswith(KNOWN):
            raise ValueError(f"not {declared}")
        found = WIDER.get(found, found)
        try:
            return data.decode(found), _called(found)
        except UnicodeDecodeError:
            pass  # then it is said in error
    if wide := _wide(data[:SEEN]):
        return _strictly(data, wide), wide
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        return _guessed(data)


def looks_like_text(beginning: bytes) -> bool:
    """Whether a file that begins so is text, in whatever encoding."""
    if any(beginning.startswith(mark) for mark, _ in MARKS) or _wide(beginning):
        return True
    return beginning.translate(None, _NO_TEXT) == beginning


def _strictly(data: bytes, name: str) -> str:
    try:
        return data.decode(name)
    except UnicodeDecodeError:
        raise ValueError(f"not {name}") from None


def _wide(data: bytes) -> str:
    """The name of UTF-16 without its mark: of text with ASCII in it every other byte is null."""
    even, odd = data[::2], data[1::2]
    for name, nulls, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        many = len(even) == len(odd) and nulls.count(0) > 0.6 * len(nulls)
        if many and others.translate(None, _NO_TEXT) == others:
            return name
    return ""


def _guessed(data: bytes) -> tuple[str, str]:
    """As the least odd of the likely encodings. Our own guess: one that changed with the version of
    a package would change what a model has learned, and short texts were beyond those tried."""
    found = dict[str, float]()
    if data.translate(None, _NO_TEXT) == data:
        first = re.search(rb"[\x80-\xff]", data)
        start = max(0, first.start() - 64) if first else 0
        words = [word for word in data[start : start + SEEN].split() if not word.isascii()]
        for name in LIKELY:
            try:
                # The last character may be cut.
                text = codecs.getincrementaldecoder(name)().decode(b" ".join(words))
            except UnicodeDecodeError:
                continue
            if name not in JAPANESE or KANA.search(text):
                found[name] = _oddness(text, name in JAPANESE)
    for name in sorted(found, key=lambda name: found[name]):
        try:
            return data.decode(name), _called(name)
        except UnicodeDecodeError:
            continue  # further on
    raise ValueError("not UTF-8, and no other encoding that is known")


def _oddness(text: str, japanese: bool) -> float:
    """How much of a text's characters beside ASCII nobody would write so: signs and controls in
    words, words of several scripts, capitals within, runs of accents."""
    odd, count = -sum(character in FREQUENT for character in text) / 5, 0
    for pair in zip(f" {text}", f"{text} ", strict=True):
        if "".join(pair).isascii():
            continue
        count += 1
        kinds = [unicodedata.category(character) for character in pair]
        if all(kind[0] == "L" for kind in kinds):
            scripts = {_script(character, japanese) for character in pair}
            odd += (len(scripts) > 1) + (kinds == ["Ll", "Lu"])
            odd += 0.3 * (scripts == {"LATIN"} and not any(map(str.isascii, pair)))
        else:
            odd += any(kind[0] == "C" for kind in kinds) + 0.3 * any(k[0] == "M" for k in kinds)
            signs = zip(pair, kinds, strict=True)
            sign = any(kind[0] in "SN" and not each.isascii() for each, kind in signs)
            odd += sign and any(kind[0] == "L" for kind in kinds)
    return odd / max(1, count)


def _script(character: str, japanese: bool) -> str:
    name = re.split("[ -]", unicodedata.name(character, "?"))[0]
    japans = japanese and name in ("CJK", "HIRAGANA", "KATAKANA", "FULLWIDTH", "IDEOGRAPHIC")
    return "JAPAN" if japans else name


def _called(name: str) -> str:
    """As people call it."""
    return name.replace("cp125", "windows-125").replace("_", "-")
