"""docs/bank_format.md shows the bytes that are written, and they suffice to read a bank."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import xxhash

from mlx_hmem.bank import Bank
from tests.helpers.places import ROOT

TEXT = (ROOT / "docs" / "bank_format.md").read_text()


# Language of each fenced block, "" for the dump, and its text.
EXAMPLES = dict(re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))


def hexdump(data: bytes) -> str:
    """What ``hexdump -C`` prints."""
    lines: list[str] = []
    before, starred = b"", False
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if row == before:
            lines += [] if starred else ["*"]
            starred = True
            continue
        before, starred = row, False
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{at:08x}  {row[:8].hex(' ')}  {row[8:].hex(' ')}  |{text}|")
    return "\n".join([*lines, f"{len(data):08x}"]) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    exec(EXAMPLES["python"], {})
    return tmp_path / "bank"


def test_example_writes_the_bytes_shown(folder: Path) -> None:
    assert (folder / "bank.json").read_text() == EXAMPLES["json"]
    assert hexdump((folder / "level-1.00000.safetensors").read_bytes()) == EXAMPLES[""]


def test_a_reader_written_from_the_page_agrees_with_ours(folder: Path) -> None:
    manifest = json.loads((folder / "bank.json").read_text())
    memory, level = manifest["memory"], manifest["levels"][0]
    (shard,) = level["shards"]
    for cluster in range(2):
        with open(folder / shard["file"], "rb") as file:
            file.seek(16_384 + (cluster - shard["first_cluster"]) * level["block_stride"])
            data = file.read(level["block_bytes"])
        assert xxhash.xxh3_64_hexdigest(data) == shard["xxh3"][16 * cluster : 16 * cluster + 16]
        shape = (memory["num_hidden_layers"], 3, memory["r"][0], memory["hidden_size"])
        plain = np.frombuffer(data, "<f2").reshape(shape)
        with Bank.open(folder) as bank:
            block = bank.fetch((cluster, 2 * cluster)).blocks[0]
        assert np.array_equal(np.array(block), plain)
