"""What a store needs to be sound, asked before it is opened: room on the disk, pages in order."""

import shutil
import subprocess
import sys
from pathlib import Path

from mlx_hmem.errors import UserError

RESTORE = "move the folder of this stage away and run it again"
WALK = """
import os, sys, lmdb
env = lmdb.open(sys.argv[1], readonly=True, lock=False, max_dbs=5)
size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
assert os.path.getsize(os.path.join(sys.argv[1], "data.mdb")) >= size
with env.begin(buffers=True) as transaction:
    for name in map(bytes, transaction.cursor().iternext(values=False)):
        for key in transaction.cursor(env.open_db(name, transaction)).iternext(values=False):
            pass
"""


def damaged(folder: Path, what: object) -> UserError:
    return UserError(f"the training store {folder} is damaged", what, RESTORE)


def check_store(folder: Path) -> None:
    """Raises UserError if there is a store whose file LMDB cannot walk: in a process of its own,
    which wrong pages may end."""
    file = folder / "data.mdb"
    if not file.exists() or not file.stat().st_size:  # or a kill came as it was made
        return
    walked = subprocess.run([sys.executable, "-c", WALK, folder], capture_output=True)
    if walked.returncode:
        raise damaged(folder, "its pages are not in order")


def check_free_space(folder: Path, size: int) -> None:
    """Raises UserError if the disk has no room for ``folder`` to grow to ``size`` bytes."""
    file = folder / "data.mdb"
    present = file.stat().st_blocks * 512 if file.exists() else 0
    free = shutil.disk_usage(folder).free
    if size - present > free:
        raise UserError(
            f"too little disk space for the training store {folder}",
            f"it may grow by {(size - present) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            "free space there or give another --out",
        )
