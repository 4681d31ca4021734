"""Inputs: the rows that a model is to look at, from files, folders, patterns, tables or lines.

Goes in: what a person names on a command line. Comes out: sources, each of which gives its rows in chunks,
all columns kept, and what is wrong with single rows. Never holds a whole table, and never opens a picture.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from headstart import mojibake
from headstart.adapters import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    a_row_a_line,
    refuse_depth,
    separator,
    unquoted,
)
from headstart.errors import HeadstartError

if TYPE_CHECKING:
    import pyarrow as pa

STDIN = "-"
TABLES = tuple(sorted(TABLE_SUFFIXES))
LOOSE = {"image": tuple(sorted(IMAGE_SUFFIXES)), "text": (".txt",)}  # files that are rows, or lines of them
COLUMNS = {"image": ("image", "path"), "text": ("text",)}  # that hold the items: the first that a table has
BLOCK = 1 << 20  # characters of JSON lines that are parsed together, or more where one line has more
EXACT = 2**53  # up to here a fraction, 64 bits long, holds every whole number
LONG = re.compile(r"(?<![\d.])\d{16,}(?![\d.eE])", re.ASCII)  # in JSON, a whole number that may be larger
SOMETHING = re.compile(r"\S")


class Chunk(NamedTuple):
    """Some rows of a source."""

    rows: pa.RecordBatch
    faults: dict[int, str] = {}  # noqa: RUF012  # never written to; of rows that are damaged, by position
    items: list[str] | None = None  # if the rows cannot hold them: a file may have a name that is not UTF-8


@dataclass(frozen=True)
class Source:
    """Rows from one place."""

    where: str
    schema: pa.Schema
    item: str  # the column of what the model is to look at
    chunks: Callable[[int], Iterator[Chunk]]  # of at most so many rows
    rows: int | None = None  # if that is known
    folder: Path = Path()  # that paths are relative to

    @property
    def kept(self) -> pa.Schema:
        """Columns that go through to the output: all but the bytes of images."""
        place = self.schema.get_field_index(self.item)
        return self.schema.remove(place) if _is_bytes(self.schema.field(place).type) else self.schema


def opened(inputs: Iterable[str], name: str, modality: str, column: str | None = None) -> list[Source]:
    """The sources that inputs stand for, in their order; loose images that follow each other are one.

    Args:
        inputs: as of ``score``.
        name: of the model, for what it has to say.
        modality: ``image`` or ``text``.
        column: of tables, what the model looks at.

    Raises:
        HeadstartError: as of ``score``.
    """
    found: list[Source] = []
    files = (file for given in inputs for file in _matching(given, name, modality))
    for loose, run in groupby(files, key=lambda file: Path(file).suffix.lower() in LOOSE["image"]):
        if loose:
            found.append(_loose(list(run)))
        else:
            found += [_opened(file, modality, column) for file in run]
    if not found:
        raise HeadstartError("there is nothing to predict", do="name files, folders, or - for standard input")
    return found


def _opened(file: str, modality: str, column: str | None) -> Source:
    if file == STDIN or file.lower().endswith(".txt"):
        return _lines(file, modality)
    return _table(Path(file), modality, column)


def _matching(given: str, name: str, modality: str) -> Iterator[str]:
    """Files that one input stands for: itself, what is in the folder, or what matches the pattern."""
    readable = (*LOOSE[modality], *TABLES)
    if given == STDIN:
        yield given
        return
    with _named(given, "the input"):
        matches = [given] if Path(given).exists() else sorted(glob.glob(given, recursive=True))  # noqa: PTH207
    seen: set[str] = set()  # `photos/**` matches the folders as well as what is in them
    for match in matches:
        if Path(match).is_dir():
            # Of a folder of images a table in it tells something else, such as their labels.
            files: Iterable[str] = _inside(Path(match), LOOSE[modality] if modality == "image" else readable)
        elif Path(match).suffix.lower() in readable:
            files = [match]
        else:
            other = Path(match).suffix.lower() in LOOSE["text" if modality == "image" else "image"]
            raise HeadstartError(
                f"{name} reads {modality}s" + (", not what is in this file" if other else ""),
                where=match,
                do=f"give it files that end in {_listed(readable)}",
            )
        for file in files:
            if (path := str(Path(file))) not in seen:
                seen.add(path)
                yield file
    if not seen:
        raise HeadstartError(
            f"no {modality}s are found here" if matches else "no file matches",
            where=given,
            do=f"{name} reads files that end in {_listed(readable)}",
        )


def _inside(
    folder: Path, suffixes: Sequence[str], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Files of these kinds in a folder and the folders in it, hidden ones aside, in order.

    Links are followed, but not to a folder ``above``, which would never end.
    """
    with _named(str(folder), "the folder"):
        found = folder.stat()
        here = (found.st_dev, found.st_ino)
        if here in above:
            return
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from _inside(path, suffixes, above | {here})
            elif path.suffix.lower() in suffixes:
                yield str(path)


