"""The tokenizer of a run: our own, SentencePiece BPE and the same for Hugging Face, or that of a
model (:mod:`train.data.taken_tokenizer`).

Lossless: identity normalisation, all spaces kept, bytes for what has no piece. The one exception is
the character U+2581 (▁), which SentencePiece itself uses for the space and gives back as one.
`<|endoftext|>` (id 0) begins every document, ends it and pads; `<unk>` exists but is never made.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import sentencepiece as spm

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.texts import records
from mlx_hmem.files import write_atomic

from ..recipe.recipe import Recipe
from .taken_tokenizer import TakenTokenizer, embedded, take_tokenizer, taken_facts

EOT, EOT_ID = "<|endoftext|>", 0
UNKNOWN = "<unk>"
MAX_TRAINING_CHARACTERS = 20_000_000
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": EOT,
    "eos_token": EOT,
    "pad_token": EOT,
    "clean_up_tokenization_spaces": False,
}


def _first(texts: Iterable[str], most_characters: int) -> Iterable[str]:
    for text in texts:
        if most_characters <= 0:
            return
        most_characters -= len(text)
        yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains on the first 20 million characters and writes the three files into ``folder``.

    Writes tokenizer.model (SentencePiece), tokenizer.json and tokenizer_config.json (Hugging Face).
    The same texts give the same bytes.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(_first(texts, MAX_TRAINING_CHARACTERS)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.998,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            user_defined_symbols=["\n"],
            eos_id=EOT_ID,
            eos_piece=EOT,
            unk_id=1,
            unk_piece=UNKNOWN,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            "the corpus does not give such a vocabulary",
            f"{vocab_size} pieces ({error})",
            "change tokenizer.vocab_size or take more documents",
        ) from None
    processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
    write_atomic(folder / "tokenizer.model", model.getvalue())
    for name, values in (
        ("tokenizer.json", hugging_face_tokenizer(processor)),
        ("tokenizer_config.json", CONFIG),
    ):
        write_atomic(folder / name, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def _merges(processor: spm.SentencePieceProcessor) -> list[tuple[str, str]]:
    """The BPE merges that a SentencePiece vocabulary implies, first to last.

    SentencePiece keeps no merges: any two pieces whose join is a piece may merge, in order of the
    joined piece's score.
    """
    normal = {
        processor.id_to_piece(i): processor.get_score(i)
        for i in range(processor.vocab_size())
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
        and processor.id_to_piece(i) != "\n"
    }
    found = [
        (-score, split, piece[:split], piece[split:])
        for piece, score in normal.items()
        for split in range(1, len(piece))
        if piece[:split] in normal and piece[split:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def hugging_face_tokenizer(processor: spm.SentencePieceProcessor) -> dict[str, Any]:
    """tokenizer.json of the same tokenizer: equal ids, except that `<|endoftext|>` in a text is
    the special token, and that encoding adds it in front unless told not to."""
    special = {
        "id": EOT_ID,
        "content": EOT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    front = {"SpecialToken": {"id": EOT, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [front, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                front,
                {"Sequence": {"id": "A", "type_id": 0}},
                front,
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {EOT: {"id": EOT, "ids": [EOT_ID], "tokens": [EOT]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {processor.id_to_piece(i): i for i in range(processor.vocab_size())},
            "merges": [list(pair) for pair in _merges(processor)],
        },
    }


class RunTokenizer(Protocol):
    """What training asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, in which no special token is seen."""

    def decode(self, ids: list[int]) -> str: ...


def load_tokenizer(folder: Path) -> RunTokenizer:
    """The tokenizer that :func:`run_tokenizer` left in a run's ``folder``."""
    if taken_facts(folder) is not None:
        return TakenTokenizer(folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.model"
    return spm.SentencePieceProcessor(model_proto=path.read_bytes())


def begin_of(folder: Path) -> tuple[int, ...]:
    """The ids that each window of a run begins with; the first of them is its end of text."""
    facts = taken_facts(folder)
    return (EOT_ID,) if facts is None else facts.begin


def eot_of(folder: Path) -> int:
    """The id that ends and begins a document, and pads, in a run's tokens."""
    return begin_of(folder)[0]


def run_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Writes ``tokenizer/``: trained on the corpus, or taken from a model."""
    out = folder / "tokenizer"
    source = recipe.anchor.path or recipe.tokenizer.path
    if source is not None:
        config = recipe.anchor.config
        vocab_size = recipe.tokenizer.vocab_size if config is None else embedded(config)
        take_tokenizer(source, out, vocab_size)
        return
    train_tokenizer(records(folder / "corpus" / "train.jsonl"), recipe.tokenizer.vocab_size, out)
    print(f"tokenizer: {recipe.tokenizer.vocab_size} pieces, in {out}")
