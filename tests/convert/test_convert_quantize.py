"""Quantising a model directory: MLX's own numbers, an honest report, nothing half-made."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model, quantize_model

from convert.quantize.command import main
from mlx_hmem import load
from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.load import (
    anchor_hash,
    anchor_of_config,
    load_anchor,
    named_parameters,
    text_hashes,
)
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.bank import Bank, stored_levels
from mlx_hmem.bank.format import num_blocks
from mlx_hmem.config import KINDS, HmemConfig, MemoryConfig
from mlx_hmem.evaluate import perplexity
from mlx_hmem.files import save_safetensors
from mlx_hmem.memory import split_block
from tests.conftest import CONTEXT, MEMORY, edit_json
from tests.helpers.places import bytes_of
from tests.helpers.programs import refused
from tests.helpers.references import of_kind
from tests.helpers.tiny_anchors import EXPERTS, GATED, LLAMA_LIKE, OTHER_KEYS, UNGATED, make_anchor
from tests.helpers.write_bank import write_bank

ARGS = ModelArgs(
    "openlm", hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=2,
    head_dim=32, vocab_size=400, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
)  # fmt: skip
SIZES = dict(hidden_size=64, intermediate_size=96, query_size=64, key_value_size=64)
FFN = replace(MEMORY, **SIZES)
# Level 2 has no memory, level 3 no option.
MIXED = {0: ("affine", 8, 32), 1: ("mxfp4", 4, 32)}
MIXED_OPTIONS = ["--bank-level", "0:affine:8:32", "--bank-level", "1:mxfp4"]
ANCHOR_OPTIONS = ["--anchor-bits", "4", "--anchor-group-size", "32"]


def block_of(config: MemoryConfig, level: int, cluster: int) -> np.ndarray:
    rng = np.random.default_rng((level, cluster))
    return rng.normal(0, 0.5, config.block_shape(level)).astype(np.float32)


def save_bank(folder: Path, config: MemoryConfig, hmem: HmemConfig) -> None:
    levels = [
        [block_of(config, level, c) if r else None for c in range(count)]
        for level, (r, count) in enumerate(zip(config.r, config.num_clusters, strict=True), 1)
    ]
    levels[0][1] = None  # a hole
    tree = hmem.retriever.tree_hash
    shutil.rmtree(folder)
    write_bank(
        folder, config, levels, block_of(config, 0, 0), anchor_hash=hmem.anchor_hash, tree_hash=tree
    )


def make(source: Path, folder: Path, config: MemoryConfig = FFN, tied: bool = True) -> Path:
    """A model as conftest's, wide enough to be quantised."""
    shutil.copytree(source, folder)
    mx.random.seed(3)
    args = replace(ARGS, tie_word_embeddings=tied)
    weights = {n: w * 3 if w.ndim > 1 else w for n, w in named_parameters(Model(args)).items()}
    save_safetensors(folder / "model.safetensors", weights)
    edit_json(folder / "config.json", lambda c: c.update(asdict(args)))
    hmem = HmemConfig.from_file(folder / "hmem.json")
    hmem = replace(hmem, memory=config, anchor_hash=anchor_hash(folder), **text_hashes(folder))
    (folder / "hmem.json").write_text(hmem.to_json())
    save_bank(folder / "bank", config, hmem)
    return folder


@pytest.fixture(scope="module")
def text(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:6]))
    return file


def report_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    main([*map(str, arguments), "--json"])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def weights_of(folder: Path) -> dict[str, mx.array]:
    return named_parameters(load_anchor(folder)[0])


