"""What both encoders ask of their input: a list of strings, and a word-piece tokenizer's file."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from mlx_hmem.errors import UserError, foreign, unheard


def check_texts(texts: Sequence[str]) -> list[str]:
    """``texts`` as a list of strings that can be tokenised; UserError where one is something else.

    Lone surrogates, which no UTF-8 file can hold, become question marks.
    """
    if isinstance(texts, str):
        raise UserError("texts is one string", repr(texts[:40]), "pass a list of strings")
    result = list(texts)
    for index, text in enumerate(result):
        if not isinstance(text, str):
            raise UserError(f"text {index} is not a string", repr(text)[:40], "pass strings only")
        if not text.isascii():
            result[index] = text.encode("utf-8", "replace").decode("utf-8")
    return result


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of ``path`` without its baked-in padding and truncation."""
    with foreign(f"{path} is not a tokenizer", "restore the file"), unheard():
        tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"{path} has another vocabulary", tokenizer.get_vocab_size(), f"need {vocab_size}"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
