"""Arrays that grow on disk and end as ordinary .npy files, so that no dataset needs to fit in memory.

Owns the header trick: room for it is left at the start and filled in when the length is known. Called by
trainer.data.tokens.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

_HEADER_BYTES = 128  # a multiple of 64, as the format asks for


class GrowingArray:
    """A .npy file of `dtype` that is appended to; `width` columns, None for one dimension."""

    def __init__(self, path: Path, dtype: type[np.generic], width: int | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._width = width
        self._items = 0
        self._file = path.open("wb")
        self._file.write(b"\0" * _HEADER_BYTES)

    def append(self, values: list[int] | list[bool] | np.ndarray) -> None:
        """Add values, row after row where there are columns."""
        array = np.asarray(values, self._dtype)
        self._file.write(array.tobytes())
        self._items += array.size

    def finish(self) -> None:
        """Write the header (numpy's format 1.0) and put all on disk."""
        shape = f"({self._items},)" if self._width is None else f"({self._items // self._width}, {self._width})"
        text = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        room = _HEADER_BYTES - 10
        start = b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(start + text.encode().ljust(room - 1) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close the file as it is; harmless after `finish`."""
        self._file.close()
