"""Who is let in, how much, and what a key's view never has read."""

import base64
import hashlib
import json
import os
import re
import select
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from urllib import request

import pytest

from mlx_hmem.bank import Bank
from mlx_hmem.model.load import load
from mlx_hmem.server.command import main
from mlx_hmem.server.web.app import MOST_BYTES
from mlx_hmem.server.web.guard import Guard, RefusedError
from mlx_hmem.server.web.http import MOST_CONNECTIONS, allow_files
from tests.bank.test_views import Reads
from tests.helpers.programs import assert_refused, process, run
from tests.helpers.servers import events, wait_until
from tests.server.conftest import PROMPTS

TIN = PROMPTS[0]
PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:8080"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "192.168.1.7"}, 403),
        ({"Host": "[::1]:9"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "localhost:1", "Origin": "http://127.0.0.1:1"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1.evil.example"}, 403),
        ({"Host": "evil.example:1", "Origin": "http://evil.example:1"}, 403),
        ({"Host": "[::1]:9", "Origin": "http://[::1]:9"}, 200),
        ({"Host": "localhost:evil.example"}, 403),
        ({"Host": "[::1].evil.example"}, 403),
        ({"Host": ""}, 403),
    ],
)
def test_only_our_own_names_and_pages_are_let_in(server, headers, status):
    got = server.ask(PATH, {"prompt": TIN, "max_tokens": 1}, headers)
    assert got.status == status
    assert status == 200 or got.error["code"] in ("wrong_host", "wrong_origin")
    assert not [name for name in got.headers if name.startswith("access-control")]


def test_a_page_of_this_server_is_let_in_at_its_port(server):
    for name in ("127.0.0.1", "localhost"):
        own = f"{name}:{server.port}"
        for origin, status in ((own, 200), (f"{name}:{server.port + 1}", 403)):
            got = server.ask("/health", headers={"Host": own, "Origin": f"http://{origin}"})
            assert got.status == status


def test_a_second_origin_is_not_passed_over_and_a_host_says_nothing_of_the_path(server):
    own = "Host: localhost\r\nOrigin: http://localhost\r\nConnection: close\r\n"
    for more, status in (("", b"200"), ("Origin: http://evil.example\r\n", b"403")):
        with server.connect(f"GET /health HTTP/1.1\r\n{own}{more}\r\n".encode()) as connection:
            assert connection.recv(1000).split()[1] == status
    for host in ("[::1", "localhost/health?", "]", "a@localhost"):
        got = server.ask("/v1/models", headers={"Host": host})
        assert (got.status, got.error["code"]) == (403, "wrong_host")


def test_another_host_answers_to_addresses_and_its_own_name():
    guard = Guard("0.0.0.0", None)
    for host in ("192.168.1.7:8080", "[fe80::1]:8080", socket.gethostname(), "localhost"):
        assert guard.check("/health", {"host": host}) is None
    with pytest.raises(RefusedError):
        guard.check("/health", {"host": "evil.example"})


@pytest.mark.parametrize(
    ("body", "status", "words", "param"),
    [
        (b"{", 400, "not JSON", None),
        (b"[NaN]", 400, "[0]: is NaN, which is not JSON", "[0]"),
        (b"NaN", 400, "is NaN, which is not JSON", None),
        (b'{"prompt": "a", "prompt": "b"}', 400, "prompt: occurs twice", "prompt"),
        (b'{"memory": {"view": "a", "view": "b"}}', 400, "occurs twice", "memory.view"),
        (b'{"prompt": ["\\ud800"]}', 400, "surrogate", "prompt[0]"),
        (b'{"\\ud800": 1}', 400, "surrogate", "\\ud800"),
        (b'{"top_p": -Infinity}', 400, "not JSON", "top_p"),
        (b'{"seed": %s}' % (b"9" * 5000), 400, "5000 digits", "seed"),
        (b'{"prompt": "\xff"}', 400, "not UTF-8", None),
        (b"[" * 100_000, 400, "nested too deeply", None),
        (b"x" * (MOST_BYTES + 1), 413, "more than", None),
    ],
)
def test_a_body_that_is_none_is_refused(server, body, status, words, param):
    got = server.ask(PATH, body)
    assert (got.status, got.error["param"]) == (status, param)
    assert words in got.error["message"]
    assert set(got.error) == {"message", "type", "param", "code"}


