"""The tokenizer in a GGUF file as the files that transformers and mlx-lm read.

Two kinds of vocabulary are known by ``tokenizer.ggml.model``: "llama", pieces of SentencePiece with
scores, and "gpt2", byte-level BPE with merges. What became of a text is the same with
SentencePiece, llama.cpp and transformers; a chat template is copied and never run.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tqdm import tqdm

from mlx_hmem.errors import UserError, foreign, unheard

from .header import Header
from .pre_tokenizers import PreTokenizer, pre_tokenizer_of

SPACE = "\u2581"  # SentencePiece's
OWN = "add --tokenizer FOLDER with the model's own tokenizer.json"
MOST_CHARACTERS = 1024  # of a token: pairs are looked for at each of them
# Types of tokens (llama.h).
NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = range(1, 7)
ROLES = ("bos", "eos", "eot", "eom", "unknown", "padding")
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
# Ends of a text or a turn that llama.cpp knows by their text, where they are control tokens.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>", "<EOT>", "</s>",
)  # fmt: skip
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


class TokenizerFiles(NamedTuple):
    """Files by name, the ids for ``config.json``, and lines for the user."""

    files: dict[str, str]
    ids: dict[str, Any]
    notes: list[str]


class Vocabulary(NamedTuple):
    """Tokens, their scores and types; the id of each role that the file gives to one."""

    tokens: list[str]
    scores: np.ndarray
    types: np.ndarray
    ids: dict[str, int]

    def text(self, role: str) -> str | None:
        """The token of a role, if the file has one."""
        return self.tokens[self.ids[role]] if role in self.ids else None

    def of_type(self, *kinds: int) -> list[str]:
        return [self.tokens[i] for i in np.flatnonzero(np.isin(self.types, kinds))]


class Parts(NamedTuple):
    """What a tokenizer is built of: the arguments of a BPE model, and what stands around it."""

    bpe: dict[str, Any]
    normalizer: Any
    pre_tokenizer: Any
    decoder: Any


def tokenizer_files(header: Header, vocab_size: int) -> TokenizerFiles:
    """The tokenizer of a model with ``vocab_size`` rows of embeddings.

    Raises UserError for a vocabulary that is damaged, or of a kind that is not converted.
    """
    values = header.values
    kind = values.get("tokenizer.ggml.model")
    if kind is None:
        note = "no tokenizer in the file: put tokenizer.json into the result"
        return TokenizerFiles({}, {}, [note])
    if kind not in ("llama", "gpt2"):
        known = f"known: llama (SentencePiece), gpt2 (BPE); {OWN}"
        raise UserError("no such tokenizer is converted", repr(kind)[:60], known)
    vocabulary = _vocabulary(header, vocab_size)
    if kind == "llama":
        made, around = _sentencepiece(vocabulary, values), {"bos": True, "eos": False}
    else:
        cut = pre_tokenizer_of(values.get("tokenizer.ggml.pre"))
        made = _byte_level(vocabulary.tokens, values.get("tokenizer.ggml.merges"), cut)
        around = {"bos": cut.add_bos, "eos": False}
    for role, usual in around.items():
        around[role] = values.get(f"tokenizer.ggml.add_{role}_token", usual) is True
        if around[role] and role not in vocabulary.ids:
            what = f"tokenizer.ggml.{role}_token_id is missing"
            raise UserError(f"a text is to have a {role} token", what, OWN)
    with foreign(f"the tokenizer in {header.files[0]} cannot be built", OWN), unheard():
        files = {"tokenizer.json": _built(made, vocabulary, around)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"add_{role}_token": each for role, each in around.items()}
    for role, name in NAMED.items():
        if role in vocabulary.ids:
            config[name] = vocabulary.text(role)
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    template, notes = values.get("tokenizer.chat_template"), list[str]()
    if isinstance(template, str):
        files["chat_template.jinja"] = template
    if others := [key for key in values if key.startswith("tokenizer.chat_template.")]:
        notes.append(f"left out {', '.join(others)[:200]}: a folder has one chat template")
    control = set(vocabulary.of_type(CONTROL))
    ends = [vocabulary.tokens.index(text) for text in ENDS if text in control]
    ids = config_ids(vocabulary.ids, ends)
    if generation := _generation(values, ids):
        files["generation_config.json"] = json.dumps(generation, indent=2) + "\n"
    return TokenizerFiles(files, ids, notes)


def _vocabulary(header: Header, vocab_size: int) -> Vocabulary:
    file, values = header.files[0], header.values
    tokens: Any = values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError("no vocabulary", f"tokenizer.ggml.tokens in {file}", OWN)
    count = len(tokens)
    if count > vocab_size:
        what = f"{count} tokens, {vocab_size} embeddings in {file}"
        raise UserError("the tokenizer has tokens that the model does not know", what, OWN)
    if (most := max(map(len, tokens))) > MOST_CHARACTERS:
        raise UserError("a token is too long", f"{most} characters in {file}", OWN)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp does
    if len(set(tokens)) != count:
        twice = Counter(tokens).most_common(1)[0][0]
        raise UserError("a token occurs twice", repr(twice)[:60], OWN)
    scores, types = (
        _numbers(header, key, np.full(count, usual))
        for key, usual in (("scores", 0.0), ("token_type", NORMAL))
    )
    return Vocabulary(tokens, scores, types, special_ids(header, count))


def _numbers(header: Header, key: str, usual: np.ndarray) -> np.ndarray:
    found: Any = header.values.get(f"tokenizer.ggml.{key}", usual)
    if not isinstance(found, np.ndarray) or len(found) != len(usual) or np.isnan(found).any():
        what = f"tokenizer.ggml.{key} has not one number for each token"
        raise UserError(what, header.files[0], OWN)
    return found


def special_ids(header: Header, count: int) -> dict[str, int]:
    """The ids that a file names, of ``count`` tokens, by llama.cpp's roles."""
    found = {}
    for role in ROLES:
        number = header.values.get(f"tokenizer.ggml.{role}_token_id")
        if number is not None:
            if type(number) is not int or not 0 <= number < count:
                raise UserError(f"the {role} token is none of {count}", str(number)[:60], OWN)
            found[role] = number
    return found


