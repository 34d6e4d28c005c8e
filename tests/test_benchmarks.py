"""The benchmarks of the memory bank measure what they say: bytes, ways of reading, topics."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import copying
from benchmarks.common.counting import CAN_DROP, HEATS, disk_bytes, evict, io_counts, timed
from benchmarks.common.models import (
    BITS,
    Bits,
    R,
    file_parts,
    keys_of,
    make_bank,
    paper_config,
    random_texts,
    random_tree,
    sibling,
    spread_paths,
    write_anchor,
)
from benchmarks.common.show import benchmark, draw, shown
from benchmarks.fetch import topics
from benchmarks.fetch.path import byte_counts, fetch_times, first_of_process
from benchmarks.fetch.raw_reads import COLD_WAYS, DIRECT, PLAIN, RawReader, Way, fastest_ways
from benchmarks.own.documents import is_right, make_documents
from mlx_hmem.anchors.openlm import PRESETS, ModelArgs
from mlx_hmem.bank import Bank
from mlx_hmem.config import MemoryConfig
from mlx_hmem.evaluate.perplexity import document_losses
from mlx_hmem.model.load import load

# Blocks of 12, 6 and 3 pages of 16 KiB, and one level without memory.
TINY = MemoryConfig(512, 4, (16, 8, 4, 0), (3, 2, 2, 2))


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A tiny bank with values in two paths and the siblings of the first."""
    folder = tmp_path_factory.mktemp("bank")
    paths = spread_paths(TINY, 2)
    paths += [sibling(TINY, paths[0], level) for level in (1, 2, 3)]
    return SimpleNamespace(
        folder=folder, paths=paths, manifest=make_bank(folder, TINY, keys_of(TINY, paths))
    )


def asked_for(work) -> int:
    """Bytes that ``work`` asks of files, by the kernel's count."""
    before = io_counts()["rchar"]
    own = io_counts()["rchar"] - before
    start = io_counts()["rchar"]
    work()
    return io_counts()["rchar"] - start - own


def test_the_banks_have_the_papers_sizes():
    sizes = {anchor: paper_config(anchor) for anchor in R}
    billions = {anchor: round(c.bank_parameters / 1e9, 1) for anchor, c in sizes.items()}
    assert billions == {"openlm-160m": 4.6, "openlm-410m": 12.7, "openlm-1b": 21.1}
    fetched = [round(c.fetched_parameters / 1e6) for c in sizes.values()]
    assert fetched == [18, 50, 153]


def test_a_sibling_shares_the_levels_above_and_no_other():
    for path in spread_paths(TINY, 5):
        for level in (1, 2, 3):
            other = TINY.check_path(sibling(TINY, path, level))
            assert other[: level - 1] == path[: level - 1]
            assert all(a != b for a, b in zip(other[level - 1 :], path[level - 1 :], strict=True))


def test_the_parts_worked_out_from_the_manifest_are_the_blocks(bank):
    keys = sorted(keys_of(TINY, bank.paths))
    parts = file_parts(bank.folder, bank.manifest, keys)
    with Bank.open(bank.folder) as opened:
        for key, part in zip(keys, parts, strict=True):
            stored = opened.stored(*key).buffers[0]
            assert part.nbytes == stored.nbytes
            with open(part.file, "rb") as file:
                file.seek(part.offset)
                assert file.read(part.nbytes) == bytes(memoryview(stored).cast("B"))
            assert np.any(np.array(stored))


@pytest.mark.parametrize("way", [*dict.fromkeys([*COLD_WAYS, Way(2, 4096), PLAIN])], ids=str)
def test_every_way_of_reading_reads_the_same_bytes(bank, way):
    parts = file_parts(bank.folder, bank.manifest, sorted(keys_of(TINY, bank.paths[:2])))
    wanted = [part.file.read_bytes()[part.offset :][: part.nbytes] for part in parts]
    try:
        reader = RawReader(parts, way)
    except OSError as error:
        pytest.skip(f"this file system refuses {DIRECT}: {error}")
    with reader:
        reader.read()
        assert reader.data() == wanted


def test_a_fetch_reads_its_blocks_and_not_a_byte_more(bank):
    size = 2 * TINY.fetched_parameters
    result = byte_counts(bank.folder, bank.paths)
    assert (result["block_bytes"], result["bytes_by_reader"]) == (size, size)
    if "rchar_by_kernel" in result:
        assert result["rchar_by_kernel"] == size