def test_a_body_without_an_end_is_cut_off_and_takes_no_memory(server):
    before = server.metric("hmem_resident_bytes")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect(head) as connection:
        chunk, sent, seen = b"100000\r\n" + b"a" * (1 << 20) + b"\r\n", 0, b""
        for _ in range(100):
            if not seen and select.select([connection], [], [], 0)[0]:
                seen = connection.recv(1 << 16)
            connection.sendall(chunk)
            sent += not seen
        assert seen.startswith(b"HTTP/1.1 413")
        assert sent < 50  # it has not waited for the end
    assert server.metric("hmem_resident_bytes") < before + (8 << 20)


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/v1/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%2f..", "//", "/x"]
)
def test_other_addresses_lead_nowhere(server, path):
    assert server.ask(path).status == server.ask("/health/").status == 404
    got = server.ask(PATH)
    assert (got.status, got.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9\r\n\r\n", b"\r\n" * 50])
def test_what_is_no_http_ends_its_connection_alone(server, raw):
    with server.connect(raw) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert b"200" not in connection.recv(1000)
    assert server.ask("/health").body == {"status": "ok"}


def test_of_a_thousand_connections_at_once_some_are_ended_and_then_it_answers(server):
    allow_files()  # to this process too
    stream = server.stream({"prompt": TIN, "max_tokens": 200, "temperature": 2.0, "seed": 1})
    waiting, ended = [socket.socket() for _ in range(1000)], select.poll()
    for each in waiting:
        each.setblocking(False)
        each.connect_ex((server.host, server.port))
        ended.register(each, select.POLLIN)
    wait_until(lambda: len(ended.poll(0)) > 1000 - MOST_CONNECTIONS)
    files = f"/proc/{server.pid}/fd"
    assert not os.path.exists(files) or len(os.listdir(files)) < MOST_CONNECTIONS + 100
    assert list(events(stream))[-1] is None
    for each in waiting:
        each.close()
    wait_until(lambda: _answers(server))
    assert server.ask(PATH, {"prompt": TIN, "max_tokens": 2}).status == 200


def _answers(server) -> bool:
    try:
        return server.ask("/health").status == 200
    except OSError:
        return False


def test_a_key_is_needed_and_one_with_a_view_has_no_other(guarded, keys, texts):
    body = {"prompt": texts[0][:40], "max_tokens": 2}
    for given in (None, "Bearer x", "Basic " + keys["bob"][7:], keys["bob"] + "x"):
        got = guarded.ask(PATH, body, {"Authorization": given} if given else {})
        assert (got.status, got.error["code"]) == (401, "invalid_api_key")
    for path in ("/v1/models", "/metrics", "/v1/memory/documents"):
        assert guarded.ask(path).status == 401
    assert guarded.ask("/health").status == 200
    ann, bob = ({"Authorization": keys[name]} for name in ("ann", "bob"))
    for fields, param in (({"view": "staff"}, "view"), ({"memory": {"view": "x"}}, "memory.view")):
        got = guarded.ask(PATH, body | fields, ann)
        assert (got.status, got.error["param"]) == (403, param)
    assert guarded.ask(PATH, body | {"view": "guest"}, ann).status == 200
    assert guarded.ask(PATH, body | {"view": "staff"}, bob).status == 200
    assert guarded.ask(PATH, body | {"view": "nobody"}, bob).error["param"] == "view"
    assert guarded.ask("/v1/memory/reload", {}, ann).status == 403
    said = " ".join(guarded.lines)
    assert texts[0][:10] not in said
    assert keys["bob"][7:] not in said


def test_a_barred_cluster_is_never_read_for_a_key_whose_view_bars_it(guarded, keys, viewed, texts):
    guarded.reads.write_text("")
    ann = {"Authorization": keys["ann"]}
    bob = {"Authorization": keys["bob"]}
    model = load(viewed, cache_bytes=0)
    barred = (model.retriever.route(texts[0])[0],)
    inside = [text for text in texts if model.retriever.route(text)[:1] == barred][:6]
    others = [text for text in texts if model.retriever.route(text)[:1] != barred][:3]

    def ask_all(headers) -> None:
        asked = [{"prompt": text[:60], "max_tokens": 6} for text in [*inside, *others]]
        asked += [fields | {"route_text": inside[0]} for fields in asked[:3]]
        asked += [fields | {"bank": "", "bar": [[(barred[0] + 1) % 3]]} for fields in asked[:2]]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda body: guarded.ask(PATH, body, headers), asked))
        assert {got.status for got in found} == {200}

    def reads_of_barred() -> list:
        reads = Reads.__new__(Reads)
        lines = guarded.reads.read_text().splitlines()
        reads.reads, reads.hints = [tuple(map(int, line.split())) for line in lines], []
        with Bank.open(viewed / "bank") as bank:
            return reads.of(viewed, bank, barred)

    ask_all(ann)
    assert guarded.reads.read_text()
    assert reads_of_barred() == []
    assert guarded.ask("/v1/memory/reload", {}, bob).status == 200
    ask_all(ann)
    assert reads_of_barred() == []
    names = {each["name"] for each in guarded.ask("/v1/memory/documents", headers=ann).body["data"]}
    known = {each["name"] for each in guarded.ask("/v1/memory/documents", headers=bob).body["data"]}
    assert 0 < len(names) < len(known)
    ask_all(bob)
    assert reads_of_barred() != []  # so it is seen when it is read
    alone = guarded.ask(PATH, {"prompt": inside[0][:60], "max_tokens": 6}, ann).body
    assert alone["memory"]["blocks"] == []


