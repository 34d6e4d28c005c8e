"""OpenLM checkpoints to model directories, and back.

The table of names is that of the architecture, ``mlx_hmem.anchors.openlm.NAMES``; what the model
looks like, :mod:`convert.anchors.openlm_config` finds out.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import anchor_of_config, check_whole_set, read_config, weight_files
from mlx_hmem.anchors.openlm import NAMES, PREFIXES
from mlx_hmem.errors import UserError

from ..torch_files.pickles import open_files, refuse_distributed
from ..torch_files.tensors import Checkpoint, open_safetensors
from ..torch_files.writer import Entry, write_torch
from . import hugging_face
from .hugging_face import wanted_of
from .keys import Drop, Rule, strip, to_mlx, to_torch
from .openlm_config import (
    EMBEDDING,
    HEAD,
    IDS,
    INV_FREQ,
    NORMS,
    POSITIONS,
    Config,
    inverse_frequencies,
    model_args,
    read_openlm_config,
)
from .tokenizer import check_tokenizer
from .weights import Conversion, Target, anchor_conversion, companions, progress, write_shards

RULES = [Rule(name, ours, "parts" if len(ours) > 1 else "same") for name, ours in NAMES.items()]


def checkpoint_files(source: Path) -> list[Path]:
    """The files of one checkpoint: a file with the other shards of its set, or a folder's only."""
    suffixes = (".pt", ".pth", ".bin", ".safetensors")
    folder = source if source.is_dir() else source.parent
    files = sorted(f for f in folder.iterdir() if f.suffix in suffixes and f.is_file())
    if source.is_file():
        files = [f for f in files if _set_of(f) == _set_of(source)] or [source]
    files = [f for f in files if not f.name.startswith(("optimizer", "scaler"))] or files
    if not files or source.suffix == ".distcp":
        refuse_distributed(folder)
        wanted = ", ".join(suffixes)
        raise UserError(f"no checkpoint in {folder}", f"no {wanted} file", "give another path")
    sets = {_set_of(file) for file in files}
    if len(sets) != 1:
        names = ", ".join(f.name for f in files[:6])
        raise UserError(f"{len(sets)} checkpoints in {folder}", names, "name the file of one")
    check_whole_set([file.name for file in files], "shards", folder)
    return files


def _set_of(file: Path) -> str:
    """What the names of a checkpoint's shards have in common: "a" of "a-00001-of-00004.pt"."""
    return re.sub(r"-\d+(-of-\d+)?$", r"\1", file.stem) + file.suffix


def is_openlm(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(EMBEDDING) for name in checkpoint.tensors)


def from_torch(
    source: Path,
    dtype: str | None = None,
    config_file: Path | None = None,
    options: Config | None = None,
    tokenizer: Path | None = None,
    is_foreign: Callable[[str], bool] = lambda name: False,
) -> Conversion:
    """An OpenLM checkpoint as a model directory.

    Args:
        source: the ``.pt`` file, one shard of several, or their folder.
        dtype: rounds all weights to float32, float16 or bfloat16; None keeps each tensor's bits.
        config_file: an OpenLM config JSON; default: the one that lies beside the checkpoint.
        options: keys of an OpenLM config that go before the file's.
        tokenizer: the folder of the tokenizer; default: the source's own, if it has one.
        is_foreign: names of tensors that are none of the anchor's.
    """
    files = checkpoint_files(source)
    config, file = read_openlm_config(source, config_file, options or {})
    checkpoint = open_files(files)
    own = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_foreign(name)}
    tensors = strip(own, PREFIXES)
    args, tied, notes = model_args(tensors, config)
    drops = [Drop(INV_FREQ, "RoPE is computed from its base")]
    if tied:
        drops.append(Drop(HEAD, "equal to the embedding, to which it is tied"))
    targets, dropped = to_mlx(tensors, RULES, drops, wanted_of(args), dtype)
    args |= {key: config[key] for key in IDS if key in config}
    notes += dropped + [f"left out {name}: no part of the model" for name in checkpoint.left_out]
    copied = companions(tokenizer or (source if source.is_dir() else source.parent))
    if not any(file.name.startswith("tokenizer") for file in copied):
        notes.append("no tokenizer beside the checkpoint: put tokenizer.json into the result")
    notes += check_tokenizer(copied, args, source)
    sources = [*files, *([file] if file else [])]
    return anchor_conversion(sources, targets, args, notes, copied, write_shards)


def write_checkpoint(part: Path, targets: Sequence[Target], config: Config) -> None:
    """Writes ``model.pt`` of an anchor with this config of OpenLM's, unless it is there."""
    if not (part / "model.pt").exists():
        interleaved = POSITIONS[config["positional_embedding_type"]]
        layers = range(0 if interleaved else config["n_layers"])
        values = inverse_frequencies(config["rope_theta"], config["head_dim"])
        tied = {HEAD: EMBEDDING} if config["weight_tying"] else {}
        with progress(targets) as bar:
            entries: list[Entry] = [(t.name, t.dtype, t.shape, t.chunks(bar)) for t in targets]
            entries += [(INV_FREQ.format(i=i), "F32", values.shape, [values]) for i in layers]
            write_torch(part / "model.pt", entries, {"name": "mlx_hmem"}, aliases=tied)


def into_torch(source: Path, dtype: str | None = None) -> Conversion:
    """A model directory as a Hugging Face folder, or with an OpenLM anchor as ``model.pt`` and
    ``model.json``, OpenLM's own."""
    config = read_config(source)
    if config.get("quantization"):
        raise UserError("the anchor is quantised", source, "convert the unquantised one")
    if config["model_type"] != "openlm":
        return hugging_face.into_torch(source, dtype)
    args: Any = anchor_of_config(config).args
    files = weight_files(source)
    targets = to_torch(open_safetensors(files).tensors, RULES, wanted_of(config), dtype)
    norms = {ours: name for name, ours in reversed(NORMS.items())}
    positions = {interleaved: name for name, interleaved in POSITIONS.items()}
    values = {
        "hidden_dim": args.hidden_size,
        "n_layers": args.num_hidden_layers,
        "n_heads": args.num_attention_heads,
        "head_dim": args.head_dim,
        "ffn_dim": args.intermediate_size,
        "vocab_size": args.vocab_size,
        "seq_len": args.max_position_embeddings,
        "post_embed_norm": False,
        "weight_tying": args.tie_word_embeddings,
        "model_norm": norms[args.norm_type],
        "norm_eps": args.norm_eps,
        "qk_norm": args.qk_norm,
        "positional_embedding_type": positions[bool(args.rope_traditional)],
        "rope_theta": args.rope_theta,
        "ffn_type": "swiglu_torch",
    } | {key: config[key] for key in IDS if config.get(key) is not None}
    sources = [source / "config.json", *files]
    write = partial(write_checkpoint, config=values)
    return anchor_conversion(sources, targets, values, [], companions(source), write, "model.json")
