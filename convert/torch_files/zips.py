"""The directory of a zip archive from a stranger, checked before anything in it is used.

``zipfile`` reads it; here stands what it does not ask. Only what ``torch.save`` writes is taken:
one archive to a file, nothing before or after it, and no two entries with a byte in common. Nothing
is ever decompressed, so there is no zip bomb: an entry is as long as its bytes in the file. Names
are keys and never become paths.
"""

import struct
import zipfile
from typing import BinaryIO, NamedTuple

from mlx_hmem.reading import read_exactly

MAX_ENTRIES = 1 << 19
MAX_DIRECTORY = 1 << 26  # bytes
SMALL, LARGE = 0xFFFF, 0xFFFFFFFF  # a number that stands in the zip64 part instead
ENCRYPTED = 0x2041  # flags: encrypted, strongly so, header masked
SIZES_FOLLOW = 0x0008  # the sizes follow the data, and the header before them may say 0

END = struct.Struct("<4sHHHHIIH")
LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCAL = struct.Struct("<4sHHHHHIIIHH")


class Entry(NamedTuple):
    """Where an entry's bytes lie in the file; ``crc`` is 0 where the writer computed none."""

    start: int
    size: int  # as it lies there
    crc: int
    stored: bool  # else compressed or encrypted


def read_directory(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The entries of the archive in ``file``, of ``size`` bytes, in the order of its directory.

    Raises ValueError for whatever is not a whole archive of entries that lie in the file one after
    the other, each with a header of its own that says what the directory says.
    """
    limit, count = _check_end(file, size)
    try:
        infos = zipfile.ZipFile(file, metadata_encoding="utf-8").infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise ValueError(f"its directory is damaged: {error}") from None
    if len(infos) != count:
        raise ValueError(f"its directory has {len(infos)} entries, not {count}")
    if len({info.orig_filename for info in infos}) != count:
        raise ValueError("two entries have one name")
    starts, end = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise ValueError(f"entry {_show(info)} overlaps another")
        starts[info.orig_filename] = _check_header(file, info, limit)
        end = starts[info.orig_filename] + info.compress_size
    return {
        info.orig_filename: Entry(
            starts[info.orig_filename], info.compress_size, info.CRC, _is_stored(info)
        )
        for info in infos
    }


def _is_stored(info: zipfile.ZipInfo) -> bool:
    return not info.compress_type and not info.flag_bits & ENCRYPTED


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return read_exactly(file, length, file.name)


def _show(info: zipfile.ZipInfo) -> str:
    return repr(info.orig_filename[:80])


def _check_end(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the directory begins, and how many entries it says it has."""
    if size < END.size:
        raise ValueError(f"{size} bytes are too few for an archive")
    mark, *disks, here, count, length, start, comment = END.unpack(
        _read(file, size - END.size, END.size)
    )
    if mark != b"PK\x05\x06" or comment:
        raise ValueError("its directory is not at the end: it was cut off or added to")
    end = size - END.size
    if end >= LOCATOR.size + END64.size:
        end64 = end - LOCATOR.size - END64.size
        block = _read(file, end64, END64.size + LOCATOR.size)
        locator = LOCATOR.unpack_from(block, END64.size)
        if locator[0] == b"PK\x06\x07":
            if locator[1:] != (0, end64, 1):
                raise ValueError("its zip64 locator points elsewhere")
            mark, rest, _, _, *disks64, here64, count64, length64, start64 = END64.unpack_from(
                block
            )
            if mark != b"PK\x06\x06" or rest != END64.size - 12:
                raise ValueError("it has a wrong zip64 record")
            pairs = ((here, here64, SMALL), (count, count64, SMALL), (length, length64, LARGE))
            if any(old not in (new, most) for old, new, most in (*pairs, (start, start64, LARGE))):
                raise ValueError("its two directory records contradict each other")
            disks, here, count, length, start = disks64, here64, count64, length64, start64
            end = end64
    if any(disks) or here != count:
        raise ValueError("it is part of an archive in several files")
    if start + length != end:
        raise ValueError("its directory is not where its end says")
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise ValueError(f"{count} entries in a directory of {length} bytes are too many")
    return start, count


def _check_header(file: BinaryIO, info: zipfile.ZipInfo, limit: int) -> int:
    """Checks an entry against the header before its data; returns where the data begin."""
    if info.volume or (info.compress_size != info.file_size and not info.compress_type):
        raise ValueError(f"entry {_show(info)} contradicts itself about its size")
    if info.header_offset + LOCAL.size > limit:
        raise ValueError(f"entry {_show(info)} lies outside the file")
    mark, _, flags, method, _, _, crc, packed, size, *lengths = LOCAL.unpack(
        _read(file, info.header_offset, LOCAL.size)
    )
    start = info.header_offset + LOCAL.size + sum(lengths)
    if mark != b"PK\x03\x04" or start + info.compress_size > limit:
        raise ValueError(f"entry {_show(info)} lies outside the file")
    names = _read(file, info.header_offset + LOCAL.size, sum(lengths))
    name, extra = names[: lengths[0]], names[lengths[0] :]
    if name != info.orig_filename.encode():
        raise ValueError(f"entry {_show(info)} has another name before its data")
    known = (info.file_size, info.compress_size)
    if LARGE in (packed, size) and struct.pack("<QQ", *known) in extra:  # its zip64 field
        size, packed = known
    same = (packed, crc) == (info.compress_size, info.CRC) and (method or size == packed)
    follow = flags & SIZES_FOLLOW and not any((packed, size, crc))
    if (flags, method) != (info.flag_bits, info.compress_type) or not (same or follow):
        raise ValueError(f"entry {_show(info)} has another size or kind before its data")
    return start
