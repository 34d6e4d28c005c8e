"""``mlx_hmem.convert SOURCE DESTINATION``: PyTorch checkpoints to MLX; ``--to pytorch``: and back.

SOURCE may be an OpenLM checkpoint (a ``.pt`` file, one shard of several, or their folder), a
Hugging Face folder, a model with memories in our PyTorch layout (docs/pytorch_layout.md), or, for
``--to pytorch``, a model directory. What it is, is seen from what lies there; ``--from`` says it.
``mlx_hmem.convert quantize``, ``… bundle``, ``… tree`` and ``… upload`` have a ``--help`` of their
own.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
from mlx_hmem.anchors.load import read_config
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.folders import identity_of, whole_folder
from mlx_hmem.model.find import is_repo_name

from .anchors import hugging_face, openlm
from .anchors.keys import size_of
from .anchors.weights import DTYPES, Plan

KINDS = ("openlm", "huggingface", "hmem-pytorch")
MARKER = "hmem_pytorch.json"
VERBS = {
    "bundle": ".bundle.bundle",
    "quantize": ".quantize.command",
    "tree": ".memory.trees",
    "upload": ".upload",
}
VERSION = 1  # of what a conversion writes: another one does not go on with a stopped one


def kind_of(source: Path) -> str:
    """One of KINDS, or "model" (with hmem.json) or "anchor" (without) for our own directories."""
    if not source.exists():
        raise UserError("no such file or folder", source, "give the path of a checkpoint")
    if source.is_dir():
        if (source / "hmem.json").is_file():
            return "model"
        if (source / MARKER).is_file():
            return "hmem-pytorch"
        if any((source / name).exists() for name in ("bank", "retriever")):
            raise UserError("a model directory without its hmem.json", source, "restore it")
        if (source / "config.json").is_file():
            values = read_config_or_none(source)
            if values is not None:
                return "anchor" if values["model_type"] == "openlm" else "huggingface"
    checkpoint = openlm.open_checkpoint(openlm.checkpoint_files(source))
    if openlm.is_openlm(checkpoint):
        return "openlm"
    names = ", ".join(list(checkpoint.tensors)[:3]) or "none"
    raise UserError(
        f"cannot tell what {source} is", f"its first tensors are {names}", "say it with --from"
    )


def read_config_or_none(folder: Path) -> dict[str, Any] | None:
    """The ``config.json`` of an anchor; None for another file of this name, such as OpenLM's."""
    try:
        return read_config(folder)
    except UserError as error:
        if "model_type" in error.what:
            return None
        raise


def plan_of(args: argparse.Namespace, kind: str) -> Plan:
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.to == "pytorch":
        name = read_config(args.source)["model_type"]
        back = openlm.plan_to_torch if name == "openlm" else hugging_face.plan_to_torch
        return back(args.source, dtype)
    if kind == "openlm":
        options = options_of(args.set)
        return openlm.plan_from_torch(args.source, args.config, options, args.tokenizer, dtype)
    if kind == "anchor":
        raise UserError("this is a model of MLX already", args.source, "add --to pytorch")
    return hugging_face.plan_from_torch(args.source, dtype)


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of the command line; a value is JSON, or else a text."""
    result = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError("--set takes KEY=VALUE", text, "write --set rope_theta=100000")
        try:
            result[key] = json.loads(value)
        except ValueError:
            result[key] = value
    return result


def convert_anchor(plan: Plan, path: Path, replace: bool, options: dict[str, Any]) -> None:
    """Carries a plan out and says what came of it."""
    identity = identity_of([*plan.sources, *plan.copied], version=VERSION, **options)
    with whole_folder(path, identity, replace=replace, need_bytes=plan.need_bytes) as part:
        for note in plan.notes:
            print(note, file=sys.stderr)
        plan.write(part)
    numbers, size = size_of(plan.targets)
    print(f"{path}: {numbers:,} parameters in {len(plan.targets)} tensors, {size / 1e6:,.1f} MB")


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="mlx_hmem.convert", description=__doc__)
    result.add_argument("source", type=Path, metavar="SOURCE")
    result.add_argument("destination", type=Path, metavar="DESTINATION", help="the folder to make")
    result.add_argument("--from", dest="kind", choices=KINDS, help="what SOURCE is")
    result.add_argument("--to", choices=("mlx", "pytorch"), default="mlx")
    result.add_argument("--config", type=Path, help="OpenLM's config JSON, if not beside SOURCE")
    result.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of OpenLM's config"
    )
    result.add_argument("--tokenizer", type=Path, help="the tokenizer's folder, for OpenLM")
    result.add_argument("--dtype", choices=list(DTYPES), help="round all weights; default: as is")
    result.add_argument("--overwrite", action="store_true", help="replace a model at DESTINATION")
    result.add_argument("--upload", metavar="USER/NAME", help="then upload it to the Hub")
    return result


def check_options(args: argparse.Namespace, kind: str) -> None:
    """Refuses options that would do nothing."""
    openlm_only = {"--config": args.config, "--set": args.set, "--tokenizer": args.tokenizer}
    if kind not in ("openlm", "hmem-pytorch") or args.to == "pytorch":
        for name, value in openlm_only.items():
            if value:
                raise UserError("this option is for OpenLM checkpoints", name, "leave it out")
    if args.upload and not is_repo_name(args.upload):
        raise UserError("not the name of a repository", args.upload, "write it as user/name")
    if args.upload and args.to == "pytorch":
        raise UserError("only MLX models are uploaded", args.upload, "leave --upload out")
    if args.to == "pytorch" and kind in ("openlm", "hmem-pytorch"):
        raise UserError("SOURCE is PyTorch's already", args.source, "leave --to pytorch out")
    if args.tokenizer and not args.tokenizer.is_dir():
        raise UserError("no such folder", args.tokenizer, "give the folder of a tokenizer")


def main(words: Sequence[str]) -> None:
    if words[:1] and words[0] in VERBS:
        importlib.import_module(VERBS[words[0]], __package__).main(words[1:])
        return
    args = parser().parse_args(words)
    kind = args.kind or kind_of(args.source)
    check_options(args, kind)
    if kind in ("model", "hmem-pytorch"):
        _convert_memory(args, kind)
    else:
        options = {"to": args.to, "dtype": args.dtype, "set": args.set, "kind": kind}
        convert_anchor(plan_of(args, kind), args.destination, args.overwrite, options)
    if args.upload:
        main(["upload", str(args.destination), args.upload])


def _convert_memory(args: argparse.Namespace, kind: str) -> None:
    from .memory import model as memory

    if args.to == "pytorch":
        memory.to_pytorch(args.source, args.destination, overwrite=args.overwrite, dtype=args.dtype)
        return
    if kind == "model":
        raise UserError("this is a model of MLX already", args.source, "add --to pytorch")
    memory.from_pytorch(
        args.source,
        args.destination,
        overwrite=args.overwrite,
        dtype=args.dtype,
        config=args.config,
        options=options_of(args.set),
        tokenizer=args.tokenizer,
    )
