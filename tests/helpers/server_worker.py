"""``mlx_hmem.server``, which writes each read of a file that MLX does not make, and each hint of
one, into the file ``READS``: inode, first byte, end."""

import os
import sys

from mlx_hmem.__main__ import main
from mlx_hmem.bank.read import blocks
from mlx_hmem.errors import run_program

RECORD = os.open(os.environ["READS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
PREADV, ADVISE = os.preadv, blocks.advise


def write(file: int, first: int, count: int) -> None:
    os.write(RECORD, f"{os.fstat(file).st_ino} {first} {first + count}\n".encode())


def read(file, buffers, offset, *flags):
    count = PREADV(file, buffers, offset, *flags)
    write(file, offset, count)
    return count


def hint(file, offset, length):
    write(file.fileno(), offset, length)
    ADVISE(file, offset, length)


os.preadv, blocks.advise = read, hint
sys.argv[:1] = ["mlx_hmem", "server"]
run_program(main)
