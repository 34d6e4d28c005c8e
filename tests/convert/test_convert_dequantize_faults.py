"""What is wrong with a quantised source is one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.torch_files.tensors import BITS
from tests.convert.test_convert_dequantize import pack_quantized, read, save, write
from tests.helpers import anchor_checkpoints as checkpoints
from tests.helpers.programs import refused

Q = "model.layers.1.self_attn.q_proj."


def given(end: str, dtype: str, array: np.ndarray) -> Any:
    """Puts other parts in the place of one of a matrix."""
    return lambda tensors, how: tensors.update({end: (dtype, array)})


WRONG: dict[str, tuple[str, Any, str]] = {
    "no scale": ("fbgemm", lambda t, how: t.pop(f"{Q}weight_scale"), f"{Q}weight cannot be"),
    "a scale of another matrix": (
        "fp8 block", given(f"{Q}weight_scale_inv", "F32", np.ones((3, 2), "f4")),
        r"its scale is F32 \(3, 2\), the weight \(32, 32\)"),
    "a scale of whole numbers": (
        "fbgemm", given(f"{Q}weight_scale", "I32", np.ones((32, 1), "i4")),
        "its scale is I32"),
    "a scale of nothing": (
        "fbgemm", given("a.weight_scale", "F32", np.ones((32, 1), "f4")),
        "a.weight_scale cannot be dequantised: there is no weight of 8 bits"),
    "a scale that is not finite": (
        "fbgemm", given(f"{Q}weight_scale", "F32", np.full((32, 1), np.inf, "f4")),
        f"{Q}weight has numbers that are not finite"),
    "a scale that makes numbers too large": (
        "fbgemm", given(f"{Q}weight_scale", "F32", np.full((32, 1), 1e6, "f4")),
        f"{Q}weight has numbers too large for this dtype: F16"),
    "zero points of another shape": (
        "compressed-tensors int8",
        given(f"{Q}weight_zero_point", "I8", np.ones((32, 1), "i1")),
        f"{Q}weight_zero_point cannot be dequantised: it is I8"),
    "no scales": ("awq", lambda t, how: t.pop(f"{Q}scales"), f"{Q[:-1]} cannot .* no scales"),
    "no zero points": ("gptq", lambda t, how: t.pop(f"{Q}qzeros"), "it has no qzeros"),
    "zero points too few": (
        "awq", given(f"{Q}qzeros", "I32", np.ones((1, 4), "i4")),
        f"{Q}qzeros cannot"),
    "scales too few": (
        "gptq", given(f"{Q}scales", "F16", np.ones((2, 31), "f2")),
        f"{Q}scales cannot"),
    "another size of groups": ("gptq", lambda t, how: how.update(group_size=32), "qzeros cannot"),
    "groups of none": ("gptq", lambda t, how: how.update(group_size=0), "group_size is no number"),
    "groups beyond": (
        "gptq in order of activation",
        given(f"{Q}g_idx", "I32", np.full(32, 9, "i4")), "it names groups"),
    "groups below": (
        "gptq in order of activation",
        given(f"{Q}g_idx", "I32", np.full(32, -1, "i4")), "it names groups"),
    "floats as words": (
        "gptq", given(f"{Q}qweight", "F32", np.ones((4, 32), "f4")),
        "its qweight is F32"),
    "a bias of more than zeros": (
        "gptq", given(f"{Q}bias", "F16", np.ones(32, "f2")),
        f"left over: {Q}bias"),
    "3 bits": ("gptq", lambda t, how: how.update(bits=3), "is read of 2, 4 and 8 bits: bits 3"),
    "8 bits of AWQ": ("awq", lambda t, how: how.update(bits=8), "awq is read of 4 bits: bits 8"),
    "True bits": ("gptq", lambda t, how: how.update(bits=True), "bits True"),
    "gemv": ("awq", lambda t, how: how.update(version="gemv"), "awq is read as gemm lays it out"),
    "marlin": ("gptq", lambda t, how: how.update(checkpoint_format="marlin"), "'marlin'"),
    "blocks of text": (
        "fp8 block", lambda t, how: how.update(weight_block_size="ab"), "weight_block_size is no"),
    "bitsandbytes": (
        "gptq", lambda t, how: how.update(quant_method="bitsandbytes"),
        r"in a way that is not read: 'bitsandbytes' \(awq, gptq, fp8.* are\); take the model that"),
    "a method that is a list": (
        "gptq", lambda t, how: how.update(quant_method=["gptq"]), r"not read: \"\['gptq'\]"),
    "sparsity that is a text": (
        "compressed-tensors int8", lambda t, how: how.update(sparsity_config="2:4"), "not sparse"),
    "a matrix of nothing": (
        "gptq", given(f"{Q}qweight", "I32", np.ones((0, 32), "i4")), r"its qweight is I32 \(0"),
    "a matrix of 8 bits of nothing": (
        "fp8 tensor", given(f"{Q}weight", "F8_E5M2", np.ones((0, 9), "u1")), "none for each tenso"),
    "no method": ("gptq", lambda t, how: how.pop("quant_method"), "not read: 'None'"),
    "packed tensors": (
        "compressed-tensors int8", lambda t, how: how.update(format="nvfp4-pack-quantized"),
        "pack-quantized, not sparse: format 'nvfp4-pack-quantized'"),
    "packed bits that nobody names": (
        "packed 4", lambda t, how: how.pop("config_groups"), "name no number of bits"),
    "packed 3": ("packed 4", lambda t, how: how.update(pack_quantized(3)), "4 or 8: num_bits .3"),
    "packed bits of a list": (
        "packed 4", lambda t, how: how.update(config_groups={"a": []}), "no number of bits"),
    "packed 8 in 4": ("packed 4", lambda t, how: how.update(pack_quantized(8)), "packed cannot"),
    "no shape": ("packed 4", lambda t, how: t.pop(f"{Q}weight_shape"), "weight_shape cannot"),
    "another shape": (
        "packed 4", given(f"{Q}weight_shape", "I64", np.array([32, 99])), "2 scales for 99"),
    "a packed matrix without scales": (
        "packed 4", lambda t, how: t.pop(f"{Q}weight_scale"), "it has no weight_scale"),
    "sparse tensors": (
        "compressed-tensors int8",
        lambda t, how: how.update(sparsity_config={"format": "sparse-24"}), "not sparse"),
}  # fmt: skip


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for method in sorted({method for method, _, _ in WRONG.values()}):
        made[method] = tmp_path_factory.mktemp("quantised") / "source"
        save(made[method], "llama", method)
    return made


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_quantised_source_is_one_line(tmp_path, quantised, what):
    method, change, words = WRONG[what]
    source = Path(shutil.copytree(quantised[method], tmp_path / "source"))
    tensors = read(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    change(tensors, config["quantization_config"])
    assert all(array.dtype.itemsize in BITS for _, array in tensors.values())
    write(source / "model.safetensors", tensors)
    (source / "config.json").write_text(json.dumps(config))
    refused(words, checkpoints.convert, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
