"""A MemoryModel in EleutherAI's lm-evaluation-harness (``pip install lm-eval``, tried with 0.4.13).

From Python ``lm_eval.simple_evaluate(model=MemoryLM("MODEL_DIR"), tasks=[...])``; or the harness's
own command line with this model in it::

    mlx_hmem.evaluate harness run --model mlx_hmem --model_args model=MODEL_DIR --tasks …

The harness hands over whole prompts, examples and all, so what is the question is a guess: the
text behind the last empty line, which is what the harness puts between examples.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.scoring import (
    TOKENS_PER_BATCH,
    Candidate,
    continue_greedily,
    longest_sequence,
    one_by_one,
    score_candidates,
)
from mlx_hmem.model.fetch import check_mode
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        "lm-evaluation-harness cannot be imported", error, "pip install lm-eval"
    ) from None

ROUTE_BY = ("question", "context")
MAX_TOKENS = 256  # to generate, where a task does not say: the harness's own default


@register_model("mlx_hmem")
class MemoryLM(LM):
    """A model for the harness.

    Args:
        model: a model directory, a Hub id, or a MemoryModel.
        memory: "fetched", "generic" or "none".
        route_by: what of a prompt routes its memory: "question", what stands behind its last
            empty line, or "context", all of it.
        max_length: the longest sequence in tokens: the anchor's, at most 2,048, unless given.
        tokens_per_batch: in all rows of a batch.
        batch_size, max_batch_size, device: what the harness passes to every model; not used.
    """

    def __init__(
        self,
        model: str | MemoryModel,
        memory: str = "fetched",
        route_by: str = "question",
        max_length: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        if route_by not in ROUTE_BY:
            raise UserError("unknown route_by", repr(route_by), f"use one of {', '.join(ROUTE_BY)}")
        self.model = model if isinstance(model, MemoryModel) else load(model)
        self.memory, self.route_by = check_mode(memory), route_by
        self.max_length = longest_sequence(self.model, max_length)
        self.tokens_per_batch = tokens_per_batch
        if memory != "none":
            self.model.require_bank()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability, and whether greedy decoding gives it.

        Requests with one context after another share what is read of it. A context too long is
        cut from the left.
        """
        pairs = [request.args for request in requests]
        groups = [list(g) for _, g in groupby(range(len(pairs)), key=lambda i: pairs[i][0])]
        questions = [[self._candidate(*pairs[i]) for i in group] for group in groups]
        texts = [self._route_text(pairs[g[0]][0]) or pairs[g[0]][1] for g in groups]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for number, scores in self._score(questions, texts):
            for i, (nats, _, greedy) in zip(groups[number], scores, strict=True):
                results[i] = (-nats, greedy)
                self.cache_hook.add_partial("loglikelihood", pairs[i], results[i])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each text, in windows; the whole text routes all of them."""
        texts = [request.args[0] for request in requests]
        questions, owners = [], []
        for number, text in enumerate(texts):
            ids = self._encode(text, special=False)
            start, longest = self._start(), self.max_length
            windows = get_rolling_token_windows(ids, start, longest, context_len=1)
            for context, answer in map(make_disjoint_window, windows):
                questions.append([Candidate(context, answer)])
                owners.append(number)
        totals = [0.0] * len(texts)
        for number, scores in self._score(questions, [texts[i] for i in owners]):
            totals[owners[number]] -= scores[0].nats
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy text after each context, up to the first of its stops, which is left out."""
        results = [""] * len(requests)
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_generation(request.args[1])].append(i)
        for (stops, max_tokens), members in groups.items():
            contexts = [requests[i].args[0] for i in members]
            room = self.max_length - max_tokens
            if room < 1:
                raise UserError(
                    "too many tokens to generate", max_tokens, f"stay below {self.max_length}"
                )
            prompts = [(self._encode(c) or [self._start()])[-room:] for c in contexts]
            routed = [self._route_text(c) or c for c in contexts]
            paths = route_texts(self.model, routed, self.memory)

            def enough(ids: list[int], stops: tuple[str, ...] = stops) -> bool:
                text = self.model.tokenizer.decode(ids)
                return any(stop in text for stop in stops)

            batches = continue_greedily(
                self.model, prompts, max_tokens, self.memory, paths, self.tokens_per_batch, enough
            )
            desc = f"generating, {self.memory}"
            for number, ids in one_by_one(batches, len(members), desc, "text"):
                text = self.model.tokenizer.decode(ids, skip_special_tokens=True)
                for stop in stops:
                    text = text.split(stop)[0]
                i = members[number]
                results[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _score(self, questions: list[list[Candidate]], texts: list[str]) -> Any:
        """Scores as they come, (question, scores), under a progress bar."""
        paths = route_texts(self.model, texts, self.memory)
        budget, desc = self.tokens_per_batch, f"scoring, {self.memory}"
        batches = score_candidates(self.model, questions, self.memory, paths, budget)
        return one_by_one(batches, len(questions), desc, "question")

    def _encode(self, text: str, special: bool = True) -> list[int]:
        return list(self.model.tokenizer.encode(text, add_special_tokens=special))

    def _start(self) -> int:
        """What a text without context is predicted from."""
        start = self.model.tokenizer.bos_token_id
        return int(self.model.tokenizer.eos_token_id if start is None else start)

    def _candidate(self, context: str, continuation: str) -> Candidate:
        """Both are tokenised in one piece, as the harness's own models do."""
        ids = self._encode(context.rstrip()) or [self._start()]
        if context.strip():
            answer = self._encode(context + continuation)[len(ids) :]
        else:
            answer = self._encode(context + continuation, special=False)
        room = self.max_length - len(answer)
        if room < 1 or not answer:
            what = "a continuation is empty or leaves no room for its context"
            raise UserError(what, repr(continuation)[:60], f"stay below {self.max_length} tokens")
        return Candidate(ids[-room:], answer)

    def _route_text(self, context: str) -> str:
        if self.route_by == "context":
            return context.strip()
        return context.strip().split("\n\n")[-1].strip()


def _generation(options: Any) -> tuple[tuple[str, ...], int]:
    """Stops and number of tokens of a request's generation options."""
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise UserError("this adapter does not sample", options, "set do_sample to false")
    until = options.get("until") or []
    stops = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    count = next((options[name] for name in names if options.get(name)), MAX_TOKENS)
    return stops, int(count)


def main(words: Sequence[str]) -> None:
    """The harness's own command line, which reads ``sys.argv`` itself."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["mlx_hmem.evaluate harness", *words]
    cli_evaluate()
