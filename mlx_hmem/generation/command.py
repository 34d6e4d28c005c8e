"""A prompt in, text out: ``mlx_hmem.generate --prompt "The atomic number of iron is"``.

The text streams to standard output; the route and the timings go to standard error.
"""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.generation.ending import check_stops, said_of, until
from mlx_hmem.generation.options import (
    add_options,
    memory_options,
    open_model,
    passages_of_run,
    read_input,
    sampling_options,
    say,
    stops_of,
)
from mlx_hmem.generation.passages import answer_alone, beside, passages_line
from mlx_hmem.generation.template import chat_ids, check_system
from mlx_hmem.model.fetch import PASSAGES_ANSWER, Fetch
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import check_length, prompt_ids


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.generate",
        usage="mlx_hmem.generate -p PROMPT [options]",
        description="Answers a prompt, or continues it, with a memory fetched for it."
        "\n\nThe text streams to standard output; the route and the timings go to standard error.",
    )
    parser.add_argument(
        "--prompt",
        "-p",
        required=True,
        help="a question to a model with a chat template, to others a text to continue; - for "
        "standard input",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without a chat template"
    )
    parser.add_argument("--route-text", help="text that chooses the memory, instead of the prompt")
    parser.add_argument("--max-tokens", "-m", type=int, default=100, help="default: %(default)s")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args(words)
    prompt, stops = args.prompt, check_stops(stops_of(args))
    if prompt == "-":
        prompt = read_input("--prompt -").rstrip("\n")
    model = open_model(args)
    known = passages_of_run(args, model)
    start = time.perf_counter()
    text = prompt if args.route_text is None else args.route_text
    ids_in = partial(ids_of, model, system=args.system_prompt, raw=args.raw)
    near = [] if known is None else known.nearest(text, args.with_passages)
    prompt, passages = beside(near, prompt, ids_in, model.context, args.max_tokens)
    ids = ids_in(prompt)
    if answer_alone(passages, args.memory is not None, args.memory_name):
        fetch = Fetch("none", why=PASSAGES_ANSWER)
    else:
        fetch = model.fetch(text, wait=False, **memory_options(args))
    stream = model.stream_ids(ids, fetch, args.max_tokens, **sampling_options(args))
    pieces, ttft_ms, piece = [], 0.0, None
    for piece in until(stream, stops):
        ttft_ms = ttft_ms or (time.perf_counter() - start) * 1e3
        pieces.append(piece.text)
        if not args.json:
            print(piece.text, end="", flush=True)
    assert piece is not None
    result: dict[str, Any] = {
        "text": "".join(pieces),
        "num_tokens": piece.generation_tokens,
        "memory": fetch.to_dict(),
        **({} if known is None else {"passages": [each._asdict() for each in passages]}),
        "ttft_ms": round(ttft_ms, 3),
        "tokens_per_s": round(piece.generation_tps, 1),
        "peak_memory_bytes": mx.get_peak_memory(),
        "finish_reason": piece.finish_reason,
    }
    if args.json:
        print(json.dumps(result, ensure_ascii=sys.stdout.encoding != "utf-8"))
    else:
        print()
        say(summary(fetch, result))
        if known is not None:
            say(passages_line(passages, len(near)))
    if note := said_of(result["text"], piece, args.max_tokens):
        say(note)
    if fetch.damage:
        say(f"the answer went on {', '.join(fetch.damage)}")


def ids_of(model: MemoryModel, prompt: str, system: str | None, raw: bool) -> list[int]:
    """The ids of the prompt, in the chat template where the model has one and ``raw`` is not set.

    Raises UserError: the prompt is empty, too long or no text, the template fails, or nothing has a
    place for the system prompt.
    """
    if raw and system is not None:
        raise UserError("--raw takes no system prompt", repr(system)[:40], "leave one of them out")
    tokenizer = model.tokenizer
    check_system(tokenizer, system)
    ids = prompt_ids(tokenizer, prompt, model.context)
    if raw or not tokenizer.has_chat_template:
        return ids
    return check_length(chat_ids(tokenizer, system, [], prompt), model.context)


def summary(fetch: Fetch, result: dict[str, Any]) -> str:
    memory = result["memory"]
    return (
        f"{fetch.line()}, {memory['bytes_read']:,} bytes read; route {memory['route_ms']:.1f} ms, "
        f"fetch {memory['fetch_ms']:.1f} ms, first token {result['ttft_ms']:.0f} ms, "
        f"{result['tokens_per_s']:.0f} tokens/s, peak {result['peak_memory_bytes'] / 1e6:.0f} MB"
    )
