"""mlx_hmem.chat: from a pipe, at a terminal, and when Ctrl-C is pressed."""

import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from mlx_hmem import load
from mlx_hmem.generation.chat import HELP, chat, main
from mlx_hmem.generation.conversation import Conversation
from tests.helpers.faults import flip_blocks
from tests.helpers.places import ROOT
from tests.helpers.programs import Said, assert_refused, process, run

PROMPTS = ["The atomic number of iron is", "The band", "The atomic number of copper is"]


COMMAND = ["-m", "mlx_hmem", "chat", "--max-tokens", "8"]


def piped(*args: object, stdin: str | bytes) -> Said:
    """A chat in this process, with the demo model unless told otherwise."""
    lines = stdin if isinstance(stdin, bytes) else stdin.encode()
    return run(main, "--max-tokens", 8, *args, stdin=lines)


def test_a_pipe_carries_the_answers_alone_and_they_are_the_models():
    model = load()
    status, out, err = process(*COMMAND, input="\n".join(PROMPTS) + "\n")
    paths = [model.retriever.route(prompt) for prompt in PROMPTS]
    expected = ["".join(p.text for p in model.stream(t, max_tokens=8)) for t in PROMPTS]
    assert (status, out) == (0, "".join(text + "\n" for text in expected))
    assert err.splitlines()[0] == f"memory: fetched {paths[0]} (level 1 disk, level 2 disk)"
    assert re.fullmatch(r"(memory: fetched \(\d+, \d+\) \([^\n]+\)\n)+", err)


def test_commands_from_a_pipe():
    model = load()
    lines = [
        "/stats", "/route", PROMPTS[0], PROMPTS[0], "", "/route", "/route The band", "/stats",
        "/memory", "/memory none", PROMPTS[0], "/memory all", "/memory generic", PROMPTS[0],
        "/history", "/history on", "/history maybe", "/nonsense", "/reset", "/route", "/help",
        "/quit", "not said",
    ]  # fmt: skip
    status, out, err = piped(stdin="\n".join(lines))
    assert status == 0
    modes = ["fetched", "fetched", "none", "generic"]
    expected = [
        "".join(p.text for p in model.stream(PROMPTS[0], max_tokens=8, memory=mode))
        for mode in modes
    ]
    assert out == "".join(text + "\n" for text in expected)
    path, other = model.retriever.route(PROMPTS[0]), model.retriever.route("The band")
    found = err.replace(HELP, "HELP").splitlines()
    assert found[:5] == [
        "no answer yet", "memory: fetched, no answer yet",
        f"memory: fetched {path} (level 1 disk, level 2 disk)",
        f"memory: fetched {path} (level 1 attached, level 2 attached)", str(other),
    ]  # fmt: skip
    stats = found[5:10]
    assert re.fullmatch(
        r"latest answer: route [\d.]+ ms, fetch [\d.]+ ms, first token \d+ ms, \d+ tokens/s",
        stats[0],
    )
    assert re.fullmatch(
        r"session: 2 answers, \d+ tokens, \d+ tokens/s, 146,880 bytes read", stats[1]
    )
    assert stats[2:4] == [
        "level 1: 1 attached, 1 disk; 97,920 bytes from disk",
        "level 2: 1 attached, 1 disk; 48,960 bytes from disk",
    ]
    assert re.fullmatch(r"resident memory: \d+ MB at most", stats[4])
    assert found[10:] == [
        "memory: fetched", "memory: none", "memory: none",
        "error: unknown memory mode: 'all'; use one of fetched, generic, none", "memory: generic",
        "history: off", "history: on", "error: no such state of the history: maybe; use on or off",
        "error: no such command: /nonsense; /help names them", "all is forgotten",
        "memory: generic, no answer yet", "HELP",
    ]  # fmt: skip


def test_q_ends_it_and_a_turn_that_cannot_be_answered_does_not():
    status, out, _ = piped("--stop", ".", stdin=f"{PROMPTS[0]}\n q \n{PROMPTS[1]}\n")
    assert (status, out) == (0, "26\n")
    status, out, _ = piped(stdin=f"{PROMPTS[0]} q\nq.\n")
    assert (status, out.count("\n") >= 2) == (0, True)
    status, out, err = piped(stdin=f"{'word ' * 400}\n{PROMPTS[0]}\n")
    assert (status, out.count("\n")) == (0, 1)
    first = err.splitlines()[0]
    assert first.startswith("error: the prompt is longer than the context: ")


