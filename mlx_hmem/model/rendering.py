"""A chat template is a program that came with a model: it runs in Jinja's sandbox, in a process of
its own, for so many seconds and within so much memory.

One operation of it may keep the interpreter for years, as the comparison of lists that are nested
sixty deep; only the system can end that. This file is both sides: the process is the file, run, and
knows transformers and nothing of this package.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 10.0
MOST_MEMORY = 1 << 30  # bytes that rendering may take
MOST_TEXT, MORE_TEXT = 1 << 22, 8  # characters that it may write, and more for each that was said
CHECKS = 0.02  # seconds between two looks at memory where the system does not limit it
TOO_MUCH = 9  # the exit status then


class Renderer:
    """The process that renders. It needs half a second to begin, and is begun anew once it was
    ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: Any, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
        """What a template makes of a conversation; ``options``: what else it may look at.

        Raises ValueError: it fails, or is beyond its bounds.
        """
        said = sum(len(text) for each in messages for text in each.values())
        asked = {
            "template": template,
            "messages": messages,
            "options": options,
            "seconds": SECONDS,
            "memory": MOST_MEMORY,
            "most": MOST_TEXT + MORE_TEXT * said,
        }
        line = json.dumps(asked, default=str).encode() + b"\n"
        with self._lock:
            process = self._begun()
            try:
                answer = self._exchanged(process, line)
            except BaseException:  # Ctrl-C: what it says later would answer another request
                self.end()
                raise
            if not answer.endswith(b"\n"):
                process.wait()
                self.end()
                raise ValueError(_why(process.returncode))
        found: dict[str, str] = json.loads(answer)
        if "error" in found:
            raise ValueError(found["error"])
        return found["text"]

    def begin(self) -> None:
        """Has the process begin, so that what is rendered first need not wait for it."""
        with self._lock:
            self._begun()

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        if (process := self._process) is not None:
            self._process = None
            process.kill()
            process.communicate()

    def _begun(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.end()
        if self._process is None:
            # In a session of its own, so that Ctrl-C is for this process alone.
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process

    @staticmethod
    def _exchanged(process: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            process.stdin.write(line)
            process.stdin.flush()
        return process.stdout.readline()

    def forget(self) -> None:
        """In a fork: the process is the parent's."""
        self._lock, self._process = threading.Lock(), None


def _why(status: int) -> str:
    """Why a process that ended with this status gave no answer."""
    if status == -signal.SIGALRM:
        return f"it takes more than {SECONDS:g} seconds"
    if status == TOO_MUCH:
        return f"it takes more than {MOST_MEMORY >> 20} MB"
    return f"the process that renders it ended with status {status}"


RENDERER = Renderer()
atexit.register(RENDERER.end)
os.register_at_fork(after_in_child=RENDERER.forget)


# The process.


def main() -> None:
    """Answers lines until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else is to write there
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with the process that began it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    from transformers.utils.chat_template_utils import render_jinja_template

    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        try:
            with _within(asked["memory"]):
                found = {"text": _rendered(render_jinja_template, asked)}
        except MemoryError:
            found = {"error": f"it takes more than {asked['memory'] >> 20} MB"}
        except Exception as error:
            lines = [each for each in str(error).splitlines() if each.strip()]
            found = {"error": (lines or [type(error).__name__])[0][:300]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _rendered(render: Any, asked: dict[str, Any]) -> str:
    [text], _ = render(
        conversations=[asked["messages"]],
        chat_template=asked["template"],
        add_generation_prompt=True,
        **asked["options"],
    )
    if len(text) > asked["most"]:
        raise ValueError(f"it writes {len(text)} characters, of {asked['most']} at most")
    return str(text)


@contextlib.contextmanager
def _within(more: int) -> Iterator[None]:
    """So much more memory: beyond it a MemoryError, or, where the system has no such limit, as
    macOS, the end of the process."""
    if sys.platform != "linux":
        _watch(more)
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    limit = most if soft == resource.RLIM_INFINITY else min(soft, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _watch(more: int) -> None:
    """Once: it is the most of the whole process that is held against the bound."""
    if threading.active_count() > 1:
        return
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + more  # bytes on macOS

    def look() -> None:
        while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= most:
            time.sleep(CHECKS)
        os._exit(TOO_MUCH)

    threading.Thread(target=look, daemon=True).start()


if __name__ == "__main__":
    main()
