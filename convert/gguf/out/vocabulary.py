"""A ``tokenizer.json`` as llama.cpp keeps it: tokens, scores or merges, types, and the cut of text.

Two kinds go: BPE over bytes with merges ("gpt2"), and BPE over pieces of SentencePiece ("llama"),
whose scores are the ranks of its merges.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlx_hmem.errors import UserError, foreign, unheard
from mlx_hmem.reading import read_json

from ..pre_tokenizers import DIGIT, GPT2, PRE_TOKENIZERS
from ..tokenizer import ADDED, BYTE, CONTROL, NAMED, NORMAL, SPACE, UNKNOWN, UNUSED

LLAMA_CPP = "llama.cpp reads BPE, over bytes or with SentencePiece's pieces"
LAST = -1e9  # the score of a piece that no merge makes


def vocabulary_of(folder: Path, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The values ``tokenizer.…`` of a model's tokenizer.

    Args:
        config: the anchor's; it may name the ids that begin and end a text.
        vocab_size: rows of the embedding; what the tokenizer lacks is filled with unused tokens.

    Raises UserError: there is no tokenizer.json, or llama.cpp has no such tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError("no tokenizer.json", folder, "save the tokenizer as a fast one there")
    values: Any = read_json(file)
    with foreign(f"{file} is no tokenizer", "restore the file"), unheard():
        tokenizer = Tokenizer.from_str(json.dumps(values))
    model: Any = values.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise UserError("no such tokenizer goes into a GGUF", model.get("type"), LLAMA_CPP)
    tokens, types = _tokens(values, model, vocab_size)
    places = {token: i for i, token in enumerate(tokens)}
    merges = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model.get("merges", [])]
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if model.get("byte_fallback"):
        found["tokenizer.ggml.model"] = "llama"
        found["tokenizer.ggml.pre"] = "default"
        found["tokenizer.ggml.scores"] = _scores(tokens, merges)
        found["tokenizer.ggml.add_space_prefix"] = _adds_space(values)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == ADDED:  # they are looked for in the text as it is
                tokens[i] = token.replace(SPACE, " ")
    else:
        found["tokenizer.ggml.model"] = "gpt2"
        found["tokenizer.ggml.pre"] = _cut_of(values, bool(model.get("ignore_merges")), file)
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    return found | _special(folder, config, tokenizer, places)


def _tokens(
    values: Mapping[str, Any], model: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """All tokens in order of their ids, and their types."""
    added = {each["id"]: each for each in values.get("added_tokens") or ()}
    by_id = {number: token for token, number in model["vocab"].items()}
    by_id |= {number: each["content"] for number, each in added.items()}
    unknown, tokens, types = model.get("unk_token"), [], []
    for number in range(vocab_size):
        token = by_id.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif token == unknown:
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number].get("special") else ADDED)
        else:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            types.append(BYTE if is_byte and model.get("byte_fallback") else NORMAL)
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """The piece that is merged first has the highest."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks[token]) if token in ranks else LAST for token in tokens]


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    if not part:
        return []
    if part.get("type") == "Sequence":
        return [step for each in part[key] for step in _steps(each, key)]
    return [part]


def _adds_space(values: Mapping[str, Any]) -> bool:
    before = _steps(values.get("normalizer"), "normalizers")
    cut = _steps(values.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "Prepend" for step in before):
        return True
    return any(s["type"] == "Metaspace" and s.get("prepend_scheme") != "never" for s in cut)


def _cut_of(values: Mapping[str, Any], ignore_merges: bool, file: Path) -> str:
    """llama.cpp's name for the way in which text is cut before bytes are merged."""
    splits = []
    for step in _steps(values.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split":
            splits.append(step["pattern"].get("Regex") or step["pattern"].get("String"))
        elif step["type"] == "Digits":
            splits.append(DIGIT if step.get("individual_digits") else r"\p{N}+")
        elif step["type"] == "ByteLevel":
            splits += [GPT2] if step.get("use_regex", True) else []
        else:
            splits.append(step["type"])
    nfc = any(s["type"] == "NFC" for s in _steps(values.get("normalizer"), "normalizers"))
    for name, cut in PRE_TOKENIZERS.items():
        if (tuple(splits), ignore_merges, nfc) == (cut.splits, cut.ignore_merges, cut.nfc):
            return name
    raise UserError("llama.cpp has no name for this way to cut text", f"{file}", LLAMA_CPP)


def _special(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, places: Mapping[str, int]
) -> dict[str, Any]:
    """The tokens with a role, what stands around a text, the chat template."""
    file = folder / "tokenizer_config.json"
    own: Any = read_json(file) if file.is_file() else {}
    found: dict[str, int] = {}
    for role, name in NAMED.items():
        token: Any = own.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in places:
            found[role] = places[token]
    for role, key in {
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "padding": "pad_token_id",
    }.items():
        ids = config.get(key)
        ids = ids if isinstance(ids, list) else [ids]
        numbers = [i for i in ids if type(i) is int and 0 <= i < len(places)]
        if numbers:
            found.setdefault(role, numbers[0])
        if role == "eos":  # an instruct model has the end of a turn beside that of a text
            more = [i for i in dict.fromkeys(numbers) if i != found.get("eos")]
            found |= dict(zip(("eot", "eom"), more, strict=False))
    values: dict[str, Any] = {
        f"tokenizer.ggml.{role}_token_id": number for role, number in found.items()
    }
    around = tokenizer.encode("a").ids
    for role, where in (("bos", 0), ("eos", -1)):
        is_there = len(around) > 1 and around[where] == found.get(role)
        values[f"tokenizer.ggml.add_{role}_token"] = is_there
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else own.get("chat_template")
    if isinstance(text, list):
        text = next((each["template"] for each in text if each.get("name") == "default"), None)
    return values | ({"tokenizer.chat_template": text} if isinstance(text, str) else {})
