"""Files of recorded functions: MLX before 0.32.1 reads them too, and any thread may record them."""

import json
import os
import struct
import subprocess
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from convert.bundle.attention import attention, single_operations
from convert.bundle.check import newer_operations_of
from convert.bundle.record import METADATA, UNCALLED, check_header, newer_operations, record
from mlx_hmem.anchors.architectures import ARCHITECTURES
from mlx_hmem.errors import UserError
from tests.convert.test_bundle import (
    PROMPTS,
    expected,
    make_bundle,
    quantised_bundle,
    says,
    with_architecture,
)

OLD = "HMEM_OLD_MLX"  # a Python that has MLX 0.31.1, numpy, tokenizers and xxhash
needs_old = pytest.mark.skipif(OLD not in os.environ, reason=f"{OLD} names no Python of MLX 0.31.1")


@pytest.fixture(scope="module")
def made(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    make_bundle(model_folder, out, "--prefill", "16", "--kv-lengths", "32")
    return out


def names_of(data: bytes, with_metadata: bool) -> tuple[list[bytes], int]:
    """The keyword inputs of a file's first function, and where they end, as one MLX reads them."""
    at = 8 + struct.unpack_from("<Q", data)[0]
    assert struct.unpack_from("<i?", data, at) == (2, False)  # functions, without shapes
    at += 5

    def string() -> bytes:
        nonlocal at
        length = struct.unpack_from("<Q", data, at)[0]
        at += 8 + length
        return data[at - length : at]

    if with_metadata:
        assert string() == METADATA.encode()
    count = struct.unpack_from("<Q", data, at)[0]
    at += 8
    return [string() for _ in range(count)], at


def test_a_header_makes_sense_with_and_without_metadata(made):
    files = list((made / "functions").iterdir())
    assert len(files) > 10
    for file in files:
        data = file.read_bytes()
        (new, end), (old, same) = names_of(data, True), names_of(data, False)
        assert (new, end) == ([UNCALLED.encode()], same)
        assert [len(name) for name in old] == [256]
        assert struct.unpack_from("<Q", data, end)[0] == 1  # the one input of the first function


def test_a_header_of_another_form_is_refused(tmp_path):
    path, one = tmp_path / "plain.mlxfn", mx.array(1)
    mx.export_function(str(path), lambda x: x + 1, one)  # without what readers of before need
    with pytest.raises(UserError, match=r"in a form that is not known here: .*; make the bundle"):
        check_header(path.read_bytes())
    record(str(path), lambda x: [x + 1], [one])
    check_header(path.read_bytes())


def test_operations_that_old_readers_lack_are_found(made, tmp_path):
    def changed(x: mx.array) -> list[mx.array]:
        x[1:] = 0
        return [x]

    path = tmp_path / "changed.mlxfn"
    record(str(path), changed, [mx.ones(3)])
    assert newer_operations(path.read_bytes()) == ["SliceUpdate"]
    assert newer_operations_of(made) == []


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", [None, "bool", "added"])
def test_attention_in_single_operations_is_the_fused_one(mask, kv_heads, dtype):
    shapes = [(2, heads, time, 8) for heads, time in ((4, 3), (kv_heads, 7), (kv_heads, 7))]
    queries, keys, values = (mx.random.normal(shape).astype(dtype) for shape in shapes)
    looks: Any = None
    if mask is not None:
        looks = mx.tri(3, 7, 4, dtype=mx.bool_)
        looks = looks if mask == "bool" else mx.where(looks, 0.0, -1e4).astype(dtype)[None, None]
    wanted = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=looks)
    found = attention(queries, keys, values, scale=0.3, mask=looks)
    assert found.dtype == dtype
    assert mx.allclose(found, wanted, atol=1e-6 if dtype == mx.float32 else 0.02).item()


def test_the_fused_attention_comes_back_and_what_cannot_be_recorded_is_named():
    fused = mx.fast.scaled_dot_product_attention
    x: Any = mx.zeros((1, 1, 2, 4))
    with single_operations(), pytest.raises(ValueError, match="a mask by name"):
        mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, mask="causal")
    assert mx.fast.scaled_dot_product_attention is fused


def elsewhere(what: Callable[[], Any]) -> Any:
    """What another thread gets, or the error that it raises."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(what())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_function_uses_the_first_stream_whatever_it_was_recorded_on(tmp_path):
    """docs/bundle.md tells apps so: MLX does not go by the stream's number."""
    path, first = str(tmp_path / "f.mlxfn"), mx.default_stream(mx.default_device())

    def recorded() -> Any:
        record(path, lambda x: [x + 1], [mx.array(1)])
        return mx.default_stream(mx.default_device())

    def called() -> Any:
        function: Any = mx.import_function(path)
        return function(mx.array(1))[0].item()

    assert str(elsewhere(recorded)) != str(first)
    assert called() == 2
    assert "no Stream" in str(elsewhere(called))


def old_says(folder: Path, prompt: str, memory: str = "fetched") -> list[int]:
    """The tokens that the bundle's own ``run.py`` gives under MLX 0.31.1."""
    command = [os.environ[OLD], "-I", str(folder / "run.py"), prompt, "--memory", memory]
    command += ["--max-tokens", "8", "--json"]
    text = subprocess.run(command, capture_output=True, check=True).stdout
    return list(json.loads(text)["tokens"])


@needs_old
def test_mlx_0_31_1_says_what_the_model_says(made, model):
    for prompt in PROMPTS[:2]:
        for memory in ("fetched", "generic", "none"):
            assert old_says(made, prompt, memory) == expected(model, prompt, 8, memory)


@needs_old
@pytest.mark.parametrize("kind", ["ffn", "lora_ffn", "lora", "kv"])
def test_mlx_0_31_1_reads_kinds_of_memory_quantised(kind, model_folder, tmp_path):
    opened = quantised_bundle(kind, model_folder, tmp_path)
    assert old_says(tmp_path / "out", PROMPTS[1]) == says(opened, PROMPTS[1], 8)


@needs_old
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if find_spec(f"mlx_lm.models.{n}")])
def test_mlx_0_31_1_reads_anchors_of_mlx_lm(name, model_folder, tmp_path):
    folder = with_architecture(model_folder, tmp_path / "model", name, "lora_vo")
    opened = make_bundle(folder, tmp_path / "out", "--prefill", 8)
    assert opened.about["oldest_mlx"] == "0.31.1"
    assert old_says(tmp_path / "out", PROMPTS[1]) == says(opened, PROMPTS[1], 8)
