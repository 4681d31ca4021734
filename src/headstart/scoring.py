"""Scoring: what a model says of many rows, from any kind of file into one table.

Goes in: a version of the registry, and files, folders, patterns, tables or lines. Comes out: a table of the
same rows in the same order, with label, probabilities and, of a row that cannot be read, what is wrong with
it. Never holds more than a few chunks of rows, never stops at a bad row, and never leaves half a file.
"""

from __future__ import annotations

import base64
import codecs
import csv
import fcntl
import glob
import io
import json
import math
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO

import numpy as np

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
from headstart.layout import room_for_file, unwritable_named
from headstart.models import ABSTAINED, Model, Version, arithmetic_here
from headstart.progress import bar

if TYPE_CHECKING:
    import pyarrow as pa

    from headstart.features import Images, Item
    from headstart.packs import Rows

STDIN = "-"
TABLES = tuple(sorted(TABLE_SUFFIXES))
OUTPUTS = (".csv", ".jsonl", ".parquet")
LOOSE = {"image": tuple(sorted(IMAGE_SUFFIXES)), "text": (".txt",)}  # files that are rows, or lines of them
COLUMNS = {"image": ("image", "path"), "text": ("text",)}  # that hold the items: the first that a table has
# Rows at a time: enough that texts of one length find each other, few enough that pictures fit in memory.
CHUNK = {"image": 256, "text": 4096}
BLOCK = 1 << 20  # characters of JSON lines that are parsed together, or more where one line has more
GIVEN = "given:"  # before the name of a column that has the name of an answer
EXACT = 2**53  # up to here a fraction, 64 bits long, holds every whole number
LONG = re.compile(r"(?<![\d.])\d{16,}(?![\d.eE])", re.ASCII)  # in JSON, a whole number that may be larger
SOMETHING = re.compile(r"\S")
Write = Callable[["pa.RecordBatch"], None]


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


@dataclass
class Scored:
    """What became of the rows; as text, one line."""

    rows: int = 0
    errors: int = 0  # rows that could not be read
    labels: Counter[str] = field(default_factory=Counter)  # of the others; "" where the model abstains
    seconds: float = 0.0

    def add(self, answers: pa.RecordBatch) -> None:
        """Count one chunk of answers."""
        labels, faults = answers.column("label").to_pylist(), answers.column("error").to_pylist()
        self.rows += len(labels)
        self.errors += sum(fault is not None for fault in faults)
        self.labels.update(label for label, fault in zip(labels, faults, strict=True) if fault is None)

    def __str__(self) -> str:
        named = [f"{count:,} {label or 'undecided'}" for label, count in self.labels.most_common(5)]
        failed = f"; {self.errors:,} failed, see the column error" if self.errors else "; none failed"
        return f"{self.rows:,} rows in {self.seconds:.1f} s: {', '.join(named) or 'no label'}{failed}"


def score(
    version: Version,
    inputs: Iterable[str],
    output: Path | None = None,
    column: str | None = None,
    chunk: int | None = None,
) -> Scored:
    """Ask a version about every row of the inputs, and write its answers.

    Memory: the model and a few chunks, whatever the number of rows; of loose images the names as well. A file
    takes the place of an earlier one when it is whole.

    Args:
        version: that ``models.load`` gave.
        inputs: files, folders, patterns such as ``photos/*.jpg``, or ``-`` for lines from standard input.
        output: a CSV, JSONL or Parquet file; without it CSV goes to standard output.
        column: of tables, what the model looks at; by default ``text``, or ``image`` or else ``path``.
        chunk: rows that are read, answered and written together.

    Raises:
        HeadstartError: nothing to read, or of another kind than the model reads; a column that is not there;
            a damaged table; tables of different columns; an output of an unknown kind, one that cannot be
            written or one that another run is writing.
    """
    from headstart import devices

    devices.keep_memory()
    start, model = time.monotonic(), version.model
    if output is not None and output.suffix.lower() not in OUTPUTS:
        raise HeadstartError(
            f"answers cannot be written as {output.suffix or 'a file without a suffix'}",
            where=str(output),
            do=f"take a name that ends in {_listed(OUTPUTS)}",
        )
    sources = opened(inputs, version.name, model.modality, column)
    schema = _schema(sources, model.classes)
    known = [source.rows for source in sources if source.rows is not None]
    total, done = sum(known) if len(known) == len(sources) else None, Scored()
    with (
        _written(output, schema) as write,
        bar(total=total, desc="predicting", unit=" rows") as progress,
    ):
        for answers in scored(version, sources, chunk or CHUNK[model.modality]):
            write(answers)
            done.add(answers)
            progress.update(answers.num_rows)
    done.seconds = time.monotonic() - start
    return done


