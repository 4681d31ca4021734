"""Answers: a table of what a model said, as CSV, JSONL or Parquet.

Goes in: batches of rows. Comes out: a file that is whole or is not there, or lines on standard output as soon
as they are known. Never replaces a file with half of one, nor one that another run is writing.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from headstart.errors import HeadstartError
from headstart.layout import room_for_file, unwritable_named

if TYPE_CHECKING:
    import pyarrow as pa

OUTPUTS = (".csv", ".jsonl", ".parquet")
Write = Callable[["pa.RecordBatch"], None]


def check_output(output: Path) -> None:
    """Raise HeadstartError unless the file's name says how answers are to be written."""
    if output.suffix.lower() not in OUTPUTS:
        raise HeadstartError(
            f"answers cannot be written as {output.suffix or 'a file without a suffix'}",
            where=str(output),
            do=f"take a name that ends in {', '.join(OUTPUTS[:-1])} or {OUTPUTS[-1]}",
        )


@contextmanager
def written(output: Path | None, schema: pa.Schema) -> Iterator[Write]:
    """Takes batches; the file is there when all of them are in it.

    Args:
        output: of a name that ``check_output`` takes; without it CSV goes to standard output.
        schema: of every batch.

    Raises:
        HeadstartError: the file cannot be written, another run is writing it, or Parquet has no such columns.
    """
    if output is None:
        yield _csv_lines(sys.stdout, schema)
        return
    with unwritable_named(output), _partial(output) as partial:
        if output.suffix.lower() == ".parquet":
            with _parquet_writer(partial, schema) as parquet:
                yield parquet.write_batch
        else:
            with partial.open("w", encoding="utf-8", newline="") as file:
                comma_separated = output.suffix.lower() == ".csv"
                yield _csv_lines(file, schema) if comma_separated else _objects(file)


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A hidden file of this run alone that takes the output's place on success.

    Raises:
        HeadstartError: there can be no such file, or another run is writing it.
    """
    room_for_file(output)
    partial = output.with_name(f".{output.name}.partial")
    with _locked(partial, output):
        try:
            yield partial
            partial.replace(output)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    """Hold the partial file, which is made if need be, against other runs; a killed run holds nothing."""
    while True:
        with partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HeadstartError(
                    "another run is writing this file",
                    where=str(output),
                    do="wait until it is done, or name another output",
                ) from None
            except OSError:  # a file system without locks
                held = True
            else:
                held = _is_open_at(partial, file)
            if held:
                yield
                return


def _is_open_at(path: Path, file: BinaryIO) -> bool:
    """Whether the file is still there: who held it before may have moved or removed it meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _parquet_writer(path: Path, schema: pa.Schema) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetWriter(path, schema)
    except pa.ArrowNotImplementedError as error:
        raise HeadstartError(
            "Parquet cannot hold these columns", table=str(error).splitlines()[:3], do="write CSV or JSONL"
        ) from error


class _LineEnds:
    r"""Rows of a CSV that end in \n: a writer told so itself would leave a lone \r in a cell unquoted."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, row: str) -> None:
        self.file.write(row.removesuffix("\r\n") + "\n")


def _csv_lines(file: Any, schema: pa.Schema) -> Write:
    lines = csv.writer(_LineEnds(file), lineterminator="\r\n")
    lines.writerow(schema.names)

    def write(batch: pa.RecordBatch) -> None:
        lines.writerows(zip(*(column.to_pylist() for column in batch.columns), strict=True))
        file.flush()  # whoever reads on gets what is known so far

    return write


def _objects(file: Any) -> Write:
    def write(batch: pa.RecordBatch) -> None:
        for row in batch.to_pylist():
            line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=_worded)
            file.write(line + "\n")
        file.flush()

    return write


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not know, however deep they lie."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _worded(value: object) -> str:
    """What JSON has no form for, as a text; bytes in base64, as a served model takes them."""
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)
