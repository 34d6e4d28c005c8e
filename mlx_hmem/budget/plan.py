"""What is chosen so that a model keeps to a memory budget, from what it will take
(:mod:`mlx_hmem.budget.needs`), MLX's buffer cache and a margin.

Chosen is, in this order, what changes the numbers least: keys and values as they are, in 8 or in
4 bits; then the longest part of a prompt, of 128 tokens at least if possible; what is left keeps
blocks of the bank.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_hmem.budget.needs import STEP, Needs
from mlx_hmem.budget.resident import IMPORTS, bytes_text, give_back_freed, machine_bytes
from mlx_hmem.errors import UserError

CONTEXT = 2048  # tokens, where the anchor does not say its own
KV_BITS = (None, 8, 4)
PARTS = (2048, 1024, 512, 256, 128)  # tokens of a prompt at once
SHORT_PARTS = (64, 32)  # where nothing else fits: a device is not busy with so few
BUFFERS = 8 << 20  # bytes that MLX may keep of freed buffers, at least
MOST_BUFFERS = 64 << 20
MARGIN = 12_000_000
SHORTEST = 32  # tokens of the shortest context that is offered


@dataclass(frozen=True)
class BudgetPlan:
    """What was chosen. ``parts``: bytes by name, which add up to less than the ``budget``."""

    budget: int
    context: int
    kv_bits: int | None
    kv_group: int
    prefill_step_size: int
    parts: dict[str, int]
    cache_bytes: int = 0
    resident_levels: tuple[int, ...] = ()
    tokens_per_batch: int = 0  # of a model that scores texts
    memory_per_batch: int = 0
    rows: int = 0  # answers at once, of a server
    prompt_bytes: int = 0  # of keys and values that it keeps of prompts

    @property
    def options(self) -> dict[str, Any]:
        """For mlx-lm's ``generate_step``."""
        found: dict[str, Any] = {"prefill_step_size": self.prefill_step_size}
        if self.kv_bits is not None:
            found |= {"kv_bits": self.kv_bits, "kv_group_size": self.kv_group}
            found |= {"quantized_kv_start": 0}
        return found

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def line(self) -> str:
        """What was chosen, for people."""
        large = ((name, size) for name, size in self.parts.items() if size >= 10**6)
        parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in large)
        if self.tokens_per_batch:
            chosen = [f"batches of {self.tokens_per_batch} tokens"]
        else:
            bits = "as they are" if self.kv_bits is None else f"in {self.kv_bits} bits"
            chosen = [f"keys and values {bits}", f"prompts {self.prefill_step_size} tokens at once"]
        if self.rows:
            chosen.append(f"answers {self.rows} at once")
        if self.resident_levels:
            levels = ", ".join(map(str, self.resident_levels))
            chosen.append(f"of the bank stays what is read of level {levels}")
        more = ""
        if self.budget > machine_bytes():
            more = f", more than this machine's {bytes_text(machine_bytes())}"
        return (
            f"memory budget {bytes_text(self.budget)}{more}: {bytes_text(self.total)} planned "
            f"({parts}); context {self.context} tokens, {', '.join(chosen)}"
        )

    @property
    def wired(self) -> int | None:
        """Bytes that Metal may wire; None where there is no Metal."""
        if not mx.metal.is_available():
            return None
        most = mx.device_info()["max_recommended_working_set_size"]
        return min(self.budget - self.parts["program"], int(most))

    def apply(self) -> None:
        """Sets the limits of MLX and of the allocator."""
        give_back_freed()
        mx.set_cache_limit(self.parts["buffers"])
        mx.set_memory_limit(self.budget - self.parts["program"])
        if (wired := self.wired) is not None:
            mx.set_wired_limit(wired)


def check_context(most: int | None, context: int | None) -> int:
    """The tokens of prompt and answer together; ``most`` are those that the anchor says."""
    if context is None:
        return CONTEXT if most is None else most
    if context < 2 or (most is not None and context > most):
        known = "2 or more" if most is None else f"2 to {most}"
        raise UserError("the anchor has no such context", f"{context} tokens", f"use {known}")
    return context


def _generation(needs: Needs, context: int, bits: int | None, tokens: int) -> dict[str, int]:
    return {
        "program": needs.program,
        "anchor": needs.anchor,
        "keys and values": needs.kv(context, bits),
        "fetched memory": needs.memory,
        "arriving": needs.stored,
        "prompt": needs.part(tokens, context, bits),
        "buffers": BUFFERS,
        "margin": MARGIN,
    }


def _choices(needs: Needs, context: int) -> Iterator[tuple[int | None, int]]:
    """Bits of keys and values and tokens at once, the best first."""
    for parts in (PARTS, SHORT_PARTS):
        for bits in KV_BITS if needs.kv_group else (None,):
            for tokens in parts:
                if tokens <= max(context, SHORT_PARTS[-1]):
                    yield bits, tokens


def least_bytes(needs: Needs, context: int) -> int:
    """The smallest budget with which a context works."""
    every = (_generation(needs, context, *choice) for choice in _choices(needs, context))
    return min(sum(parts.values()) for parts in every)


