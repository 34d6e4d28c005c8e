"""The chat page: one file, which asks this server and nobody else."""

import base64
import hashlib
import re
from importlib import resources

from starlette.responses import HTMLResponse

POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page() -> HTMLResponse:
    """With a policy by which a browser runs the page's own script and no other."""
    text = (resources.files("mlx_hmem.server") / "page.html").read_text(encoding="utf-8")
    own = [
        f"{kind}-src 'sha256-{_hash(block)}'"
        for kind in ("script", "style")
        for block in re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
    ]
    return HTMLResponse(text, headers={"Content-Security-Policy": "; ".join([POLICY, *own])})


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
