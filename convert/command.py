"""``mlx_hmem.convert SOURCE DESTINATION``: PyTorch checkpoints to MLX; ``--to pytorch``: and back.

What SOURCE is, is seen from what lies there. PyTorch's layout of memories: docs/pytorch_layout.md.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
from mlx_hmem.anchors.load import read_config
from mlx_hmem.errors import ArgumentParser, UserError, run_verb
from mlx_hmem.folders import identity_of
from mlx_hmem.model.find import MODEL_FILES, TEXTS, find_model, is_repo_name

from .anchors import hugging_face, openlm
from .anchors.weights import Conversion, carry_out
from .gguf.header import is_gguf
from .gguf.model import from_gguf
from .gguf.out.model import to_gguf, write_file
from .gguf.out.write import FILE_TYPES
from .torch_files.pickles import open_files

KINDS = ("openlm", "huggingface", "hmem-pytorch", "gguf")
MARKER = "hmem_pytorch.json"
VERBS = {
    "quantize": (".quantize.command", "anchor and bank of a model to fewer bits"),
    "adapters": (".adapters.command", "LoRA adapters beside one anchor, as a memory bank"),
    "fuse": (".adapters.fuse", "the memory of a text inside an ordinary model"),
    "bundle": (".bundle.bundle", "a folder that a phone can run, without Python"),
    "tree": (".memory.trees", "a cluster tree from k-means of other libraries"),
    "upload": (".upload", "a model directory to the Hugging Face Hub"),
}
WHOLE = "unquantised"  # what is quantised, within the folder that is made
VERSION = 1  # of what a conversion writes: another one does not go on with a stopped one


def kind_of(source: Path) -> str:
    """One of KINDS, or "model" (with hmem.json) or "anchor" (without) for our own directories."""
    if source.is_dir():
        if (source / "hmem.json").is_file():
            return "model"
        if (source / MARKER).is_file():
            return "hmem-pytorch"
        if any((source / name).exists() for name in ("bank", "retriever")):
            raise UserError("a model directory without its hmem.json", source, "restore it")
        if hugging_face.is_hugging_face(source):
            return "anchor" if read_config(source)["model_type"] == "openlm" else "huggingface"
        if files := sorted(file.name for file in source.glob("*.gguf")):
            what = "a folder of GGUF files, of which one is converted"
            raise UserError(what, f"{', '.join(files)[:200]} in {source}", "give the path of one")
    elif is_gguf(source) or source.suffix == ".gguf":
        return "gguf"
    checkpoint = open_files(openlm.checkpoint_files(source))
    if openlm.is_openlm(checkpoint):
        return "openlm"
    names = ", ".join(list(checkpoint.tensors)[:3]) or "none"
    raise UserError(
        f"cannot tell what {source} is", f"its first tensors are {names}", "say it with --from"
    )


def conversion_of(args: argparse.Namespace, source: Path, kind: str) -> Conversion:
    from .memory.model import from_pytorch, to_pytorch

    if args.to == "gguf":
        return to_gguf(source, args.dtype)
    if args.to == "pytorch":
        if kind == "model":
            return to_pytorch(source, args.dtype)
        return openlm.into_torch(source, args.dtype)
    if kind in ("anchor", "model"):
        remedy = "use mlx_hmem.convert quantize" if args.quantize else "add --to pytorch"
        raise UserError("this is a model of MLX already", source, remedy)
    if kind == "huggingface":
        return hugging_face.from_torch(source, args.dtype)
    if kind == "gguf":
        return from_gguf(source, args.dtype, args.tokenizer)
    own = (args.config, options_of(args.set), args.tokenizer)
    if kind == "openlm":
        return openlm.from_torch(source, args.dtype, *own)
    return from_pytorch(source, args.dtype, *own)


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


def make(
    conversion: Conversion, path: Path, replace: bool, quantized: bool, options: dict[str, Any]
) -> None:
    """Makes the folder ``path``, its anchor ``quantized`` or not."""
    identity = identity_of(conversion.sources, version=VERSION, quantized=quantized, **options)
    if not quantized:
        carry_out(conversion, path, identity, replace)
        return
    from .quantize.command import quantization_for
    from .quantize.model import plan, write

    def write_quantized(part: Path) -> str:
        conversion.write(part / WHOLE)
        anchor = write(plan(part / WHOLE, quantization_for(0), {}), part).anchor
        shutil.rmtree(part / WHOLE)
        without_size = conversion.made.rpartition(", ")[0] or conversion.made
        size = f"{anchor.bytes_after / 1e6:,.1f} MB"
        return f"{without_size}, {anchor.bits_per_weight:.1f} bits for each weight, {size}"

    need = 2 * conversion.need_bytes
    smaller = conversion._replace(write=write_quantized, need_bytes=need)
    carry_out(smaller, path, identity, replace)


def parser() -> ArgumentParser:
    result = ArgumentParser(
        prog="mlx_hmem.convert",
        usage="mlx_hmem.convert SOURCE DESTINATION [options]",
        description="Brings a checkpoint to MLX: one of OpenLM's (a .pt file, a shard of several, "
        "or their folder), a Hugging Face folder, a GGUF file of llama.cpp's (of a set any), or a "
        "model with memories in PyTorch's layout. With --to pytorch it takes a model directory "
        "back, with --to gguf its anchor as a GGUF file. What SOURCE is, is seen from what lies "
        "there."
        "\n\nMakes the folder DESTINATION. Stopped, it goes on with the same command.",
        verbs=VERBS,
    )
    result.add_argument("source", nargs="?", metavar="SOURCE")
    result.add_argument("destination", nargs="?", metavar="DESTINATION", help="what to make")
    result.add_argument("--hf-path", metavar="SOURCE", help="the same; a Hub id, too")
    result.add_argument("--mlx-path", metavar="DESTINATION", help="the same")
    result.add_argument(
        "-q", "--quantize", action="store_true", help="the anchor to 4 bits, in groups of 64"
    )
    result.add_argument("--from", dest="kind", choices=KINDS, help="what SOURCE is")
    result.add_argument("--to", choices=("mlx", "pytorch", "gguf"), default="mlx")
    result.add_argument("--config", type=Path, help="OpenLM's config JSON, if not beside SOURCE")
    result.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of OpenLM's config"
    )
    result.add_argument(
        "--tokenizer", type=Path, help="the tokenizer's folder, for OpenLM and GGUF"
    )
    result.add_argument(
        "--dtype",
        choices=list(FILE_TYPES),
        help="round all weights; default: as is, to gguf float16; q8_0 is for gguf alone",
    )
    result.add_argument("--overwrite", action="store_true", help="replace a model at DESTINATION")
    result.add_argument("--upload", metavar="USER/NAME", help="then upload it to the Hub")
    return result


def check_options(args: argparse.Namespace, source: Path, kind: str) -> None:
    """Refuses options that would do nothing, or read something else than there is."""
    if kind in ("huggingface", "hmem-pytorch") and not source.is_dir():
        remedy = "leave --from out" if is_gguf(source) else "give the folder it lies in"
        raise UserError(f"--from {kind} takes a folder", source, remedy)
    openlm_only = {"--config": args.config, "--set": args.set, "--tokenizer": args.tokenizer}
    if kind not in ("openlm", "hmem-pytorch") or args.to != "mlx":
        for name, value in openlm_only.items():
            if value and not (kind == "gguf" and name == "--tokenizer"):
                raise UserError("this option is for OpenLM checkpoints", name, "leave it out")
    if args.upload and not is_repo_name(args.upload):
        raise UserError("not the name of a repository", args.upload, "write it as user/name")
    for name, value in {"--upload": args.upload, "--quantize": args.quantize}.items():
        if value and args.to != "mlx":
            raise UserError("this option is for models of MLX", name, "leave it out")
    if args.to == "pytorch" and kind == "gguf":
        raise UserError("a GGUF file becomes a model of MLX", source, "convert that to PyTorch")
    if args.to == "pytorch" and kind in ("openlm", "hmem-pytorch"):
        raise UserError("SOURCE is PyTorch's already", source, "leave --to pytorch out")
    if args.to == "gguf" and kind not in ("model", "anchor", "huggingface"):
        raise UserError("only a model's folder goes into a GGUF", source, "convert it to MLX first")
    if args.to != "gguf" and args.dtype == "q8_0":
        raise UserError("q8_0 is for --to gguf", args.dtype, "use float32, float16 or bfloat16")
    if args.tokenizer and not args.tokenizer.is_dir():
        raise UserError("no such folder", args.tokenizer, "give the folder of a tokenizer")


def places_of(args: argparse.Namespace) -> tuple[Path, Path]:
    """Source and destination, in our words or in mlx-lm's."""
    places = (args.source, args.hf_path, args.destination, args.mlx_path)
    source, out = places[0] or places[1], places[2] or places[3]
    if bool(places[0]) == bool(places[1]) or bool(places[2]) == bool(places[3]):
        raise UserError(
            "a conversion has one source and one destination",
            ", ".join(str(place) for place in places if place) or "none is given",
            "give SOURCE DESTINATION, or --hf-path and --mlx-path",
        )
    if not Path(source).exists() and (args.hf_path or is_repo_name(source.partition("@")[0])):
        pickles = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
        source = find_model(source, (*MODEL_FILES, *pickles, *TEXTS))
    if not Path(source).exists():
        raise UserError("no such file or folder", source, "give the path of a checkpoint")
    return Path(source), Path(out)


def main(words: Sequence[str]) -> None:
    if run_verb(words, VERBS, __package__):
        return
    args = parser().parse_args(words)
    source, out = places_of(args)
    kind = args.kind or kind_of(source)
    check_options(args, source, kind)
    options = {"to": args.to, "dtype": args.dtype, "set": args.set, "kind": kind}
    conversion = conversion_of(args, source, kind)
    if args.to == "gguf":
        write_file(conversion, out, args.overwrite)
        return
    make(conversion, out, args.overwrite, args.quantize, options)
    if args.upload:
        from .upload import upload

        upload(out, args.upload)