def _loose(files: list[str]) -> Source:
    """Images, a row each."""
    return _listing("path", files, f"{len(files):,} images", len(files))


def _lines(file: str, modality: str) -> Source:
    """A row for each line of a file or of standard input: a text, or the path of an image."""
    where = "standard input" if file == STDIN else file
    # A file is found by the bytes of its name alone, so those of a path stay what they are.
    read: Callable[[str], str] = mojibake.windows if modality == "text" else str

    def lines() -> Iterator[str]:
        with (
            _named(where, "the lines"),
            _text(sys.stdin.fileno() if file == STDIN else file, newline=None) as text,
        ):
            yield from (read(line.rstrip("\n")) for line in text)

    return _listing(COLUMNS[modality][-1], _Again(lines), where)


@dataclass(frozen=True)
class _Again:
    """What can be walked over anew."""

    start: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.start()


def _listing(column: str, values: Iterable[str], where: str, rows: int | None = None) -> Source:
    import pyarrow as pa

    schema = pa.schema([(column, pa.string())])

    def chunks(size: int) -> Iterator[Chunk]:
        rest = iter(values)
        while some := list(islice(rest, size)):
            shown = pa.array(map(mojibake.escaped, some), pa.string())
            yield Chunk(pa.RecordBatch.from_arrays([shown], schema=schema), items=some)

    return Source(where, schema, column, chunks, rows)


def _table(path: Path, modality: str, column: str | None) -> Source:
    """The rows of a table; of a CSV all columns are strings, so that 007 stays what it is."""
    import pyarrow as pa

    wanted = COLUMNS[modality] if column is None else (column,)
    with _named(str(path)):
        if path.suffix.lower() == ".parquet":
            schema, read, rows = _parquet(path)
        elif path.suffix.lower() == ".jsonl":
            schema, read, rows = _json_lines(path)
        else:
            schema, read, rows = _separated(path, wanted)
    given, names = schema.names, _told_apart(schema.names)
    schema = pa.schema([field.with_name(name) for field, name in zip(schema, names, strict=True)])
    item = next((name for name in wanted if name in names), None)
    if item is None:
        raise HeadstartError(
            f"the table has no column {' or '.join(wanted)}",
            where=str(path),
            table=[f"its columns are {', '.join(names):.300}"],
            do="name the one to look at with --column",
        )
    if given.count(item) > 1:
        raise HeadstartError(
            f"the table has several columns {item}", where=str(path), do="give each a name of its own"
        )
    kind = schema.field(item).type
    if not (_is_text(kind) or pa.types.is_null(kind) or (modality == "image" and _is_bytes(kind))):
        raise HeadstartError(
            f"the column {item} holds {kind}, not {'texts' if modality == 'text' else 'images or paths'}",
            where=str(path),
            do="name another with --column",
        )

    def chunks(size: int) -> Iterator[Chunk]:
        with _named(str(path)):
            for chunk in read(size):
                yield chunk._replace(rows=chunk.rows.rename_columns(names))

    return Source(str(path), schema, item, chunks, rows, path.parent)


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names of columns, with its place in one that is empty or was there before: spreadsheets have such."""
    apart: dict[str, None] = {}
    for place, name in enumerate(names, 1):
        new = name
        while not new or new in apart or (new != name and new in names):
            new = f"{new or 'column'} {place}"
        apart[new] = None
    return list(apart)


@contextmanager
def _named(where: str, what: str = "the table") -> Iterator[None]:
    """Turn what is wrong with an input into words."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, csv.Error, ValueError, OSError) as error:
        raise HeadstartError(
            f"{what} cannot be read", where=where, table=str(error).splitlines()[:3], do=f"mend {what}"
        ) from error


