"""How positions are stretched, from what llama.cpp keeps of it: settings, and tensors of factors.

Of Llama 3's scaling it keeps one factor for each pair alone (``rope_freqs``), from which the
settings are found again; of Phi 3's both lists (``rope_factors_long``, ``rope_factors_short``).
"""

import math
from typing import Any

import numpy as np

from mlx_hmem.errors import UserError

from .header import Header
from .settings import Key, Settings
from .tensors import open_tensor

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# What models of Meta's kind have: low and high factor, original context; Meta's own first.
LLAMA3 = [(1.0, 4.0, float(1 << power)) for power in (13, *range(8, 13), *range(14, 20))]
MOST_FACTORS = 1 << 16


def scaling_of(base: float, settings: Settings) -> dict[str, Any]:
    """``rope_scaling`` of a config, if there is any."""
    value, header = settings.value, settings.header
    kind = value(Key("rope.scaling.type", str, "none"))
    if LONG in header.tensors and SHORT in header.tensors:
        value(Key("rope.scaling.attn_factor", float, 1.0))  # it follows from the context lengths
        lists = {"long_factor": _factors(header, LONG), "short_factor": _factors(header, SHORT)}
        return {"rope_scaling": {"rope_type": "longrope", "type": "longrope", **lists}}
    if FREQS in header.tensors:
        found = llama3_of(_factors(header, FREQS), base)
        return {"rope_scaling": found} if found else {}
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "type": kind, "factor": value(Key("rope.scaling.factor", float))}
    if kind == "yarn":
        original = value(Key("rope.scaling.original_context_length"))
        scaling["original_max_position_embeddings"] = original
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            scaling[key] = value(Key(f"rope.scaling.yarn_{key}", float, default))
        for key, usual in (("attn_factor", 1.0), ("ext_factor", 1.0), ("log_multiplier", 0.0)):
            if value(Key(f"rope.scaling.yarn_{key}", float, usual)) != usual:
                what = f"rope.scaling.yarn_{key} is not {usual:g}"
                raise UserError("mlx-lm does not heed this setting", what, "use llama.cpp")
    elif kind != "linear":
        raise UserError("no such scaling of RoPE is converted", kind, "known: linear, yarn")
    return {"rope_scaling": scaling}


def _factors(header: Header, name: str) -> list[float]:
    tensor = header.tensors[name]
    if math.prod(tensor.shape) > MOST_FACTORS:
        raise UserError(f"{name} is too large for factors of RoPE", tensor.shape, "check the file")
    numbers = open_tensor(name, tensor).numbers().reshape(-1)
    if not np.all(np.isfinite(numbers) & (numbers > 0)):
        raise UserError(f"{name} has numbers that are no factors", tensor.path, "check the file")
    return [float(str(number)) for number in numbers.astype(np.float32)]


def llama3_factors(
    base: float, dims: int, factor: float, low: float, high: float, original: float
) -> np.ndarray:
    """By what Llama 3's scaling divides the frequency of each pair, (dims / 2,) float64."""
    frequencies = base ** -(np.arange(0, dims, 2) / dims)
    smooth = (original * frequencies / (2 * math.pi) - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def llama3_of(factors: list[float], base: float) -> dict[str, Any] | None:
    """Llama 3's scaling that has these factors; None if they scale nothing.

    Where none of :data:`LLAMA3` has them: between the two ends 1 ÷ factor is a straight line
    over the frequency, and two numbers say which. ``low_freq_factor`` is then 1, as only its ratios
    to the others count.
    """
    found, dims = np.array(factors), 2 * len(factors)
    factor = float(found.max())
    if factor <= 1:
        return None
    tries = [*LLAMA3]
    turns = base ** -(np.arange(0, dims, 2) / dims) / (2 * math.pi)
    smooth = (1 / found - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if between.sum() > 1:
        slope, start = np.polyfit(turns[between], smooth[between], 1)
        if start < 0 < slope:
            high = 1 - 1 / start
            tries.append((1.0, float(high), float(slope * (high - 1))))
    for low, high, original in tries:
        if np.allclose(llama3_factors(base, dims, factor, low, high, original), found, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": round(original),
            }
    what = f"{FREQS} is not of Llama 3's scaling"
    raise UserError(what, f"factors up to {factor:g}", "use its Hugging Face folder")
