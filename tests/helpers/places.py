"""Where the repository lies, and what lies beside it."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HMEM_SHARED", ROOT.parent / "shared"))


def shared(*parts: str) -> Path:
    """A file or folder beside the checkout; where it is missing, the test is skipped."""
    import pytest  # the workers do without

    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}; set HMEM_SHARED")
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
