"""How text is cut before bytes are merged, by the name that llama.cpp has for it.

``tokenizer.ggml.pre`` names a cut that is not in the file: it stands in the model's own
``tokenizer.json``, as the expressions below. Text is cut by one after the other. llama.cpp's names:
``src/llama-vocab.cpp``.
"""

from typing import NamedTuple

from mlx_hmem.errors import UserError


class PreTokenizer(NamedTuple):
    """``ignore_merges``: a word of the vocabulary is taken as it is. ``add_bos``: what the name
    says of a file that does not say it. ``nfc``: composed characters first."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


END = r"\s+(?!\S)|\s+"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
DIGIT = r"\p{N}"
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{END}"


def _words(digits: str, letters: str = r"\p{L}", others: str = r"\p{L}") -> str:
    return (
        rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s{others}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{END}"
    )


def _cased(digits: str, ending: str = "") -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{END}"
    )


LLAMA3 = _words(r"\p{N}{1,3}")
QWEN2 = _words(DIGIT)
GPT4O = _cased(r"\p{N}{1,3}", ENGLISH + "?")
PRE_TOKENIZERS = {
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat",
         "mellum", "modern-bert", "exaone4", "a.x-4.0"),
        PreTokenizer((GPT2,)),
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenizer((DIGIT, GPT2)),
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer((LLAMA3,))),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "megrez", "kormo"), PreTokenizer((QWEN2,), nfc=True)
    ),
    "stablelm2": PreTokenizer((QWEN2,)),
    "qwen35": PreTokenizer((_words(DIGIT, r"[\p{L}\p{M}]", r"\p{L}\p{M}"),), nfc=True),
    "tekken": PreTokenizer((_cased(DIGIT),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), PreTokenizer((GPT4O,))),
}  # fmt: skip


def pre_tokenizer_of(name: object) -> PreTokenizer:
    """The cut of this name; UserError for any other."""
    if isinstance(name, str) and name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    raise UserError(
        "the file names no pre-tokenizer that is known (tokenizer.ggml.pre)",
        repr(name)[:60],
        "add --tokenizer FOLDER with the model's own tokenizer.json",
    )