def make_plan(
    needs: Needs,
    budget: int,
    context: int | None = None,
    resident_levels: tuple[int, ...] = (),
    most_cache: int = 256 << 20,
) -> BudgetPlan:
    """What to choose for generation; UserError where nothing fits, with what would."""
    length = check_context(needs.most_context, context)
    asked = sum(needs.levels.get(level, 0) for level in resident_levels)
    for bits, tokens in _choices(needs, length):
        parts = _generation(needs, length, bits, tokens)
        spare = budget - sum(parts.values()) - asked
        if spare >= 0:
            parts["buffers"] += (more := min(spare // 4, MOST_BUFFERS - BUFFERS))
            return _with_blocks(
                BudgetPlan(budget, length, bits, needs.kv_group, tokens, parts),
                needs, spare - more, resident_levels, most_cache,
            )  # fmt: skip
    shorter = (*range(SHORTEST, STEP, SHORTEST), *range(STEP, length, STEP))
    raise _too_small(budget, lambda n: least_bytes(needs, n) + asked, length, shorter)


def _with_blocks(
    plan: BudgetPlan, needs: Needs, spare: int, asked: tuple[int, ...], most_cache: int
) -> BudgetPlan:
    """Levels that fit whole stay, the coarsest first; what is left keeps the latest blocks."""
    resident, room = list(asked), spare
    for level, size in sorted(needs.levels.items()):
        if level in resident:
            continue
        # A path's other blocks must find room beside them.
        if size + needs.stored > room:
            break
        resident.append(level)
        room -= size
    kept = sum(needs.levels[level] for level in resident)
    cache = min(room, most_cache, sum(needs.levels.values()) - kept)
    parts = plan.parts | {"kept blocks": kept + cache}
    return replace(plan, parts=parts, cache_bytes=cache, resident_levels=tuple(resident))


def _too_small(
    budget: int, least: Callable[[int], int], context: int, shorter: Iterable[int]
) -> UserError:
    """What would fit: a larger budget, or one of the ``shorter`` contexts; ``least`` is the
    smallest budget of each."""
    needed = -(-least(context) // 10**6) * 10**6
    remedy = f"give at least {bytes_text(needed)} for a context of {context} tokens"
    if fitting := [n for n in shorter if n < context and least(n) <= budget]:
        remedy += f", or --context {fitting[-1]}"
    return UserError("the memory budget is too small", bytes_text(budget), remedy)


@dataclass(frozen=True)
class Serving:
    """What a server does at once, at most: ``rows`` answers, and of ``read_rows`` prompts so many
    tokens of each. ``prompt_bytes``: of keys and values that it keeps of prompts; None: half of
    what is left."""

    rows: int
    read_rows: int
    read_tokens: int
    prompt_bytes: int | None = None


def plan_serving(
    needs: Needs,
    budget: int,
    serving: Serving,
    context: int | None = None,
    most_cache: int = 256 << 20,
) -> BudgetPlan:
    """As :func:`make_plan` for a server, of fewer rows where not so many fit."""
    length = check_context(needs.most_context, context)

    def parts_of(rows: int, context: int) -> dict[str, int]:
        read = min(rows, serving.read_rows)
        parts = _generation(needs, context, None, min(serving.read_tokens, context))
        # Those of prompts that are read are there once more when they join the others.
        parts["keys and values"] *= rows + read
        # A row's memory is there three times while it is stacked with the others.
        parts["fetched memory"] *= 1 if rows == 1 else 3 * rows
        parts["arriving"] *= rows
        parts["prompt"] = read * parts["prompt"] + 16 * rows * needs.vocab_size
        parts["reload"] = needs.anchor + needs.program - IMPORTS  # of the model that takes over
        return parts | {"kept prompts": serving.prompt_bytes or 0}

    for rows in [serving.rows >> n for n in range(serving.rows.bit_length())]:
        parts = parts_of(rows, length)
        spare = budget - sum(parts.values())
        if spare >= 0:
            parts["buffers"] += (more := min(spare // 4, MOST_BUFFERS - BUFFERS))
            if serving.prompt_bytes is None:
                parts["kept prompts"] = (spare - more) // 2
            tokens, kept = min(serving.read_tokens, length), parts["kept prompts"]
            plan = BudgetPlan(budget, length, None, 0, tokens, parts, rows=rows, prompt_bytes=kept)
            return _with_blocks(plan, needs, budget - plan.total, (), most_cache)
    shorter = (*range(SHORTEST, STEP, SHORTEST), *range(STEP, length, STEP))
    raise _too_small(budget, lambda n: sum(parts_of(1, n).values()), length, shorter)


def plan_scoring(needs: Needs, budget: int, context: int | None = None) -> BudgetPlan:
    """As :func:`make_plan` for scoring texts, which takes the logits of every token of a batch."""
    length = min(check_context(needs.most_context, context), CONTEXT)

    def parts_of(tokens: int, longest: int) -> dict[str, int]:
        parts = _generation(needs, longest, None, tokens)
        parts["keys and values"] = needs.kv(tokens, None)
        parts["logits"] = 4 * 3 * tokens * needs.vocab_size
        return parts

    # A batch holds one text at least.
    for tokens in sorted({length, *(n for n in (4096, *PARTS) if n > length)}, reverse=True):
        parts = parts_of(tokens, length)
        spare = budget - sum(parts.values())
        if spare >= 0:
            rows = spare // 2  # of a batch, each with a memory of its own
            cache = min(spare - rows, 256 << 20, sum(needs.levels.values()))
            parts |= {"kept blocks": cache, "memory of more texts": rows}
            # A row's memory is there three times while it is stacked with the others.
            return BudgetPlan(
                budget, length, None, 0, tokens, parts, cache, (), tokens,
                rows // 3 + 4 * needs.fetched,
            )  # fmt: skip
    shorter = range(SHORTEST, length, SHORTEST)
    raise _too_small(budget, lambda n: sum(parts_of(n, n).values()), length, shorter)
