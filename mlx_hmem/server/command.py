"""A server that speaks OpenAI's ``/v1``: ``mlx_hmem.server --model M``."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from mlx_hmem.bank.views import check_name
from mlx_hmem.budget.plan import Serving
from mlx_hmem.budget.resident import base_bytes, machine_bytes, parse_bytes
from mlx_hmem.errors import ArgumentParser, UserError, needed, printable
from mlx_hmem.generation.options import add_machine, say
from mlx_hmem.model.find import DEMO, is_repo_name
from mlx_hmem.model.load import load
from mlx_hmem.server.engine import Engine
from mlx_hmem.server.prepare import run_of
from mlx_hmem.server.served import PREFILL_ROWS, PREFILL_TOKENS, Served
from mlx_hmem.server.web.guard import Guard, is_loopback
from mlx_hmem.server.web.keys import Key, check_views, new_key, read_keys


def parser() -> ArgumentParser:
    made = ArgumentParser(
        prog="mlx_hmem.server",
        usage="mlx_hmem.server --model MODEL [options]",
        description="Answers at OpenAI's addresses, each request with a memory of its own.",
    )
    made.add_argument(
        "--model",
        default="demo",
        help="folder, Hub id or Hub id@REVISION (default: demo, the bundled model)",
    )
    made.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    made.add_argument("--port", type=int, default=8080, help="default: %(default)s; 0: a free one")
    made.add_argument(
        "--run", type=Path, metavar="FOLDER",
        help="where the text of remembered documents lies (default: MODEL.run, if it is there)",
    )  # fmt: skip
    bounds = made.add_argument_group("bounds")
    bounds.add_argument(
        "--rows", type=int, default=32, metavar="N",
        help="most answers that are generated at once (default: %(default)s)",
    )  # fmt: skip
    bounds.add_argument(
        "--waiting", type=int, default=128, metavar="N",
        help="most answers that may wait beside them; more are refused (default: %(default)s)",
    )  # fmt: skip
    machine = add_machine(made)
    machine.add_argument(
        "--prompt-cache-bytes", metavar="BYTES",
        help="most keys and values of prompts to keep for those that begin alike, as 2GB; 0: none "
        "(default: a sixteenth of the machine's memory, half of what a budget leaves)",
    )  # fmt: skip
    who = made.add_argument_group("who may ask")
    who.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="a file of keys, one in each line"
    )
    who.add_argument(
        "--no-keys-needed", action="store_true",
        help="let whoever reaches --host ask, without keys, from other machines too",
    )  # fmt: skip
    who.add_argument("--new-key", metavar="NAME", help="make a key, print it and its line, and end")
    who.add_argument("--view", metavar="VIEW", help="what the bearer of the new key may fetch")
    made.add_argument(
        "--log-requests", action="store_true",
        help="write each request with its text to standard error (default: failures, no text)",
    )  # fmt: skip
    return made


def main(words: Sequence[str]) -> None:
    args = parser().parse_args(words)
    if args.new_key is not None:
        _print_key(args.new_key, args.view)
        return
    keys = _checked(args)
    open_model = _opening(args, keys)
    for package in ("starlette", "uvicorn"):
        needed(package, "the server")
    from mlx_hmem.server.web import app, http  # they import these

    listening = http.bind(args.host, args.port)
    engine = Engine(open_model, args.waiting, _log, args.log_requests)
    guard = Guard(args.host, keys)
    made = app.App(engine, guard, name_of(args.model), _log, args.log_requests)
    _drain_at_signals(engine)
    with http.serving(made, listening):
        host = f"[{args.host}]" if ":" in args.host else args.host
        say(f"serving {name_of(args.model)} at http://{host}:{listening.getsockname()[1]}/v1")
        engine.run()
    _log("ended; all requests that were begun are answered")


def name_of(model: str) -> str:
    """What clients call the model: no path of this machine."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return "demo" if folder.resolve() == DEMO.resolve() else folder.resolve().name
    return model if is_repo_name(model.partition("@")[0]) else "demo"


def _checked(args: argparse.Namespace) -> list[Key] | None:
    if args.view is not None:
        raise UserError("--view alone has no use", args.view, "give it with --new-key NAME")
    for name in ("rows", "waiting"):
        least = int(name == "rows")
        if getattr(args, name) < least:
            raise UserError(f"--{name} is too small", getattr(args, name), f"give {least} or more")
    if not 0 <= args.port < 1 << 16:
        raise UserError("--port is none", args.port, "use 1 to 65535, or 0 for a free one")
    if args.api_keys is not None:
        return read_keys(args.api_keys)
    if not is_loopback(args.host) and not args.no_keys_needed:
        what = "without keys only this machine is served"
        raise UserError(what, f"--host {args.host}", "give --api-keys FILE or --no-keys-needed")
    return None


def _opening(args: argparse.Namespace, keys: Sequence[Key] | None) -> Callable[[], Served]:
    """What opens the model, also anew; to be called before more is imported, which counts."""
    base, run = base_bytes(), run_of(args.run, args.model)
    budget, kept = (
        None if text is None else parse_bytes(text, name)
        for name, text in (
            ("--memory-budget", args.memory_budget),
            ("--prompt-cache-bytes", args.prompt_cache_bytes),
        )
    )
    options = {"context": args.context, "lazy": args.lazy, "memory_budget": budget}
    serving = Serving(args.rows, PREFILL_ROWS, PREFILL_TOKENS, kept)

    def open_model() -> Served:
        model = load(args.model, serving=serving, **options)
        check_views(keys or (), model.banks.views if model.banks is not None else {})
        if model.plan is None:
            return Served(model, run, args.rows, machine_bytes() // 16 if kept is None else kept)
        _log(model.plan.line())
        model.keep_to(model.plan, base, lambda: served.let_go())  # two models count at a reload
        served = Served(model, run, model.plan.rows, model.plan.prompt_bytes)
        return served

    return open_model


def _print_key(name: str, view: str | None) -> None:
    if view is not None:
        check_name(view, "view")
    key, line = new_key(name, view)
    print(line)
    print(f"the key of {name}, said this once: {key}\nabove: its line", file=sys.stderr)


def _log(line: str) -> None:
    """A line on standard error, if somebody takes it: a log that was closed, or whose disk is full,
    is no reason to end."""
    with contextlib.suppress(OSError, ValueError):
        say(printable(line))


def _drain_at_signals(engine: Engine) -> None:
    """The first signal lets what was begun end; the second ends it."""

    def stop(number: int, frame: FrameType | None) -> None:
        if engine.draining:
            raise KeyboardInterrupt
        engine.drain()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
