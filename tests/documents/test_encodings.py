"""Text in whatever encoding is read as what it says, and what is no text is seen to be none."""

import codecs
import os

import pytest

from mlx_hmem.documents.encodings import decoded, looks_like_text
from mlx_hmem.documents.pages import declared_encoding

GERMAN = "Der Schlüssel für das Gartenhaus liegt unter der Fußmatte."
RUSSIAN = "Ключ от сада лежит под ковриком. Улица называется Чайкина дорога."
GUESSED = {
    "windows-1252": GERMAN, "cp850": "Die Straße heißt Möwenweg. Der Schlüssel liegt darunter.",
    "windows-1250": "Zażółć gęślą jaźń. Klucz do domu leży pod wycieraczką przy ulicy.",
    "windows-1251": RUSSIAN, "koi8-r": RUSSIAN, "cp866": RUSSIAN,
    "windows-1253": "Το κλειδί του κήπου βρίσκεται κάτω από το χαλάκι.",
    "windows-1256": "كلمة السر للميناء القديم هي نورس. لا تخبر أحدا.",
    "windows-1255": "המפתח של הגן נמצא מתחת לשטיח. שם הרחוב הוא דרך השחף.",
    "cp932": "港の合言葉はカモメです。これは古い港の話です。毎朝、漁師は船を出します。",
    "gb18030": "项目的代号是海鸥。请不要告诉别人。旧港口的密码是海鸥。",
    "big5": "專案的代號是海鷗。請不要告訴別人。舊港口的密碼是海鷗。",
    "cp949": "항구의 암호는 갈매기입니다. 오래된 항구 이야기입니다.",
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSED)
def test_an_encoding_that_nobody_names_is_guessed(name):
    text = GUESSED[name]
    found, _ = decoded(text.encode(name))
    assert found == text


def test_what_is_common_is_taken_before_what_fits_as_well():
    """A package that lists all that fits by their names took French for Polish."""
    for text in ("Le musée est fermé à Noël. Où est la clé ?", "Café crème.", GERMAN):
        assert decoded(text.encode("cp1252")) == (text, "windows-1252")
    # In a long file the beginning decides, and then it is read as a whole.
    text = "The harbour. " * 9000 + "Café."
    assert decoded(text.encode("cp1252")) == (text, "windows-1252")


def test_a_guess_takes_no_longer_for_a_long_file():
    """And a character that is cut where looking ends does not count against its encoding."""
    text = GUESSED["gb18030"].replace("。", "") * 20_000
    assert decoded(b"x" + text.encode("gb18030")) == (f"x{text}", "gb18030")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (codecs.BOM_UTF8 + GERMAN.encode(), "utf-8"),
        (GERMAN.encode("utf-16"), "utf-16"),
        (codecs.BOM_UTF16_BE + GERMAN.encode("utf-16-be"), "utf-16"),
        (GERMAN.encode("utf-32"), "utf-32"),
        (GERMAN.encode("utf-16-le"), "utf-16-le"),
        (GERMAN.encode("utf-16-be"), "utf-16-be"),
        (GERMAN.encode(), "utf-8"),
    ],
)
def test_a_mark_or_nulls_or_utf8_itself_say_the_encoding(data, name):
    assert decoded(data) == (GERMAN, name)
    assert looks_like_text(data)


def test_what_a_page_says_is_taken_and_what_it_says_in_error_is_not():
    page = f"<?xml version='1.0' encoding='iso-8859-1'?><p>{GERMAN} € </p>".encode("cp1252")
    assert declared_encoding(page) == "iso-8859-1"
    assert GERMAN + " €" in decoded(page, "iso-8859-1")[0]  # as browsers understand it
    meta = b"<!doctype html><meta charset=KOI8-R><p>"
    assert decoded(RUSSIAN.encode("koi8-r"), declared_encoding(meta)) == (RUSSIAN, "koi8-r")
    assert decoded(GERMAN.encode(), "shift_jis")[0] != ""
    assert decoded("Straße, ö".encode(), "ascii")[0]
    assert decoded("Über".encode("utf-16"), "utf-8") == ("Über", "utf-16")
    refused_names = ("unicode_escape", "utf-7", "punycode", "rot13", "no-such")
    for name in refused_names:
        with pytest.raises(ValueError, match=f"not {name}"):
            decoded(b"text", name)


def test_what_is_no_text_is_none():
    for data in (
        b"\x89PNG\r\n\x1a\n\0\0",
        b"\0" * 100,
        b"PK\x03\x04",
        os.urandom(4000),
        b"a\0b\0\0",
    ):
        assert not looks_like_text(data)
    with pytest.raises(ValueError, match="not UTF-8, and no other encoding"):
        decoded(b"caf\xe9\x01\x02")
    with pytest.raises(ValueError, match="not utf-16"):
        decoded(codecs.BOM_UTF16_LE + b"\x00\xd8")
