import json
import random
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from tests.helpers.programs import refused
from train.data.tokenizer import EOT, EOT_ID, train_tokenizer

VARIED = [
    "The river Örebro (1923–2004) is 1,234.5 km long.",
    "Two  spaces,   three; a tab\tand an end. ",
    " starts with a space",
    "\nstarts with a line\n\n  and ends with one\n",
    "日本語 und Ελληνικά и русский 🏔️👩‍🚀 “quoted” – ½ \u200e",
    "aaaaaaaaaaaaaaa ababababab lalalalala",
    "<unk> <0x41> </s> <|endoftex|> [INST]",
    "x" * 2000,
    "",
    " ",
    "\n",
    "7",
]


def made_up_texts() -> list[str]:
    draw = random.Random(0)
    words = [
        "".join(draw.choice(["la", "to", "ri", "ne", "sh", "ka", "un"]) for _ in range(n))
        for n in (1, 1, 2, 2, 2, 3, 3, 4)
        for _ in range(20)
    ]
    return [
        " ".join(draw.choice(words) for _ in range(40)).capitalize()
        + f". In {draw.randrange(1000, 2000)}, é and ü.\nIt ended"
        for _ in range(300)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(made_up_texts(), 500, path)
    # A model directory holds an anchor's configuration that transformers does not know.
    (path / "config.json").write_text(json.dumps({"model_type": "openlm", "hidden_size": 8}))
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> TokenizerWrapper:
    return load(folder)


def check_equal_and_lossless(
    text: str, ours: spm.SentencePieceProcessor, theirs: TokenizerWrapper
) -> None:
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert ours.decode(ids) == text
    assert theirs.decode(ids) == text
    detokenizer = theirs.detokenizer
    pieces = []
    for i in ids:
        detokenizer.add_token(i)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    # mlx-lm's streaming takes leading spaces off; nothing else may be lost.
    assert "".join([*pieces, detokenizer.last_segment]) == text.lstrip(" ")


@pytest.mark.parametrize("text", VARIED)
def test_both_forms_give_the_same_ids_and_lose_nothing(text, ours, theirs):
    check_equal_and_lossless(text, ours, theirs)


def test_both_forms_agree_on_the_text_they_were_trained_on(ours, theirs):
    for text in made_up_texts()[:100]:
        check_equal_and_lossless(text, ours, theirs)
        assert len(ours.encode(text)) < len(text) / 1.5


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.one_of(
            st.sampled_from("laotrinesh k\n .,019é"),
            st.characters(exclude_categories=["Cs"], exclude_characters="\x00▁"),
        ),
        max_size=60,
    ).filter(lambda text: EOT not in text)
)
def test_both_forms_agree_on_any_text(ours, theirs, text):
    check_equal_and_lossless(text, ours, theirs)


def test_end_of_text_comes_first_once_and_is_the_only_special_token(ours, theirs):
    assert theirs.encode("La")[0] == EOT_ID
    assert theirs.encode("La")[1:] == ours.encode("La")
    assert theirs.encode(EOT + "La", add_special_tokens=False) == theirs.encode("La")
    assert theirs.bos_token == theirs.eos_token == EOT
    assert theirs.eos_token_ids == {EOT_ID}
    assert ours.eos_id() == EOT_ID
    assert EOT_ID not in ours.encode(EOT)  # in training text it is plain characters


def test_newlines_and_digits_stand_alone(ours):
    newline = ours.piece_to_id("\n")
    assert ours.encode("la\nto 1987", out_type=str)[-4:] == ["1", "9", "8", "7"]
    assert ours.encode("la\n\nto").count(newline) == 2
    pieces = [ours.id_to_piece(i) for i in range(ours.vocab_size()) if not ours.is_byte(i)]
    assert all(p == "\n" or "\n" not in p for p in pieces)


def test_training_gives_the_same_bytes_again(folder, tmp_path):
    train_tokenizer(made_up_texts(), 500, tmp_path)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_too_large_a_vocabulary_for_the_text_is_one_line(tmp_path):
    refused("vocab_size", train_tokenizer, ["la la to"], 5000, tmp_path)
    assert not list(tmp_path.iterdir())
