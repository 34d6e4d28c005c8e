"""A folder that a phone can run, with no Python in it: ``mlx_hmem.convert bundle MODEL OUT``.

Anchor and bank go in as MODEL has them: ``mlx_hmem.convert quantize`` makes them small before.
What computes is recorded as MLX functions (``.mlxfn``), which mlx-swift and MLX's C++ import; all
else an app does itself: docs/bundle.md says how, call for call, and ``run.py`` in the bundle is an
example. Shards of the bank are linked where the file system can, and copied elsewhere.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import xxhash
from tqdm import tqdm

from mlx_hmem.anchors.load import weight_files
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.files import link_or_copy, save_safetensors, write_atomic
from mlx_hmem.folders import RECORD, copy_missing, identity_of, whole_folder
from mlx_hmem.model.find import (
    BANK_FILES,
    BANK_FOLDER,
    MODEL_FILES,
    TEXTS,
    check_inside,
    find_model,
)
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.reading import open_regular
from mlx_hmem.retriever.encoder import STATIC_FOLDER

from .check import check_functions, newer_operations_of, plain_tokenizer
from .functions import Functions, dtype_and_shape
from .record import OLDEST

FORMAT_VERSION = 1
CONTEXT, PREFILL, KV_LENGTHS = 2048, (32, 128, 512), (256, 512, 1024)
BUNDLE, ANCHOR, RUNNER = "bundle.json", "anchor.safetensors", "run.py"
ENCODER = ("config.json", "encoder.safetensors", "tokenizer.json")  # of the static one


@dataclass(frozen=True)
class Bundle:
    """What a bundle will hold."""

    folder: Path  # the model directory
    model: MemoryModel
    functions: Functions

    @cached_property
    def encoder(self) -> Path:
        name = HmemConfig.from_file(self.folder / "hmem.json").routed.encoder
        return STATIC_FOLDER if name == "static" else self.folder / name

    @cached_property
    def shards(self) -> dict[str, Path]:
        """The shards of the bank, by their names in the bundle."""
        names = [shard.file for shard in self.model.require_bank().manifest.shards]
        return {f"{BANK_FOLDER}/{name}": self.folder / BANK_FOLDER / name for name in names}

    @cached_property
    def copied(self) -> dict[str, Path]:
        """Other files that go in as they are."""
        bank = {f"{BANK_FOLDER}/{MANIFEST}": self.folder / BANK_FOLDER / MANIFEST}
        tree = {"retriever/tree.safetensors": self.folder / "retriever" / "tree.safetensors"}
        encoder = {f"retriever/encoder/{name}": self.encoder / name for name in ENCODER}
        texts = [f for p in TEXTS for f in self.folder.glob(p)]
        for text in texts:
            check_inside(text, self.folder)
        runner = {RUNNER: Path(__file__).with_name("runner.py")}
        return bank | tree | encoder | {file.name: file for file in texts} | runner

    @property
    def identity(self) -> dict[str, Any]:
        files = [
            *self.shards.values(),
            *self.copied.values(),
            *weight_files(self.folder),
            *self.folder.glob("*.json"),
        ]
        return identity_of(
            files,
            program="bundle",
            version=FORMAT_VERSION,
            mlx=version("mlx"),
            device=device(),
            context=self.functions.context,
            prefill=self.functions.prefill,
            kv_lengths=self.functions.kv_lengths,
        )

    @property
    def bytes_needed(self) -> int:
        anchor = sum(array.nbytes for array in self.functions.weights.values())
        files = [*self.shards.values(), *self.copied.values()]
        return anchor + sum(file.stat().st_size for file in files)

    def write(self, part: Path) -> None:
        """All files; first those that may turn out to be impossible."""
        write_atomic(part / "tokenizer.json", plain_tokenizer(self.model))
        functions = [*self.functions.all(), *self.functions.short()]
        for function in tqdm(functions, desc="recording", unit="function", delay=2, disable=None):
            function.write(part)
        check_functions(self.functions, part)
        if not (part / ANCHOR).exists():
            save_safetensors(part / ANCHOR, self.functions.weights)
        copy_missing(self.shards, part, link_or_copy)
        copy_missing(self.copied, part)
        write_atomic(part / BUNDLE, json.dumps(self.manifest(part), indent=1) + "\n")

    def manifest(self, part: Path) -> dict[str, Any]:
        names = sorted(str(f.relative_to(part)) for f in part.rglob("*") if f.is_file())
        functions, tokenizer = self.functions, self.model.tokenizer
        return {
            "format_version": FORMAT_VERSION,
            # Readers of before compare the stream's number with 0, though MLX does not.
            "made_with": {"mlx": version("mlx"), "device": device(), "stream": 0},
            "oldest_mlx": version("mlx") if newer_operations_of(part) else OLDEST,
            "context": functions.context,
            "prefill": list(functions.prefill),
            "bos_token": tokenizer.bos_token,
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
            "weights": [
                {"name": name, **dtype_and_shape(array)}
                for name, array in functions.weights.items()
            ],
            "cache": [dtype_and_shape(array) for array in functions.cache],
            "rows": [dtype_and_shape(array) for array in functions.empty_rows(1)],
            "functions": [{"file": f.file, **f.about} for f in functions.all()],
            "short_functions": [{"file": f.file, **f.about} for f in functions.short()],
            "files": {
                name: _known_by(part / name) for name in names if name not in (BUNDLE, RECORD)
            },
        }


def device() -> str:
    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


def _known_by(file: Path) -> dict[str, Any]:
    """Length and XXH3 of a file; shards have checksums for each block in bank.json."""
    known: dict[str, Any] = {"bytes": file.stat().st_size}
    if file.parent.name != BANK_FOLDER or file.name == MANIFEST:
        with open_regular(file) as opened:
            digest = hashlib.file_digest(opened, xxhash.xxh3_64)  # type: ignore[arg-type]
        known["xxh3"] = digest.hexdigest()
    return known


def plan(
    folder: Path, context: int | None, prefill: Sequence[int], kv_lengths: Sequence[int] = ()
) -> Bundle:
    """Checks a model directory and what is asked of its bundle; nothing is written."""
    model = load(folder, cache_bytes=0)
    if model.bank is None:
        raise UserError("this model has no memory bank", folder, "choose one with memories")
    encoder = model.require_retriever().encoder
    if (beside := len(model.require_banks().parts) - 1) or model.bank.barred:
        raise UserError(
            "a bundle holds one bank and no views",
            f"{beside} banks beside it, {len(model.bank.barred)} clusters barred by default",
            "bundle what mlx_hmem.bank split makes, or unblock them first",
        )
    if encoder.name != "static":
        raise UserError(
            "only the static encoder goes into a bundle",
            encoder.name,
            "train tree and memories with encoder static",
        )
    most = model.context or context or CONTEXT
    chosen = min(CONTEXT, most) if context is None else context
    if not 2 <= chosen <= most:
        raise UserError("the context is not the anchor's", chosen, f"use 2 to {most} tokens")
    pieces = sorted(set(prefill or [n for n in PREFILL if n <= chosen] or [chosen]))
    short = sorted({*(kv_lengths or [n for n in KV_LENGTHS if n < chosen]), chosen})
    for name, lengths in (("prefill", pieces), ("KV", short)):
        if lengths[0] < 1 or lengths[-1] > chosen:
            raise UserError(
                f"a {name} length is out of range", lengths, f"use 1 to {chosen} tokens"
            )
    return Bundle(folder, model, Functions(model, chosen, pieces, short[:-1]))


def sizes_of(folder: Path) -> Counter[str]:
    """Bytes of each part of a bundle: a file, or a folder in it."""
    sizes = Counter[str]()
    for file in folder.rglob("*"):
        if file.is_file():
            sizes[file.relative_to(folder).parts[0]] += file.stat().st_size
    return sizes


def lengths_option(name: str, text: str | None) -> list[int]:
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{name} takes lengths in tokens", repr(text), "write it as 32,128"
        ) from None


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.convert bundle",
        description="Makes a folder that a phone can run, with no Python in it: anchor and bank as "
        "the model has them, and what computes as functions for mlx-swift and MLX's C++. "
        "mlx_hmem.convert quantize makes the model small before."
        "\n\ndocs/bundle.md says what an app does; run.py in the folder is an example.",
    )
    parser.add_argument("model", help="model directory or Hub id, quantised or not")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument(
        "--context", type=int, help=f"tokens the cache has room for; default: up to {CONTEXT}"
    )
    parser.add_argument(
        "--prefill",
        metavar="N,N",
        help="lengths of the pieces of a prompt; default: "
        f"{','.join(map(str, PREFILL))}, those that the context has room for",
    )
    parser.add_argument(
        "--kv-lengths",
        metavar="N,N",
        help="slots of the cache that shorter functions look at, for as long as no more are in "
        f"use; default: {','.join(map(str, KV_LENGTHS))}, those below the context; the context: "
        "no such functions",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(words)
    mx.default_stream(mx.default_device())  # imported functions find the first of the device
    prefill = lengths_option("--prefill", args.prefill)
    kv_lengths = lengths_option("--kv-lengths", args.kv_lengths)
    folder = find_model(args.model, (*MODEL_FILES, *BANK_FILES, *TEXTS))
    bundle = plan(folder, args.context, prefill, kv_lengths)
    with whole_folder(
        args.out, bundle.identity, replace=args.overwrite, need_bytes=bundle.bytes_needed
    ) as part:
        bundle.write(part)
    sizes = sizes_of(args.out)
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in sizes.most_common(5))
    print(f"{args.out}: {sizes.total() / 1e6:,.1f} MB ({parts})")
    if device() == "cpu":
        print(
            "the functions are recorded for the CPU; make the bundle on a Mac for a phone's GPU",
            file=sys.stderr,
        )
    if newer := newer_operations_of(args.out):
        print(
            f"MLX {OLDEST} cannot read {', '.join(newer)}: the app needs MLX {version('mlx')}",
            file=sys.stderr,
        )
