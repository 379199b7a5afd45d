"""How many samples an MP4 or MOV file tells of, before FFmpeg builds their tables: 300 bytes may mean gigabytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BOXES_OF_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex", b"edts", b"dinf")
SAMPLE_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}  # where the number of samples stands
COMPRESSED_HEADER = 2**63  # a compressed header may hold any table
FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"styp", b"sidx", b"free", b"skip", b"wide", b"pnot", b"uuid")


def count_samples(path: Path) -> int:
    """The samples of all tracks of an MP4 or MOV file, but for raw sound, which has no table; 0 for another file."""
    total = track = 0
    is_sound = is_raw = False
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(4)
        if file.read(4) not in FIRST_BOXES:
            return 0
        for kind, head in _boxes(file, 0, end):
            if kind == b"trak":
                track, is_sound, is_raw = 0, False, False
            elif kind == b"hdlr" and head[8:12] in (b"soun", b"vide"):
                is_sound = head[8:12] == b"soun"
            elif kind == b"stts":
                is_raw = head[4:8] == head[12:16] == b"\0\0\0\1"  # each sample lasts one unit
            elif kind == b"cmov":
                return COMPRESSED_HEADER
            elif kind in SAMPLE_COUNTS:
                track = int.from_bytes(head[SAMPLE_COUNTS[kind] :][:4], "big")
                total += track
            if is_sound and is_raw:
                total, track = total - track, 0
    return total


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """The kinds of a file's boxes, in their order, and 16 bytes of each."""
    ends = [end]
    while ends:
        if start + 8 > ends[-1]:
            start = max(start, ends.pop())
            continue
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = int.from_bytes(file.read(8), "big"), 16
        stop = min(start + size, ends[-1]) if size >= header else ends[-1]
        yield kind, file.read(16)
        if kind in BOXES_OF_BOXES:
            ends.append(stop)
            stop = start + header
        start = stop
