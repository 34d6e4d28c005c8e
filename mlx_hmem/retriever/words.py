"""Which of some texts a question is about, by the words that both have.

An encoder knows what a text is like, and a question about one of many that are alike it sends to
any of them: what tells them apart is a name. So each word of the question weighs as much as it is
rare, among the texts (the idf of BM25) and in general, which the encoder's tokenizer knows: its
vocabulary begins with the commonest words, and names are cut into many pieces. How much of a
question a text *covers* is the weight of the words that it has, in the weight of all and a little
more that no text has: a question of common words alone says too little. A word that no text has
weighs most. So a question about a name that was never said is covered little, however much it is
like the others.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

# Covered at least so much, a question is about the text. Measured in docs/log.md, as what follows.
NEAR = 0.2
UNSAID = 2.0  # rare words of one piece that no text has, added to each question
FEWEST = 20  # texts that words are weighed for: of a few no word would be rare
# Weight of a question among the last words of a conversation. Of one that says little by itself it
# is less, by this power of the share that UNSAID has of all its weight.
OWN, LITTLE = 0.8, 6
COMMONEST = 1996  # the first word of BERT's vocabulary: before it are signs and single letters
UNKNOWN = "[UNK]"
# Thai, Lao, Burmese, Khmer and kana stand without spaces between words.
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff]+)")


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of ``text`` as the tokenizer of an encoder tells them apart, each once, sorted;
    where a script has no spaces, each two letters that follow one another."""
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normal)
    words = (word for piece, _ in pieces for word in _told_apart(piece))
    return sorted({word for word in words if any(map(str.isalnum, word))})


def _told_apart(piece: str) -> Iterator[str]:
    for part in filter(None, _UNSPACED.split(piece)):
        if len(part) > 2 and _UNSPACED.match(part):
            yield from (a + b for a, b in pairwise(part))
        else:
            yield part


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

    def covered(self, question: str, around: str | None = None) -> np.ndarray:
        """How much of the question each text covers, (texts,) float64 from 0 to 1; ``around``: the
        last words of a conversation, the question's among them, which count a little, and the more
        the less the question says by itself, as "And where?"."""
        found, unsaid = self._covered(question)
        if around is None:
            return found
        own = OWN * (1 - unsaid**LITTLE)
        return own * found + (1 - own) * self._covered(around)[0]

    def _covered(self, question: str) -> tuple[np.ndarray, float]:
        """How much each text covers, and the share of all weight that is not its words' own."""
        unsaid = total = UNSAID * self._among_texts(0)
        sums = np.zeros(self._size)
        for word in words_of(self.tokenizer, question):
            texts = self._texts.get(word)
            weight = self._among_texts(0 if texts is None else len(texts)) * self._general(word)
            total += weight
            if texts is not None:
                sums[texts] += weight
        return sums / total, unsaid / total

    def _among_texts(self, count: int) -> float:
        """How rare a word is that so many of the texts have."""
        return math.log(1 + (max(self._size, FEWEST) - count + 0.5) / (count + 0.5))

    def _general(self, word: str) -> float:
        """How rare a word is in general: that of its pieces, summed and squared; about 1 for the
        rarest of one piece, and for one whose letters the encoder does not know."""
        most = math.log(self.tokenizer.get_vocab_size() - COMMONEST + 1)
        pieces = self.tokenizer.model.tokenize(word)
        if any(piece.value == UNKNOWN for piece in pieces):  # it stands before the commonest words
            return 1.0
        ranks = (piece.id - COMMONEST for piece in pieces)
        return sum(0.5 if rank < 0 else math.log(2 + rank) / most for rank in ranks) ** 2
