"""What the machine is, without a name of its owner, of itself or of a folder."""

import getpass
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_hmem.budget.resident import bytes_text, machine_bytes
from mlx_hmem.errors import printable

PACKAGES = ("mlx-hmem", "mlx", "mlx-lm", "numpy", "tokenizers", "transformers", "lmdb")
LENGTH = 400  # characters of what a program said
# The folders of a path: in quotes names may hold spaces.
FOLDERS = (r"(?<=[\"'])~?/[^\"'\n]*/", r"(?<![\w./~])~?/(?:[^/\s\"']+/)+")


def describe() -> dict[str, Any]:
    """Device, system, memory and versions."""
    info = mx.device_info()
    found: dict[str, Any] = {
        "chip": _chip(),
        "device": f"{mx.default_device().type.name}, {info.get('architecture', '?')}",
        "system": _system(),
        "cores": os.cpu_count(),
        "memory": bytes_text(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "of it for models": bytes_text(machine_bytes()),
        "page": f"{os.sysconf('SC_PAGE_SIZE')} bytes",
        "room on the disk": bytes_text(shutil.disk_usage(".").free),
        "Python": platform.python_version(),
    }
    if limit := info.get("max_buffer_length"):
        found["largest array"] = bytes_text(int(limit))
    return found | {name: _version(name) for name in PACKAGES}


def impersonal(text: str, work: Path) -> str:
    """The end of what a program said, without folders, the machine's and the person's name, and
    what a terminal would obey."""
    places = {str(work): "WORK", sys.prefix: "PYTHON", os.path.expanduser("~"): "~"}
    for place in sorted(places, key=len, reverse=True):  # one may lie in another
        text = _without(place, places[place], text)
    for folders in FOLDERS:
        text = re.sub(folders, ".../", text)
    for name in (platform.node(), platform.node().partition(".")[0]):
        text = _without(name, "MACHINE", text)
    with suppress(OSError, KeyError, ImportError):
        text = _without(getpass.getuser(), "USER", text)
    return printable(text, keep="\n").strip()[-LENGTH:]


def _without(name: str, instead: str, text: str) -> str:
    if len(name) < 2:  # "/" is in every path
        return text
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)


def _system() -> str:
    version, _, architecture = platform.mac_ver()
    if version:
        return f"macOS {version}, {architecture}"
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def _chip() -> str:
    with suppress(OSError):
        if sys.platform == "darwin":
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "?"


def _version(name: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "none"
