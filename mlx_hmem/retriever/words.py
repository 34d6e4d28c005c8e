"""Which of some texts a question is about, by the words that both have.

An encoder knows what a text is like, and a question about one of many that are alike it sends to
any of them: what tells them apart is a name. So each word of the question weighs as much as it is
rare among the texts (the idf of BM25), times the square of the pieces that the encoder's tokenizer
cuts it into, for names are cut into many. How much of a question a text *covers* is the weight of
the words that it has, in the weight of all and a little more that no text has: a question of common
words alone says too little. A word that no text has weighs most. So a question about a name that
was never said is covered little, however much it is like the others.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
from tokenizers import Tokenizer

# Covered at least so much, a question is about the text; measured in docs/log.md.
NEAR = 0.25
UNSAID = 3.0  # words of one piece that no text has, added to each question
FEWEST = 8  # texts that words are weighed for: of a few no word would be rare


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of ``text`` as the tokenizer of an encoder tells them apart, each once, sorted."""
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normal)
    return sorted({word for word, _ in pieces if any(map(str.isalnum, word))})


class WordIndex:
    """The words of some texts; ``bags`` are those of each."""

    def __init__(self, tokenizer: Tokenizer, bags: Sequence[Collection[str]]):
        self.tokenizer, self._size = tokenizer, len(bags)
        found: dict[str, list[int]] = {}
        for number, bag in enumerate(bags):
            for word in dict.fromkeys(bag):
                found.setdefault(word, []).append(number)
        self._texts = {word: np.array(numbers) for word, numbers in found.items()}

    def __len__(self) -> int:
        return self._size

    def covered(self, question: str) -> np.ndarray:
        """How much of the question each text covers, (texts,) float64 from 0 to 1."""
        total, sums = UNSAID * self._rarity(0), np.zeros(self._size)
        for word in words_of(self.tokenizer, question):
            texts = self._texts.get(word)
            rarity = self._rarity(0 if texts is None else len(texts))
            weight = rarity * len(self.tokenizer.model.tokenize(word)) ** 2
            total += weight
            if texts is not None:
                sums[texts] += weight
        return sums / total

    def _rarity(self, count: int) -> float:
        """What a word of one piece weighs that so many of the texts have."""
        return math.log(1 + (max(self._size, FEWEST) - count + 0.5) / (count + 0.5))