@pytest.mark.skipif(not CAN_DROP, reason="pages can be dropped, and reads counted, on Linux only")
def test_an_evicted_block_comes_from_the_disk_and_a_second_time_it_does_not(bank):
    parts = file_parts(bank.folder, bank.manifest, sorted(keys_of(TINY, bank.paths[:1])))
    probe = {parts[0].file}
    evict(probe)
    before = disk_bytes()
    parts[0].file.read_bytes()
    if disk_bytes() == before:
        pytest.skip("the temporary folder is in memory")
    for way in (Way(2, 16384, hints=True), PLAIN):
        with RawReader(parts, way) as reader:
            evict({part.file for part in parts})
            assert timed(reader.read).disk_bytes >= 2 * TINY.fetched_parameters
            assert timed(reader.read).disk_bytes == 0
    with Bank.open(bank.folder, cache_bytes=0) as opened:
        evict({part.file for part in parts})
        cold = timed(lambda: opened.fetch(bank.paths[0]))
        assert cold.disk_bytes == 2 * TINY.fetched_parameters
        assert timed(lambda: opened.fetch(bank.paths[0])).disk_bytes == 0


@pytest.mark.skipif(not CAN_DROP, reason="reads are counted on Linux only")
def test_a_change_of_topic_reads_only_the_levels_that_differ(bank):
    level = {n: 2 * int(np.prod(TINY.block_shape(n))) for n in (1, 2, 3)}
    wanted = {
        "levels": level[1] + level[2] + level[3],
        "same_level_1": level[2] + level[3],
        "same_levels_1_2": level[3],
    }
    changes = topics.changes_of_levels(bank.folder, TINY, bank.paths[0])
    for name, change in changes.items():
        with topics.at_topic(change) as opened:
            assert asked_for(lambda: opened.blocks(change.keys)) == wanted[name]  # noqa: B023
            assert [level for level, _ in change.keys] == [1, 2, 3]


def test_the_flat_banks_are_of_the_same_size_and_share_nothing_between_topics(tmp_path):
    config = MemoryConfig(512, 2, (12, 8, 4), (4, 4, 4))
    cases = topics.Cases(tmp_path, None, config, num_topics=2)
    for name in ("flat", "scattered"):
        with Bank.open(tmp_path / name) as opened:
            assert opened.config.bank_parameters == pytest.approx(config.bank_parameters, rel=0.1)
    used = [set(c.keys) | set(c.before) for some in cases.changes for c in [some["flat"]]]
    assert used[0].isdisjoint(used[1])
    for some in cases.changes:
        for name in ("flat", "flat_scattered", "levels"):
            with topics.at_topic(some[name]) as opened:
                start = opened.bytes_read
                opened.blocks(some[name].keys)
                assert opened.bytes_read - start == 2 * config.fetched_parameters
    assert sum(part.nbytes for part in cases.scattered[0]) == 2 * config.fetched_parameters


