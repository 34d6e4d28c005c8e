"""Evaluation of a MemoryModel: tasks, perplexity, recall of facts, blocking, routing."""

from mlx_hmem.evaluate.facts import Fact, FactRecall, RecallBucket, format_facts, read_facts, recall
from mlx_hmem.evaluate.paper.blocking import BlockingRow, blocking
from mlx_hmem.evaluate.paper.counting import count_names
from mlx_hmem.evaluate.paper.fact_runs import CountBucket, FactRun, count_buckets
from mlx_hmem.evaluate.paper.fact_tables import FactTable, atomic_numbers, read_fact_table
from mlx_hmem.evaluate.paper.routing_quality import RoutingRow, document_rows, fact_rows
from mlx_hmem.evaluate.perplexity import Perplexity, perplexity
from mlx_hmem.evaluate.rag.document_index import DocumentIndex
from mlx_hmem.evaluate.rag.rag import Rag
from mlx_hmem.evaluate.tasks.benchmark import (
    Average,
    TaskResult,
    averages,
    model_fingerprint,
    score_task,
)
from mlx_hmem.evaluate.tasks.task import Task, TaskData, load_tasks
from mlx_hmem.evaluate.texts import read_texts

__all__ = [
    "Average",
    "BlockingRow",
    "CountBucket",
    "DocumentIndex",
    "Fact",
    "FactRecall",
    "FactRun",
    "FactTable",
    "Perplexity",
    "Rag",
    "RecallBucket",
    "RoutingRow",
    "Task",
    "TaskData",
    "TaskResult",
    "atomic_numbers",
    "averages",
    "blocking",
    "count_buckets",
    "count_names",
    "document_rows",
    "fact_rows",
    "format_facts",
    "load_tasks",
    "model_fingerprint",
    "perplexity",
    "read_fact_table",
    "read_facts",
    "read_texts",
    "recall",
    "score_task",
]
