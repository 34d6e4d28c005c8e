"""Many clients with different memories at once, against the same ones by one; beside mlx-lm's
server with the anchor alone."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from benchmarks.common.counting import in_turns
from benchmarks.common.models import make_bank
from benchmarks.common.show import Result
from benchmarks.serving.process import (
    Rate,
    at_once,
    first_alone,
    first_under_load,
    one_by_one,
    running,
)
from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.config import FORMAT_VERSION, HmemConfig, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import save_safetensors, write_atomic
from mlx_hmem.model.find import DEMO
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel

SUBJECTS = (
    "river city church album band beetle moth football club king queen railway station novel poem "
    "film actor painter museum castle bridge mountain lake island ship navy army battle war treaty "
    "election party minister judge court law bank company factory mine coal oil gas steel glass "
    "paper newspaper magazine television radio song opera dancer school university professor "
    "physics chemistry algebra planet star comet rocket aircraft pilot airport road car engine "
    "bicycle cricket tennis chess horse dog bird fish snake frog tree flower fruit wheat rice wine "
    "beer village temple bishop saint monk language dialect alphabet coin stamp flag virus fever "
    "surgeon hospital"
)
ANCHOR = {"hidden_size": 128, "num_hidden_layers": 5, "intermediate_size": 352}


def prompts_apart(model: MemoryModel, count: int) -> list[str]:
    """Prompts of which each has another route; about its documents, where a model has some."""
    found: dict[tuple[int, ...], str] = {}
    documents = model.require_banks().parts[""].documents
    for subject in [Path(d.name).stem for d in documents if d.name] or SUBJECTS.split():
        prompt = f"The {subject} was known for"
        found.setdefault(model.require_retriever().route(prompt), prompt)
    if len(found) < count:
        raise UserError("not so many routes", len(found), "ask for fewer clients")
    return list(found.values())[:count]


def measure(model: str = "demo", clients: int = 32, tokens: int = 64, rounds: int = 3) -> Result:
    """``tokens``: of each answer, at most."""
    prompts = prompts_apart(load(model), clients)
    with running("mlx_hmem.server", model, "--rows", str(clients)) as program:
        ways: dict[str, Callable[[int], Rate]] = {
            "one by one": lambda _: one_by_one(program, prompts, tokens),
            "at once": lambda _: at_once(program, prompts, tokens),
        }
        at_once(program, prompts, tokens)  # warms up; one by one it would take six times as long
        found = in_turns(ways, rounds, "rounds", warm_up=False)
        alone = first_alone(program, prompts)
        loaded = median(first_under_load(program, prompts, tokens))
    pairs = zip(found["one by one"][0].answers, found["at once"][0].answers, strict=True)
    return {
        "clients": clients,
        "answers that are the same at once": sum(a == b for a, b in pairs),
        "answers": rates(found, "one by one"),
        "first token": {
            "alone": {"ms": alone, "of_alone": 1.0},
            f"beside {clients - 1}": {"ms": loaded, "of_alone": loaded / alone},
        },
    }


def rates(found: dict[str, list[Rate]], first: str) -> dict[str, Any]:
    """Medians over the rounds, and of the ratios within a round."""
    return {
        name: {
            "tokens/s": median(rate.tokens_per_s for rate in rates),
            "of_first": median(
                rate.tokens_per_s / base.tokens_per_s
                for rate, base in zip(rates, found[first], strict=True)
            ),
        }
        for name, rates in found.items()
    }


def write_model(folder: Path, context: int | None = None) -> None:
    """A random anchor that mlx-lm knows, with the demo's tokenizer and retriever and a random
    bank; ``context``: in tokens, in place of the demo's."""
    demo = json.loads((DEMO / "config.json").read_text())
    args: dict[str, Any] = ANCHOR | {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    }
    args |= {name: demo[name] for name in ("vocab_size", "max_position_embeddings")}
    if context is not None:
        args["max_position_embeddings"] = context
    config = args | {"model_type": "llama", "eos_token_id": demo["eos_token_id"]}
    mx.random.seed(0)
    anchor = Model(ModelArgs.from_dict(config))
    weights: Any = tree_flatten(anchor.parameters())
    save_safetensors(folder / "model.safetensors", dict(weights))
    write_atomic(folder / "config.json", json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    shutil.copytree(DEMO / "retriever", folder / "retriever")
    own = HmemConfig.from_file(DEMO / "hmem.json")
    sizes = (args["hidden_size"], args["num_hidden_layers"])
    memory = MemoryConfig(*sizes, r=own.memory.r, branching=own.memory.branching)
    hmem = HmemConfig(FORMAT_VERSION, memory, own.retriever, anchor_hash(folder))
    keys = {(n, i) for n, count in enumerate(memory.num_clusters, 1) for i in range(count)}
    make_bank(folder / "bank", memory, keys, 16, hmem.anchor_hash, own.routed.tree_hash)
    write_atomic(folder / "hmem.json", hmem.to_json())


def measure_beside(
    model: Path | None = None, clients: int = 16, tokens: int = 32, rounds: int = 3
) -> Result:
    """``model``: one whose anchor mlx-lm knows, in place of a random one; ``tokens``: of each
    answer, at most."""
    with tempfile.TemporaryDirectory() as place:
        folder = model or Path(place) / "model"
        if model is None:
            folder.mkdir()
            write_model(folder)
        prompts = prompts_apart(load(folder), clients)
        with (
            running("benchmarks.serving.theirs", folder) as theirs,
            running("mlx_hmem.server", folder, "--rows", str(clients)) as ours,
        ):
            ways: dict[str, Callable[[int], Rate]] = {
                "mlx-lm's server": lambda _: at_once(theirs, prompts, tokens),
                "memory none": lambda _: at_once(ours, prompts, tokens, memory="none"),
                "one memory for all": lambda _: at_once(ours, prompts, tokens, memory="generic"),
                "a memory for each": lambda _: at_once(ours, prompts, tokens),
            }
            found = in_turns(ways, rounds, "rounds")
    pairs = zip(found["mlx-lm's server"][0].answers, found["memory none"][0].answers, strict=True)
    return {
        "clients": clients,
        "answers of memory none that are mlx-lm's": sum(a.text == b.text for a, b in pairs),
        "all at once": rates(found, "mlx-lm's server"),
    }


def measure_again(tokens: int = 1500, rounds: int = 9) -> Result:
    """``tokens``: of each prompt; ``rounds``: prompts, each asked twice."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        folder.mkdir()
        write_model(folder, context=tokens + 64)
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        prompts = [random.Random(n).choices(range(1, size), k=tokens) for n in range(rounds)]
        with running("mlx_hmem.server", folder) as program:
            times = [[program.first_token(prompt) for _ in "ab"] for prompt in prompts]
            not_read = program.metric("hmem_prompt_cache_tokens_total") / rounds
    first, again = (median(each) for each in zip(*times, strict=True))
    ratio = median(again / first for first, again in times)
    return {
        "tokens of a prompt": tokens,
        "of these not read again": not_read,
        "first token": {
            "asked first": {"ms": first, "of_first": 1.0},
            "asked again": {"ms": again, "of_first": ratio},
        },
    }