Opened = tuple["pa.Schema", Callable[[int], Iterator[Chunk]], "int | None"]


def _text(file_or_pipe: Path | str | int, newline: str | None = "") -> TextIO:
    """A text, decoded as the adapter ``table`` does it: stray bytes become lone surrogates."""
    file = open(file_or_pipe, mode="rb")  # noqa: PTH123, SIM115  # closed with the text
    marked = file.peek(2)[:2] in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}  # a pipe has no way back
    encoding = "utf-16" if marked else "utf-8-sig"
    return io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=newline)


def _separated(path: Path, wanted: Sequence[str]) -> Opened:
    """A CSV or TSV file, whose cells are told apart as the adapter ``table`` does it."""
    import pyarrow as pa

    csv.field_size_limit(sys.maxsize)  # a field may be a whole book
    with _text(path) as file:
        header = file.readline().rstrip("\r\n")
    found = [separator(path, header, {name}) for name in wanted]
    between = next((each for each in found if each != ","), ",")
    quoting: Any = csv.QUOTE_MINIMAL
    by_line = False
    if between == "\t":
        with _text(path) as file:
            by_line = a_row_a_line(file)
    if by_line:
        quoting = csv.QUOTE_NONE
    elif between == "\t":
        with _text(path) as file:
            try:
                deque(csv.reader(file, delimiter=between, strict=True), maxlen=0)
            except csv.Error:  # quotation marks that only quote: the file knows no quoting
                quoting = csv.QUOTE_NONE

    def cells(file: TextIO) -> Iterator[list[str]]:
        strict = quoting != csv.QUOTE_NONE  # a mark that nothing closes would swallow the rows after it
        rows = csv.reader(map(mojibake.windows, file), delimiter=between, quoting=quoting, strict=strict)
        return map(unquoted, rows) if by_line else rows

    with _text(path) as file:
        names = [name.strip() for name in next(cells(file), [])]
    schema = pa.schema([(name, pa.string()) for name in names])

    def read(size: int) -> Iterator[Chunk]:
        with _text(path) as file:
            lines = filter(None, cells(file))
            next(lines, None)
            while some := list(islice(lines, size)):
                faults = {
                    place: f"the row has {len(line)} cells, the table {len(names)} columns"
                    for place, line in enumerate(some)
                    if len(line) != len(names)
                }
                columns = [[line[i] if i < len(line) else None for line in some] for i in range(len(names))]
                arrays = [pa.array(values, pa.string()) for values in columns]
                yield Chunk(pa.RecordBatch.from_arrays(arrays, schema=schema), faults)

    return schema, read, None


def _json_lines(path: Path) -> Opened:
    """A JSONL file, which is read twice: what a column holds may show in its last line alone."""
    import pyarrow as pa
    import pyarrow.json

    def blocks() -> Iterator[str]:
        with _text(path) as file:
            while lines := file.readlines(BLOCK):  # whole lines, which pyarrow's own blocks are not
                block = mojibake.windows("".join(lines))
                if block.strip():
                    yield block

    def parsed(text: str, schema: pa.Schema | None = None) -> pa.Table:
        block = text.encode()
        reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block))
        parsing = pyarrow.json.ParseOptions(explicit_schema=schema)
        return pyarrow.json.read_json(pa.BufferReader(block), reading, parsing)

    schema, rows, long = pa.schema([]), 0, False
    for block in blocks():
        try:
            refuse_depth(block)
        except ValueError:
            for line in block.splitlines():  # what is wrong may be a quotation mark, from which on all is
                refuse_depth(line)
                json.loads(line)
            raise
        table = parsed(block)
        fields = [field.with_type(_as_written(field.type)) for field in table.schema]
        schema = pa.unify_schemas([schema, pa.schema(fields)], promote_options="permissive")
        rows += table.num_rows
        long = long or LONG.search(block) is not None
    rounded = pa.struct(schema)
    exact = _exact(rounded, blocks()) if long else rounded
    schema = pa.schema(exact.fields)

    def read(size: int) -> Iterator[Chunk]:
        for block in blocks():
            text = block if exact == rounded else _with_texts(block, exact)
            yield from map(Chunk, parsed(text, schema).to_batches(size))

    return schema, read, rows


