"""A quantisation that is stopped, refused or fed damaged files leaves nothing that looks whole."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from convert.quantize.command import main
from mlx_hmem import load
from mlx_hmem.config import HmemConfig
from mlx_hmem.files import save_safetensors
from tests.conftest import edit_json
from tests.convert import test_convert_quantize as quantized
from tests.helpers import programs
from tests.helpers.places import bytes_of
from tests.helpers.programs import process
from tests.helpers.write_bank import write_bank

KILLED = """
import os, signal, sys
from convert.quantize import command as quantize
moment, rename = int(sys.argv[1]), os.replace
def counted(*names):
    global moment
    moment -= 1
    if moment == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)
os.replace = counted
quantize.main(sys.argv[2:])
"""


def test_a_run_killed_at_any_file_ends_as_one_that_was_not(wide, tmp_path):
    options = [*quantized.ANCHOR_OPTIONS, *quantized.MIXED_OPTIONS]
    main([str(wide), str(tmp_path / "whole"), *options])
    out, part = tmp_path / "out", tmp_path / "out.part"
    stages, kept = set(), {}
    for moment in (1, 10, 10):  # files, counted from where the run before was killed
        killed = process("-c", KILLED, moment, wide, out, *options)
        assert killed.status == -signal.SIGKILL
        assert not out.exists()
        files = {str(f.relative_to(part)) for f in part.rglob("*.safetensors")}
        assert kept.items() <= {n: (part / n).stat().st_ino for n in kept}.items()
        noted = {f.stem for f in (part / "bank" / "notes").glob("*.json")}
        kept = {f"bank/{name}": (part / "bank" / name).stat().st_ino for name in noted}
        stages.add(len(files))
    assert len(stages) > 1
    cut = part / sorted(kept)[0]  # by somebody else, meanwhile: that one is made anew
    os.truncate(cut, cut.stat().st_size // 2)
    assert kept.pop(f"bank/{cut.name}")
    assert kept
    main([str(wide), str(out), *options])
    assert {n: (out / n).stat().st_ino for n in kept} == kept  # not written again
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert os.listdir(tmp_path).count("out.part") == 0


def refused(arguments: list[object], *words: str) -> None:
    text = programs.refused("", main, [*map(str, arguments)])
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["nothing to quantise", "--anchor-bits"]),
        (["--bank-level", "1:none"], ["nothing to quantise"]),
        (["--anchor-bits", "7"], ["bits", "7"]),
        (["--anchor-bits", "0"], ["bits", "0"]),
        (["--anchor-mode", "int4"], ["mode", "int4", "mxfp4"]),
        (["--anchor-bits", "4", "--anchor-group-size", "128"], ["no matrix", "128"]),
        (["--bank-bits", "8", "--bank-group-size", "128"], ["128", "width 64"]),
        (["--bank-mode", "mxfp4", "--bank-bits", "8"], ["mxfp4", "bits", "8"]),
        (["--bank-level", "2:affine"], ["levels that have memory", "[0, 1, 3]"]),
        (["--bank-level", "7:affine"], ["levels that have memory"]),
        (["--bank-level", "1"], ["LEVEL:MODE"]),
        (["--bank-level", "x:affine"], ["LEVEL:MODE"]),
        (["--bank-level", "1:affine:four"], ["LEVEL:MODE"]),
        (["--bank-level", "1:affine", "--bank-level", "1:none"], ["twice"]),
        (["--bank-dtype", "int8"], ["dtype", "int8", "bfloat16"]),
        (["--bank-bits", "4", "--text", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--bank-bits", "4", "--text", "nowhere.txt"], ["nowhere.txt"]),
        (["--bank-bits", "four"], ["wrong command line"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(wide, tmp_path, options, words):
    refused([wide, tmp_path / "out", *options], *words)
    assert not os.listdir(tmp_path)


def test_what_is_quantised_already_is_refused_by_name(wide, tmp_path):
    main([str(wide), str(tmp_path / "one"), *quantized.ANCHOR_OPTIONS, *quantized.MIXED_OPTIONS])
    out = tmp_path / "two"
    refused([tmp_path / "one", out, "--anchor-bits", 8], "anchor is quantised already", "affine")
    words = ["generic memory", "already", "affine 8 bits", "0:none"]
    refused([tmp_path / "one", out, "--bank-bits", 8], *words)
    refused([tmp_path / "one", out, "--bank-level", "1:mxfp8"], "level 1", "already", "mxfp4")
    refused([tmp_path / "one", out, "--bank-dtype", "bfloat16"], "keeps its dtype")
    assert not out.exists()
    # The level that is not can still be, and the rest is the same bytes.
    main([str(tmp_path / "one"), str(out), "--bank-level", "3:nvfp4"])
    for name in ("model.safetensors", "bank/level-1.00000.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    load(out)


def test_a_place_that_is_taken_or_no_model_is_refused(wide, tmp_path):
    main([str(wide), str(tmp_path / "out"), "--bank-bits", "8"])
    refused([wide, tmp_path / "out", "--bank-bits", 4], "exists", "--overwrite")
    main([str(wide), str(tmp_path / "out"), "--bank-bits", "4", "--overwrite"])
    assert load(tmp_path / "out").bank.manifest.quantization_of(1).bits == 4
    refused([wide, wide, "--bank-bits", 4, "--overwrite"], "source")
    refused([tmp_path, tmp_path / "other", "--anchor-bits", 4], "config.json")
    refused([tmp_path / "nothing", tmp_path / "other", "--anchor-bits", 4], "nothing")
    assert load(wide).bank is not None


def test_parts_that_do_not_belong_together_are_not_tied_anew(wide, tmp_path):
    source = Path(shutil.copytree(wide, tmp_path / "model"))
    weights = {n: w + 0.01 for n, w in quantized.weights_of(wide).items()}
    save_safetensors(source / "model.safetensors", weights)
    refused([source, tmp_path / "out", *quantized.ANCHOR_OPTIONS], "anchor is not the one")
    shutil.copytree(wide, source, dirs_exist_ok=True)
    edit_json(source / "tokenizer.json", lambda t: t.update(added_tokens=[]))
    refused([source, tmp_path / "out", "--bank-bits", 8], "tokenizer is not the one")
    (source / "tokenizer.json").unlink()
    os.mkfifo(source / "tokenizer.json")  # it was left out, and the copy called whole
    refused([source, tmp_path / "out", "--bank-bits", 8], "not a file", "tokenizer.json")
    (source / "tokenizer.json").unlink()
    shutil.copytree(wide, source, dirs_exist_ok=True)
    os.mkfifo(source / "bank" / "documents.jsonl")
    refused([source, tmp_path / "out", "--bank-bits", 8], "not a file", "documents.jsonl")
    (source / "bank" / "documents.jsonl").unlink()
    edit_json(source / "bank" / "bank.json", lambda b: b.update(tree_hash="xxh3:other"))
    refused([source, tmp_path / "out", *quantized.ANCHOR_OPTIONS], "tree")
    (source / "hmem.json").unlink()
    refused([source, tmp_path / "out", "--bank-bits", 8], "hmem.json")
    refused([source, tmp_path / "out", "--anchor-bits", 8], "hmem.json")
    shutil.rmtree(source / "bank")  # now it is an anchor without memory
    refused([source, tmp_path / "out", "--bank-bits", 8], "no memory bank")
    refused([source, tmp_path / "out", "--bank-level", "1:mxfp8"], "no memory bank")


def test_a_damaged_or_lost_block_is_named_and_leaves_no_model(wide, tmp_path):
    source = Path(shutil.copytree(wide, tmp_path / "model"))
    shard = source / "bank" / "level-3.00000.safetensors"
    with open(shard, "r+b") as file:
        file.seek(2 * 16_384 + 40)
        file.write(b"\xff")
    for option in ("3:affine", "1:affine"):  # whether it is quantised or stays as it is
        refused([source, tmp_path / "out", "--bank-level", option], "level 3", "1", "damaged")
        assert not (tmp_path / "out").exists()
    hmem = HmemConfig.from_file(source / "hmem.json")
    small = [1e-5 * quantized.block_of(quantized.FFN, 3, c) for c in range(12)]
    shutil.rmtree(source / "bank")
    zeros = [None] * 3
    hashes = dict(anchor_hash=hmem.anchor_hash, tree_hash=hmem.retriever.tree_hash)
    write_bank(
        source / "bank", quantized.FFN, [zeros, None, small], None, dtype="bfloat16", **hashes
    )
    refused([source, tmp_path / "out", "--bank-mode", "nvfp4"], "block 0 of level 3", "lost")
    main([str(source), str(tmp_path / "out"), "--bank-mode", "mxfp4"])
