"""The beginnings of prompts that were read before: the anchor's keys and values of them."""

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

Beginning = tuple[Hashable, tuple[int, ...]]  # the memory it was read with, and its ids


class PromptCache:
    """At most ``most_bytes`` of keys and values, those that were used last; 0: none.

    Only whole parts of ``part`` tokens are kept, as a prompt is read in them: what is reused then
    has the bits that it would have anew. mlx-lm's own ``LRUPromptCache`` goes by tokens, takes
    seconds to see that of a few long prompts none begins alike, and a hit does not keep it.
    """

    def __init__(self, most_bytes: int, part: int):
        self.most_bytes, self._part = most_bytes, part
        self._kept: dict[Beginning, list[Any]] = {}  # the one used longest ago first
        self.nbytes = 0

    def whole(self, ids: Sequence[int]) -> int:
        """How many of the ids stand in whole parts; the last is read by itself, for the answer."""
        return (len(ids) - 1) // self._part * self._part if self.most_bytes else 0

    def find(self, memory: Hashable, ids: Sequence[int]) -> tuple[list[Any], int]:
        """A prompt cache, without its route, of as many of the first ids as were read before with
        this very memory, and how many these are; an empty list where none were."""
        ids, found, most = tuple(ids[: self.whole(ids)]), None, 0
        for each, states in self._kept.items():
            same = self._same(each[1], ids) if each[0] == memory else 0
            if same > most and (same == len(each[1]) or can_trim_prompt_cache(states)):
                found, most = each, same
        if found is None:
            return [], 0
        states = self._kept[found] = self._kept.pop(found)
        states = copy.deepcopy(states)  # the arrays are shared
        trim_prompt_cache(states, len(found[1]) - most)
        return states, most

    def keep(self, memory: Hashable, ids: Sequence[int], states: list[Any]) -> None:
        """Takes a prompt cache, without its route, of ids in whole parts."""
        size, new = _nbytes(states), (memory, tuple(ids))
        if size > self.most_bytes:
            return
        shorter = can_trim_prompt_cache(states)  # then it serves those that begin it, too
        for each in [*self._kept]:
            begins = each[0] == memory and each[1] == new[1][: len(each[1])]
            if each == new or (shorter and begins):
                self._drop(each)
        while self.nbytes + size > self.most_bytes:
            self._drop(next(iter(self._kept)))
        mx.eval([each.state for each in states])  # else they hold all of the batch
        self._kept[new] = states
        self.nbytes += size

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0

    def _drop(self, each: Beginning) -> None:
        self.nbytes -= _nbytes(self._kept.pop(each))

    def _same(self, ids: tuple[int, ...], others: tuple[int, ...]) -> int:
        """How many tokens both begin with, in whole parts."""
        most, part = min(len(ids), len(others)), self._part
        starts = range(0, most, part)
        return next((n for n in starts if ids[n : n + part] != others[n : n + part]), most)


def _nbytes(states: Sequence[Any]) -> int:
    return sum(each.nbytes for each in states)