def scored(version: Version, sources: Sequence[Source], chunk: int) -> Iterator[pa.RecordBatch]:
    """The rows of the sources with the version's answers, in order, at most ``chunk`` of them at a time.

    How many rows there are is not known beforehand. So a network is compiled after as many as would have
    repaid it, which never takes much more than twice as long as the better of the two.
    """
    from headstart.features import compile_from

    model, seen, pays = version.model, 0, compile_from(version.model.modality)
    allowed = model.extractor.options.compile is not False
    schema = _schema(sources, model.classes)
    for source in sources:
        for piece in source.chunks(chunk):
            if allowed and seen < pays <= seen + piece.rows.num_rows:
                model = _compiled(version)
            seen += piece.rows.num_rows
            yield _answered(model, source, piece, schema)


def _compiled(version: Version) -> Model:
    """The same model with a compiled network."""
    from headstart.features import Extractor

    plain = version.model.extractor
    arithmetic = arithmetic_here(version.folder / "artifacts" / "arithmetic.safetensors")
    return replace(
        version.model, extractor=Extractor(plain.weights, plain.options, arithmetic, compiled=True)
    )


def _answered(model: Model, source: Source, chunk: Chunk, schema: pa.Schema) -> pa.RecordBatch:
    """One chunk of rows with its answers."""
    import pyarrow as pa

    items, faults = items_of(source, chunk, model.modality)
    labels = [ABSTAINED] * chunk.rows.num_rows
    probabilities = np.full((chunk.rows.num_rows, len(model.classes)), np.nan)
    places = np.fromiter(items, np.int64, len(items))
    vectors, unread = vectors_of(model, list(items.values()))
    faults |= {int(places[row]): words for row, words in unread.items()}
    good = np.array([row not in unread for row in range(len(places))], bool)
    if good.any():
        said = model.answers(model.head.probabilities(vectors[good]))
        probabilities[places[good]] = said.probabilities
        for place, label in zip(places[good].tolist(), said.labels, strict=True):
            labels[place] = label
    return pa.RecordBatch.from_arrays(
        [
            *(chunk.rows.column(name) for name in source.kept.names),
            pa.array(labels, pa.string()),
            *(pa.array(column, pa.float64(), from_pandas=True) for column in probabilities.T),
            pa.array([faults.get(place) for place in range(len(labels))], pa.string()),
        ],
        schema=schema,
    )


def items_of(source: Source, chunk: Chunk, modality: str) -> tuple[dict[int, Item], dict[int, str]]:
    """What is to be looked at, and what is wrong with rows that have none; each by position in the chunk."""
    faults = dict(chunk.faults)
    items: dict[int, Item] = {}
    for place, value in enumerate(chunk.items or chunk.rows.column(source.item).to_pylist()):
        if place in faults:
            continue
        if not value or (isinstance(value, str) and not value.strip()):
            faults[place] = f"there is no {source.item}"
        elif modality == "image" and isinstance(value, str):
            items[place] = source.folder / value
        else:
            items[place] = value
    return items, faults


def vectors_of(model: Model, items: list[Item]) -> tuple[Any, dict[int, str]]:
    """Vectors of the items, float32 [items, dim], and what is wrong with those that cannot be read."""
    if not items:
        return np.empty((0, model.extractor.dim), np.float32), {}
    reader = model.extractor.reader(items)
    if model.modality == "text":
        return model.extractor.read(reader), {}
    tolerant = _Tolerant(reader)  # type: ignore[arg-type]  # it is one of images
    return model.extractor.read(tolerant), tolerant.faults


class _Tolerant:
    """A reader of images to which one that cannot be read is black, and its fault is noted."""

    def __init__(self, images: Images) -> None:
        self.images, self.batches, self.smallest = images, images.batches, images.smallest
        self.faults: dict[int, str] = {}

    def read(self, rows: Rows) -> tuple[Any, ...]:
        """Pixels of one batch."""
        try:
            return self.images.read(rows)
        except HeadstartError as error:
            if len(rows) == 1:
                self.faults[int(rows[0])] = ": ".join([error.what, *error.table])
                return (np.zeros((1, self.images.side, self.images.side, 3), np.uint8),)
        return (np.concatenate([self.read(rows[place : place + 1])[0] for place in range(len(rows))]),)


def _schema(sources: Sequence[Source], classes: Sequence[str]) -> pa.Schema:
    """Columns of the answers: those of the sources, which must have the same, then the model's."""
    import pyarrow as pa

    first = sources[0]
    for other in sources[1:]:
        if not other.kept.equals(first.kept):
            raise HeadstartError(
                "the inputs have different columns",
                where=f"{first.where} and {other.where}",
                table=[", ".join(f"{each.name} ({each.type})" for each in s.kept) for s in (first, other)],
                do="predict them one by one",
            )
    answers = ["label", *(f"p:{name}" for name in classes), "error"]
    taken = {*answers, *first.kept.names}
    names = []
    for name in first.kept.names:
        new = name
        while new in answers or (new != name and new in taken):
            new = GIVEN + new
        taken.add(new)
        names.append(new)
    types = [*first.kept.types, pa.string(), *[pa.float64()] * len(classes), pa.string()]
    return pa.schema(list(zip([*names, *answers], types, strict=True)))


# Inputs


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


# Outputs


@contextmanager
def _written(output: Path | None, schema: pa.Schema) -> Iterator[Write]:
    """Takes batches; the file is there when all of them are in it."""
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
