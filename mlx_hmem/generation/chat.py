"""``mlx_hmem.chat``: a :class:`Conversation` at a terminal, or with lines from a pipe.

Answers go to standard output, all else to standard error. Without a terminal there is no prompt
sign, and the answers alone, a line each or more, are what a pipe carries on.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from mlx_hmem.budget.resident import OverBudgetError
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.generation.conversation import MAX_TOKENS, Conversation
from mlx_hmem.generation.ending import said_of
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
from mlx_hmem.generation.passages import passages_line
from mlx_hmem.generation.template import expect_chat
from mlx_hmem.model.fetch import NOTHING_NEAR

DESCRIPTION = """\
A conversation whose memory follows the topic. Each line is answered; /help names the commands, q
ends.

Answers go to standard output, all else to standard error: it works in a pipe, too."""
HELP = """\
Text is answered; a line that begins with / is a command:
/memory fetched|generic|none   which memory the next answers use; alone: which it is
/name NAME                     the memory that the next answers use; alone: which there are
/route                         the cluster path of the latest answer
/route TEXT                    what TEXT would be routed to
/history on|off                whether an answer sees what was said before; alone: which it is
/stats                         times, where each level came from, memory
/save FILE                     put the conversation into a file
/load FILE                     go on with the conversation in a file, in place of this one
/reset                         forget what was said
/help                          this
/quit                          end; so do q and Ctrl-D. Ctrl-C stops an answer"""


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.chat", usage="mlx_hmem.chat [options]", description=DESCRIPTION
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=MAX_TOKENS,
        help="of an answer (default: %(default)s)",
    )
    add_options(parser)
    args = parser.parse_args(words)
    options = memory_options(args) | sampling_options(args) | {"memory": args.memory}
    model = open_model(args)
    expect_chat(model.tokenizer)
    options |= {"max_tokens": args.max_tokens, "system": args.system_prompt, "stop": stops_of(args)}
    options |= {"passages": passages_of_run(args, model), "with_passages": args.with_passages or 0}
    chat(Conversation(model, notify=say, **options))


def chat(conversation: Conversation) -> None:
    """Answers the lines of standard input until it ends or one is ``/quit``."""
    at_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with suppress(ImportError):  # not on every system; input() then has no line editing
            import readline  # noqa: F401
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # as the words of a prompt
        say("/help names the commands, q ends")
    try:
        while (line := _next_line(at_terminal)) is not None:
            if line.strip() and not _handle(conversation, line.strip()):
                break
    finally:
        conversation.stop_prefetch()


def _next_line(at_terminal: bool) -> str | None:
    """A line without its end; None at the end of the input."""
    while at_terminal:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends")
    while True:
        try:
            return read_input("mlx_hmem.chat", one_line=True) or None
        except UserError as error:
            if sys.stdin is None:
                raise
            say(f"error: {error}")  # a line that is no text; the next may be one


def _handle(conversation: Conversation, line: str) -> bool:
    """Answers a text or obeys a command; False where that is to end."""
    try:
        if line == "q":  # as in mlx-lm's chat
            return False
        if not line.startswith("/"):
            _answer(conversation, line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name == "quit":
            return False
        if name not in COMMANDS:
            raise UserError("no such command", f"/{name}", "/help names them")
        COMMANDS[name](conversation, rest.strip())
    except OverBudgetError:
        raise  # the system may end the program at any moment
    except UserError as error:
        say(f"error: {error}")
    return True


def _answer(conversation: Conversation, text: str) -> None:
    before = _named(conversation)
    pieces, piece = conversation.say(text), None
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print(flush=True)
        assert piece is not None
        if note := said_of(conversation.turns[-1].answer, piece, conversation.max_tokens):
            say(note)
    except KeyboardInterrupt:
        pieces.close()
        print(flush=True)
        say("stopped")
    if (fetch := conversation.fetch) is not None and (_named(conversation) != before or fetch.why):
        say(_route(conversation))
    if conversation.with_passages:
        say(passages_line(*conversation.passages))


def _named(conversation: Conversation) -> object:
    """What is said of the memory in use when it is another than before."""
    fetch = conversation.fetch
    return (None, []) if fetch is None else (fetch.path, fetch.documents[:1])


def _route(conversation: Conversation) -> str:
    fetch = conversation.fetch
    return f"memory: {conversation.memory}, no answer yet" if fetch is None else fetch.line()


def _memory_command(conversation: Conversation, mode: str) -> None:
    if mode:
        conversation.set_memory(mode)
    say(f"memory: {conversation.memory_said}")


def _name_command(conversation: Conversation, name: str) -> None:
    if name:
        conversation.set_name(name)
    known = conversation.model.require_banks().names
    chosen = conversation.memory_name or "none, the text chooses"
    say(f"name: {chosen}; known: {', '.join(known) or 'none'}")


def _history_command(conversation: Conversation, state: str) -> None:
    if state not in ("", "on", "off"):
        raise UserError("no such state of the history", state, "use on or off")
    if state:
        conversation.history = state == "on"
    say(f"history: {'on' if conversation.history else 'off'}")


def _route_command(conversation: Conversation, text: str) -> None:
    say(str(conversation.path_of(text) or NOTHING_NEAR) if text else _route(conversation))


def _save_command(conversation: Conversation, file: str) -> None:
    conversation.save(_file(file))
    say(f"saved: {_turns(conversation)}")


def _load_command(conversation: Conversation, file: str) -> None:
    conversation.load(_file(file))
    name = "" if conversation.memory_name is None else f", name: {conversation.memory_name}"
    history = "on" if conversation.history else "off"
    say(
        f"loaded: {_turns(conversation)}; memory: {conversation.memory_said}{name}, "
        f"history: {history}"
        f"{'' if conversation.system is None else ', with its system prompt'}"
    )


def _file(name: str) -> str:
    if not name:
        raise UserError("no file", "''", "give its name, as in /save talk")
    return os.path.expanduser(name)


def _turns(conversation: Conversation) -> str:
    count = len(conversation.turns)
    return f"{count} turn{'' if count == 1 else 's'}"


def _reset_command(conversation: Conversation, rest: str) -> None:
    conversation.reset()
    say("all is forgotten")


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "memory": _memory_command,
    "name": _name_command,
    "history": _history_command,
    "route": _route_command,
    "stats": lambda conversation, rest: say("\n".join(conversation.stats.lines())),
    "save": _save_command,
    "load": _load_command,
    "reset": _reset_command,
    "help": lambda conversation, rest: say(HELP),
}
