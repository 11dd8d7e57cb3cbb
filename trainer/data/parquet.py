"""Parquet files: rows in small batches, only the columns that can matter, and nothing that declares more than it may.

pyarrow is imported here alone. Sizes are checked where the file declares them, before anything is unpacked; what lies
about its size meets the worker's memory limit, and that too ends in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from trainer.data.problems import Fault, printable

if TYPE_CHECKING:
    import pyarrow as pa

Record = tuple[int, bytes | dict[str, Any], Fault | None]

MAX_COLUMNS = 2000
MAX_FOOTER_BYTES = 64 * 1024**2
MAX_GROUP_BYTES = 8 * 1024**3
MAX_RATIO = 5000
BATCH_ROWS = 64
# a page's own limit in arrow is 2 GiB; a row group whose pages unpack to this much in one batch is no set of texts
MAX_BATCH_BYTES = 1024**3
_MAGIC = b"PAR1"


class Rows:
    """The rows of a Parquet file, numbered from 1. Raises Fault where the file cannot be used at all.

    `limit` bounds the text of one row in bytes; `wanted` are columns that are read where the file has them, all columns
    of texts and lists where it has none of them.
    """

    def __init__(self, file: BinaryIO, limit: int, wanted: Sequence[str]) -> None:
        self._limit = limit
        self._file = _opened(file)
        metadata = self._file.metadata
        self.rows = metadata.num_rows
        schema = self._file.schema_arrow
        self.columns = list(schema.names)
        known = [name for name in self.columns if name in wanted]
        self.read = known or [field.name for field in schema if _may_hold_text(field.type)]
        for number in range(metadata.num_row_groups):
            _check_group(number, metadata.row_group(number))

    def __iter__(self) -> Iterator[Record]:
        return self.from_row(0)

    def from_row(self, start: int) -> Iterator[Record]:
        """The rows from number `start` (from 0) on; row groups before it are not unpacked."""
        import pyarrow as pa

        metadata = self._file.metadata
        groups: list[int] = []
        first = 0
        for number in range(metadata.num_row_groups):
            size = metadata.row_group(number).num_rows
            if first + size <= start and not groups:
                first += size
            else:
                groups.append(number)
        row = first
        try:
            if groups and self.read:
                batches = self._file.iter_batches(BATCH_ROWS, groups, columns=self.read, use_threads=False)
            else:
                batches = iter(())
            for batch in batches:
                if batch.nbytes > MAX_BATCH_BYTES:
                    raise Fault("too_large", f"{batch.num_rows} rows unpack to {batch.nbytes / 1024**3:.1f} GiB")
                for at in range(max(0, start - row), batch.num_rows):
                    yield row + at + 1, *self._row(batch, at)
                row += batch.num_rows
        except MemoryError:
            yield row + 1, b"", Fault("too_large", "the rows from here on unpack to more memory than there may be used")
            return
        except Fault as fault:
            yield row + 1, b"", fault
            return
        except (pa.ArrowException, OSError, ValueError) as error:
            yield row + 1, b"", Fault("damaged", f"the Parquet file cannot be read from here on ({_first_line(error)})")
            return
        for missing in range(max(row, start), self.rows) if not self.read else ():
            yield missing + 1, {}, None

    def _row(self, batch: pa.RecordBatch, at: int) -> tuple[bytes | dict[str, Any], Fault | None]:
        try:
            row = {
                name: self._value(column[at]) for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
        except Fault as fault:
            return b"", fault
        except UnicodeDecodeError as error:
            return b"", Fault("not_utf8", f"byte {error.start + 1:,} of a text is not UTF-8")
        if _characters(row) > self._limit:
            return b"", self._too_long()
        return row, None

    def _value(self, scalar: Any) -> Any:
        """A cell as Python; a text that is too long is not even copied: a million rows may show one of 1 GiB. Raises Fault."""
        import pyarrow as pa

        inner = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        if isinstance(inner, pa.StringScalar | pa.BinaryScalar):
            held = inner.as_buffer()
            if held is not None and held.size > self._limit:
                raise self._too_long()
        return inner.as_py() if inner is not None else None

    def _too_long(self) -> Fault:
        return Fault("line_too_long", f"the row is longer than {self._limit // 1024**2} MiB")


def _opened(file: BinaryIO) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    end = file.read(8)
    footer = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC or footer > size:
        raise Fault("damaged", "the file begins as Parquet and does not end as such; a part is missing")
    if footer > MAX_FOOTER_BYTES:
        raise Fault("too_large", f"the Parquet file's own description has {footer / 1024**2:,.0f} MiB")
    file.seek(0)
    try:
        plain = pq.ParquetFile(file)
        schema = plain.schema_arrow
        if len(schema.names) > MAX_COLUMNS:
            raise Fault("too_large", f"the Parquet file has {len(schema.names):,} columns; {MAX_COLUMNS:,} are allowed")
        twice = len(set(schema.names)) < len(schema.names)
        if twice:
            raise Fault("columns", "the Parquet file has two columns of one name")
        # texts that repeat stay one text and numbers to it: a value of 8 MiB in a million rows must not be written out
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        return pq.ParquetFile(file, read_dictionary=texts, metadata=plain.metadata)
    except MemoryError:
        raise Fault(
            "too_large", "the Parquet file's own description needs more memory than there may be used"
        ) from None
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise Fault("damaged", f"the Parquet file cannot be read ({_first_line(error)})") from None


def _check_group(number: int, group: Any) -> None:
    """Raise Fault for a row group that declares too much: in all, or for the bytes that it takes in the file."""
    if group.total_byte_size > MAX_GROUP_BYTES:
        raise Fault("too_large", f"row group {number + 1} unpacks to {group.total_byte_size / 1024**3:,.1f} GiB")
    packed = sum(max(0, group.column(at).total_compressed_size) for at in range(group.num_columns))
    if group.total_byte_size > 1024**3 and group.total_byte_size > MAX_RATIO * max(packed, 1):
        ratio = group.total_byte_size // max(packed, 1)
        raise Fault("too_large", f"row group {number + 1} unpacks to {ratio:,} times its size")


def _may_hold_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    return (
        types.is_string(kind) or types.is_large_string(kind) or types.is_list(kind) or types.is_large_list(kind)
        or types.is_dictionary(kind) or types.is_struct(kind)
    )  # fmt: skip


def _characters(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 120).rstrip(".")
