"""The directory of a zip archive from a stranger, checked before anything in it is used.

Only what ``torch.save`` writes is taken: one archive to a file, nothing before or after it, and no
two entries with a byte in common. Nothing is ever decompressed, so there is no zip bomb: an entry
is as long as its bytes in the file. Names are keys and never become paths.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mlx_hmem.files import read_exactly

MAX_ENTRIES = 1 << 19
MAX_DIRECTORY = 1 << 26  # bytes
SMALL, LARGE = 0xFFFF, 0xFFFFFFFF  # a number that stands in the zip64 part instead
ENCRYPTED = 0x2041  # flags: encrypted, strongly so, header masked
SIZES_FOLLOW = 0x0008  # the sizes follow the data, and the header before them may say 0

END = struct.Struct("<4sHHHHIIH")
LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQHHIIQQQQ")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL = struct.Struct("<4sHHHHHIIIHH")


class Entry(NamedTuple):
    """Where an entry's bytes lie in the file; ``crc`` is 0 where the writer computed none."""

    start: int
    size: int  # as it lies there
    crc: int
    stored: bool  # else compressed or encrypted


class _Record(NamedTuple):
    name: bytes
    flags: int
    crc: int
    size: int  # as it lies in the file
    method: int
    header: int  # offset of the header before its data


def read_directory(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The entries of the archive in ``file``, of ``size`` bytes, in the order of its directory.

    Raises ValueError for whatever is not a whole archive of entries that lie in the file one after
    the other, each with a header of its own that says what the directory says.
    """
    start, length, count = _find_directory(file, size)
    records = list(_read_records(_read(file, start, length), count))
    if len({record.name for record in records}) != count:
        raise ValueError("two entries have one name")
    entries = {}
    end = 0
    for record in sorted(records, key=lambda record: record.header):
        if record.header < end:
            raise ValueError(f"entry {_show(record.name)} overlaps another")
        data = _check_header(file, record, start)
        end = data + record.size
        entries[record.name] = Entry(data, record.size, record.crc, _is_stored(record))
    return {record.name.decode(): entries[record.name] for record in records}


def _is_stored(record: _Record) -> bool:
    return not record.method and not record.flags & ENCRYPTED


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return read_exactly(file, length, file.name)


def _show(name: bytes) -> str:
    return repr(name.decode(errors="replace")[:80])


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Offset, length and number of entries of the central directory."""
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
    return start, length, count


def _read_records(directory: bytes, count: int) -> Iterator[_Record]:
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > len(directory):
            raise ValueError("its directory ends too early")
        (mark, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, header) = (
            CENTRAL.unpack_from(directory, at)
        )
        name_end = at + CENTRAL.size + lengths[0]
        name, extra = directory[at + CENTRAL.size : name_end], name_end + lengths[1]
        at = extra + lengths[2]
        if mark != b"PK\x01\x02" or at > len(directory):
            raise ValueError("its directory is damaged")
        size, packed, header = _large_numbers(directory[name_end:extra], size, packed, header)
        if disk or (packed != size and not method):
            raise ValueError(f"entry {_show(name)} contradicts itself about its size")
        name.decode()  # UnicodeDecodeError is a ValueError
        yield _Record(name, flags, crc, packed, method, header)
    if at != len(directory):
        raise ValueError("its directory has bytes left over")


def _large_numbers(extra: bytes, *numbers: int) -> list[int]:
    """The numbers, those that do not fit 32 bits taken from the zip64 field."""
    if LARGE not in numbers:
        return list(numbers)
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            if len(field) != length or length != 8 * numbers.count(LARGE):
                break
            large = iter(struct.unpack(f"<{length // 8}Q", field))
            return [next(large) if number == LARGE else number for number in numbers]
        at += 4 + length
    raise ValueError("an entry lacks its zip64 sizes")


def _check_header(file: BinaryIO, record: _Record, limit: int) -> int:
    """Checks the header before an entry's data; returns where the data begin."""
    name = _show(record.name)
    if record.header + LOCAL.size > limit:
        raise ValueError(f"entry {name} lies outside the file")
    block = _read(
        file, record.header, min(LOCAL.size + len(record.name) + 1024, limit - record.header)
    )
    mark, _, flags, method, _, _, crc, packed, size, *lengths = LOCAL.unpack_from(block)
    start = record.header + LOCAL.size + sum(lengths)
    if mark != b"PK\x03\x04" or start + record.size > limit:
        raise ValueError(f"entry {name} lies outside the file")
    if block[LOCAL.size : LOCAL.size + lengths[0]] != record.name:
        raise ValueError(f"entry {name} has another name before its data")
    if LARGE in (packed, size):
        extra = _read(file, start - lengths[1], lengths[1])
        size, packed = _large_numbers(extra, size, packed)
    same = (packed, crc) == (record.size, record.crc) and (method or size == packed)
    follow = flags & SIZES_FOLLOW and not any((packed, size, crc))
    if (flags, method) != (record.flags, record.method) or not (same or follow):
        raise ValueError(f"entry {name} has another size or kind before its data")
    return start
