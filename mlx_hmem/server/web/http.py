"""HTTP over uvicorn, in a thread of its own, with an end to all that a client may keep waiting."""

import asyncio
import contextlib
import logging
import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_hmem.errors import UserError

MOST_CONNECTIONS = 512
HEADER_SECONDS = 10.0  # in which the head of a request must be here
STALL_SECONDS = 30.0  # for which a client may take nothing of what is sent
IDLE_SECONDS = 5  # between two requests
END_SECONDS = 10  # for answers that are sent when the server ends
WANTED_FILES = 4096


class BoundedProtocol(H11Protocol):
    """uvicorn's, which waits for a slow head and a slow reader for ever."""

    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _look(self) -> None:
        """The time for a head begins with the connection, and with the end of an answer."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not answering and self._head is None:
            self._head = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer has begun
            self.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; UserError where none can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    except OSError as error:
        what = f"nothing can listen at {host}, port {port}"
        raise UserError(what, error.strerror or error, "choose another --host or --port") from None
    found.setblocking(False)
    return found


@contextlib.contextmanager
def serving(app: Any, listening: socket.socket) -> Iterator[None]:
    """Serves meanwhile; at the end what is being sent is sent, for some seconds, unless it is the
    end by an error."""
    allow_files()
    for name in ("uvicorn.error", "uvicorn.access", "asyncio"):  # they name clients and paths
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
    config = uvicorn.Config(
        app, http=BoundedProtocol, ws="none", loop="asyncio", lifespan="on", log_config=None,
        access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=END_SECONDS,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), name="http", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield
    except BaseException:
        server.force_exit = True
        raise
    finally:
        server.should_exit = True
        thread.join(END_SECONDS + 5)


def allow_files() -> None:
    """Connections are open files, of which macOS lets a program have 256 unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