def test_without_the_packages_of_the_extra_it_says_how_to_get_them(monkeypatch):
    words = "import sys, runpy; sys.modules |= {'starlette': None, 'uvicorn': None}"
    words += "; sys.argv[1:] = ['server', '--port', '0']"
    said = process("-c", f"{words}; runpy.run_module('mlx_hmem', run_name='__main__')")
    assert_refused(said, "starlette", "pip install 'mlx-hmem[server]'")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_refused(run(main, "--port", "0"), "uvicorn", "pip install 'mlx-hmem[server]'")


def test_a_wrong_command_line_is_one_line(tmp_path, keys):
    assert_refused(run(main, "--host", "0.0.0.0"), "only this machine", "--no-keys-needed")
    assert_refused(run(main, "--port", "99999"), "--port")
    assert_refused(run(main, "--rows", "0"), "--rows", "give 1 or more")
    assert_refused(run(main, "--waiting", "-1"), "--waiting", "give 0 or more")
    assert_refused(run(main, "--view", "guest"), "--new-key")
    file = tmp_path / "keys"
    for line in ('{"name": "ann"}', '{"name": "a", "sha256": "0"}', "[]", "", "ann"):
        file.write_text(line)
        assert_refused(run(main, "--api-keys", file), str(file))
    twice = {"sha256": "0" * 64}
    lines = [twice | {"name": "ann", "view": "guest"}, twice | {"name": "eve"}]
    file.write_text("\r\n".join(map(json.dumps, lines)))
    assert_refused(run(main, "--api-keys", file), "line 2, has a key that is there already: eve")
    os.truncate(file, 1 << 30)
    assert_refused(run(main, "--api-keys", file), "too large for keys: 1073741824 bytes")
    assert_refused(run(main, "--model", "demo", "--api-keys", keys["file"], "--port", "0"), "ann")
    made = run(main, "--new-key", "carl", "--view", "guest")
    key = re.search("hmem-\\S+", made.err)[0]
    assert key not in made.out
    assert json.loads(made.out)["view"] == "guest"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Blocks(HTMLParser):
    """The inline scripts and styles of a page, and every address in it."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.addresses, self._inside = {"script": [], "style": []}, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in self.found:
            self.found[self._inside].append(data)


def test_the_page_needs_no_key_and_a_browser_runs_its_own_script_alone(guarded):
    with request.urlopen(guarded.url.removesuffix("v1")) as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    blocks = Blocks(page)
    for kind, (text,) in blocks.found.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert all(address.startswith("data:") for address in blocks.addresses)
    assert not re.search(r"""fetch\(["'`](?!v1/)""", page)
