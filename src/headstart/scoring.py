"""Scoring: what a model says of many rows, from any kind of file into one table.

Goes in: a version of the registry, and what ``inputs`` can open. Comes out: a table of the same rows in the
same order, with label, probabilities and, of a row that cannot be read, what is wrong with it. Never holds
more than a few chunks of rows, and never stops at a bad row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.answers import check_output, written
from headstart.errors import HeadstartError
from headstart.inputs import Chunk, Source, opened
from headstart.models import ABSTAINED, Model, Version, arithmetic_here
from headstart.progress import bar

if TYPE_CHECKING:
    import pyarrow as pa

    from headstart.features import Images, Item
    from headstart.packs import Rows

# Rows at a time: enough that texts of one length find each other, few enough that pictures fit in memory.
CHUNK = {"image": 256, "text": 4096}
GIVEN = "given:"  # before the name of a column that has the name of an answer


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
    if output is not None:
        check_output(output)
    sources = opened(inputs, version.name, model.modality, column)
    schema = _schema(sources, model.classes)
    known = [source.rows for source in sources if source.rows is not None]
    total, done = sum(known) if len(known) == len(sources) else None, Scored()
    with (
        written(output, schema) as write,
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
