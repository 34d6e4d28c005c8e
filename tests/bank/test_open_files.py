"""How many files banks hold open: macOS lets a process have 256, sockets among them, and a bank of
many shards took 128, a second one as many more, a fetch of many blocks two for each."""

import os
import resource
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.bank import Bank
from mlx_hmem.bank.read import shards
from mlx_hmem.bank.read.blocks import _read_into
from tests.helpers.hub_models import BLOCKS_PER_SHARD

FILES = Path("/proc/self/fd")
KEYS = [(3, leaf) for leaf in range(12)]


def open_shards(folder: Path) -> int:
    paths = (os.readlink(FILES / name) for name in os.listdir(FILES) if (FILES / name).exists())
    return sum(Path(path).parent == folder.resolve() for path in paths)


counted = pytest.mark.skipif(not FILES.exists(), reason="counts open files through /proc")


def test_half_of_the_files_of_a_process_at_most():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for soft, most in ((256, 128), (200, 100), (1024, 128)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
            assert shards.most_open() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@counted
def test_all_banks_together_keep_to_it_and_give_what_each_gives_alone(directory, monkeypatch):
    folder = directory / "bank"
    with Bank.open(folder) as bank:
        wanted = [np.array(block) for block in bank.blocks(KEYS)]
    monkeypatch.setattr(shards, "MOST_OPEN", 3)
    assert 12 // BLOCKS_PER_SHARD > 3
    with ExitStack() as stack:
        banks = [stack.enter_context(Bank.open(folder, cache_bytes=0)) for _ in range(3)]
        for turn in range(24):
            found = banks[turn % 3].blocks(KEYS[turn % 12 :][:2])
            assert all(map(np.array_equal, found, wanted[turn % 12 :]))
            assert 1 <= open_shards(folder) <= 3
    assert open_shards(folder) == 0


@counted
def test_a_fetch_takes_no_file_twice(directory, monkeypatch):
    most, folder = [], directory / "bank"

    def read(*given) -> int:
        most.append(open_shards(folder))
        return _read_into(*given)

    monkeypatch.setattr("mlx_hmem.bank.read.blocks._read_into", read)
    with Bank.open(folder, cache_bytes=0) as bank:
        bank.blocks(KEYS)
        assert max(most) == len(bank._sources._shards.open)


def test_a_bank_that_is_closed_while_it_is_read_ends_the_reading(directory):
    bank = Bank.open(directory / "bank", cache_bytes=0)
    with Bank.open(directory / "bank") as other:
        wanted = other.fetch((2, 5, 10)).rows
        arriving = bank.begin((2, 5, 10))
        bank.close()
        assert np.array_equal(arriving[0][0], wanted[0][0])
