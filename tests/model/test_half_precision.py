"""A whole model in bfloat16 or float16, whatever its bank is stored in: each way to use it computes
in the anchor's dtype, and is no further from float32 than its roundings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from convert.quantize import command as quantize
from mlx_hmem import load
from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.bank import Quantization, stored_levels
from mlx_hmem.config import HmemConfig
from mlx_hmem.evaluate.perplexity import document_losses
from mlx_hmem.files import load_safetensors, save_safetensors
from mlx_hmem.generation.batch import batch_generate
from tests.conftest import ARGS, MEMORY, save_bank
from tests.convert.test_bundle import with_architecture
from tests.helpers.dtypes import (
    FORWARD,
    HALVES,
    UNIT,
    as_on_metal,
    distance,
    shapes_in_other_floats,
)
from tests.helpers.graphs import computed, leading_to
from tests.helpers.tiny_anchors import HIDDEN

PROMPTS = ["The old lighthouse stands on a cliff", "Rivers of the north"]
PATHS = [(0, 1, 2), (2, 5, 11)]
both = pytest.mark.parametrize("dtype", HALVES, ids=str)
# Architecture, kind, and what the bank is stored in: None for the other 16 bits.
MODELS = [
    ("llama", "ffn", "float32", None),
    ("gemma3_text", "kv", None, None),
    ("llama", "lora_ffn", "float16", ("affine", 8, 32)),
    ("gemma3_text", "ffn", "float16", ("affine", 4, 32)),
    ("qwen3", "ffn", "bfloat16", ("mxfp4", 4, 32)),
]


def half_model(source, folder, dtype, name, kind, bank, how, wide=False) -> Path:
    """A model directory whose anchor has numbers of ``dtype``; ``wide``: stored as float32."""
    with_architecture(source, folder, name, kind)
    file = folder / "model.safetensors"
    weights = {n: w.astype(dtype) for n, w in load_safetensors(file).items()}
    if wide:
        weights = {n: w.astype(mx.float32) for n, w in weights.items()}
    save_safetensors(file, weights)
    hmem = HmemConfig.from_file(folder / "hmem.json")
    hmem = replace(hmem, anchor_hash=anchor_hash(folder))
    (folder / "hmem.json").write_text(hmem.to_json())
    other = {mx.bfloat16: "float16", mx.float16: "bfloat16"}[dtype]
    levels = stored_levels(hmem.memory)
    options = {} if how is None else {"quantization": [Quantization(n, *how) for n in levels]}
    given = (hmem.memory, hmem.anchor_hash, hmem.retriever.tree_hash)
    save_bank(folder / "bank", *given, size=0.3, dtype=bank or other, **options)
    return folder


def has_a_reason(shape: tuple[int, ...]) -> bool:
    """Blocks in the dtype of their bank, before they are in the anchor's, and two 4-bit numbers of
    a byte; log-probabilities that are sampled from; logits that are scored, and what comes of them
    for each token."""
    of_blocks = not 3 <= len(shape) <= 4 or shape[-2] in (*MEMORY.r, sum(MEMORY.r))
    return of_blocks or shape[-1] in (1, 2, ARGS.vocab_size)


@both
@pytest.mark.parametrize(("name", "kind", "bank", "how"), MODELS)
def test_each_way_to_use_a_model_computes_in_the_dtype_of_its_anchor(
    name, kind, bank, how, dtype, model_folder, tmp_path
):
    model = load(half_model(model_folder, tmp_path / "model", dtype, name, kind, bank, how))
    ids, clipped = mx.array([[5, 6, 7]] * 2), (name, dtype) == ("gemma3_text", mx.float16)

    ways: list[Callable[[], object]] = [
        lambda: mx.eval(model(ids, PATHS)),
        lambda: mx.eval(model(ids, memory="generic")),
        lambda: list(model.stream(PROMPTS[0], max_tokens=3, temp=0.7, seed=1)),
        lambda: list(model.stream_ids([5, 6, 7], model.fetch(PROMPTS[0], wait=False), 3)),
        lambda: batch_generate(model, PROMPTS, max_tokens=3),
        lambda: document_losses(model, PROMPTS, progress=False),
    ]
    for wait in (True, False):
        rows = model.fetch(PROMPTS[0], wait=wait).rows
        assert {group.dtype for group in (rows if wait else rows[0])} == {dtype}
    for use in ways:
        check(use, dtype, clipped)
    if kind == "ffn":
        with model.fuse(PATHS[0]) as fused:
            check(lambda: mx.eval(fused.anchor(ids)), dtype, clipped)


def check(use: Callable[[], object], dtype: mx.Dtype, clipped: bool) -> None:
    """``clipped``: mlx-lm clips residual sums to the range of float16."""
    with as_on_metal(), computed() as steps:
        use()
    assert any(step.name == "Matmul" for step in steps)
    for _, shape, product in shapes_in_other_floats(steps, dtype):
        assert not product, shape
        assert has_a_reason(shape) or (clipped and shape[-1] == HIDDEN), shape


@both
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_quantised_embeddings_begin_in_the_dtype_of_the_anchor(
    name, mode, dtype, model_folder, tmp_path
):
    """MLX gives them as bfloat16: with norms in float16 all was float32, and the cache as large."""
    half_model(model_folder, tmp_path / "half", dtype, name, "lora_vo", "float16", None)
    bits = ["--anchor-bits", "8"] if mode == "mxfp8" else ["--anchor-bits", "4"]
    group = ["--anchor-group-size", "16" if mode == "nvfp4" else "32"]
    given = [str(tmp_path / "half"), str(tmp_path / "small"), *bits, *group]
    quantize.main([*given, "--anchor-mode", mode])
    model = load(tmp_path / "small")
    cache = make_prompt_cache(model.anchor)
    assert model(mx.array([[5, 6, 7]]), PATHS[:1], cache=cache).dtype == dtype
    assert {layer.keys.dtype for layer in cache} == {dtype}
    if mode == "mxfp4":  # of 8-bit floats MLX exports no graph
        with as_on_metal():
            steps = leading_to(model(mx.array([[5, 6, 7]]), memory="none"))
        found = shapes_in_other_floats(steps, dtype)
        clipped = (name, dtype) == ("gemma3_text", mx.float16)
        wide = {(1, 3, HIDDEN)} if clipped else set()
        assert {shape for own, shape, _ in found if own == "float32"} == wide
        assert not any(product for _, _, product in found)


@both
@pytest.mark.parametrize(("name", "kind"), [("llama", "ffn"), ("gemma3_text", "lora_ffn")])
def test_each_way_is_as_near_to_float32_as_its_roundings(name, kind, dtype, model_folder, tmp_path):
    given, ids = (dtype, name, kind, "float16", None), mx.array([[5, 6, 7, 8]] * 2)
    wide, model = (
        load(half_model(model_folder, tmp_path / str(wide), *given, wide=wide))
        for wide in (True, False)
    )
    most = FORWARD * UNIT[dtype]
    exact = wide(ids, PATHS)
    assert distance(wide(ids, memory="none"), exact) > 4 * most
    assert distance(model(ids, PATHS), exact) <= most
    for row, path in enumerate(PATHS):
        assert distance(model(ids[:1], [path])[0], exact[row]) <= most
    generic = (each(ids, memory="generic") for each in (model, wide))
    assert distance(*generic) <= most
    losses, wanted = (document_losses(each, PROMPTS, progress=False) for each in (model, wide))
    assert np.array_equal(losses.tokens, wanted.tokens)
    assert np.abs(losses.nats / wanted.nats - 1).max() <= most
    # The loss itself is float32, of logits in 16 bits.
    ids, path = list(model.tokenizer.encode(PROMPTS[0])), model.route(PROMPTS[0])[1]
    logits = np.array(model(mx.array([ids[:-1]]), [path])[0].astype(mx.float32), np.float64)
    sums = np.log(np.exp(logits).sum(axis=-1))
    nats = (sums - logits[np.arange(len(ids) - 1), ids[1:]]).sum()
    assert document_losses(model, PROMPTS[:1], progress=False).nats[0] == pytest.approx(nats, 1e-5)
    # What is generated is as likely as the likeliest, but for the roundings of two logits.
    for prompt, row in zip(PROMPTS, batch_generate(model, PROMPTS, max_tokens=4), strict=True):
        begin = list(model.tokenizer.encode(prompt))
        logits = wide(mx.array([begin + row.tokens]), [row.path])[0, len(begin) - 1 : -1]
        chosen = mx.take_along_axis(logits, mx.array(row.tokens)[:, None], axis=-1)[:, 0]
        behind = (logits.max(axis=-1) - chosen) / mx.abs(logits).max(axis=-1)
        assert row.tokens
        assert behind.max().item() <= 2 * most
