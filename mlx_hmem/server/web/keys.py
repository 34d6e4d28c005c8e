"""Who may ask: API keys, each a name, a hash and perhaps a view, one JSON object a line::

    {"name": "ann", "sha256": "9f86…", "view": "guest"}

A key is 256 random bits, so that its plain hash gives nothing away.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_hmem.bank.views import check_name
from mlx_hmem.errors import UserError
from mlx_hmem.reading import open_regular, strict_json

MOST_BYTES = 1 << 24
REMEDY = "make each line with mlx_hmem.server --new-key NAME"


@dataclass(frozen=True)
class Key:
    """``view``: what its bearer may fetch, None for whatever is asked for."""

    name: str
    sha256: str
    view: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "key")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError("sha256 is not 64 hex digits")
        if self.view is not None:
            check_name(self.view, "view")


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; UserError for one that is none, with the number of its line."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
            raise UserError(f"{path} is too large for keys", f"{size} bytes", REMEDY)
        lines = file.read().split(b"\n")
    found, known = list[Key](), set[str]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(Key(**strict_json(line)))
            except (ValueError, TypeError) as error:
                reason = "not an object of name, sha256 and perhaps view"
                said = error if isinstance(error, ValueError) else reason
                raise UserError(f"{path}, line {number}, is no key", said, REMEDY) from None
            if found[-1].sha256 in known:  # of two views the last would have held
                what = f"{path}, line {number}, has a key that is there already"
                raise UserError(what, found[-1].name, "keep the line with the view it is to have")
            known.add(found[-1].sha256)
    if not found:
        raise UserError("the file has no keys", path, REMEDY)
    return found


def check_views(keys: Sequence[Key], views: Collection[str]) -> None:
    """Raises UserError for a key with a view that the model does not have."""
    for key in keys:
        if key.view is not None and key.view not in views:
            known = ", ".join(views) or "none; mlx_hmem.bank block makes one"
            raise UserError(f"no such view for the key {key.name}", key.view, f"known: {known}")


def key_of(keys: Sequence[Key], given: bytes) -> Key | None:
    """The key that was given, in a time that does not tell how near to one it is."""
    digest, found = hashlib.sha256(given).hexdigest(), None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def new_key(name: str, view: str | None) -> tuple[str, str]:
    """A new key, and its line for the file."""
    secret = f"hmem-{secrets.token_urlsafe(32)}"
    key = Key(name, hashlib.sha256(secret.encode()).hexdigest(), view)
    values = {"name": key.name, "sha256": key.sha256} | ({"view": view} if view else {})
    return secret, json.dumps(values, ensure_ascii=False)
