"""The fewest bytes within a bound on the held-out loss: measured, kept, and never half-made."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from convert.quantize.command import main
from mlx_hmem import load
from mlx_hmem.config import HmemConfig
from mlx_hmem.evaluate import perplexity
from mlx_hmem.evaluate.perplexity import document_losses
from mlx_hmem.memory import FetchedMemory
from tests.convert.test_convert_quantize import FFN, make, report_of
from tests.convert.test_convert_quantize_faults import KILLED
from tests.helpers.places import bytes_of
from tests.helpers.programs import assert_refused, process, refused, run
from tests.helpers.write_bank import write_bank

# Blocks of several pages: fewer bits would save nothing of a smaller one.
CONFIG = replace(FFN, r=(192, 0, 96))
BOUNDS = (0.0001, 0.001, 0.01, 0.1, 0.5)


def learned(folder: Path, texts: list[str]) -> dict[tuple[int, int], mx.array]:
    """Blocks that know the texts, so that whatever is rounded off them is missed."""
    model, rng = load(folder), np.random.default_rng(0)
    keys = [
        (0, 0),
        *((level, c) for level in (1, 3) for c in range(CONFIG.num_clusters[level - 1])),
    ]
    blocks = {
        str(key): mx.array(rng.normal(0, 0.05, CONFIG.block_shape(key[0])).astype(np.float32))
        for key in keys
    }
    rows = [mx.array([model.tokenizer.encode(text)]) for text in texts]
    paths = model.retriever.route_many(texts)

    def loss(blocks: dict[str, mx.array]) -> mx.array:
        total = mx.array(0.0)
        for ids, path in zip(rows, paths, strict=True):
            on_path = tuple(blocks.get(str(key)) for key in enumerate(path, 1))
            for memory in (on_path, (blocks[str((0, 0))],)):
                attached = model.with_rows(model.rows_of([FetchedMemory(memory, CONFIG)]))
                total += nn.losses.cross_entropy(attached(ids[:, :-1]), ids[:, 1:]).mean()
        return total

    adam, step = optim.Adam(0.02), mx.value_and_grad(loss)
    for _ in range(20):
        blocks = adam.apply_gradients(step(blocks)[1], blocks)
        mx.eval(blocks)
    return {key: blocks[str(key)] for key in keys}


def save(folder: Path, blocks: dict[tuple[int, int], mx.array]) -> None:
    hmem = HmemConfig.from_file(folder / "hmem.json")
    levels = [[blocks.get((n, c)) for c in range(k)] if CONFIG.r[n - 1] else None
              for n, k in enumerate(CONFIG.num_clusters, 1)]  # fmt: skip
    shutil.rmtree(folder / "bank")
    hashes = dict(anchor_hash=hmem.anchor_hash, tree_hash=hmem.retriever.tree_hash)
    write_bank(folder / "bank", CONFIG, levels, blocks.get((0, 0)), **hashes)


@pytest.fixture(scope="module")
def short(texts) -> list[str]:
    return [text[:150] for text in texts[:8]]  # each fits the context


@pytest.fixture(scope="module")
def held_out(short, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    return file


@pytest.fixture(scope="module")
def blocks(model_folder, short, tmp_path_factory) -> dict[tuple[int, int], mx.array]:
    return learned(make(model_folder, tmp_path_factory.mktemp("m") / "model", CONFIG), short)


@pytest.fixture(scope="module")
def taught(model_folder, blocks, tmp_path_factory) -> Path:
    """A model whose memories know the held-out text; for reading only."""
    folder = make(model_folder, tmp_path_factory.mktemp("taught") / "model", CONFIG)
    save(folder, blocks)
    return folder


@pytest.fixture(scope="module")
def reports(taught, held_out, tmp_path_factory) -> dict[float, dict]:
    """What was found for each of the bounds, and where."""
    found, place = {}, tmp_path_factory.mktemp("found")
    for bound in BOUNDS:
        words = [taught, place / str(bound), "--text", held_out, "--max-loss", bound, "--json"]
        found[bound] = json.loads(run(main, *words).out)
    return found


def kept_of(report: dict, memory: str) -> dict:
    (kept,) = [c for c in report["search"]["curve"] if c["memory"] == memory and c["kept"]]
    return kept


@pytest.mark.parametrize("memory", ["fetched", "generic"])
def test_the_bound_is_kept_and_a_tighter_one_never_gives_fewer_bytes(reports, memory):
    kept = [kept_of(reports[bound], memory) for bound in BOUNDS]
    for bound, each in zip(BOUNDS, kept, strict=True):
        assert each["rise"] <= bound * (each["loss"] - each["rise"])
    sizes = [each["bytes"] for each in kept]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    # Nothing that was measured to keep the bound has fewer bytes.
    for bound, each in zip(BOUNDS, kept, strict=True):
        curve = [c for c in reports[bound]["search"]["curve"] if c["memory"] == memory]
        least = bound * (curve[0]["loss"])
        assert each["bytes"] == min(c["bytes"] for c in curve if c["rise"] <= least)


def test_the_bank_that_is_written_loses_what_the_curve_says(reports, taught, short, held_out):
    for report in reports.values():
        out, kept = load(report["model"]), []
        for memory in ("fetched", "generic"):
            each = kept_of(report, memory)
            loss = math.log(perplexity(out, short, memory, progress=False).per_token)
            assert loss == pytest.approx(each["loss"], rel=1e-4)
            kept.append(each)
        forms = [form for each in kept for form in each["forms"]]
        written = [q.to_dict() for q in out.bank.manifest.quantization]
        assert written == sorted(forms, key=lambda form: form["level"])
        levels = report["bank"]["levels"]
        assert sum(k["bytes"] for k in kept) == sum(level["bytes_after"] for level in levels)


def test_every_line_of_the_curve_is_what_a_bank_of_that_form_loses(
    reports, taught, short, tmp_path
):
    """Without writing one; the errors are those of pairs by document."""
    curve = reports[0.01]["search"]["curve"]
    before = document_losses(load(taught), short, "fetched", progress=False)
    for number, each in enumerate((curve[3], curve[-1], *curve[6:9])):
        words = [f"{f['level']}:affine:{f['bits']}:{f['group_size']}" for f in each["forms"]]
        options = [word for form in words for word in ("--bank-level", form)]
        main([str(taught), str(tmp_path / str(number)), *options])
        after = document_losses(load(tmp_path / str(number)), short, each["memory"], progress=False)
        assert after.nats.sum() / after.tokens.sum() == pytest.approx(each["loss"], rel=1e-4)
        if each["memory"] == "fetched":
            rises = after.nats - before.nats
            mean = rises.sum() / before.tokens.sum()
            squares = np.square(rises - mean * before.tokens).sum() * len(short) / (len(short) - 1)
            error = math.sqrt(squares) / before.tokens.sum()
            assert each["rise"] == pytest.approx(mean, rel=0.01, abs=1e-6)
            assert each["rise_error"] == pytest.approx(error, rel=0.01, abs=1e-6)


def test_the_table_has_a_line_for_each_candidate_and_a_short_text_a_warning(
    reports, taught, held_out, tmp_path
):
    said = run(main, taught, tmp_path / "out", "--text", held_out, "--max-loss", "1%")
    curve = reports[0.01]["search"]["curve"]
    assert sum(" kept\n" in line + "\n" for line in said.out.split("\n")) == 2
    for each in curve:
        (line,) = [x for x in said.out.split("\n") if f"{each['bytes']:,}" in x and
                   f"{each['loss']:.5f}" in x and f"{each['rise']:+.5f}" in x]  # fmt: skip
        for form in each["forms"]:
            assert f"affine {form['bits']}, {form['group_size']}" in line
    for each in (kept_of(reports[0.01], memory) for memory in ("fetched", "generic")):
        rise = f"{each['rise'] / (each['loss'] - each['rise']):+.3%}, standard error"
        assert rise in said.err
    assert bytes_of(tmp_path / "out") == bytes_of(Path(reports[0.01]["model"]))


def test_one_document_has_no_standard_error(taught, short, tmp_path, capsys):
    (tmp_path / "one.txt").write_text(short[0])
    words = ["--text", tmp_path / "one.txt", "--max-loss", "5%"]
    report = report_of(capsys, taught, tmp_path / "out", *words)
    assert {each["rise_error"] for each in report["search"]["curve"]} == {None}


def test_levels_that_stay_out_of_the_search_stay_as_they_are(taught, held_out, tmp_path, capsys):
    half, out = tmp_path / "half", tmp_path / "out"
    words = ["--text", held_out, "--max-loss", "20%"]
    report_of(capsys, taught, half, *words, "--bank-level", "3:none", "--bank-level", "0:none")
    assert [q.level for q in load(half).bank.manifest.quantization] == [1]
    report_of(capsys, half, out, *words)  # level 1 is quantised already
    for name in ("bank/level-1.00000.safetensors", "model.safetensors"):
        assert (out / name).read_bytes() == (half / name).read_bytes()
    assert [q.level for q in load(out).bank.manifest.quantization] == [0, 1, 3]
    again = ["--text", held_out, "--max-loss", "50%"]
    refused("no level of the bank", main, [str(w) for w in (out, tmp_path / "two", *again)])


def test_one_document_has_no_error_and_none_is_refused(taught, held_out, tmp_path):
    """It was said to be nan %; a text without text was measured as if none had been given."""
    (tmp_path / "one.txt").write_text(held_out.read_text()[:200])
    (tmp_path / "none.txt").write_text(" \n")
    given = ["--text", tmp_path / "one.txt", "--max-loss", "50%"]
    said = run(main, taught, tmp_path / "out", *given)
    assert "one document has no error" in said.err
    for options in (["--bank-bits", "4"], ["--max-loss", "50%"]):
        words = [taught, tmp_path / "no", *options, "--text", tmp_path / "none.txt"]
        refused("there is no text to score", main, [str(word) for word in words])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("no.")]


def test_a_level_of_which_the_text_reads_only_zeros_stays_as_it_was(
    model_folder, blocks, held_out, tmp_path
):
    source = make(model_folder, tmp_path / "model", CONFIG)
    save(source, {key: b for key, b in blocks.items() if key != (0, 0) and key[0] != 1})
    said = run(main, source, tmp_path / "out", "--text", held_out, "--max-loss", "10%")
    assert "level 1 stays as it was" in said.err
    assert "the generic memory stays as it was" in said.err
    assert [q.level for q in load(tmp_path / "out").bank.manifest.quantization] == [3]


def test_a_run_killed_anywhere_ends_as_one_that_was_not(reports, taught, held_out, tmp_path):
    whole, out = bytes_of(Path(reports[0.01]["model"])), tmp_path / "out"
    part, seen, kept = tmp_path / "out.part", set(), {}
    options = ["--text", held_out, "--max-loss", "0.01"]
    for moment in (5, 12, 12):  # files, counted from where the run before was killed
        killed = process("-c", KILLED, moment, taught, out, *options)
        assert killed.status == -signal.SIGKILL
        assert not out.exists()
        notes = {n.name: n.stat().st_ino for n in (part / "bank" / "notes").glob("loss.*")}
        assert kept.items() <= notes.items()  # nothing is measured again
        kept = notes
        seen.add((len(notes), len(list(part.rglob("*.safetensors")))))
    assert len(seen) == 3
    main([str(taught), str(out), *map(str, options)])
    assert bytes_of(out) == whole
    assert not part.exists()


def test_another_bound_does_not_go_on_with_what_is_left(reports, taught, held_out, tmp_path):
    out, options = tmp_path / "out", ["--text", held_out, "--max-loss"]
    process("-c", KILLED, 30, taught, out, *options, "0.5")
    assert list(tmp_path.glob("out.part/bank/*.safetensors"))
    main([str(taught), str(out), *map(str, options), "0.01"])
    assert bytes_of(out) == bytes_of(Path(reports[0.01]["model"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-loss", "0.5%"], ["--max-loss needs held-out text", "--text"]),
        (["--max-loss", "0", "--text", "x.txt"], ["no share", "'0'", "0.5%"]),
        (["--max-loss", "5", "--text", "x.txt"], ["no share", "'5'", "0.5%"]),
        (["--max-loss=-1%", "--text", "x.txt"], ["no share", "'-1%'"]),
        (["--max-loss", "nan", "--text", "x.txt"], ["no share", "'nan'"]),
        (["--max-loss", "0.5 per cent", "--text", "x.txt"], ["no share", "per cent"]),
        (["--max-loss", "%", "--text", "x.txt"], ["no share", "'%'"]),
        (["--max-loss", "1%", "--text", "x.txt", "--bank-bits", "8"], ["--bank-bits", "8"]),
        (["--max-loss", "1%", "--text", "x.txt", "--bank-mode", "mxfp4"], ["--bank-mode"]),
        (["--max-loss", "1%", "--text", "x.txt", "--bank-level", "1:affine:8"], ["--bank-level"]),
        (["--max-loss", "1%", "--text", "x.txt", "--bank-dtype", "bfloat16"], ["--bank-dtype"]),
        (["--max-loss", "1%", "--text", "x.txt", "--anchor-bits", "8"], ["--anchor-bits", "first"]),
        (["--max-loss", "1%", "--text", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(taught, tmp_path, options, words):
    said = run(main, taught, tmp_path / "out", *options)
    assert_refused(said, *words)
    assert not os.listdir(tmp_path)


def test_a_bank_that_fewer_bits_do_not_make_smaller_is_refused(wide, held_out, tmp_path):
    words = [wide, tmp_path / "out", "--text", held_out, "--max-loss", "1%"]
    assert_refused(run(main, *words), "no level of the bank", "[0, 1, 3]")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(shutil.copytree(wide, tmp_path / "anchor") / "bank")
    (tmp_path / "anchor" / "hmem.json").unlink()
    words[0] = tmp_path / "anchor"
    assert_refused(run(main, *words), "no memory bank", "leave out --max-loss")


def test_a_form_in_which_little_is_left_of_a_block_is_not_chosen(
    model_folder, blocks, held_out, tmp_path, capsys
):
    """In 3 bits most of a group becomes zeros beside one value that is 15 times as large."""
    source = make(model_folder, tmp_path / "model", CONFIG)
    spiked = np.zeros(CONFIG.block_shape(0), np.float32)
    spiked[..., :56], spiked[..., 63] = 0.0068, 0.1
    save(source, blocks | {(0, 0): spiked})
    words = ["--text", held_out, "--max-loss", "99%"]
    curve = report_of(capsys, source, tmp_path / "out", *words)["search"]["curve"]
    *_, last, lost = [each for each in curve if each["memory"] == "generic"]
    assert (lost["forms"][0]["bits"], lost["loss"], lost["rise"]) == (3, None, None)
    assert (last["forms"][0]["bits"], last["kept"]) == (4, True)
