"""Reads columns of parquet files.

The files are read one by one and only in the columns asked for, so that a refusal can name file,
split, column and type, and what nobody reads cannot be in the way. `datasets` would cast the
numbers of one file to another's texts, and refuse types that it does not know in any column.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.spec.command_line import Refusal

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 256
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Split:
    """The files of one split in order; they may differ in columns that nobody reads."""

    name: str
    files: Sequence[Path]

    def __len__(self) -> int:
        return sum(self._open(file).metadata.num_rows for file in self.files)

    def columns(self) -> list[str]:
        """Every file's columns, in the first one's order; those of the first file alone too."""
        return list(dict.fromkeys(name for schema in self._schemas() for name in schema.names))

    def holds(self, column: str, suits: Callable[[pa.DataType], bool]) -> bool:
        """Whether every file has the column, in a suitable type."""
        schemas = self._schemas()
        return all(column in s.names and suits(s.field(column).type) for s in schemas)

    def rows(
        self, columns: Sequence[str], suits: Callable[[pa.DataType], bool], expected: str
    ) -> Iterator[dict[str, Any]]:
        """Rows of these columns; Refusal, before the first, names the file that cannot give one."""
        for file, schema in zip(self.files, self._schemas(), strict=True):
            where = f"{file}, split {self.name}"
            for column in columns:
                if schema.names.count(column) != 1:
                    raise Refusal(
                        f"{where}: found the columns {', '.join(schema.names)}, "
                        f"expected one called {column}"
                    )
                dtype = schema.field(column).type
                if not suits(dtype):
                    raise Refusal(f"{where}, column {column}: found {dtype}, expected {expected}")
        return (row for file in self.files for row in self._rows(file, list(columns)))

    def texts(self, columns: Sequence[str]) -> Iterator[dict[str, str]]:
        """Rows of columns that hold text; a missing text is empty."""
        for row in self.rows(columns, is_text, "text"):
            yield {column: row[column] or "" for column in columns}

    def _schemas(self) -> list[pa.Schema]:
        return [self._open(file).schema_arrow for file in self.files]

    def _open(self, file: Path) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        with self._sound(file):
            return pq.ParquetFile(file)

    def _rows(self, file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
        with self._sound(file):
            for batch in self._open(file).iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()

    @contextlib.contextmanager
    def _sound(self, file: Path) -> Iterator[None]:
        """Refusal for a file that is not whole parquet; the disk's own errors pass through."""
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            with file.open("rb") as data:
                start = data.read(len(LFS_POINTER))
            problem = {b"": "an empty file", LFS_POINTER: "a Git LFS pointer"}.get(
                start, f"a damaged file ({' '.join(str(error).split())})"
            )
            raise Refusal(
                f"{file}, split {self.name}: found {problem}, expected parquet; fetch it again"
            ) from None


def is_text(dtype: pa.DataType) -> bool:
    """Whether a column of this type holds texts or nothing."""
    from pyarrow import types

    dtype = dtype.value_type if types.is_dictionary(dtype) else dtype
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(is_type(dtype) for is_type in texts)


def is_plain(dtype: pa.DataType) -> bool:
    """Whether JSON holds this type as it is: texts, numbers, lists and structs of them."""
    from pyarrow import types

    nested = (types.is_struct, types.is_list, types.is_large_list, types.is_fixed_size_list)
    if any(is_type(dtype) for is_type in nested):
        return all(is_plain(dtype.field(i).type) for i in range(dtype.num_fields))
    numbers = (types.is_boolean, types.is_integer, types.is_floating)
    return is_text(dtype) or any(is_type(dtype) for is_type in numbers)