def assert_same(first: dict[str, mx.array], second: dict[str, mx.array]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert mx.array_equal(array, second[name]).item(), name


def rounded(config: MemoryConfig, level: int, cluster: int, how: tuple | None) -> np.ndarray:
    """A block as MLX itself quantises and dequantises it, out of the float16 that was stored."""
    if (level, cluster) == (1, 1):
        return np.zeros(config.block_shape(level), np.float16)
    block = mx.array(block_of(config, level, cluster)).astype(mx.float16)
    if how is None:
        return np.array(block)
    options = dict(zip(("mode", "bits", "group_size"), how, strict=True))
    groups = []
    for group in split_block(block, config):
        stored = mx.quantize(group, **options)
        back = mx.dequantize(*stored, **options, dtype=mx.float16)
        groups.append(np.array(back).reshape(len(back), -1))
    return np.concatenate(groups, axis=1).reshape(block.shape)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (["--anchor-bits", "4"], (64, 4, "affine")),
        (["--anchor-bits", "8", "--anchor-group-size", "32"], (32, 8, "affine")),
        (["--anchor-mode", "mxfp4"], (32, 4, "mxfp4")),
        (["--anchor-mode", "nvfp4"], (16, 4, "nvfp4")),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_anchor_is_what_mlx_lms_own_quantiser_makes(
    model_folder, tmp_path, capsys, options, how, tied
):
    source = make(model_folder, tmp_path / "model", tied=tied)
    report = report_of(capsys, source, tmp_path / "out", *options)
    anchor, config = quantize_model(*load_anchor(source), *how)
    assert_same(weights_of(tmp_path / "out"), named_parameters(anchor))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization"] == config["quantization"] == written["quantization_config"]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["anchor"]["bytes_after"] == size < report["anchor"]["bytes_before"]
    # 96 is no multiple of 64: mlx-lm leaves these, and the report names them.
    left = [f"model.layers.{i}.mlp.down_proj" for i in range(2)] if how[0] == 64 else []
    assert report["anchor"]["left"] == left


def test_an_anchor_of_mlx_lm_without_memory_is_quantised_as_mlx_lm_does(wide, tmp_path, capsys):
    source = tmp_path / "llama"
    source.mkdir()
    weights = named_parameters(make_anchor("llama"))
    save_safetensors(source / "model.safetensors", weights)
    args = asdict(make_anchor("llama").args) | {"eos_token_id": 0}
    (source / "config.json").write_text(json.dumps(args))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(wide / name, source)
    report = report_of(capsys, source, tmp_path / "out", *ANCHOR_OPTIONS)
    assert report["bank"] is None
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=32)
    ours, theirs = (load_model(tmp_path / name) for name in ("out", "theirs"))
    assert_same(named_parameters(ours[0]), named_parameters(theirs[0]))
    assert ours[1]["quantization"] == theirs[1]["quantization"]


@pytest.mark.parametrize("name", [*GATED, *UNGATED, *EXPERTS])
def test_an_anchor_of_any_architecture_loads_quantised_and_answers(tmp_path, name):
    # 64 wide, for mlx-lm quantises parts of granite and qwen3_moe in groups of 64 in any case.
    config = {**LLAMA_LIKE, "model_type": name, **OTHER_KEYS.get(name, {}), "hidden_size": 64}
    config |= {"n_embd": 64, "tie_word_embeddings": name != "openlm"}
    mx.random.seed(1)
    source, anchor = tmp_path / "model", anchor_of_config(config)
    save_safetensors(source / "model.safetensors", named_parameters(anchor))
    (source / "config.json").write_text(json.dumps(config))
    main([str(source), str(tmp_path / "out"), "--anchor-bits", "8", "--anchor-group-size", "32"])
    found = load_anchor(tmp_path / "out")[0]
    expected = quantize_model(load_anchor(source)[0], config, 32, 8)[0]
    assert_same(named_parameters(found), named_parameters(expected))
    ids = mx.array([[1, 7, 3, 20]])
    assert mx.array_equal(found(ids), expected(ids)).item()
    # In the mean, for a mixture of experts may choose another expert for a token.
    difference, size = (mx.abs(a).mean().item() for a in (found(ids) - anchor(ids), anchor(ids)))
    assert 0 < difference < 0.1 * size


@pytest.mark.parametrize("kind", KINDS)
def test_the_banks_blocks_are_what_mlx_quantises_and_the_errors_are_theirs(
    model_folder, tmp_path, capsys, kind
):
    config = replace(FFN, **of_kind(kind))
    source = make(model_folder, tmp_path / "model", config)
    report = report_of(capsys, source, tmp_path / "out", *MIXED_OPTIONS)
    with Bank.open(tmp_path / "out" / "bank") as bank:
        found = [q.level for q in bank.manifest.quantization]
        assert found == sorted(MIXED)
        for level, row in zip(stored_levels(config), report["bank"]["levels"], strict=True):
            clusters = range(num_blocks(config, level))
            blocks = [np.array(bank.blocks([(level, c)])[0]) for c in clusters]
            before = [rounded(config, level, c, None) for c in clusters]
            for cluster, block in zip(clusters, blocks, strict=True):
                assert np.array_equal(block, rounded(config, level, cluster, MIXED.get(level)))
            squares = [np.square(b.astype(np.float64)).sum() for b in before]
            errors = [
                np.square(a.astype(np.float64) - b).sum()
                for a, b in zip(blocks, before, strict=True)
            ]
            each = [np.sqrt(e / s) for e, s in zip(errors, squares, strict=True) if s]
            assert row["error"] == pytest.approx(np.sqrt(sum(errors) / sum(squares)), rel=1e-4)
            assert row["worst_error"] == pytest.approx(max(each), rel=1e-4)
            assert (row["error"] > 0) == (level in MIXED)
            shards = list((tmp_path / "out" / "bank").glob(f"level-{level}.*"))
            if level:
                assert row["bytes_after"] == sum(s.stat().st_size for s in shards)
    # The anchor and what stays as it is are the same bytes.
    unchanged = bytes_of(source).keys() - {"bank/bank.json", "bank/generic.safetensors"}
    unchanged -= {name for name in unchanged if name.startswith("bank/level-1")}
    assert all((tmp_path / "out" / n).read_bytes() == bytes_of(source)[n] for n in unchanged)


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantised_model_answers_as_its_parts_do_and_generates(model_folder, tmp_path, kind):
    config = replace(FFN, **of_kind(kind))
    source = make(model_folder, tmp_path / "model", config)
    main([str(source), str(tmp_path / "out"), *ANCHOR_OPTIONS, *MIXED_OPTIONS])
    model, path = load(tmp_path / "out"), (2, 5, 10)
    anchor, _ = quantize_model(*load_anchor(source), 32, 4)
    ids = mx.array([[1, 7, 3, 200, 42]])
    assert mx.array_equal(model(ids, memory="none"), anchor(ids)).item()
    slot = attach_memory(anchor, config)
    blocks = [rounded(config, level, path[level - 1], MIXED.get(level)) for level in (1, 3)]
    groups = zip(*(split_block(mx.array(b), config) for b in blocks), strict=True)
    rows = tuple(mx.concatenate(list(g), axis=-2).astype(mx.float32) for g in groups)
    with slot.using(rows):
        expected = anchor(ids)
    assert mx.array_equal(model(ids, [path]), expected).item()
    assert mx.abs(model(ids, [path]) - model(ids, memory="none")).max().item() > 1e-2
    assert "".join(piece.text for piece in model.stream("iron is", max_tokens=5))


