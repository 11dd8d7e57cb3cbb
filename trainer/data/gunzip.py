"""A gzip archive read as a stream, with an end to what it may unpack to: in all, and for each byte that it has.

Standard library only. What is wrong comes as a Fault out of `read`, so that it stands where the rows end.
"""

from __future__ import annotations

import io
import zlib
from typing import Any, BinaryIO

from trainer.data.problems import Fault

MAX_UNPACKED_BYTES = 64 * 1024**3
MAX_RATIO = 250
"""Text packs 3 to 30 times; rows that all say the same a little over 200 times."""
RATIO_FROM_BYTES = 64 * 1024**2
_CHUNK_BYTES = 64 * 1024


class Gunzip(io.RawIOBase):
    """What a gzip archive holds, several members one after the other included; wrap it in a BufferedReader."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._member: Any = zlib.decompressobj(31)
        self._waiting = b""
        self._fault: Fault | None = None
        self._packed = 0
        self._unpacked = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; raises Fault for a damaged archive and for one that unpacks to too much."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            try:
                part = self._unpack(len(view) - filled)
            except Fault:
                if not filled:
                    raise
                break  # what came before is given first; the next call meets the fault again
            if not part:
                break
            view[filled : filled + len(part)] = part
            filled += len(part)
        return filled

    def _unpack(self, size: int) -> bytes:
        if self._fault is not None:
            raise self._fault
        try:
            return self._next(size)
        except Fault as fault:
            self._fault = fault
            raise

    def _next(self, size: int) -> bytes:
        while True:
            if self._member.eof:
                self._waiting = self._member.unused_data or self._file.read(_CHUNK_BYTES)
                if not self._waiting.strip(b"\x00"):  # padding, as some tools leave it
                    return b""
                self._member = zlib.decompressobj(31)
            elif not self._waiting:
                self._waiting = self._file.read(_CHUNK_BYTES)
                if not self._waiting:
                    raise Fault("damaged", "the gzip archive ends before its end; rows are missing")
                self._packed += len(self._waiting)
            try:
                part = self._member.decompress(self._waiting, size)
            except zlib.error:
                raise Fault("damaged", "the gzip archive is damaged here; what follows cannot be read") from None
            self._waiting = self._member.unconsumed_tail
            self._unpacked += len(part)
            self._refuse_a_bomb()
            if part:
                return part

    def _refuse_a_bomb(self) -> None:
        if self._unpacked > MAX_UNPACKED_BYTES:
            raise Fault("too_large", f"the archive unpacks to more than {MAX_UNPACKED_BYTES // 1024**3} GiB")
        if self._unpacked > RATIO_FROM_BYTES and self._unpacked > MAX_RATIO * max(self._packed, 1):
            told = f"the archive unpacks to more than {MAX_RATIO} times its size, as no text does"
            raise Fault("too_large", told)
