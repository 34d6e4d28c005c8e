"""Rows that are freed, requests that fail alone, a model that is taken over, an end that drains."""

import io
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_hmem.generation.options import say
from mlx_hmem.model.load import load
from mlx_hmem.server.command import _drain_at_signals, _log
from mlx_hmem.server.engine import Engine
from mlx_hmem.server.served import Served
from tests.bank.test_views import PROMPT, write_views
from tests.conftest import MEMORY, save_bank
from tests.helpers.programs import process
from tests.helpers.servers import Server, events, received, wait_until
from tests.server.conftest import PROMPTS

PATH = "/v1/completions"
LONG = {"prompt": PROMPTS[1], "max_tokens": 240, "memory": "none", "temperature": 2.0}


FIRST = """
import socket
import time
import mlx_hmem.server.web.http as http
import mlx_hmem.server.web.app as app
import mlx_hmem.server.served as served
http.HEADER_SECONDS = app.BODY_SECONDS = 2.0
http.STALL_SECONDS = 0.5
step, made = served.Served.next, http.BoundedProtocol.connection_made
served.Served.next = lambda self: (time.sleep(0.03), step(self))[1]

def connection_made(self, transport):
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made(self, transport)

http.BoundedProtocol.connection_made = connection_made
"""


@pytest.fixture(scope="module")
def small(model_folder, tmp_path_factory):
    """A slow server of two rows, beside which two may wait, on a model that may be changed. The
    tests take turns on it; the last ends it."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("small") / "model"))
    words = ("--model", folder, "--rows", 2, "--waiting", 2)
    with Server(*words, worker="tests.helpers.quick_worker", FIRST=FIRST) as found:
        found.folder = folder
        yield found


def long(small, **fields):
    """An answer of the tiny model that takes its time."""
    return small.stream({"prompt": PROMPT, "max_tokens": 80, "temperature": 2.0} | fields)


def test_ten_clients_that_go_away_free_their_rows(server):
    streams = [server.stream(LONG | {"seed": seed}) for seed in range(10)]
    gone = server.metric("hmem_requests_gone_total")
    for stream in streams:
        stream.close()
    wait_until(lambda: server.metric("hmem_rows_inside") == 0)
    ended = server.metric("hmem_requests_gone_total") - gone
    assert ended >= 5  # the first may have come to their end
    assert server.ask(PATH, {"prompt": PROMPTS[0], "max_tokens": 3}).body["choices"][0]["text"]


def test_a_client_that_goes_away_without_a_stream_frees_its_row(small):
    text = b'{"prompt": "The old lighthouse", "max_tokens": 80, "temperature": 2}'
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n"
    connection = small.connect(head.encode() + text)
    wait_until(lambda: small.metric("hmem_rows") == 1)
    connection.close()
    wait_until(lambda: small.metric("hmem_rows_inside") == 0)
    assert small.metric("hmem_requests_gone_total") >= 1


def test_more_than_may_wait_are_sent_away_and_the_rest_answered(small):
    streams = [long(small, seed=seed) for seed in (1, 2)]
    waiting = [threading.Thread(target=small.ask, args=(PATH, {"prompt": PROMPT})) for _ in "ab"]
    for each in waiting:
        each.start()
    wait_until(lambda: small.metric("hmem_rows_inside") == 4)
    got = small.ask(PATH, {"prompt": PROMPT})
    assert (got.status, got.error["type"]) == (429, "rate_limit_error")
    assert int(got.headers["retry-after"]) >= 1
    never = small.ask(PATH, {"prompt": PROMPT, "n": 5})  # clients ask again after a 429
    assert (never.status, never.error["param"]) == (400, "n")
    assert small.metric("hmem_rows") <= 2
    assert [list(events(each))[-1] for each in streams] == [None, None]
    for each in waiting:
        each.join()
    assert small.metric("hmem_rows_inside") == 0


def test_a_damaged_block_fails_the_request_that_needs_it_alone(small, texts):
    model = load(small.folder)
    routes = {model.retriever.route(text)[0]: text for text in texts}
    first, second = list(routes)[:2]
    place = model.bank._sources.storage.place((1, first))
    stream = long(small, route_text=routes[second])
    (file,) = small.folder.glob("bank/level-1.*")
    whole = file.read_bytes()
    with file.open("r+b") as opened:
        opened.seek(place.offset)
        opened.write(bytes(place.nbytes))
    got = small.ask(PATH, {"prompt": PROMPT, "route_text": routes[first], "max_tokens": 3})
    assert (got.status, got.error["message"]) == (500, "a block of the memory cannot be read")
    assert list(events(stream))[-1] is None
    assert small.ask(PATH, {"prompt": PROMPT, "route_text": routes[second]}).status == 200
    file.write_bytes(whole)
    assert str(small.folder) not in " ".join(small.lines[1:])


def test_a_reload_takes_over_and_answers_in_flight_end_with_the_model_they_began_with(small):
    body = {"prompt": PROMPT, "max_tokens": 12}
    before = small.ask(PATH, body).body["choices"][0]["text"]
    stream = small.stream(body)
    new = Path(shutil.copytree(small.folder, small.folder.with_name("new")))
    bank = load(new).bank
    hashes = (bank.anchor_hash, bank.tree_hash)
    save_bank(new / "bank", MEMORY, *hashes, seed=9)
    write_views(new, staff=[])
    small.folder.rename(small.folder.with_name("old"))
    new.rename(small.folder)
    assert small.ask("/v1/memory/reload", {}).status == 200
    after = small.ask(PATH, body).body["choices"][0]["text"]
    assert after != before
    said = "".join(e["choices"][0]["text"] for e in events(stream) if e)
    assert before.endswith(said)
    assert small.ask("/v1/memory/documents").body["views"] == ["staff"]
    (small.folder / "config.json").unlink()
    got = small.ask("/v1/memory/reload", {})
    assert got.status == 500
    assert str(small.folder) not in str(got.body)
    assert small.ask(PATH, body).body["choices"][0]["text"] == after


def test_many_reloads_at_once_are_one_and_models_that_nobody_needs_are_closed(model_folder):
    """Sixty clients had sixty models opened, and 1.6 GB of memory that never came back."""
    opened = []

    def open_model() -> Served:
        opened.append(Served(load(model_folder), None, 2, 0))
        return opened[-1]

    engine = Engine(open_model, 2, 2, print)
    asked = time.monotonic()
    for _ in range(5):
        engine.reload(asked, engine.served)
    assert len(opened) == 2
    for _ in range(3):
        engine.reload(time.monotonic(), engine.served)
        assert len(engine._old) == 1
    assert engine.served is opened[-1]
    engine._close_old()
    for each in opened[:-1]:
        assert not hasattr(each, "batch")  # closed


def test_a_slow_head_is_cut_off(small):
    slow = small.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
    again = small.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"ok" in received(again, b"ok")
    for connection in (slow, again):
        for _ in range(400):
            try:
                connection.sendall(b"x: y\r\n")
                time.sleep(0.02)
            except OSError:
                break
        else:
            raise AssertionError("it may send for ever")


def _rest(connection: socket.socket) -> bytes:
    """What comes to the end of a connection."""
    found = b""
    try:
        while more := connection.recv(1 << 16):
            found += more
    except ConnectionResetError:
        pass
    return found


def test_a_slow_body_gets_408_and_its_connection_ends(small):
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    connection, start = small.connect(head.encode()), time.monotonic()
    connection.settimeout(0.05)
    got = b""
    while b"in time" not in got:
        try:
            got += connection.recv(1 << 16)
        except TimeoutError:
            connection.sendall(b" ")
        assert time.monotonic() < start + 20
    assert time.monotonic() > start + 1.5
    assert got.startswith(b"HTTP/1.1 408")
    connection.settimeout(30)
    assert b"HTTP" not in _rest(connection)
    assert small.metric("hmem_rows_inside") == 0


def test_a_reader_that_takes_nothing_is_cut_off_and_frees_its_rows(small):
    asked = {"messages": [{"role": "user", "content": PROMPT}], "stream": True, "n": 2, "seed": 1}
    asked |= {"max_tokens": 80, "temperature": 2, "logprobs": True, "top_logprobs": 20}
    text = json.dumps(asked)  # its answer has over 200 KB
    path = "/v1/chat/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n"
    gone = small.metric("hmem_requests_gone_total")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((small.host, small.port))
        connection.sendall(head.encode() + text.encode())
        wait_until(lambda: small.metric("hmem_rows") == 2)
        wait_until(lambda: small.metric("hmem_rows_inside") == 0)
        assert small.metric("hmem_requests_gone_total") == gone + 1
        connection.settimeout(30)
        assert b"[DONE]" not in _rest(connection)
    assert small.ask(PATH, {"prompt": PROMPT, "max_tokens": 2}).status == 200


def test_a_log_that_nobody_takes_is_no_end(monkeypatch):
    """Once its terminal was gone the first line ended the server, with all answers in flight."""
    read, write = os.pipe()
    with os.fdopen(write, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(pipe, write_through=True))
        os.close(read)
        with pytest.raises(BrokenPipeError):
            say("a line")
        _log("a line")
    _log("to what is closed")


SIGNALLED = """
import signal, sys, threading
import mlx_hmem.server.command as command
import mlx_hmem.server.engine as engine
engine.LOOK_SECONDS = 0.05