def test_memory_is_fused_into_a_float_anchor_and_refused_by_a_quantised_one(wide, tmp_path):
    main([str(wide), str(tmp_path / "bank"), *MIXED_OPTIONS])
    model, ids = load(tmp_path / "bank"), mx.array([[1, 7, 3]])
    attached = model(ids, [(0, 1, 2)])
    with load(tmp_path / "bank").fuse((0, 1, 2)) as fused:
        assert mx.allclose(fused.anchor(ids), attached, atol=1e-4).item()
    main([str(wide), str(tmp_path / "both"), *ANCHOR_OPTIONS, *MIXED_OPTIONS])
    refused("attached form", lambda: load(tmp_path / "both").fuse((0, 1, 2)))


def test_the_perplexities_of_the_report_are_evaluates_own(wide, tmp_path, capsys, text, texts):
    out = tmp_path / "out"
    report = report_of(capsys, wide, out, *ANCHOR_OPTIONS, "--bank-mode", "mxfp8", "--text", text)
    assert [row["memory"] for row in report["perplexity"]] == ["fetched", "none"]
    for row in report["perplexity"]:
        for when, folder in (("before", wide), ("after", out)):
            expected = perplexity(load(folder), texts[:6], row["memory"], progress=False)
            assert row[when] == expected.to_dict()
        change = row["after"]["per_token"] - row["before"]["per_token"]
        assert row["change_per_token"] == change != 0


def test_a_plain_text_is_one_document_and_the_table_tells_it_all(wide, tmp_path, capsys, texts):
    (tmp_path / "text.txt").write_text(texts[0])
    options = [*ANCHOR_OPTIONS, "--bank-bits", "8", "--text", tmp_path / "text.txt"]
    report = report_of(capsys, wide, tmp_path / "one", *options)
    assert report["perplexity"][0]["before"]["documents"] == 1
    assert report["perplexity"][0]["before"]["per_token_error"] is None
    main([str(wide), str(tmp_path / "two"), *map(str, options)])
    table = capsys.readouterr().out
    for word in ("anchor", "affine 4, 32", "level 3, 12 blocks", "affine 8, 64", "fetched", "none"):
        assert word in table
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_bank_changes_its_dtype(wide, tmp_path, capsys):
    options = ["--bank-dtype", "bfloat16", "--bank-level", "3:affine:8"]
    report = report_of(capsys, wide, tmp_path / "out", *options)
    with Bank.open(tmp_path / "out" / "bank") as bank:
        assert bank.dtype == report["bank"]["dtype"] == "bfloat16"
        (block,) = bank.blocks([(1, 2)])
        expected = mx.array(rounded(FFN, 1, 2, None)).astype(mx.bfloat16)
        assert block.dtype == mx.bfloat16
        assert mx.array_equal(block, expected).item()
        both = [bank.blocks([(3, c)])[0].astype(mx.float32) for c in range(12)]
    assert 1e-4 < report["bank"]["levels"][1]["error"] < 4e-3  # bfloat16 has 8 bits
    before = np.stack([rounded(FFN, 3, c, None).astype(np.float32) for c in range(12)])
    error = np.sqrt(np.square(np.stack(both) - before).sum() / np.square(before).sum())
    assert report["bank"]["levels"][2]["error"] == pytest.approx(error, rel=1e-4)
    assert load(tmp_path / "out").bank.manifest.quantization_of(3).options["bits"] == 8
