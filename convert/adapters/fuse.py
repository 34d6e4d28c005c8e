"""``mlx_hmem.convert fuse MODEL OUT --text "…"``: the memory of a text inside an ordinary model.

FFN memory makes the anchor's FFNs wider (paper, section 3); LoRA memory is added to its weights.
The result needs no memory bank: mlx-lm, transformers and llama.cpp run it as any other model of its
architecture. It is streamed: memory holds chunks of matrices, and the fetched blocks.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlx_hmem.anchors.attach import anchor_sizes, check_sizes
from mlx_hmem.anchors.load import anchor_of_config, check_hashes, load_anchor, read_config
from mlx_hmem.anchors.load import weight_files as anchor_files
from mlx_hmem.bank.documents import read_documents, taught
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.bank.views import barred_path, in_bank, shown
from mlx_hmem.bank_tools.command import opened
from mlx_hmem.bank_tools.contents import model_folder, views_of
from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.folders import identity_of
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.model.banks import Banks, RoutedBank
from mlx_hmem.model.fetch import NOTHING_NEAR
from mlx_hmem.model.find import BANK_FOLDER
from mlx_hmem.model.load import open_encoder, read_hmem
from mlx_hmem.retriever import Retriever

from ..anchors.hugging_face import RULES, wanted_of, with_dtype
from ..anchors.keys import SAME, Shapes, rule_of, target_of, to_torch
from ..anchors.mlx_folder import QUANTIZED, plain_tensors
from ..anchors.weights import (
    DTYPES,
    Conversion,
    Target,
    anchor_conversion,
    carry_out,
    companions,
    write_shards,
)
from ..gguf.out.model import write_file
from ..gguf.out.write import write_gguf
from ..torch_files.tensors import LazyTensor
from .matrices import Change, merged, patches_of, widened
from .out import WRITERS, adapter_of, gguf_adapter

VERSION = 1  # of what is written: another one does not go on with a stopped one


class Chosen(NamedTuple):
    """A memory that was fetched from a model directory; ``said`` names it in words."""

    folder: Path
    memory: FetchedMemory
    said: str
    files: list[Path]  # what says which memory that is

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another memory of the same files."""
        blocks = [(read.level, read.cluster) for read in self.memory.reads]
        return {"version": VERSION, "memory": self.said, "blocks": blocks}


def choose(args: argparse.Namespace) -> Chosen:
    """Fetches the memory that the command line names.

    Raises UserError: none or several are named, the model has no such path, or its parts do not
    belong together.
    """
    given = [name for name in ("text", "path", "memory_name", "generic") if getattr(args, name)]
    if len(given) != 1:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none is named"
        remedy = "give --text, --path, --memory-name or --generic"
        raise UserError("one memory is fused", named, remedy)
    folder = model_folder(args.model)
    hmem = read_hmem(folder)
    assert hmem is not None  # model_folder saw it
    check_hashes(folder, hmem)
    with opened(folder) as open_banks:
        encoder = open_encoder(folder, hmem) if args.text else None
        parts = {}
        for each in open_banks:
            known = taught(read_documents(each.folder / BANK_FOLDER))
            retriever = Retriever(encoder, each.tree, known) if encoder else None
            parts[each.name] = RoutedBank(retriever, each.bank, each.hmem.names or {})
        banks = Banks(parts, views_of(folder, open_banks)).under(None)
        name, path = "", ClusterPath()
        if encoder is not None:
            name, found = banks.route(args.text)
            if found is None:
                raise UserError(NOTHING_NEAR, args.text, "give another --text, or --path")
            path = found
        elif args.memory_name:
            name, path = banks.named(args.memory_name)
        elif args.path:
            name, path = in_bank(barred_path(args.path))
            if not path:
                raise UserError(
                    "not a cluster path", repr(args.path), "write it as 3,51 or BANK:3,51"
                )
        bank = banks.bank(name)
        memory = bank.generic() if args.generic else bank.fetch(bank.config.check_path(path))
        said = (
            "generic memory" if args.generic else f"memory {shown((name, *path) if name else path)}"
        )
        if memory.rows is None:
            remedy = "mlx_hmem.bank unblock lets it be fetched"
            raise UserError("no block of this path may be fetched", said, remedy)
        place = next(each.folder for each in open_banks if each.name == name)
    files = [folder / "hmem.json", place / BANK_FOLDER / MANIFEST]
    return Chosen(folder, memory, said, files)


