"""A server in a process of its own, and clients that speak to it over loopback."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

from tests.helpers.places import ROOT

SECONDS = 60  # most that a test waits for anything


class Got(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any  # JSON, or text where it is none

    @property
    def error(self) -> dict[str, Any]:
        return self.body["error"]


class Server:
    """``mlx_hmem.server WORDS…`` at a free port; ``worker``: a script that runs it."""

    def __init__(self, *words: object, worker: str = "mlx_hmem.server", **environment: str):
        command = [sys.executable, "-m", worker, *map(str, words), "--port", "0"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.lines: list[str] = []
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            if found := re.search(r"^serving .* at http://(.*):(\d+)/v1$", line):
                break
        else:
            raise AssertionError(f"no server: {self.lines}")
        self.host, self.port = found[1].strip("[]"), int(found[2])
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        self.lines.extend(self._process.stderr)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        status = self._process.wait(SECONDS)
        self._reader.join(SECONDS)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self.signal()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self._process.kill()

    # Clients.

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> Got:
        """``body``: JSON values, or bytes as they are; a POST, unless there is none."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        try:
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        is_json = found.get("content-type", "") == "application/json"
        return Got(response.status, found, json.loads(text) if is_json else text)

    def connect(self, sent: bytes = b"") -> socket.socket:
        found = socket.create_connection((self.host, self.port), SECONDS)
        found.sendall(sent)
        return found

    def stream(self, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
        """A connection on which an answer has begun to come."""
        text = json.dumps(body | {"stream": True}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n"
        found = self.connect(head.encode() + text)
        seen = b""
        while b"data: " not in seen:
            more = found.recv(1 << 16)
            assert more, seen
            seen += more
        return found

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (.*)$", self.ask("/metrics").body, re.MULTILINE)
        assert found, name
        return float(found[1])


def received(connection: socket.socket, wanted: bytes) -> bytes:
    """What comes, until ``wanted`` is in it or no more comes."""
    found = b""
    while wanted not in found and (more := connection.recv(1 << 16)):
        found += more
    return found


def events(connection: socket.socket) -> Iterator[Any]:
    """The events of a stream up to its end, without those that have been read before."""
    text = b""
    while more := connection.recv(1 << 16):
        text += more
        if b"0\r\n\r\n" in text:
            break
    for line in re.findall(rb"data: (.*)\n\n", text):
        yield None if line == b"[DONE]" else json.loads(line)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
