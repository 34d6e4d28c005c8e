"""Evaluation of a MemoryModel: perplexity over documents and recall of facts."""

from mlx_hmem.evaluate.facts import Fact, FactRecall, RecallBucket, format_facts, read_facts, recall
from mlx_hmem.evaluate.perplexity import Perplexity, perplexity
from mlx_hmem.evaluate.texts import read_texts

__all__ = [
    "Fact",
    "FactRecall",
    "Perplexity",
    "RecallBucket",
    "format_facts",
    "perplexity",
    "read_facts",
    "read_texts",
    "recall",
]