def test_a_line_that_is_no_text_is_said_and_the_chat_goes_on():
    status, out, err = piped(stdin=b"caf\xe9\n" + PROMPTS[0].encode() + b"\n")
    assert (status, out.count("\n")) == (0, 1)
    first = err.splitlines()[0]
    assert first.startswith("error: standard input is not UTF-8 text: ")
    assert first.endswith("; convert it")


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (["--temp", "-1"], b"", "temp is negative"),
        (["--max-tokens", "0"], b"", "max_tokens is not positive"),
        (["--block", "99"], b"", "no such cluster on level 1"),
    ],
)
def test_what_is_wrong_from_the_start_is_one_line_and_status_2(args, stdin, words):
    assert_refused(piped(*args, stdin=stdin), words)


def test_a_damaged_block_is_said_in_one_line_and_strictly_it_is_an_error(broken):
    flip_blocks(broken / "bank" / "level-3.00000.safetensors")
    status, out, err = piped("--model", broken, stdin="The old lighthouse\n")
    assert (status, out.count("\n") >= 1) == (0, True)
    assert err.count("the answer goes on without level 3: ") == 1
    status, out, err = piped("--model", broken, "--strict-memory", stdin="The old lighthouse\n")
    assert (status, out) == (0, "")
    assert re.fullmatch(r"error: level 3, cluster \d+ of the bank is damaged: [^\n]+\n", err)


class PressesCtrlC(io.StringIO):
    """Standard output; after so many pieces the person presses Ctrl-C, once."""

    def __init__(self, pieces: int):
        super().__init__()
        self.left = pieces

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_an_answer_and_not_the_chat(monkeypatch, capsys):
    model, text = load(), "In the summer of that year the town"
    whole = [p.text for p in model.stream(text, max_tokens=20, memory="none")]
    out = PressesCtrlC(pieces=6)  # print writes the text and its end
    talk = Conversation(model, memory="none", max_tokens=20, history=True)
    stdin = io.TextIOWrapper(io.BytesIO(f"{text}\n/memory\nThe band\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stdout", out)
    chat(talk)
    said = out.getvalue().splitlines()
    assert len(said) == 2
    assert "".join(whole).startswith(said[0])
    assert len(said[0]) < len("".join(whole))
    assert capsys.readouterr().err == "stopped\nmemory: none\n"
    assert [turn.text for turn in talk.turns] == [text, "The band"]
    assert 1 <= len(talk.turns[0].answer_ids) < 6
    assert talk.turns[0].answer.startswith(said[0])


class Terminal:
    """What a program writes to a terminal, read as far as each of some words in turn."""

    def __init__(self, file: int):
        self.file, self.unread = file, ""

    def shows(self, words: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while words not in self.unread and time.monotonic() < end:
            if select.select([self.file], [], [], 0.1)[0]:
                self.unread += os.read(self.file, 65536).decode()
        return words in self.unread

    def until(self, words: str) -> str:
        assert self.shows(words, seconds=60)
        found, _, self.unread = self.unread.partition(words)
        return found


def test_at_a_terminal_there_is_a_prompt_and_ctrl_d_ends_it():
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    terminal = Terminal(ours)
    environment = os.environ | {"TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, *COMMAND], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment, start_new_session=True,
        # A shell's background job ignores it, and so would whatever it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    try:
        terminal.until("> ")
        os.write(ours, PROMPTS[0].encode() + b"\n")
        assert "26." in terminal.until("level 2 disk)")
        terminal.until("> ")
        for _ in range(60):
            # Again: readline writes its prompt before it listens for signals.
            process.send_signal(signal.SIGINT)
            if terminal.shows("/quit or Ctrl-D ends", seconds=1):
                break
        terminal.until("/quit or Ctrl-D ends")
        terminal.until("> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        with contextlib.suppress(OSError):
            os.close(ours)
