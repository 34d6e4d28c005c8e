"""From rows to prompts, as LLM-Foundry v0.9 builds them: the examples shown, texts, token ids.

The examples shown with row i come from the same file, drawn by one random generator that goes
through the file in order, so the prompts of a part of the rows are those of the whole file.
Memory is routed by the row's own text, never by the examples (paper, section 2).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.scoring import Candidate, common_start
from mlx_hmem.evaluate.tasks.task import SCHEMA, Example, Task


@dataclass(frozen=True)
class Prompt:
    """What a model is shown for one row: ``preamble`` and each of ``contexts`` are tokenised
    apart, and each answer after them."""

    example: Example
    preamble: str
    contexts: tuple[str, ...]
    route_text: str


def draw_examples(rows: int, shots: int, row: int, rng: random.Random) -> set[int]:
    """The rows shown with ``row``, in the order in which the set gives them."""
    drawn = set(rng.sample(range(rows), min(shots, rows - 1)))
    if row in drawn:
        drawn.remove(row)
        other = rng.choice(range(rows))
        while other == row or other in drawn:
            other = rng.choice(range(rows))
        drawn.add(other)
    return drawn


def build_prompts(task: Task, examples: Sequence[Example]) -> list[Prompt]:
    """The prompt of every row, in their order. With categories, draws stay inside a category."""
    prompts: list[Any] = [None] * len(examples)
    for category in {example.category for example in examples}:
        rows = [i for i, example in enumerate(examples) if example.category == category]
        rng = random.Random(task.fewshot_random_seed)
        for row, i in enumerate(rows):
            shown = draw_examples(len(rows), task.num_fewshot, row, rng)
            prompts[i] = _prompt(task, examples[i], [examples[rows[j]] for j in shown])
    return prompts


def _prompt(task: Task, example: Example, shown: Sequence[Example]) -> Prompt:
    preamble = task.prompt_string
    for other in shown:
        question = task.question_prelimiter + other.gold_context
        answer = other.gold_answer
        if task.cot_delimiter:
            answer = other.chain_of_thought + task.cot_delimiter + answer
        separator = task.example_delimiter if preamble else ""
        preamble += separator + question + task.continuation_delimiter + answer
    separator = task.example_delimiter if preamble else ""
    # A schema task's options have no delimiter behind them when nothing precedes.
    bare = task.icl_task_type == SCHEMA and not preamble
    delimiter = "" if bare else task.continuation_delimiter
    contexts = tuple(
        (separator + task.question_prelimiter + context + delimiter).rstrip()
        for context in example.contexts
    )
    return Prompt(example, preamble, contexts, route_text(example))


def route_text(example: Example) -> str:
    """What of a row routes its memory: the question or context; of a schema task the text common
    to all choices, which is what the options share in front and behind, and the continuation."""
    if len(example.contexts) == 1:
        return example.contexts[0]
    options = [option.split() for option in example.contexts]
    front = common_start(options)
    behind = common_start(option[len(front) :][::-1] for option in options)[::-1]
    return " ".join([*front, *behind, example.answers[0]])


class PromptTokens:
    """Token ids of prompts for one tokenizer and a longest sequence of ``context`` tokens."""

    def __init__(self, tokenizer: Any, context: int):
        self.tokenizer, self.context = tokenizer, context
        # GPT-2's way: the space belongs to the word behind it.
        self.prefix_space = len(self._encode(" a")) == 1

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _contexts(self, prompt: Prompt) -> list[list[int]]:
        start = list(self.tokenizer.encode(prompt.preamble))
        if len(start) > 1 and start[-1] in self.tokenizer.eos_token_ids:
            start.pop()
        return [start + self._encode(context) for context in prompt.contexts]

    def candidates(self, prompt: Prompt) -> list[Candidate]:
        """One sequence per choice: of multiple choice the answers, of a schema the contexts."""
        answers = [self._answer(text) for text in prompt.example.answers]
        where = f"line {prompt.example.line}"
        return [self._fit(c, a, where) for c in self._contexts(prompt) for a in answers]

    def has_room(self, example: Example) -> bool:
        """Whether each answer leaves at least one token of the context for its question."""
        return all(len(self._answer(text)) < self.context for text in example.answers)

    def _answer(self, text: str) -> list[int]:
        space = " " if self.prefix_space and not text.startswith(" ") else ""
        return self._encode(space + text)

    def _fit(self, context: list[int], answer: list[int], where: str) -> Candidate:
        room = self.context - len(answer)
        if not context or not answer:
            what = "nothing of the question or of an answer is left as tokens"
            raise UserError(what, where, "correct the row, or use another tokenizer")
        if room < 1:
            raise UserError(
                f"the answer on {where} leaves no room for its question",
                f"{len(answer)} tokens",
                f"leave the row out, or use a model with a context beyond {self.context}",
            )
        return Candidate(context[-room:], answer, max(0, len(context) - room))

    def question(self, prompt: Prompt, max_tokens: int) -> Candidate:
        """What a generation task begins with, cut from the left to leave room for an answer."""
        room = self.context - max_tokens
        if room < 1:
            raise UserError(
                "the longest answer leaves no room for a question",
                f"{max_tokens} tokens",
                f"use a model with a context beyond {self.context}",
            )
        (context,) = self._contexts(prompt)
        if not context:
            where = f"line {prompt.example.line}"
            raise UserError("nothing of the question is left as tokens", where, "correct the row")
        return Candidate(context[-room:], [], max(0, len(context) - room))

    def decode(self, ids: list[int]) -> str:
        """Generated text, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text if self.prefix_space else " " + text

    def longest_answer(self, task: Task, examples: Sequence[Example]) -> int:
        """Tokens to generate: those of the longest answer or alias of the file, tokenised as the
        tokenizer does by itself, special tokens included; 10 more with a chain of thought."""
        texts = {
            example.chain_of_thought + task.cot_delimiter + answer
            for example in examples
            for answer in (*example.answers, *example.aliases)
        }
        longest = max(len(self.tokenizer.encode(text)) for text in texts)
        return longest + (10 if task.cot_delimiter else 0)
