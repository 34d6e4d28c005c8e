"""``mlx_hmem.convert quantize MODEL OUT --anchor-bits 4 --bank-bits 8``: a model made smaller."""

import json
from collections.abc import Sequence
from pathlib import Path

from mlx_hmem.bank import Quantization, stored_levels
from mlx_hmem.bank.format import STORED_TYPES
from mlx_hmem.bank.quantization import MODES
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.evaluate import read_texts
from mlx_hmem.model.find import BANK_FILES, BANK_FOLDER, MODEL_FILES, TEXTS, find_model
from mlx_hmem.model.load import read_hmem

from .model import plan, quantize
from .report import report_table

DEFAULTS = {"affine": (4, 64)}  # bits and group size of mlx-lm; the other modes have one of each
NOT_GIVEN = (None, None, None)
LEVEL_FORM = "LEVEL:MODE[:BITS[:GROUP_SIZE]] or LEVEL:none, LEVEL 0 being the generic memory"


def quantization_for(
    level: int, mode: str | None = None, bits: int | None = None, group_size: int | None = None
) -> Quantization:
    """A quantisation, with mlx-lm's defaults for what is left out."""
    mode = mode or "affine"
    known = [values[0] for values in MODES.get(mode, ((0,), (0,)))]
    default = DEFAULTS.get(mode, known)
    return Quantization(
        level,
        mode,
        default[0] if bits is None else bits,
        default[1] if group_size is None else group_size,
    )


def level_option(text: str) -> tuple[int, Quantization | None]:
    """The level that ``--bank-level`` names, and its quantisation; None leaves it as it is."""
    level, *parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not all(n.isdecimal() for n in (level, *parts[1:])):
        raise UserError("not a level and its quantisation", repr(text), f"write {LEVEL_FORM}")
    if parts == ["none"]:
        return int(level), None
    return int(level), quantization_for(int(level), parts[0], *map(int, parts[1:]))


def _all_levels(
    folder: Path, mode: str | None, bits: int | None, group_size: int | None
) -> dict[int, Quantization]:
    """The same quantisation for each level of a model's bank, the generic memory too."""
    hmem = read_hmem(folder)
    if hmem is None:
        raise UserError("this model has no memory bank", folder, "leave out --bank-…")
    return {n: quantization_for(n, mode, bits, group_size) for n in stored_levels(hmem.memory)}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mlx_hmem.convert quantize",
        usage="mlx_hmem.convert quantize MODEL OUT [options]",
        description="Makes a model smaller: its anchor, its memory bank, or both. Each level of "
        "the bank may have its own way: --bank-bits 8 --bank-level 2:mxfp4 --bank-level 1:none. "
        "What no option names stays as it is."
        "\n\nMakes the model directory OUT and prints what that saved and what it cost. Stopped, "
        "it goes on with the same command.",
    )
    parser.add_argument("model", help="model directory or Hub id; without a bank it works too")
    parser.add_argument("out", type=Path, help="the model directory to make")
    for part in ("anchor", "bank"):
        parser.add_argument(f"--{part}-bits", type=int, help="bits of a value; affine: 4")
        parser.add_argument(f"--{part}-mode", help=f"one of {', '.join(MODES)}")
        parser.add_argument(f"--{part}-group-size", type=int, help="values per scale; affine: 64")
    parser.add_argument(
        "--bank-level",
        action="append",
        default=[],
        metavar="L:MODE",
        help=f"one level: {LEVEL_FORM}",
    )
    parser.add_argument("--bank-dtype", help=f"the bank's new dtype: {', '.join(STORED_TYPES)}")
    parser.add_argument(
        "--text", type=Path, help="documents (.jsonl, .txt) whose perplexity is measured"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(words: Sequence[str]) -> None:
    args = _parser().parse_args(words)
    for_anchor = (args.anchor_mode, args.anchor_bits, args.anchor_group_size)
    for_bank = (args.bank_mode, args.bank_bits, args.bank_group_size)
    given = [level_option(text) for text in args.bank_level]
    if len(own := dict(given)) < len(given):
        raise UserError("--bank-level names a level twice", args.bank_level, "name each once")
    options = (*for_anchor, *for_bank, *own.values(), args.bank_dtype)
    if all(option is None for option in options):
        raise UserError(
            "there is nothing to quantise", args.model, "give --anchor-bits or --bank-bits, or both"
        )
    texts = read_texts(args.text) if args.text else []
    wanted = (*MODEL_FILES, *BANK_FILES, f"{BANK_FOLDER}/*.jsonl", *TEXTS)
    folder = find_model(args.model, wanted)
    anchor = None if for_anchor == NOT_GIVEN else quantization_for(0, *for_anchor)
    levels = {} if for_bank == NOT_GIVEN else _all_levels(folder, *for_bank)
    levels = {level: how for level, how in {**levels, **own}.items() if how is not None}
    chosen = plan(folder, anchor, levels, args.bank_dtype)
    report = quantize(chosen, args.out, texts, args.overwrite)
    print(json.dumps(report.to_dict()) if args.json else report_table(report))
