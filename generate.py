"""A prompt in, text out: ``python generate.py --prompt "The atomic number of iron is"``.

With ``--chat`` a conversation.

The text streams to standard output; the route and the timings go to standard error.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

from mlx_hmem.errors import ArgumentParser, UserError, run_program


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Generates text with a memory fetched for the prompt.")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="text to continue, - for standard input")
    asked.add_argument("--chat", action="store_true", help="answer line by line; /help says more")
    parser.add_argument("--model", help="folder or Hub id (default: the bundled demo model)")
    parser.add_argument(
        "--memory",
        default="fetched",
        choices=("fetched", "generic", "none"),
        help="which memory to attach (default: %(default)s)",
    )
    parser.add_argument("--route-text", help="text that chooses the memory, instead of the prompt")
    parser.add_argument(
        "--block",
        nargs="+",
        default=[],
        metavar="PATH",
        help="clusters that may not be fetched, each as its path: 3 or 3,51, after the name of a "
        "bank that was added: NAME or NAME:3,51",
    )
    parser.add_argument(
        "--view",
        metavar="NAME",
        help="fetch no more than this view of the memory allows (default: default, if there is "
        "one); python -m mlx_hmem.bank block makes views",
    )
    parser.add_argument("--max-tokens", type=int, help="default: 100, of an answer in a chat 256")
    parser.add_argument("--temp", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="most bytes to take, as 400MB, 1.5GB or plain bytes: resident memory above that of "
        "Python with nothing but MLX imported. What is chosen for it is said in one line",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="most tokens of prompt and answer together (default: those of the anchor)",
    )
    parser.add_argument(
        "--resident-levels",
        type=int,
        nargs="+",
        default=[],
        metavar="LEVEL",
        help="levels whose blocks stay in memory once they are read (1 = coarsest)",
    )
    parser.add_argument(
        "--level-folder",
        nargs="+",
        default=[],
        metavar="LEVEL=FOLDER",
        help="levels of the bank that lie elsewhere, such as on another disk",
    )
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="of a Hub id, fetch the parts of the bank only when they are needed",
    )
    parser.add_argument(
        "--strict-memory",
        action="store_true",
        help="stop at a block that cannot be read (default: go on without it, and say so)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()
    if args.chat and (args.json or args.route_text is not None):
        parser.error("--json and --route-text do not go with --chat")
    return args


def level_folder(text: str) -> tuple[int, Path]:
    level, equals, folder = text.partition("=")
    if not (level.isdecimal() and equals and Path(folder).is_dir()):
        raise UserError(
            "--level-folder names no folder", repr(text), "write it as 3=/Volumes/DISK/bank"
        )
    return int(level), Path(folder)


def read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    if sys.stdin is None:
        raise UserError("standard input is closed", "--prompt -", "pipe a text into it")
    try:
        return sys.stdin.buffer.read().decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text", error, "convert it") from None


def main() -> None:
    args = parse_arguments()
    prompt = "" if args.chat else read_prompt(args.prompt)

    import mlx.core as mx

    from mlx_hmem.bank.views import barred_path
    from mlx_hmem.budget.resident import parse_bytes
    from mlx_hmem.model.load import DEMO, load
    from mlx_hmem.model.stream import prompt_ids

    blocked = [barred_path(text) for text in args.block]
    model = load(
        DEMO if args.model is None else args.model,
        memory_budget=None if args.memory_budget is None else parse_bytes(args.memory_budget),
        context=args.context,
        lazy=args.lazy,
        resident_levels=tuple(args.resident_levels),
        level_folders=dict(level_folder(text) for text in args.level_folder),
        view=args.view,
    )
    if model.plan is not None:
        say(model.plan.line())
    damaged: Literal["stop", "skip"] = "stop" if args.strict_memory else "skip"
    options: dict[str, Any] = {"temp": args.temp, "top_p": args.top_p, "seed": args.seed}
    if args.chat:
        from mlx_hmem.generation.chat import chat
        from mlx_hmem.generation.conversation import Conversation

        options |= {} if args.max_tokens is None else {"max_tokens": args.max_tokens}
        options |= {"memory": args.memory, "blocked": blocked, "damaged": damaged}
        chat(Conversation(model, notify=say, **options))
        return
    start = time.perf_counter()
    ids = prompt_ids(model.tokenizer, prompt, model.context)
    recall = model.recall(
        prompt if args.route_text is None else args.route_text,
        args.memory,
        blocked,
        wait=False,
        damaged=damaged,
    )
    pieces, ttft_ms, piece = [], 0.0, None
    max_tokens = 100 if args.max_tokens is None else args.max_tokens
    for piece in model.stream_ids(ids, recall, max_tokens, **options):
        ttft_ms = ttft_ms or (time.perf_counter() - start) * 1e3
        pieces.append(piece.text)
        if not args.json:
            print(piece.text, end="", flush=True)
    assert piece is not None
    result: dict[str, Any] = {
        "text": "".join(pieces),
        "num_tokens": piece.generation_tokens,
        "memory": recall.to_dict(),
        "ttft_ms": round(ttft_ms, 3),
        "tokens_per_s": round(piece.generation_tps, 1),
        "peak_memory_bytes": mx.get_peak_memory(),
    }
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print()
        say(summary(result))
    if recall.damage:
        say(f"the answer went on {', '.join(recall.damage)}")


def say(line: str) -> None:
    print(line, file=sys.stderr)


def summary(result: dict[str, Any]) -> str:
    memory = result["memory"]
    where = "" if memory["path"] is None else f" {tuple(memory['path'])}"
    where = f" of bank {memory['bank']},{where}" if "bank" in memory else where
    sources = ", ".join(f"level {b['level']} {b['source']}" for b in memory["blocks"])
    return (
        f"memory: {memory['mode']}{where}{f' ({sources})' if sources else ''}, "
        f"{memory['bytes_read']:,} bytes read; route {memory['route_ms']:.1f} ms, "
        f"fetch {memory['fetch_ms']:.1f} ms, first token {result['ttft_ms']:.0f} ms, "
        f"{result['tokens_per_s']:.0f} tokens/s, peak {result['peak_memory_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    run_program(main)
