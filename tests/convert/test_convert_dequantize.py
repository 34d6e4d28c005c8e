"""Models that others have quantised, against loops over every number of every matrix."""

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from convert.anchors import packed as packed_rows
from convert.anchors import weights
from convert.anchors.dequantize import NUMBERS
from convert.torch_files.tensors import ITEM_SIZES, open_safetensors, safetensors_header
from mlx_hmem.files import load_safetensors
from tests.convert.test_convert_legacy import torch_saved
from tests.helpers import anchor_checkpoints as checkpoints
from tests.helpers.faults import stop_at
from tests.helpers.places import bytes_of
from tests.helpers.programs import refused

RNG = np.random.default_rng(0)
Parts = dict[str, tuple[str, np.ndarray]]  # by the end of a name: dtype and bits


def test_codes_of_8_bits_are_the_numbers_of_pytorch() -> None:
    for kind, numbers in json.loads(torch_saved("fp8").splitlines()[-1]).items():
        assert np.array_equal(NUMBERS[kind], np.array(numbers, "f4"), equal_nan=True)


def test_codes_of_8_bits_are_what_their_fields_say() -> None:
    for kind, (exponents, fractions, bias) in {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15)}.items():
        for code, found in enumerate(NUMBERS[kind]):
            sign, exponent = code >> 7, (code >> fractions) & (2**exponents - 1)
            fraction = code & (2**fractions - 1)
            if kind == "F8_E5M2" and exponent == 31:
                wanted = math.nan if fraction else math.inf
            elif kind == "F8_E4M3" and code & 0x7F == 0x7F:
                wanted = math.nan
            else:
                whole = fraction / 2**fractions + (exponent > 0)
                wanted = whole * 2.0 ** (max(exponent, 1) - bias)
            wanted *= (-1) ** sign
            assert found == wanted or (math.isnan(found) and math.isnan(wanted)), (kind, code)


# How each method stores a matrix (outputs, inputs), and what it is, by a loop


