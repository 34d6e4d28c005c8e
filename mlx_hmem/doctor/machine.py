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

PACKAGES = ("mlx-hmem", "mlx", "mlx-lm", "numpy", "tokenizers", "transformers", "lmdb")
LENGTH = 400  # characters of what a program said


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


def impersonal(text: str, work: Path | None = None) -> str:
    """The end of what a program said, its folders and the person's name taken out."""
    own = [(str(work), "WORK")] if work is not None else []
    own += [(str(Path(sys.prefix)), "PYTHON"), (str(Path.home()), "~"), (os.getcwd(), "HERE")]
    own += [(platform.node(), "MACHINE")]
    with suppress(OSError, KeyError, ImportError):
        own.append((getpass.getuser(), "USER"))
    for name, instead in own:
        if len(name) > 1:  # "/" is in every path
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text.strip()[-LENGTH:]


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
