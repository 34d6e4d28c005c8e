"""The tokenizer of a model directory: files that are checked before transformers sees them, words
that never become control tokens, text that comes out as the ids say.

A folder's own code is never run and nobody is asked whether it may be. What a person, a document or
a passage says is text: ``<|im_end|>`` in it is eight characters and more, not the end of a turn.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from transformers.utils import logging as transformers_logging

from mlx_hmem.anchors.load import TOKENIZER_FILES
from mlx_hmem.errors import UserError, foreign, unheard
from mlx_hmem.files import MAX_DIM, is_whole
from mlx_hmem.reading import check_mark, open_regular, read_json

# What a tokenizer may consist of, and what is read beside it: its class, the ids that end a text.
FILES = ("tokenizer*", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "added_tokens.json",
         "special_tokens_map.json", "chat_template*")  # fmt: skip
BESIDE = ("config.json", "generation_config.json")
MOST_BYTES = 1 << 28
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def read_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model directory, which knows the ids that end a text."""
    check_files(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError("no tokenizer", folder, "add tokenizer.json or tokenizer.model")
    configs, file = {folder / "config.json": config}, folder / "generation_config.json"
    configs |= {file: read_json(file)} if file.exists() else {}
    ends = ends_of(configs, config.get("vocab_size"))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns that it does not know model_type openlm
    try:
        with foreign(f"the tokenizer in {folder} cannot be read", "restore it"), unheard():
            extra = {"trust_remote_code": False}
            wrapper = load_tokenizer(folder, extra, ends)
            # mlx-lm adds the tokenizer's own end of text; the end of a turn may be another token.
            if (turn_end := _turn_end(folder, wrapper._tokenizer)) is not None:
                wrapper.eos_token_ids = wrapper.eos_token_ids | {turn_end}
            return ModelTokenizer.of(wrapper, config.get("vocab_size"))
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_files(folder: Path) -> None:
    """Raises UserError for a tokenizer that needs code of its own, and for a file of it that is no
    regular one, leads nowhere or is too large."""
    for file in folder.iterdir():
        if any(fnmatch(file.name, pattern) for pattern in (*FILES, *BESIDE)) and not file.is_dir():
            with open_regular(file):
                size = file.stat().st_size
            if size > MOST_BYTES:
                raise UserError(f"{file} is too large for a tokenizer", size, "restore the file")
            if file.suffix == ".json":
                check_mark(file)
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object", repr(config)[:40], "restore the file")
    own = config.get("auto_map")
    if isinstance(own, list | str) or (isinstance(own, dict) and "AutoTokenizer" in own):
        raise UserError(
            "the tokenizer needs code of its own, which is never run",
            f"auto_map in {file}",
            "use a model whose tokenizer is a plain tokenizer.json or tokenizer.model",
        )


def ends_of(configs: Mapping[Path, Any], most: int | None) -> list[int] | None:
    """The ids that end a text, of all files that name some: of ``config.json``, and of
    ``generation_config.json``, where many an instruct anchor has the end of a turn.

    Raises UserError for an id that is none of ``most`` tokens.
    """
    ids: list[int] = []
    for file, config in configs.items():
        found = config.get("eos_token_id") if isinstance(config, dict) else None
        own = found if isinstance(found, list) else [] if found is None else [found]
        for one in own:
            if not is_whole(one, (most or MAX_DIM) - 1):  # a text would wait for it without end
                what = f"eos_token_id is none of the anchor's {most or MAX_DIM} tokens"
                raise UserError(what, repr(one)[:40], f"correct it in {file}")
        ids += own
    return ids or None


def _turn_end(folder: Path, tokenizer: Any) -> int | None:
    """The id of the ``eot_token`` that ``tokenizer_config.json`` names, if that is an added one."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    extra = config.get("extra_special_tokens")
    named = config.get("eot_token") or (extra.get("eot_token") if isinstance(extra, dict) else None)
    text = named.get("content") if isinstance(named, dict) else named
    added = tokenizer.added_tokens_decoder.items()
    return next((number for number, token in added if token.content == text), None)


class Pieces(StreamingDetokenizer):
    """Text as the tokens come; joined, it is what the tokenizer decodes of all of them together.

    A token is decoded behind those of the piece before it. Held back is what later tokens may
    change: characters that are not whole, and a run of byte tokens, which is read as a whole.
    """

    def __init__(self, tokenizer: Any):
        self._decode: Callable[[Sequence[int]], str] = tokenizer.decode
        self._name: Callable[[int], str | None] = tokenizer.convert_ids_to_tokens
        self.reset()

    def reset(self) -> None:
        self.text, self.tokens, self.offset = "", list[int](), 0
        self._start, self._read, self._known = 0, 0, ""

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        if BYTE.fullmatch(self._name(token) or ""):
            return
        said = self._decode(self.tokens[self._start :])
        if said.endswith("\ufffd") or not said.startswith(self._known):
            return
        self.text += said[len(self._known) :]
        self._start, self._read = self._read, len(self.tokens)
        self._known = self._decode(self.tokens[self._start :])

    def finalize(self) -> None:
        whole = self._decode(self.tokens)
        if whole.startswith(self.text):
            self.text = whole


class ModelTokenizer(TokenizerWrapper):
    """mlx-lm's wrapper, whose ``encode`` reads a text as text, and whose ids the anchor knows."""

    _vocab_size: int | None

    @classmethod
    def of(cls, wrapper: TokenizerWrapper, vocab_size: Any) -> "ModelTokenizer":
        """``wrapper`` as one; ``vocab_size``: the anchor's, None where nobody says."""
        made = cls.__new__(cls)
        vars(made).update(vars(wrapper))
        made._detokenizer = Pieces(wrapper._tokenizer)
        made._vocab_size = vocab_size if type(vocab_size) is int else None
        return made

    @cached_property
    def controls(self) -> dict[int, str]:
        """The control tokens: those that are special, and what else was added to the vocabulary and
        stands in the chat template."""
        template = json.dumps(self._tokenizer.chat_template, ensure_ascii=False)
        return {
            number: token.content
            for number, token in self._tokenizer.added_tokens_decoder.items()
            if len(token.content.strip()) > 1 and (token.special or token.content in template)
        }

    def held(self, text: str, **options: bool) -> dict[str, int]:
        """The control tokens that the tokenizer sees in a text, which for some knows no capitals;
        not one that stands for what the tokenizer does not know."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, **options)
        seen = {self.controls[i]: i for i in set(ids) if i in self.controls}
        return {name: i for name, i in seen.items() if any_of([name], re.I).search(text)}

    def cut(self, text: str, mark: str, **options: bool) -> str:
        """The text with marks, each behind the first character of a control token that the
        tokenizer would see, so that it sees none."""
        while found := self.held(text, **options):
            text = any_of(found, re.I).sub(lambda name: name[0][:1] + mark + name[0][1:], text)
        return text

    def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        """The ids of a text, in which no control token is seen; around it what the tokenizer puts
        there, unless ``add_special_tokens`` is not set. UserError for an id that the anchor lacks,
        and for a text that the tokenizer cannot read."""
        with foreign("the tokenizer cannot read this text", "use another model's tokenizer"):
            ids = self._text_ids(text, add_special_tokens)
        return self.checked(ids)

    def _text_ids(self, text: str, around: bool) -> list[int]:
        encode = partial(self._tokenizer.encode, split_special_tokens=True)
        ids = list(encode(text, add_special_tokens=around))
        if sum(i in self.controls for i in ids) == (self._around if around else 0):
            return ids
        # One that is not special, or a piece of the vocabulary as well.
        mark = mark_for([text])
        first, *rest = self.cut(text, mark, split_special_tokens=True).split(mark)
        ids = list(encode(first, add_special_tokens=around))
        for part in rest:
            ids += encode(part, add_special_tokens=False)
        return ids

    def without_bos(self, prompt: str) -> str:
        """A prompt without what begins a text, where :meth:`encode` puts that there anyway: a
        prompt copied from elsewhere may have it. Told by its id, as the tokenizer reads it."""
        begin, encode = self.bos_token_id, self._tokenizer.encode
        found = None if begin is None else any_of([self.bos_token], re.I).match(prompt)
        same = found and encode("a")[:1] == encode(found[0], add_special_tokens=False) == [begin]
        return prompt[found.end() :] if found and same else prompt

    @cached_property
    def _around(self) -> int:
        """How many control tokens are put around a text."""
        return sum(i in self.controls for i in self._tokenizer.encode("a"))

    def rendered_ids(self, rendered: str, mark: str) -> list[int]:
        """The ids of what a chat template wrote: its control tokens, and between them text that was
        :meth:`cut`."""
        found, ids = self.held(rendered), list[int]()
        added = self._tokenizer.added_tokens_decoder
        pieces = ["", *any_of(found).split(rendered), ""]
        for place in range(1, len(pieces), 2):  # a text between two control tokens
            before, text, after = pieces[place - 1 : place + 2]
            text = text.replace(mark, "")
            if before and added[found[before]].rstrip:
                text = text.lstrip()
            if after and added[found[after]].lstrip:
                text = text.rstrip()
            ids += self._text_ids(text, False) if text else []
            ids += [found[after]] if after else []
        return ids

    def checked(self, ids: list[int]) -> list[int]:
        """``ids``, if the anchor has embeddings of them."""
        most = self._vocab_size
        if most is not None and ids and not 0 <= min(ids) <= max(ids) < most:
            raise UserError(
                "the tokenizer has tokens that the anchor does not know",
                f"{max(ids)} of {most}",
                "restore tokenizer and config.json from one place",
            )
        return ids


def any_of(names: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    """Finds the longest of ``names``, as a group."""
    longest = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})", flags)


def mark_for(texts: Iterable[str]) -> str:
    """A character that is in none of the texts."""
    used = set().union(*texts)
    return next(mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if mark not in used)
