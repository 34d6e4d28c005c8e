"""The documents of these tests are few, and lie in several clusters all the same, as many do."""

from collections.abc import Iterator

import pytest

from train.remember import plan
from train.remember.plan import branching_for
from train.remember.sync import renewal


def several(windows: int, tokens: int, deeper: tuple[int, ...] | None) -> tuple[int, ...]:
    """As if their windows were long, and two clusters of level 1 at least."""
    first, *others = branching_for(windows, 10**9, deeper)
    return (max(2, first), *others)


@pytest.fixture(scope="package", autouse=True)
def _several_clusters() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (plan, renewal):
            patch.setattr(module, "branching_for", several)
        yield
