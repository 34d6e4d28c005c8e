"""Evaluation of a MemoryModel: benchmark tasks, perplexity over documents, recall of facts."""

from mlx_hmem.evaluate.benchmark import (
    Average,
    TaskResult,
    averages,
    model_fingerprint,
    score_task,
)
from mlx_hmem.evaluate.facts import Fact, FactRecall, RecallBucket, format_facts, read_facts, recall
from mlx_hmem.evaluate.perplexity import Perplexity, perplexity
from mlx_hmem.evaluate.tasks import Task, TaskData, load_tasks
from mlx_hmem.evaluate.texts import read_texts

__all__ = [
    "Average",
    "Fact",
    "FactRecall",
    "Perplexity",
    "RecallBucket",
    "Task",
    "TaskData",
    "TaskResult",
    "averages",
    "format_facts",
    "load_tasks",
    "model_fingerprint",
    "perplexity",
    "read_facts",
    "read_texts",
    "recall",
    "score_task",
]
