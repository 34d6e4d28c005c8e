"""What a memory adds to a decoded token, on a GPU little but launches and the host's work for them:
a gated FFN memory launched five kernels a layer where three do, and cut itself into layers for each
token, a sixth of the host's work (docs/metal.md)."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.memory.packed import Packed, Packing
from mlx_hmem.model.stream import AnchorWithMemory
from tests.helpers.graphs import launches, operations, traced
from tests.helpers.references import config_of, random_rows
from tests.helpers.tiny_anchors import LAYERS, make_anchor

TOKEN = mx.array([[3]])


def second_token(name: str, kind: str, with_memory: bool = True, packed: bool = False) -> mx.array:
    """The logits of an anchor's second token, not computed yet."""
    anchor = make_anchor(name)
    config = config_of(anchor, kind)
    slot, rows = attach_memory(anchor, config), random_rows(config, 0)
    if packed:
        how = Packing("affine", 4, 32)
        rows = tuple(Packed(mx.quantize(g, **how._asdict()), how, g.dtype) for g in rows)
    mx.eval(*rows)
    model = AnchorWithMemory(anchor, slot, rows if with_memory else None)
    cache = make_prompt_cache(anchor)
    mx.eval(model(TOKEN, cache=cache))
    return model(TOKEN, cache=cache)


ADDED = {  # to a layer
    ("openlm", "ffn", False): {"Matmul": 1, "AddMM": 1, "product": 1},
    ("gemma3_text", "ffn", False): {"Matmul": 1, "AddMM": 1, "product": 1},
    ("openlm", "lora_vo", False): {"Matmul": 2, "AddMM": 2},  # of two projections
    ("openlm", "ffn", True): {"QuantizedMatmul": 2, "Add": 1, "product": 1},
    ("openlm", "lora_vo", True): {"QuantizedMatmul": 4, "Multiply": 2, "Add": 2},
}


@pytest.mark.parametrize(("name", "kind", "packed"), ADDED)
def test_kernels_of_a_layer(name, kind, packed):
    more = launches(second_token(name, kind, packed=packed))
    more.subtract(launches(second_token(name, kind, with_memory=False)))
    per_layer = {n if n[:8] != "Compiled" else "product": c / LAYERS for n, c in more.items() if c}
    assert per_layer == ADDED[name, kind, packed]


def test_a_memory_is_cut_into_layers_once():
    found = operations(second_token("openlm", "ffn"))
    assert found["CustomTransforms"] == 0
    assert found["StopGradient"] == 0


@pytest.mark.parametrize("kind", ["ffn", "lora_vo"])
def test_the_gradient_of_a_memory_that_all_rows_share_is_made_once(kind):
    anchor, ids = make_anchor("openlm"), mx.zeros((5, 6), mx.int32)
    config = config_of(anchor, kind)
    slot = attach_memory(anchor, config)
    groups = random_rows(config, 0)
    own = list(zip(*groups, strict=True))  # of each layer

    def loss(first: mx.array) -> mx.array:
        with slot.using([(first, *own[0][1:]), *own[1:]]):
            return anchor(ids).square().mean()

    first = groups[0][0]
    shapes = {shape for step in traced(mx.grad(loss), first) for shape in step.outputs}
    num_rows = first.shape[-2]
    assert (num_rows, first.shape[-1]) in shapes
    assert not [s for s in shapes if s[:1] == (5,) and num_rows in s and 6 not in s]