def strike(line, say=command.say):
    say(line)
    if line.startswith("serving"):
        threading.Timer(0.1, signal.pthread_kill, (ended.ident, signal.SIGTERM)).start()

command.say, ended = strike, threading.Thread(target=threading.Event().wait, daemon=True)
ended.start()
command.main(["--model", sys.argv[1], "--port", "0"])
"""


def test_a_signal_that_another_thread_gets_ends_an_idle_server(model_folder):
    """It was seen with the next request: Python handles it in the main thread, which slept."""
    said = process("-c", SIGNALLED, model_folder, timeout=60)
    assert said.status == 0
    assert said.err.endswith("ended; all requests that were begun are answered\n")


def test_a_second_signal_ends_it_at_once(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    engine = SimpleNamespace(draining=False)
    engine.drain = lambda: setattr(engine, "draining", True)
    _drain_at_signals(engine)
    assert set(handlers) == {signal.SIGINT, signal.SIGTERM}
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert engine.draining
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGINT](signal.SIGINT, None)


def test_sigterm_lets_what_was_begun_end_and_takes_nothing_new(small):
    streams = [long(small, seed=seed) for seed in (1, 2)]
    kept = small.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b'{"status":"ok"}' in received(kept, b"}")
    small.signal()
    time.sleep(0.2)
    for path, body in (("/health", None), (PATH, {"prompt": PROMPT})):
        assert small.ask(path, body).status == 503
    for each in streams:
        *_, last, done = events(each)
        assert last["choices"][0]["finish_reason"]
        assert done is None
    assert small.wait() == 0
    assert "answered" in small.lines[-1]
