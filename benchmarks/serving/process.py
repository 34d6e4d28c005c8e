"""A server in a process of its own, and a client that asks it."""

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mlx_hmem.errors import UserError

SECONDS = 600.0  # most that an answer may take
PATH = "/v1/completions"


class Answer(NamedTuple):
    text: str
    num_tokens: int


class Program(NamedTuple):
    """A server that listens: its port, and its process."""

    port: int
    process: subprocess.Popen[str]

    def ask(self, prompt: str, max_tokens: int, **fields: Any) -> Answer:
        wanted = {"prompt": prompt, "max_tokens": max_tokens} | fields
        try:
            body = self._post(wanted)
        except ConnectionResetError:  # once more, where many ask at once
            body = self._post(wanted)
        found = json.loads(body)
        return Answer(found["choices"][0]["text"], found["usage"]["completion_tokens"])

    def first_token(self, prompt: str | list[int], max_tokens: int = 2) -> float:
        """Milliseconds to the first event of a stream; all of it is read."""
        start = time.perf_counter()
        fields = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
        with closing(self._connection()) as connection:
            connection.request("POST", PATH, json.dumps(fields))
            response = connection.getresponse()
            response.readline()
            ms = (time.perf_counter() - start) * 1e3
            response.read()
        return ms

    def metric(self, name: str) -> float:
        with closing(self._connection()) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return float(re.findall(rf"^{name} (.*)$", text, re.MULTILINE)[0])

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), SECONDS)

    def num_files(self) -> int:
        """Its open files; 0 where the system does not say."""
        files = Path(f"/proc/{self.process.pid}/fd")
        return len(list(files.iterdir())) if files.exists() else 0

    def resident(self) -> int:
        """Its resident bytes."""
        command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]  # Linux's and macOS'
        return int(subprocess.run(command, capture_output=True, check=True).stdout) * 1024

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def _post(self, fields: dict[str, Any]) -> bytes:
        with closing(self._connection()) as connection:
            connection.request("POST", PATH, json.dumps(fields))
            response = connection.getresponse()
            body = response.read()
        if response.status != 200:
            raise UserError("the server refuses", body.decode(errors="replace"), "see above")
        return body


@contextmanager
def running(module: str, model: str | Path, *words: str) -> Iterator[Program]:
    """``python -m MODULE --model MODEL`` at a free port, until it listens and until the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", module, "--model", str(model), "--port", str(port), *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True)
    found = Program(port, process)
    try:
        while True:
            try:
                found.ask("The", 1)
                break
            except OSError:
                if process.poll() is not None:
                    raise UserError("the server has ended", " ".join(command), "run it") from None
                time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait()


class Rate(NamedTuple):
    answers: list[Answer]
    tokens_per_s: float


def at_once(program: Program, prompts: Sequence[str], tokens: int, **fields: Any) -> Rate:
    """All prompts, each by a client of its own."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return _rate(pool.map(lambda prompt: program.ask(prompt, tokens, **fields), prompts))


def one_by_one(program: Program, prompts: Sequence[str], tokens: int, **fields: Any) -> Rate:
    return _rate(program.ask(prompt, tokens, **fields) for prompt in prompts)


def _rate(answers: Iterator[Answer]) -> Rate:
    start = time.perf_counter()
    found = list(answers)
    seconds = time.perf_counter() - start
    return Rate(found, sum(answer.num_tokens for answer in found) / seconds)


def first_under_load(program: Program, prompts: Sequence[str], tokens: int) -> list[float]:
    """Milliseconds to the first token of each prompt, while all others are asked again and
    again."""
    found, ended = list[float](), False

    def load(prompt: str) -> None:
        while not ended:
            program.ask(prompt, tokens)

    with ThreadPoolExecutor(len(prompts)) as pool:
        others = [pool.submit(load, prompt) for prompt in prompts[1:]]
        time.sleep(1)
        try:
            for prompt in prompts:
                found.append(program.first_token(prompt))
        finally:
            ended = True
        for other in others:
            other.result()
    return found


def first_alone(program: Program, prompts: Sequence[str]) -> float:
    return median(program.first_token(prompt) for prompt in prompts)
