"""A language model whose every number can be worked out by hand: the next word depends on the last.

Its tokenizers have one token per word, in the manner of GPT-2 or of SentencePiece.
"""

import math

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import decoders as decoding
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mlx_hmem.model.model import MemoryModel

SKY = "the sky sea is blue red falls"
SPACES = {"gpt2": "Ġ", "sentencepiece": "▁"}


def make_tokenizer(
    words: str, manner: str = "gpt2", start: str = "<s>", end: str = ""
) -> TokenizerWrapper:
    """``words`` are split at spaces; each is a token with and without a space in front. ``start``
    and ``end`` name what is put around every text."""
    space = SPACES[manner]
    extra = ["Ċ"] if manner == "gpt2" else ["\n", space]
    names = ["<unk>", "<s>", "</s>", *extra]
    names += [front + word for word in words.split() for front in ("", space)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    if manner == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoding.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Prepend(space)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoding.Metaspace(prepend_scheme="always")
    around = " ".join(filter(None, [start, "$A", end]))
    specials = [(name, vocabulary[name]) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    return TokenizerWrapper(fast, eos_token_ids=[vocabulary["</s>"]])


class Bigram(nn.Module):
    """``table[last]`` are the log-probabilities of the next token."""

    def __init__(self, table: list[list[float]]):
        super().__init__()
        self.layers: list[nn.Module] = []
        self.table = mx.array(table)

    def __call__(self, ids: mx.array, cache: object = None) -> mx.array:
        return self.table[ids]


def make_model(
    tokenizer: TokenizerWrapper, chances: dict[tuple[str, str], float], context: int = 64
) -> MemoryModel:
    """``chances[last, next]`` by the names of tokens; what they leave is spread evenly."""
    vocabulary = tokenizer.get_vocab()
    size = len(vocabulary)
    table = []
    for last, _ in sorted(vocabulary.items(), key=lambda item: item[1]):
        known = {vocabulary[b]: p for (a, b), p in chances.items() if a == last}
        rest = (1 - sum(known.values())) / (size - len(known))
        table.append([math.log(known.get(i, rest)) for i in range(size)])
    return MemoryModel(Bigram(table), {"max_position_embeddings": context}, tokenizer)
