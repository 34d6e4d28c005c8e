"""Evaluation of a MemoryModel: perplexity, recall of facts, tasks (docs/evaluation.md)."""

from mlx_hmem.evaluate.facts import Fact, format_facts, read_facts, recall
from mlx_hmem.evaluate.perplexity import Perplexity, perplexity
from mlx_hmem.evaluate.tasks.benchmark import score_task
from mlx_hmem.evaluate.tasks.task import load_tasks
from mlx_hmem.evaluate.texts import read_texts

__all__ = [
    "Fact",
    "Perplexity",
    "format_facts",
    "load_tasks",
    "perplexity",
    "read_facts",
    "read_texts",
    "recall",
    "score_task",
]
