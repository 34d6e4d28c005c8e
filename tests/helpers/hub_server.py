"""A Hugging Face Hub on this computer: as much of its HTTP interface as huggingface_hub asks for.

It keeps repositories as lists of commits, answers over loopback, and counts what it was asked for
and how many bytes it gave. Plain HTTP and LFS storage only: Xet, which the real Hub prefers, is
switched off in the client that talks to it.
"""

import base64
import hashlib
import json
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.helpers.places import bytes_of

TOKEN = "hf_of_the_tests"
LFS = (".safetensors", ".model")  # the real Hub decides by .gitattributes


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    sent: int = 0


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all its files."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1] if self.commits else ("0" * 40, {})
        return next((c for c in self.commits if c[0] == revision), None)


class Hub:
    """The server, as a context manager. ``requests`` lists what was asked, in order."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.closed: dict[str, str] = {}  # repositories that are not given, by the code of why
        self.blobs: dict[str, bytes] = {}  # LFS storage, by SHA-256
        self.requests: list[Request] = []
        self.cut_once: set[str] = set()  # files of which half is sent, once
        self.hold: dict[str, threading.Event] = {}  # files that wait for an event
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []
        verbs = {f"do_{verb}": _Handler.handle_one for verb in ("HEAD", "GET", "POST", "PUT")}
        handler = type("Handler", (_Handler,), {"hub": self, **verbs})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:  # clients keep them open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, name: str, folder: Path) -> str:
        """Makes the files of ``folder`` the newest commit of a repository."""
        return self.repos.setdefault(name, Repo()).commit(bytes_of(folder))

    def downloads(self) -> list[str]:
        """Files that were sent, one entry for each GET, and the requests forgotten."""
        with self.lock:
            found = [r.path.split("/resolve/")[1] for r in self.requests if self._is_file(r)]
            self.requests.clear()
        return [name.split("/", 1)[1] for name in found]

    @staticmethod
    def _is_file(request: Request) -> bool:
        return request.method == "GET" and "/resolve/" in request.path

    def bytes_sent(self) -> int:
        """Bytes of files sent since the requests were last forgotten."""
        with self.lock:
            return sum(r.sent for r in self.requests if self._is_file(r))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *_: object) -> None:
        pass

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        self.request_record = Request(self.command, path, self.headers.get("Range"))
        with self.hub.lock:
            self.hub.requests.append(self.request_record)
        parts = path.strip("/").split("/")
        if self.command in ("POST", "PUT") and not self._may_write(parts):
            self._error(401, "Unauthorized")
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif parts == ["api", "repos", "create"]:
            self._create()
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._lfs_batch()
        elif parts[0] == "lfs" and self.command == "PUT":
            self.hub.blobs[parts[1]] = self.body
            self._json({})
        else:
            self._error(404, "NotImplemented")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _may_write(self, parts: list[str]) -> bool:
        return parts[0] == "lfs" or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _api(self, name: str, rest: list[str]) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or name in self.hub.closed:
            return self._error(403 if repo else 404, self.hub.closed.get(name, "RepoNotFound"))
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        found = repo.at(revision)
        if found is None:
            return self._error(404, "RevisionNotFound")
        sha, files = found
        if verb == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings})
        if verb == "tree":
            return self._json([_entry(path, data) for path, data in sorted(files.items())])
        if verb == "preupload":
            return self._json(
                {"files": [self._mode(f, files) for f in json.loads(self.body)["files"]]}
            )
        if verb == "commit":
            return self._commit(name, repo, dict(files))
        return self._error(404, "NotImplemented")

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        exists = name in self.hub.repos
        self.hub.repos.setdefault(name, Repo())
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if exists else 200)

    @staticmethod
    def _mode(file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(LFS) else "regular"
        known = files.get(file["path"])
        oid = None if known is None else _oid(known, mode == "lfs")
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _lfs_batch(self) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, files: dict[str, bytes]) -> None:
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _file(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._error(404, "RepoNotFound")
        found = repo.at(revision)
        if found is None:
            return self._error(404, "RevisionNotFound")
        sha, files = found
        if path not in files:
            return self._error(404, "EntryNotFound")
        data, start = files[path], 0
        if self.command == "GET" and path in self.hub.hold:
            self.hub.hold[path].wait(10)
        if self.request_record.range:
            start = int(self.request_record.range.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_oid(data, path.endswith(LFS))}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        part = data[start:]
        if path in self.hub.cut_once:
            self.hub.cut_once.remove(path)
            part = part[: len(part) // 2]
            self.close_connection = True
        self.request_record.sent = len(part)
        self.wfile.write(part)
        return None


def _oid(data: bytes, lfs: bool) -> str:
    if lfs:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    lfs = path.endswith(LFS)
    entry = {"type": "file", "path": path, "size": len(data), "oid": _oid(data, False)}
    if lfs:
        entry["lfs"] = {"oid": _oid(data, True), "size": len(data), "pointerSize": 130}
    return entry
