"""A tokenizer taken from a model, in place of one that is trained: any that mlx-lm loads.

A window of its tokens begins with the end-of-text token, as the paper separates documents, and then
with what the tokenizer itself puts in front of a text (Llama's and Gemma's begin-of-text), so that
a document looks as it does at inference.
"""

import json
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import anchor_of_config, num_embedded
from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from mlx_hmem.model.find import find_model
from mlx_hmem.model.tokenizer import FILES, read_tokenizer
from mlx_hmem.reading import read_json

FACTS = "taken.json"


@dataclass(frozen=True)
class TakenFacts(JsonConfig):
    """What must be known of a tokenizer without loading it."""

    source: str
    begin: tuple[int, ...]
    vocab_size: int


def taken_facts(folder: Path) -> TakenFacts | None:
    """Those of a run in ``folder``; None if it trained its own tokenizer."""
    path = folder / "tokenizer" / FACTS
    return TakenFacts.from_dict(read_json(path), str(path)) if path.exists() else None


def is_tokenizer_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in FILES)


class TakenTokenizer:
    """The tokenizer in ``folder``, as :class:`train.data.tokenizer.RunTokenizer`."""

    def __init__(self, folder: Path):
        self._tokenizer: Any = read_tokenizer(folder, {})

    def encode(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def begin(self) -> tuple[int, ...]:
        """End of text, and what the tokenizer begins a text with, if that is another token."""
        eot = self._tokenizer.eos_token_id
        if eot is None:
            raise UserError(
                "the tokenizer has no end of text", "no eos_token", "name it in its config"
            )
        whole, bare = self._encode("a"), self._encode("a", add_special_tokens=False)
        front = whole[: max(0, len(whole) - len(bare))] if whole[-1:] == bare[-1:] else []
        return (eot, *(i for i in front if i != eot))

    def _encode(self, text: str, **options: bool) -> list[int]:
        return list(self._tokenizer.encode(text, **options))


def embedded(config: dict[str, Any]) -> int:
    """Tokens that an anchor with this ``config.json`` has embeddings of."""
    return num_embedded(anchor_of_config(config))


def take_tokenizer(source: str, out: Path, vocab_size: int) -> None:
    """Copies the tokenizer of ``source`` (a folder or Hub id) to ``out``, with what is to be known
    of it in ``taken.json``."""
    folder = find_model(source, [*FILES, "config.json"])
    for file in sorted(folder.iterdir()):
        if file.is_file() and (is_tokenizer_file(file.name) or file.name == "config.json"):
            shutil.copyfile(file, out / file.name)
    tokenizer = TakenTokenizer(out)
    facts = TakenFacts(source, tokenizer.begin(), vocab_size)
    write_atomic(out / FACTS, json.dumps(facts.to_dict(), indent=2) + "\n")
    print(f"tokenizer: that of {source}, a document begins with {list(facts.begin)}, in {out}")
