"""What tree and how many passes a text gets."""

from types import SimpleNamespace
from typing import Any

import pytest

from train.remember.plan import branching_for
from train.remember.rows import STEPS, num_passes


@pytest.mark.parametrize(
    ("windows", "tokens", "branching"),
    [
        (1, 0, (1,)),
        (1, 150, (1,)),
        (30, 4500, (1,)),  # three clusters side by side knew half of what one block knows
        (100, 15_000, (3, 3)),
        (200, 5000, (1,)),  # notes of a line
        (12, 6000, (1,)),
        (60, 30_000, (5,)),
        (1000, 150_000, (13, 7)),
        (100_000, 50_000_000, (20, 21, 20)),
    ],
)
def test_a_cluster_of_level_1_has_text_enough(windows, tokens, branching):
    assert branching_for(windows, tokens, None) == branching


def test_new_clusters_beside_those_of_a_bank_have_its_lower_levels():
    assert branching_for(1, 100, (4, 2)) == (2, 4, 2)
    assert branching_for(960, 150_000, (4, 2)) == (10, 4, 2)


def settings(**given: Any) -> Any:
    return SimpleNamespace(**{"passes": None, "quick": False, "step_tokens": 320} | given)


def test_a_little_text_is_read_often_and_much_of_it_a_few_times():
    passes = [num_passes(n, settings()) for n in (10, 600, 1800, 4500, 10**6)]
    assert passes == sorted(passes, reverse=True)
    assert (passes[0], passes[-1]) == (28, 4)
    for tokens, number in zip((600, 1800), passes[1:3], strict=True):
        steps = tokens * 6 / 320  # of a pass
        assert abs(number * steps - STEPS) <= steps / 2
    assert all(num_passes(n, settings(quick=True)) < num_passes(n, settings()) for n in (10, 10**6))
    assert num_passes(10, settings(passes=3)) == 3
