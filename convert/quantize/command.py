"""``mlx_hmem.convert quantize MODEL OUT --anchor-bits 4 --bank-bits 8``: a model made smaller."""

import json
from argparse import Namespace
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
from .search import Bound

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


def share_option(text: str) -> float:
    """A share of the loss, between 0 and 1, as ``0.5%`` or ``0.005``."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1
    if not 0 < share < 1:
        raise UserError("--max-loss is no share of the loss", repr(text), "write 0.5% or 0.005")
    return share


def _levels(folder: Path, option: str) -> list[int]:
    """The levels of a model's bank, the generic memory, 0, too."""
    hmem = read_hmem(folder)
    if hmem is None:
        raise UserError("this model has no memory bank", folder, f"leave out {option}")
    return stored_levels(hmem.memory)


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
    parser.add_argument(
        "--max-loss",
        metavar="SHARE",
        help="searches the form of each level of the bank: the fewest bytes with which the loss of "
        "--text (nats per token) rises by no more than this share of it, 0.5%% or 0.005",
    )
    parser.add_argument("--bank-dtype", help=f"the bank's new dtype: {', '.join(STORED_TYPES)}")
    parser.add_argument(
        "--text", type=Path, help="documents (.jsonl, .txt) whose perplexity is measured"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _share(args: Namespace) -> float | None:
    """That of ``--max-loss``, once nothing else is found to contradict it."""
    if args.max_loss is None:
        return None
    share = share_option(args.max_loss)
    if args.text is None:
        raise UserError("--max-loss needs held-out text", args.max_loss, "add --text")
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name == "bank_level":
            value = [text for text in value if level_option(text)[1] is not None]
        if name.startswith("bank_") and value not in (None, []):
            remedy = "leave one of them out; --bank-level LEVEL:none keeps a level as it is"
            raise UserError(f"--max-loss is given along with {option}", value, remedy)
        if name.startswith("anchor_") and value is not None:
            remedy = "quantise the anchor first, then the bank of what that makes"
            raise UserError(f"--max-loss is given along with {option}", value, remedy)
    return share


def main(words: Sequence[str]) -> None:
    args = _parser().parse_args(words)
    for_anchor = (args.anchor_mode, args.anchor_bits, args.anchor_group_size)
    for_bank = (args.bank_mode, args.bank_bits, args.bank_group_size)
    share = _share(args)
    given = [level_option(text) for text in args.bank_level]
    if len(own := dict(given)) < len(given):
        raise UserError("--bank-level names a level twice", args.bank_level, "name each once")
    options = (*for_anchor, *for_bank, *own.values(), args.bank_dtype, share)
    if all(option is None for option in options):
        raise UserError(
            "there is nothing to quantise",
            args.model,
            "give --anchor-bits or --bank-bits, or both, or --max-loss",
        )
    texts = read_texts(args.text) if args.text else []
    if args.text and not any(text.strip() for text in texts):
        raise UserError("there is no text to score", args.text, "give documents with some")
    wanted = (*MODEL_FILES, *BANK_FILES, f"{BANK_FOLDER}/*.jsonl", *TEXTS)
    folder = find_model(args.model, wanted)
    anchor = None if for_anchor == NOT_GIVEN else quantization_for(0, *for_anchor)
    levels, bound = dict[int, Quantization | None](), None
    if for_bank != NOT_GIVEN:
        levels = {n: quantization_for(n, *for_bank) for n in _levels(folder, "--bank-…")}
    if share is not None:
        searched = [level for level in _levels(folder, "--max-loss") if level not in own]
        bound = Bound(share, tuple(searched))
    explicit = {level: how for level, how in {**levels, **own}.items() if how is not None}
    chosen = plan(folder, anchor, explicit, args.bank_dtype)
    report = quantize(chosen, args.out, texts, args.overwrite, bound)
    print(json.dumps(report.to_dict()) if args.json else report_table(report))