def fp8(kind: str, over: str, end: str) -> Any:
    def make(shape: tuple[int, int]) -> tuple[np.ndarray, Parts]:
        (rows, columns), finite = shape, np.flatnonzero(np.isfinite(NUMBERS[kind]))
        codes = RNG.choice(finite, shape).astype("u1")
        sizes = {"tensor": (rows, columns), "row": (1, columns), "block": (24, 20)}[over]
        grid = tuple(-(-n // size) for n, size in zip(shape, sizes, strict=True))
        scale = RNG.uniform(1e-4, 1e-2, grid).astype("f4")
        wanted = np.empty(shape, "f4")
        for i in range(rows):
            for j in range(columns):
                one = NUMBERS[kind][codes[i, j]]
                wanted[i, j] = one * scale[i // sizes[0], j // sizes[1]]
        stored = scale.reshape(()) if over == "tensor" else scale
        return wanted, {"weight": (kind, codes), end: ("F32", stored)}

    return make


def int8(shape: tuple[int, int]) -> tuple[np.ndarray, Parts]:
    """Groups of 8 inputs with zero points, and scales in bfloat16."""
    numbers = RNG.integers(-128, 128, shape)
    grid = (shape[0], shape[1] // 8)
    zeros, scale = RNG.integers(-9, 9, grid), RNG.uniform(1e-3, 1e-2, grid).astype("f4")
    scale = (scale.view("u4") >> 16 << 16).view("f4")
    wanted = np.empty(shape, "f4")
    for i in range(shape[0]):
        for j in range(shape[1]):
            wanted[i, j] = np.float32(numbers[i, j] - zeros[i, j // 8]) * scale[i, j // 8]
    return wanted, {
        "weight": ("I8", numbers.astype("i1")), "weight_zero_point": ("I8", zeros.astype("i1")),
        "weight_scale": ("BF16", (scale.view("u4") >> 16).astype("u2")),
    }  # fmt: skip


def packed(numbers: np.ndarray, bits: int, order: Any) -> np.ndarray:
    """Rows of small numbers, several to an int32: ``order[k]`` is which one lies in place k."""
    per = 32 // bits
    words = np.zeros((numbers.shape[0], -(-numbers.shape[1] // per)), "u4")
    for i in range(words.shape[0]):
        for j in range(words.shape[1]):
            for k in range(per):
                if j * per + order[k] < numbers.shape[1]:
                    words[i, j] |= np.uint32(numbers[i, j * per + order[k]]) << np.uint32(k * bits)
    return words


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def grouped(shape: tuple[int, int], bits: int, group: np.ndarray) -> tuple[np.ndarray, ...]:
    """Numbers, zero points, float16 scales of groups, and the matrix that they make."""
    numbers, count = RNG.integers(0, 2**bits, shape), int(group.max()) + 1
    zeros = RNG.integers(0, 2**bits, (count, shape[0]))
    scales = RNG.uniform(1e-3, 1e-1, (count, shape[0])).astype("f2")
    wanted = np.empty(shape, "f4")
    for i in range(shape[0]):
        for j in range(shape[1]):
            zero, scale = zeros[group[j], i], np.float32(scales[group[j], i])
            wanted[i, j] = np.float32(numbers[i, j] - zero) * scale
    return numbers, zeros, scales, wanted


def awq(shape: tuple[int, int]) -> tuple[np.ndarray, Parts]:
    numbers, zeros, scales, wanted = grouped(shape, 4, np.arange(shape[1]) // 16)
    return wanted, {
        "qweight": ("I32", packed(numbers.T, 4, AWQ_ORDER)),
        "qzeros": ("I32", packed(zeros, 4, AWQ_ORDER)), "scales": ("F16", scales),
    }  # fmt: skip


def gptq(bits: int, version: int, act_order: bool = False, size: int = 16) -> Any:
    def make(shape: tuple[int, int]) -> tuple[np.ndarray, Parts]:
        group = np.arange(shape[1]) // (shape[1] if size == -1 else size)
        group = RNG.permutation(group) if act_order else group
        numbers, zeros, scales, wanted = grouped(shape, bits, group)
        order = range(32 // bits)
        stored = (zeros - (version == 1)) % 2**bits
        parts = {
            "qweight": ("I32", packed(numbers, bits, order).T.copy()),
            "qzeros": ("I32", packed(stored, bits, order)), "scales": ("F16", scales),
            "bias": ("F16", np.zeros(shape[0], "f2")),
        }  # fmt: skip
        return wanted, parts | ({"g_idx": ("I32", group.astype("i4"))} if act_order else {})

    return make


def compressed(bits: int, with_zeros: bool, order: bool, count: int) -> Any:
    """``weight_packed`` of compressed-tensors, with ``count`` groups of inputs."""

    def make(shape: tuple[int, int]) -> tuple[np.ndarray, Parts]:
        group = np.arange(shape[1]) // (shape[1] // count)
        group = RNG.permutation(group) if order else group
        numbers, zeros, scales, wanted = grouped(shape, bits, group)
        if not with_zeros:
            for i in range(shape[0]):
                for j in range(shape[1]):
                    scale = np.float32(scales[group[j], i])
                    wanted[i, j] = np.float32(numbers[i, j] - 2 ** (bits - 1)) * scale
        places = range(32 // bits)
        parts = {
            "weight_packed": ("I32", packed(numbers, bits, places)),
            "weight_scale": ("F16", scales.T.copy()),
            "weight_shape": ("I64", np.array(shape, "i8")),
        }
        if with_zeros:
            parts["weight_zero_point"] = ("I32", packed(zeros, bits, places).T.copy())
        groups = group if order else np.full(shape[1], -1)
        return wanted, parts | {"weight_g_idx": ("I32", groups.astype("i4"))}

    return make


def powers(shape: tuple[int, int]) -> tuple[np.ndarray, Parts]:
    """E4M3 under E8M0, a power of two for each 16 inputs."""
    numbers = RNG.integers(0, 0x7F, shape).astype("u1")
    scale = RNG.integers(100, 130, (shape[0], shape[1] // 16)).astype("u1")
    wanted = np.empty(shape, "f4")
    for i in range(shape[0]):
        for j in range(shape[1]):
            wanted[i, j] = NUMBERS["F8_E4M3"][numbers[i, j]] * 2.0 ** (int(scale[i, j // 16]) - 127)
    return wanted, {"weight": ("F8_E4M3", numbers), "weight_scale": ("F8_E8M0", scale)}


def pack_quantized(bits: int) -> dict[str, Any]:
    groups = {"group_0": {"weights": {"num_bits": bits, "type": "int"}}}
    return CT | {"format": "pack-quantized", "config_groups": groups}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
CT = {"quant_method": "compressed-tensors"}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8 block": (fp8("F8_E4M3", "block", "weight_scale_inv"),
                  {"quant_method": "fp8", "weight_block_size": [24, 20]}),
    "fp8 tensor": (fp8("F8_E5M2", "tensor", "weight_scale_inv"), {"quant_method": "fp8"}),
    "fbgemm": (fp8("F8_E4M3", "row", "weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "compressed-tensors row": (fp8("F8_E4M3", "row", "weight_scale"),
                               CT | {"format": "float-quantized"}),
    "compressed-tensors int8": (int8, CT | {"format": "int-quantized"}),
    "powers of two": (powers, CT | {"format": "float-quantized"}),
    "packed 4": (compressed(4, False, False, 2), pack_quantized(4)),
    "packed 4 with zero points, in order of activation": (
        compressed(4, True, True, 2), pack_quantized(4)),
    "packed 8": (compressed(8, True, False, 1), pack_quantized(8)),
    "packed 2": (compressed(2, True, False, 4), pack_quantized(2)),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "gptq": (gptq(4, 1), GPTQ),
    "gptq in order of activation": (gptq(4, 1, True), GPTQ),
    "gptq v2": (gptq(4, 2), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq 8": (gptq(8, 1, True, 8), {"quant_method": "gptq", "bits": 8, "group_size": 8}),
    "gptq 2": (gptq(2, 1, size=-1), {"quant_method": "gptq", "bits": 2, "group_size": -1}),
}  # fmt: skip


def save(folder: Path, name: str, method: str) -> dict[str, np.ndarray]:
    """A tiny model whose projections are quantised; those matrices in float32."""
    make, how = METHODS[method]
    plain = checkpoints.save_hugging_face(folder.with_name("plain"), name, mx.float32)
    theirs = checkpoints.convert(plain, folder.with_name("theirs"), "--to", "pytorch")
    wanted, stored = dict[str, np.ndarray](), dict[str, tuple[str, np.ndarray]]()
    for label, array in load_safetensors(theirs / "model.safetensors").items():
        if label.endswith("_proj.weight"):
            base = label.removesuffix("weight")
            wanted[label], parts = make(array.shape)
            stored |= {base + end: part for end, part in parts.items()}
            stored[f"{base}input_scale"] = ("F32", np.ones(1, "f4"))
        else:
            stored[label] = ("F32", np.array(array))
    if not how["quant_method"].endswith(("fp8", "tensors")):
        stored = {k: v for k, v in stored.items() if not k.endswith("input_scale")}
    config = json.loads((theirs / "config.json").read_text())
    config |= {"quantization_config": how, "torch_dtype": "float16"}
    folder.mkdir()
    write(folder / "model.safetensors", stored)
    (folder / "config.json").write_text(json.dumps(config))
    return wanted


def write(path: Path, stored: dict[str, tuple[str, np.ndarray]]) -> None:
    # The widest first, so that each begins at a multiple of its size.
    ordered = sorted(stored.items(), key=lambda item: -ITEM_SIZES[item[1][0]])
    header = safetensors_header(((n, kind, a.shape) for n, (kind, a) in ordered), {"format": "pt"})
    path.write_bytes(header + b"".join(np.ascontiguousarray(a).tobytes() for _, (_, a) in ordered))


def read(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    return {n: (t.dtype, t.read()) for n, t in open_safetensors([path]).tensors.items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_matrix_is_the_product_that_a_loop_gives(tmp_path, method, monkeypatch, capsys):
    monkeypatch.setattr(weights, "CHUNK", 700)  # several chunks, whose rows begin anywhere
    monkeypatch.setattr(packed_rows, "PART", 100)
    wanted = save(tmp_path / "source", "llama", method)
    out = checkpoints.convert(tmp_path / "source", tmp_path / "exact", "--dtype", "float32")
    said = capsys.readouterr().err
    assert f"dequantised {len(wanted)} matrices" in said
    assert "every weight is its product in float32" in said
    found = checkpoints.bits(out)
    assert found.keys() == checkpoints.bits(tmp_path / "plain").keys()
    for label, array in wanted.items():
        assert found[label] == ("mlx.core.float32", array.shape, array.tobytes()), label
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    # Rounded once, to the config's dtype, and the largest difference is what is said.
    out = checkpoints.convert(tmp_path / "source", tmp_path / "rounded")
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("dequantised"))
    errors = {}
    for label, array in wanted.items():
        half = array.astype("f2")
        assert checkpoints.bits(out)[label][2] == half.tobytes()
        errors[label] = float(np.abs(half.astype("f4") - array).max())
    said_of = re.fullmatch(r".* to float16; the most .*: ([^ ,]+), in (.*)", line)
    worst = max(errors.values())
    assert (said_of[1], errors[said_of[2]]) == (f"{worst:.3g}", worst)


def test_experts_are_dequantised_one_by_one(tmp_path):
    wanted = save(tmp_path / "source", "qwen3_moe", "fp8 block")
    out = checkpoints.convert(tmp_path / "source", tmp_path / "out", "--dtype", "float32")
    found = load_safetensors(out / "model.safetensors")
    experts = [wanted[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(4)]
    up = found["model.layers.1.mlp.switch_mlp.up_proj.weight"]
    assert np.array_equal(np.array(up), np.stack(experts))


def test_a_stopped_conversion_goes_on_and_says_what_it_looked_at(tmp_path, monkeypatch, capsys):
    wanted = save(tmp_path / "source", "llama", "gptq")
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    checkpoints.convert(tmp_path / "source", tmp_path / "whole")
    stop_at(monkeypatch, weights, "write_safetensors", 2)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.convert(tmp_path / "source", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    capsys.readouterr()
    checkpoints.convert(tmp_path / "source", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    now = int(re.search(r"to float16, (\d+) of them now", capsys.readouterr().err)[1])
    assert 0 < now < len(wanted)


def test_a_quantised_model_of_mlx_needs_no_conversion(tmp_path):
    source = checkpoints.save_hugging_face(tmp_path / "source", "llama", mx.float32)
    config = json.loads((source / "config.json").read_text())
    config["quantization"] = {"bits": 4, "group_size": 64}
    (source / "config.json").write_text(json.dumps(config))
    refused(
        "a model of MLX: quantization; use it as it is", checkpoints.convert, source, source / "x"
    )


def test_the_settings_of_autogptq_beside_a_config_that_has_none(tmp_path):
    """Before transformers had a place for them, quantize_config.json was it."""
    save(tmp_path / "source", "llama", "gptq")
    wanted = checkpoints.convert(tmp_path / "source", tmp_path / "wanted")
    values = json.loads((tmp_path / "source" / "config.json").read_text())
    how = values.pop("quantization_config")
    (tmp_path / "source" / "config.json").write_text(json.dumps(values))
    how = {key: value for key, value in how.items() if key != "quant_method"}
    (tmp_path / "source" / "quantize_config.json").write_text(json.dumps(how))
    found = checkpoints.convert(tmp_path / "source", tmp_path / "found")
    assert checkpoints.bits(found) == checkpoints.bits(wanted)
    (tmp_path / "source" / "quantize_config.json").write_text("[1]")
    refused("holds no settings", checkpoints.convert, tmp_path / "source", tmp_path / "out")