def test_the_times_have_every_row_that_the_tables_and_pictures_show(bank, tmp_path):
    counts = {"a bank": byte_counts(bank.folder, bank.paths)}
    result = {"machine": "a machine", "versions": "versions", "bytes": counts}
    for heat in HEATS:
        way, rows = fetch_times(bank.folder, bank.paths[:2], heat, repeats=2)
        assert way in {str(way) for way in COLD_WAYS}
        assert rows["raw"]["ms"] <= rows["raw_plain"]["ms"]
        rows["first_of_process"] = {"ms": first_of_process(bank.folder, bank.paths[0], heat)}
        result[heat] = rows
    table = shown(json.loads(json.dumps(result)))
    for label in ("later", "first of process", "in float32", "copy fresh", "bytes by reader"):
        assert f"\n{label} " in table
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `plot`, is missing")
    draw(result, ("ms", "of_copy"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_function_takes_are_the_options_of_the_program(monkeypatch, capsys):
    def measure(
        models: Sequence[Path],
        *,
        text: Path,
        bits: Sequence[Bits] = BITS,
        repeats: int = 3,
        most: int | None = None,
    ):
        print("what a program says that is called")
        return {"given": [len(models), text.name, list(bits), repeats, most]}

    def run(*words):
        monkeypatch.setattr("sys.argv", ["benchmark", *words])
        benchmark("What it is.", {"part": measure})
        return capsys.readouterr()

    said = run("part", "a", "b", "--text", "of/c", "--bits", "8", "4", "--most", "7", "--json")
    assert json.loads(said.out)["given"] == [2, "c", [8, 4], 3, 7]
    assert "is called" in said.err
    assert "given: 1, c, 16, 8, 4, 3, –" in run("part", "a", "--text", "c").out
    for wrong in (["part", "a"], ["part", "a", "--text", "c", "--bits", "3"], ["other"]):
        with pytest.raises(SystemExit, match="2"):
            run(*wrong)
        assert capsys.readouterr().err.startswith("error: ")


def test_the_fastest_ways_are_sorted_out_of_those_that_were_tried(bank):
    parts = file_parts(bank.folder, bank.manifest, sorted(keys_of(TINY, bank.paths[:1])))
    ways = fastest_ways(parts, "warm", rounds=1, keep=3)
    assert len(set(ways)) == 3
    assert not any(way.direct or way.hints for way in ways)


def test_random_texts_spread_over_the_random_tree():
    vectors = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    tree = random_tree(vectors, (4, 4))
    assert len({tuple(path) for path in tree.route_batch(vectors).tolist()}) > 8
    assert random_texts(3, 50, seed=1) == random_texts(3, 50, seed=1)
    assert [len(text.split()) for text in random_texts(3, 50, seed=1)] == [50] * 3


def test_growth_is_counted_after_the_warm_up_in_fifths():
    flat = topics.growth([(9, 1)] * 10 + [(100 + i % 2, 7) for i in range(50)], warm_up=10)
    assert list(flat["mean_resident_bytes"].values()) == [100] * 5
    assert list(flat["most_resident_bytes"].values()) == [101] * 5
    assert list(flat["open_files"].values()) == [7] * 5
    grown = topics.growth([(i * 10**6, i) for i in range(60)], warm_up=10)
    assert list(grown["open_files"].values()) == [19, 29, 39, 49, 59]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_anchor_of_zeros_is_a_whole_one(tmp_path, monkeypatch, dtype):
    tiny = ModelArgs("openlm", 32, 2, 64, 2, 16, vocab_size=64, max_position_embeddings=32)
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    write_anchor(tmp_path, "tiny", dtype)
    model = load(tmp_path)
    assert model.tokenizer.encode("w20 w7 w9") == [20, 7, 9]
    pieces = list(model.stream("w20 w7 w9", max_tokens=2, memory="none"))
    assert (pieces[-1].prompt_tokens, pieces[-1].token) == (3, 0)
    assert str(model.anchor.model.norm.weight.dtype).endswith(dtype)


def test_a_repeated_token_is_one_whose_pair_stood_before():
    assert copying.repeated([5, 1, 2, 1, 2, 3, 1, 2]).tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert copying.repeated([4, 4, 4, 4]).tolist() == [0, 1, 1]


def test_losses_of_repeated_and_new_tokens_make_the_models_perplexity():
    model = load()
    texts = ["Iron is iron. The atomic number of iron is 26.", "A town in Iron County.", "Rain."]
    rows = [model.tokenizer.encode(text) for text in texts]
    sums = copying.measure(model, texts, rows)
    losses = document_losses(model, texts, "fetched", progress=False)
    np.testing.assert_allclose(sums[:, 0, 0], losses.nats, rtol=1e-5)
    np.testing.assert_allclose(sums[:, 1] + sums[:, 2], sums[:, 0])
    assert sums[0, 1, 1] > 0
    first, second = copying.compare([sums, sums + [[[0, 0], [0, 0], [0.5, 0]]] * 3])
    assert first["all"]["tokens"] == losses.tokens.sum()
    assert second["repeated"]["per_cent"] == 0
    assert second["new"]["per_cent"] > 0


def test_invented_documents_say_what_is_asked_and_no_two_have_one_name():
    documents, questions = make_documents(60, 3)
    assert documents == make_documents(60, 3)[0]
    assert len({document.title for document in documents}) == 60
    assert len(questions) == 5 * 60
    for question in questions:
        text, own = documents[question.document].text, question.prompts["own words"]
        assert text.startswith(f"{own} {question.answer}")
        name = max(documents[question.document].title.split(), key=len)
        assert all(name in question.prompts[way] for way in ("another wording", "question"))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" A badger.\nQuestion", True),
        ("\n\nthe Badger", True),
        ("badgers", False),
        (" I know\n a badger", False),
        ("\n", False),
    ],
)
def test_an_answer_counts_if_its_first_line_says_it(said, right):
    assert is_right(said, "badger") is right
