"""The door: which names the server answers to, from which pages, and whose key it takes."""

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence

from mlx_hmem.server.asked import RefusedError
from mlx_hmem.server.web.keys import Key, key_of

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
HOST = re.compile(r"(\[(?P<address>[^]]+)\]|(?P<name>[^][:]+))(:[0-9]+)?")
OPEN = ("/health", "/")  # what needs no key: whether the server is well, and the page that asks


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server at this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """``keys`` None: whoever reaches the server may ask.

    A page of another site could have its name resolved to this machine (DNS rebinding), so a
    request must name a host that is ours: on loopback one of its names, else an address in
    figures, which nobody resolves, or a name of this machine.
    """

    def __init__(self, host: str, keys: Sequence[Key] | None):
        self._keys, self._loopback = keys, is_loopback(host)
        own = socket.gethostname().lower()
        self._names = (
            LOOPBACK | {host.lower()} | (set() if self._loopback else {own, f"{own}.local"})
        )

    def check(self, path: str, headers: Mapping[str, str]) -> Key | None:
        """Whose request it is; RefusedError for one that may not be answered."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise RefusedError(403, "the Host of the request is not this server", code="wrong_host")
        own = (f"http://{host.lower()}", f"https://{host.lower()}")
        origins = [value for name, value in headers.items() if name == "origin"]
        if not all(origin.lower() in own for origin in origins):
            raise RefusedError(403, "pages of other origins may not ask", code="wrong_origin")
        if self._keys is None or path in OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = key_of(self._keys, given.strip().encode("latin-1"))
        if scheme.lower() != "bearer" or key is None:
            raise RefusedError(
                401,
                "no valid API key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return key

    def _is_ours(self, host: str) -> bool:
        if (found := HOST.fullmatch(host.lower())) is None:
            return False
        name = found["name"] or found["address"]
        return name in self._names or (not self._loopback and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def view_for(key: Key | None, asked: str | None, param: str | None) -> str | None:
    """The view of a request: that of its key, which no other may be asked for beside."""
    if key is None or key.view is None:
        return asked
    if asked is not None and asked != key.view:
        raise RefusedError(403, "this key has another view", param, "view_not_allowed")
    return key.view