def fuse(chosen: Chosen, dtype: str | None = None) -> Conversion:
    """The memory and its anchor as a model folder without memory.

    Args:
        dtype: that of all weights, as MLX calls it; None keeps that of each tensor.

    Raises UserError: the kind cannot be fused, or the architecture has no place for it.
    """
    folder, memory = chosen.folder, chosen.memory
    config = read_config(folder)
    name, files = config["model_type"], anchor_files(folder)
    anchor, wanted = anchor_of_config(config), wanted_of(config)
    check_sizes(anchor, memory.config)
    tensors, notes = plain_tensors(folder, wanted)
    notes.insert(0, f"fusing {chosen.said}, kind {memory.config.kind}")
    config = {key: value for key, value in config.items() if key not in QUANTIZED}
    if memory.config.kind == "ffn":
        changes, extra = widened(anchor, memory), sum(memory.config.r)
        config["intermediate_size"] = anchor_sizes(anchor)["intermediate_size"] + extra
        notes.append(f"each FFN grows by {extra} units to {config['intermediate_size']}")
    elif memory.config.patched:
        changes = merged(patches_of(anchor, memory))
        stored = dtype or "the dtype of the weights"
        notes.append(f"patches are added in float32, the sums rounded to {stored}")
    else:
        raise UserError(
            f"memory of kind {memory.config.kind} is no part of an ordinary model",
            chosen.said,
            "run it attached, with mlx_hmem.generate; kinds ffn and lora can be fused",
        )
    if name == "openlm":
        notes.append("mlx_hmem.generate --memory none runs it; --to pytorch makes it OpenLM's own")
    targets = _targets(name, tensors, changes, wanted, wanted_of(config), dtype)
    sources = [folder / "config.json", *files, *chosen.files]
    made = anchor_conversion(
        sources, targets, with_dtype(config, dtype), notes, companions(folder), write_shards
    )

    def write(part: Path) -> None:
        made.write(part)
        load_anchor(part, lazy=True)  # config and weights go together

    return made._replace(write=write)


def _targets(
    name: str,
    tensors: Mapping[str, LazyTensor],
    changes: Mapping[str, Change],
    wanted: Shapes,
    after: Shapes,
    dtype: str | None,
) -> list[Target]:
    """The tensors of the result, under PyTorch's names, which mlx-lm reads as well as its own.

    ``wanted`` and ``after`` have the names and shapes of mlx-lm's, before and after.
    """
    rules, stored = RULES.get(name, [SAME]), DTYPES[dtype] if dtype else None
    ours = tensors.keys() == wanted.keys()  # or the folder has PyTorch's names already
    changed = dict(tensors)
    for each, change in changes.items():
        rule, _, values = rule_of(each, [SAME] if ours else rules)
        source, turned = rule.torch.format(**values), rule.how == "transposed"
        if source not in tensors:
            raise UserError("the anchor has no such tensor", source, "restore the anchor")
        tensor = tensors[source].T if turned else tensors[source]
        tensor = change(tensor, stored or tensor.dtype)
        if tensor.shape != after[each]:
            raise UserError(
                f"mlx-lm's {name} takes no other width of its FFNs",
                f"{each} would be {tensor.shape}, not {after[each]}",
                "run the memory attached, with mlx_hmem.generate",
            )
        changed[source] = tensor.T if turned else tensor
    if ours:
        return to_torch(changed, rules, after, dtype)
    return [target_of(each, t.shape, [t], dtype) for each, t in changed.items()]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mlx_hmem.convert fuse",
        usage="mlx_hmem.convert fuse MODEL OUT --text TEXT [options]",
        description="Makes an ordinary model, without a memory bank, of an anchor and the memory "
        "of one text, which is in its weights then: mlx-lm, transformers and llama.cpp run it."
        "\n\nMakes the folder OUT. Stopped, it goes on with the same command.",
    )
    parser.add_argument("model", metavar="MODEL", help="a model directory, a Hub id, or demo")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make; for gguf a file")
    memory = parser.add_argument_group("which memory: one of")
    memory.add_argument("--text", help="the memory that this text is routed to")
    memory.add_argument("--path", help="that of a cluster path: 3,51, or NAME:3,51 of a bank")
    memory.add_argument("--memory-name", metavar="NAME", help="the memory of this name")
    memory.add_argument("--generic", action="store_true", help="the generic memory")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("model", *WRITERS, "gguf"),
        default="model",
        help="an ordinary model (default), or the memory alone, of a LoRA kind, as an adapter",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of a model's weights; default: as is"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model at OUT")
    return parser


def main(words: Sequence[str]) -> None:
    args = _parser().parse_args(words)
    chosen = choose(args)
    conversion = fuse(chosen, args.dtype) if args.form == "model" else adapter(chosen, args)
    if args.form == "gguf":
        write_file(conversion, args.out, args.overwrite)
        return
    identity = identity_of(
        conversion.sources, **chosen.identity, program="fuse", form=args.form, dtype=args.dtype
    )
    carry_out(conversion, args.out, identity, args.overwrite)


def adapter(chosen: Chosen, args: argparse.Namespace) -> Conversion:
    """The memory as an adapter of its anchor, in the form that the command line asks for."""
    if args.dtype:
        raise UserError("an adapter keeps its numbers", f"--dtype {args.dtype}", "leave it out")
    made = adapter_of(chosen.folder, chosen.memory)
    size = sum(pair.a.nbytes + pair.b.nbytes for pair in made.pairs)
    said = f"LoRA of rank {made.rank} on {len(made.pairs)} matrices, {size / 1e6:,.1f} MB"
    note = f"{chosen.said}, kind {chosen.memory.config.kind}, as {args.form}"
    if args.form == "gguf":
        values, tensors = gguf_adapter(made)
        write = partial(write_gguf, values=values, tensors=tensors)
    else:
        write = partial(WRITERS[args.form], adapter=made, base=args.model)
    return Conversion(chosen.files, size + (1 << 20), [note], write, said, made.config)
