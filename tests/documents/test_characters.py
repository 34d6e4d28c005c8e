"""What is learned is what a person types who asks for it."""

import unicodedata

from mlx_hmem.documents.characters import is_unreadable, tidy


def test_what_a_person_types_matches_what_a_program_wrote():
    assert tidy("e\u0301tude") == "étude"
    assert tidy("oﬃce ﬂoor, ﬆ") == "office floor, st"
    assert tidy("har\xadbour\u200b and \u2060sea\ufeff") == "harbour and sea"
    assert tidy("a\u202eb\u2066c") == "abc"
    assert tidy("one\ftwo\u2028three\x85four") == "one\ntwo\nthree\nfour"
    assert tidy("half \ud800 character") == "half \ufffd character"
    assert tidy("a \t b  \n\n\n\n c\xa0d ") == "a b\n\nc d"
    # Arabic letters as a PDF draws them.
    assert tidy("\ufee3\ufeae\ufea3\ufe92\ufe8e") == "مرحبا"


def test_only_ligatures_are_made_plain():
    """NFKC of all would make 2⁵ to 25 and ½ to 1⁄2."""
    kept = "2⁵ ½ № ™ ① Ａ ㎏ ﷽"
    assert tidy(kept)[:-1] == kept[:-1]


def test_joiners_stay_where_they_are_part_of_what_is_written():
    for text in ("می\u200cخواهم", "क्\u200dष", "👩\u200d🚀", "❤️\u200d🔥", "ශ්\u200dරී"):
        assert tidy(text) == unicodedata.normalize("NFC", text)
    assert tidy("har\u200cbour\u200d s\u200dea") == "harbour sea"


def test_source_code_keeps_what_its_lines_begin_with():
    text = "def f(x):\n    if x:  \n\n\n\n\treturn  1\n"
    assert tidy(text, indented=True) == "def f(x):\n    if x:\n\n\treturn 1"
    assert tidy(" " * 200_000 + "a" + " " * 200_000, indented=True).strip() == "a"


def test_a_page_of_glyphs_is_seen():
    assert is_unreadable("\uf041\uf042\uf043 \uf044 and")
    assert is_unreadable("(cid:12)(cid:13) (cid:99)")
    assert is_unreadable("/g12/g13/gid00045 /C12")
    assert not is_unreadable("The path /usr/g1 has \uf041 one sign of an icon font.")
    assert not is_unreadable("")