def _sentencepiece(vocabulary: Vocabulary, values: Mapping[str, Any]) -> Parts:
    """Pieces that grow by their scores; what no piece holds is written byte by byte."""
    places, by_rank = _pieces(vocabulary)
    merges = _merges(places, by_rank)
    unknown = vocabulary.text("unknown") or next(iter(vocabulary.of_type(UNKNOWN)), None)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if values.get("tokenizer.ggml.add_space_prefix", True) is True:
        steps.insert(0, normalizers.Prepend(SPACE))
        back.append(decoders.Strip(" ", left=1))
    bpe = dict(
        vocab=places, merges=merges, unk_token=unknown, fuse_unk=True,
        byte_fallback=bool((vocabulary.types == BYTE).any()),
    )  # fmt: skip
    return Parts(bpe, normalizers.Sequence(steps), None, decoders.Sequence(back))


def _pieces(vocabulary: Vocabulary) -> tuple[dict[str, int], list[str]]:
    """The id of each piece, and those that others are merged to, the first to be merged first.

    Runs of spaces that were added come before all others: SentencePiece takes them whole, and the
    file has them with real spaces, which no text has any more where merging begins.
    """
    places = {token: i for i, token in enumerate(vocabulary.tokens)}
    spaces = []
    for token in vocabulary.of_type(ADDED):
        run = SPACE * len(token)
        if not token.strip(f" {SPACE}") and places.get(run, places[token]) == places[token]:
            places[run] = places.pop(token)
            spaces.append(run)
    normal = np.flatnonzero(vocabulary.types == NORMAL)
    order = normal[np.argsort(-vocabulary.scores[normal], kind="stable")]
    return places, spaces + [vocabulary.tokens[i] for i in order]


def _merges(places: dict[str, int], by_rank: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece; of those that make the same the longest left first."""
    found = []
    for piece in tqdm(by_rank, "merges", delay=2, disable=None, unit="piece"):
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in places and right in places:
                found.append((left, right))
    return found


def _byte_level(tokens: Sequence[str], merges: Any, cut: PreTokenizer) -> Parts:
    """Bytes, written as characters, that are merged by a list."""
    if not isinstance(merges, list):
        raise UserError("no merges", "tokenizer.ggml.merges", OWN)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [m for m, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise UserError("a merge is no pair", repr(wrong[0])[:60], OWN)
    places = {token: i for i, token in enumerate(tokens)}
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in cut.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return Parts(
        dict(vocab=places, merges=pairs, ignore_merges=cut.ignore_merges),
        normalizers.NFC() if cut.nfc else None,
        pre_tokenizers.Sequence([*splits, to_bytes]),
        decoders.ByteLevel(),
    )


def _built(parts: Parts, vocabulary: Vocabulary, around: Mapping[str, bool]) -> str:
    """``tokenizer.json`` of a tokenizer that finds added tokens in a text as they are, and puts the
    tokens of the roles ``around`` it."""
    tokenizer = Tokenizer(models.BPE(**parts.bpe))
    tokenizer.decoder = parts.decoder
    if parts.normalizer is not None:
        tokenizer.normalizer = parts.normalizer
    if parts.pre_tokenizer is not None:
        tokenizer.pre_tokenizer = parts.pre_tokenizer
    special = vocabulary.of_type(UNKNOWN, CONTROL)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    # A run of spaces has another spelling by now.
    added = [t for t in vocabulary.of_type(ADDED) if t in parts.bpe["vocab"]]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in added])
    before, after = (vocabulary.text(role) if around[role] else None for role in ("bos", "eos"))
    if before or after:
        single = [each for each in (before, "$A", after) if each]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=single + [each.replace("$A", "$B") + ":1" for each in single],
            special_tokens=[
                (each, tokenizer.token_to_id(each)) for each in (before, after) if each
            ],
        )
    return str(tokenizer.to_str())


def config_ids(ids: Mapping[str, int], more_ends: Sequence[int] = ()) -> dict[str, Any]:
    """bos, eos and pad for ``config.json``. What ends a text is all that the file names for it, and
    ``more_ends``: an instruct model has the end of a turn beside that of a text."""
    ends = [ids[role] for role in ("eos", "eot", "eom") if role in ids]
    ends = list(dict.fromkeys([*ends, *more_ends]))
    found: dict[str, Any] = {}
    if "bos" in ids:
        found["bos_token_id"] = ids["bos"]
    if ends:
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if "padding" in ids:
        found["pad_token_id"] = ids["padding"]
    return found


def _generation(values: Mapping[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """``generation_config.json``, where there is more to say than ``config.json`` does."""
    sampling = {}
    for theirs, ours in SAMPLING.items():
        value: Any = values.get(f"general.sampling.{theirs}")
        if type(value) in (int, float) and np.isfinite(value):
            sampling[ours] = value if type(value) is int else float(str(np.float32(value)))
    if sampling:
        sampling = {"do_sample": True} | sampling
    return ids | sampling if sampling or isinstance(ids.get("eos_token_id"), list) else {}
