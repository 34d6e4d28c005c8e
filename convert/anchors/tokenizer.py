"""Whether a tokenizer fits its anchor, told before anything is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_hmem.errors import UserError, foreign
from mlx_hmem.model.tokenizer import ends_of
from mlx_hmem.reading import read_json

READ = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_tokenizer(files: Sequence[Path], config: dict[str, Any], source: Path) -> list[str]:
    """A line for the user where tokens were added that the anchor cannot read: Gemma 3's tokenizer
    has one for pictures, in models that see none, too.

    Args:
        files: those that are taken along with the anchor.
        config: the anchor's, which is that of ``source``.

    Raises UserError: the vocabulary is larger than the embedding, or a token that begins or ends a
    text has no embedding.
    """
    own: dict[str, Any] = {f.name: read_json(f) for f in files if f.name in READ}
    beside = {f: own[f.name] for f in files if f.name == "generation_config.json"}
    size, file = (
        config.get("vocab_size"),
        next((f for f in files if f.name == "tokenizer.json"), ""),
    )
    ends_of({source: config} | beside, size)
    if not file or not size:
        return []
    what, remedy = (
        f"{file}, {size} embeddings",
        "give the tokenizer that the anchor was trained with",
    )
    with foreign(f"{file} is no tokenizer", remedy):
        values = own["tokenizer.json"]
        vocab: Any = values.get("model", {}).get("vocab", ())
        count = max(vocab.values(), default=-1) + 1 if isinstance(vocab, dict) else len(vocab)
        added = {each["content"]: each["id"] for each in values.get("added_tokens", ())}
        beyond = [token for token, number in added.items() if number >= size]
        roles = [own.get("tokenizer_config.json", {}).get(role) for role in ROLES]
        named = [role.get("content") if isinstance(role, dict) else role for role in roles]
    if count > size:
        what = f"{count} tokens in {what}"
        raise UserError("the tokenizer has tokens that the anchor does not know", what, remedy)
    if without := [token for token in named if token in beyond]:
        what = f"{without[0]!r} in {what}"
        raise UserError("a token that begins or ends a text has no embedding", what, remedy)
    said = f"tokens without an embedding, which no text may have: {', '.join(beyond)[:200]}"
    return [said] if beyond else []