def _exact(kind: pa.DataType, blocks: Iterable[str]) -> pa.DataType:
    """The type of the objects with texts in place of fractions that would round a whole number."""
    for block in filter(LONG.search, blocks):
        for value in _objects_in(block, parse_int=float, parse_float=_no_number, parse_constant=_no_number):
            kind = _holding(kind, value)
    return kind


def _no_number(written: str) -> None:
    """What a fraction is to who looks for whole numbers."""


def _objects_in(block: str, **numbers: Any) -> Iterator[Any]:
    """Objects of JSON that follow each other, their numbers parsed in these ways."""
    decoder, place = json.JSONDecoder(**numbers), 0
    while start := SOMETHING.search(block, place):
        value, place = decoder.raw_decode(block, start.start())
        yield value


def _holding(kind: pa.DataType, value: Any) -> pa.DataType:
    """The type, of texts where it is one of fractions and the value too large for them."""
    import pyarrow as pa

    if pa.types.is_floating(kind) and isinstance(value, float) and abs(value) >= EXACT:
        return pa.string()
    if pa.types.is_struct(kind) and value:
        return pa.struct([field.with_type(_holding(field.type, value.get(field.name))) for field in kind])
    if pa.types.is_list(kind):
        for each in value or []:
            kind = pa.list_(_holding(kind.value_type, each))
    return kind


def _with_texts(block: str, kind: pa.DataType) -> str:
    """Lines of JSON in which the numbers that are to be texts stand in quotation marks."""
    both = zip(_objects_in(block), _objects_in(block, parse_int=str, parse_float=str), strict=True)
    return "\n".join(json.dumps(_chosen(kind, value, written)) for value, written in both)


def _chosen(kind: pa.DataType, value: Any, written: Any) -> Any:
    """The value, or where the type is of texts how it is written."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and value:
        return {name: _chosen(kind.field(name).type, value[name], written[name]) for name in value}
    if pa.types.is_list(kind) and value:
        return [_chosen(kind.value_type, *each) for each in zip(value, written, strict=True)]
    return written if pa.types.is_string(kind) else value


def _as_written(kind: pa.DataType) -> pa.DataType:
    """A type of JSON in which what looks like a time is a text: another block may have words there."""
    import pyarrow as pa

    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_written(field.type)) for field in kind.fields])
    return pa.list_(_as_written(kind.value_type)) if pa.types.is_list(kind) else kind


def _parquet(path: Path) -> Opened:
    import pyarrow.parquet

    def begun() -> Any:
        # Page by page: a row group may hold the whole table.
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)

    def read(size: int) -> Iterator[Chunk]:
        with begun() as file:
            yield from map(_sound, file.iter_batches(size))

    with begun() as file:
        return file.schema_arrow, read, file.metadata.num_rows


def _sound(rows: pa.RecordBatch) -> Chunk:
    """The rows without texts that are not UTF-8, each of which is a fault of its row."""
    import pyarrow as pa

    faults: dict[int, str] = {}
    for column, name in enumerate(rows.schema.names):
        try:
            rows.column(column).validate(full=True)
        except pa.ArrowInvalid:
            places: list[int | None] = list(range(rows.num_rows))
            for place, value in enumerate(rows.column(column)):
                try:
                    value.as_py()
                except UnicodeDecodeError:
                    places[place] = None
                    faults[place] = f"the text in {name} is not UTF-8"
            kept = rows.column(column).take(pa.array(places, pa.int64()))
            rows = rows.set_column(column, rows.schema.field(column).with_nullable(True), kept)
    return Chunk(rows, faults)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _listed(suffixes: Sequence[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
