"""Adapters: from a folder of raw files to a frame of rows.

Goes in: ``data/<recipe>/`` and the recipe's ``validate`` block. Comes out: a frame with ``path`` or
``text``, and ``label``; optionally ``id``, ``domain``, ``group``, ``split``, ``confidence``, ``weight``,
``left_out`` (why a row is not used), ``original`` (a text before its encoding was mended) and ``place``
(where to find a row that has no name of its own). Decides nothing about fitness: that is validation's.
Hidden files are passed over.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import importlib
import io
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headstart import mojibake
from headstart.errors import HeadstartError
from headstart.layout import leads_out
from headstart.recipe import Validate

Adapter = Callable[[Path, Validate], pd.DataFrame]
Columns = dict[str, list[Any]]

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# Kinds of pictures that are not read: a class of these alone would vanish.
UNREAD_SUFFIXES = {".dcm", ".exr", ".heic", ".heif", ".jp2", ".jxl", ".pgm", ".pnm", ".ppm", ".psd", ".tga"}
UNREAD_SUFFIXES |= {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}  # what cameras call raw
NO_LABEL = "no label"  # why a row is left out; rows of a target domain need none
NEUTRAL = "neutral: |mean rating| <= 0.5"
NO_CLASS = "not an image in a class folder"
UNREAD = "a file of a kind that is not read"
TABLE_SUFFIXES = {".csv", ".tsv", ".parquet", ".jsonl"}
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
BATCHES = ".batches"  # in the source's folder, one for each batch that came after it
MAX_DEPTH = 100  # of JSON
UNMARKED = bytes(set(range(256)) - set(b'[]{}"'))  # what says nothing of how deep JSON is
QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a cell that means what is inside, where two marks are one
# Adapters whose groups are places in a list, and mean nothing outside of it.
GROUPS_BY_POSITION = {"elpv"}
# A module of 60, 72, 54, 50 or 48 cells: the formats that occur in the ELPV data set.
MODULE_CELLS, WHOLE_RUNS = 60, {72, 54, 50, 48}


def read(raw: Path, options: Validate) -> pd.DataFrame:
    """Rows of a raw folder, by the adapter that the recipe names.

    Raises:
        HeadstartError: the folder is missing, the adapter is unknown or cannot be imported, the files are
            not what the adapter expects, or a row's path leads out of the folder.
    """
    if not raw.is_dir():
        do = "run `headstart ingest RECIPE` first"
        raise HeadstartError("there are no raw data", where=str(raw), do=do)
    frame = _find(options.adapter)(raw, options)
    if not isinstance(frame, pd.DataFrame) or frame.empty:
        raise HeadstartError(
            "the raw data hold no rows",
            where=str(raw),
            do=f"check that the files suit the adapter {options.adapter!r}",
        )
    if "label" not in frame or ("text" in frame) == ("path" in frame):
        raise HeadstartError(
            f"the adapter {options.adapter!r} gives the columns {', '.join(map(str, frame.columns))}",
            where="validate.adapter",
            do="give `label` and either `text` or `path`",
        )
    if "path" in frame and (outside := sorted({path for path in map(str, frame["path"]) if leads_out(path)})):
        raise HeadstartError(
            f"{len(outside)} paths of pictures lead out of the data",
            where=str(raw),
            table=outside[:20],
            do="give each as a path inside of the folder, without `..`",
        )
    return frame.reset_index(drop=True)


def _find(name: str) -> Adapter:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise HeadstartError(
            f"there is no adapter {name!r}",
            where="validate.adapter",
            do=f"did you mean {near[0]!r}?" if near else f"take {', '.join(BUILT_IN)} or `module:function`",
        )
    module, function = name.split(":", 1)
    try:
        adapter: Adapter = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise HeadstartError(
            f"the adapter {name!r} cannot be imported: {error}",
            where="validate.adapter",
            do="put the module in the project's root, or install it",
        ) from error
    return adapter


def image_folder(raw: Path, options: Validate) -> pd.DataFrame:
    """Images in one folder per class, with or without train, val and test folders on top.

    Images beside the class folders have no label. Wrapper folders are looked through, but for one that is a
    known class; a split's name on one counts for all that is inside. A folder called ``train`` that holds
    pictures, not folders, is a class like any other, unless every class is called like a split.

    Raises:
        HeadstartError: file names that are not UTF-8; splits where classes should be; a class folder whose
            pictures are all of kinds that are not read.
    """
    classes = _known_classes(raw, options)
    top = _without_wrappers(raw, classes)
    around = [split for part in top.relative_to(raw).parts if (split := _split(part))]
    given = _given(top)
    _refuse_unknown_splits(top, given, classes)
    rows, unnameable = [], []
    example: dict[str, str] = {}  # a picture of each class
    used, unread = set[str](), defaultdict[str, set[str]](set)  # class folders
    for file in sorted(raw.rglob("*")):
        path = file.relative_to(raw)
        if any(_hidden(part) for part in path.parts) or not file.is_file():
            continue
        name = path.as_posix()
        if mojibake.STRAY.search(name):
            unnameable.append(name.encode("utf-8", "backslashreplace").decode())
        parts = file.relative_to(top).parts if file.is_relative_to(top) else ()
        split = given.get(parts[0]) if parts else None
        folders = parts[1:-1] if split else () if given else parts[:-1]
        suffix = file.suffix.lower()
        known = suffix in IMAGE_SUFFIXES
        bare = not folders and (len(parts) == 1 or split)  # where class folders would stand
        reason = None if known and folders else NO_LABEL if known and bare else NO_CLASS
        label = folders[0] if folders else None
        if label:
            place = "/".join(parts[: 2 if split else 1])
            if known:
                used.add(place)
                example.setdefault(label, name)
            elif suffix:
                reason = f"{UNREAD}: {suffix}"
                unread[place] |= {suffix} & UNREAD_SUFFIXES
        if around and not given and parts:
            split = around[-1]
        rows.append({"path": name, "label": label, "split": split, "left_out": reason})
    if unnameable:
        raise HeadstartError(
            f"{len(unnameable)} file names are not UTF-8",
            where=str(raw),
            table=unnameable[:20],
            do="rename the files; `convmv` does it in bulk",
        )
    if gone := {place: kinds for place, kinds in unread.items() if kinds and place not in used}:
        raise HeadstartError(
            "class folders hold pictures of kinds that are not read, and no others",
            where=str(top),
            table=[f"{place}: {', '.join(sorted(kinds))}" for place, kinds in gone.items()],
            do="save the pictures as .png or .jpg, or take these folders away",
        )
    if len({_like_a_split(name) for name in example} - {None}) > 1 and all(map(_like_a_split, example)):
        _refuse_splits(example, classes, raw, "put class folders inside them: train/CLASS/1.png")
    return pd.DataFrame(rows, columns=["path", "label", "split", "left_out"])


def _known_classes(raw: Path, options: Validate) -> set[str]:
    """Classes that are known beforehand: the recipe's, or those of the source that a batch came after."""
    if options.classes or raw.parent.name != BATCHES:
        return set(options.classes or ())
    top = _without_wrappers(raw.parents[1])
    given = _given(top)
    folders = [inner for name in given for inner in _folders(top / name)] if given else _folders(top)
    return {folder.name for folder in folders}


def _without_wrappers(folder: Path, classes: Collection[str] = ()) -> Path:
    """The first folder inside that is more than a wrapper around one folder of folders, which no class is."""
    inner = _folders(folder)
    pictures = any(file.suffix.lower() in IMAGE_SUFFIXES for file in _visible(folder))
    if len(inner) != 1 or inner[0].name in classes or pictures or not _folders(inner[0]):
        return folder
    return _without_wrappers(inner[0], classes)


def _given(top: Path) -> dict[str, str]:
    """Folders that are splits, as they hold folders, and which."""
    return {
        folder.name: split for folder in _folders(top) if (split := _split(folder.name)) and _folders(folder)
    }


def _split(name: str) -> str | None:
    """The split that a folder of this name is: ``train``, ``Training_Set``, ``test-images``."""
    return SPLIT_NAMES.get(re.sub(r"[ _-]?(set|images)$", "", name.lower()))


def _like_a_split(name: str) -> str | None:
    """The split that a folder of this name may be: ``seg_train``, ``val2017``, ``test data``."""
    words = [name.lower(), *re.split(r"[\W\d_]+", name.lower())]
    return next((split for word in words if (split := _split(word))), None)


def _refuse_unknown_splits(top: Path, given: dict[str, str], classes: set[str]) -> None:
    """Raise if folders hold the same class folders and are called like splits, but not quite."""
    alike = {folder.name: split for folder in _folders(top) if (split := _like_a_split(folder.name))}
    if len(set(alike.values())) < 2 or alike.keys() == given.keys():
        return
    inside = [{folder.name for folder in _folders(_without_wrappers(top / name))} for name in alike]
    both = sorted(set.intersection(*inside))
    if len(both) > 1:  # one folder of the same name may be anything
        example = {name: f"{name}/{both[0]}" for name in alike}
        _refuse_splits(example, classes, top, "call the splits train, val and test")


def _refuse_splits(example: dict[str, str], classes: set[str], where: Path, do: str) -> None:
    """Raise unless all these folders are known to be classes."""
    if not classes.issuperset(example):
        raise HeadstartError(
            "folders that are called like splits would be classes",
            where=str(where),
            table=[f"{name}, as of {path}" for name, path in sorted(example.items())],
            do=f"{do}; if they are classes, name all classes in `validate: classes:`",
        )


def table(raw: Path, options: Validate) -> pd.DataFrame:
    """Rows of every CSV, TSV, Parquet and JSONL file, by the recipe's column names."""
    files = [
        file
        for file in sorted(raw.rglob("*"))
        if file.suffix.lower() in TABLE_SUFFIXES
        and not file.is_dir()  # as Spark calls a folder of parts
        and not any(map(_hidden, file.relative_to(raw).parts))
    ]
    if not files:
        raise HeadstartError(
            "there is no table",
            where=str(raw),
            do=f"a table's name ends in {', '.join(sorted(TABLE_SUFFIXES))}",
        )
    return pd.concat([_one_table(file, options) for file in files], ignore_index=True)


def column_names(file: Path) -> list[str]:
    """Names of a table's columns.

    Raises:
        HeadstartError: the table is damaged.
    """
    return _read(file, set())[0]


def columns(file: Path, names: set[str]) -> pd.DataFrame:
    """Columns of a table as texts without spaces around them; None where nothing stands.

    Raises:
        HeadstartError: the table is damaged.
    """
    content = _read(file, names)[1]
    return pd.DataFrame({name: _whole(map(as_text, content[name])) for name in sorted(names)})


def _one_table(file: Path, options: Validate) -> pd.DataFrame:
    wanted = {role: column for role, column in options.columns.model_dump().items() if column is not None}
    names, content = _read(file, set(wanted.values()))
    rows: Columns = {}
    for role, column in wanted.items():
        if column not in content:
            raise HeadstartError(
                f"the table has no column {column!r} for the {role}",
                where=f"{file}, columns: {', '.join(names):.300}",
                do=f"set validate.columns.{role}{_nearest(column, names)}",
            )
        if any(isinstance(value, list | dict) for value in content[column]):
            raise HeadstartError(
                f"the column {column!r} holds lists or objects",
                where=str(file),
                do=f"give the {role} as one value a row",
            )
        rows[role] = [as_text(value) for value in content[column]]
    rows["text"], rows["original"] = _mended(rows["text"])
    rows["left_out"] = [None if label else NO_LABEL for label in rows["label"]]
    if "split" in rows:
        rows["split"] = [SPLIT_NAMES.get(split.lower(), split) if split else None for split in rows["split"]]
    rows["place"] = [f"{file.name}, row {number}" for number in range(1, len(rows["text"]) + 1)]
    for role in set(wanted) - {"text"}:
        rows[role] = _whole(rows[role])
    return pd.DataFrame(rows)


def _whole(texts: Iterable[str | None]) -> list[str | None]:
    """Texts without stray bytes; None where nothing stands."""
    return [mojibake.windows(text) if text else None for text in texts]


def _read(file: Path, wanted: set[str]) -> tuple[list[str], Columns]:
    import pyarrow as pa

    try:
        return _content(file, wanted)
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        raise HeadstartError(
            "the table cannot be read", where=str(file), table=str(error).splitlines()[:5], do="mend the file"
        ) from error


def _content(file: Path, wanted: set[str]) -> tuple[list[str], Columns]:
    """Names of a table's columns, and the values of those wanted; names without spaces around them."""
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        read = parquet.read(columns=[name for name in names if name.strip() in wanted])
        columns = list(zip(read.column_names, read.columns, strict=True))
        # Of two alike the first counts.
        return names, {name.strip(): column.to_pylist() for name, column in reversed(columns)}
    text = _decode(file)
    if file.suffix.lower() == ".jsonl":
        return _json_lines(text, wanted)
    between = separator(file, text.split("\n", 1)[0], wanted)
    if between == "\t" and a_row_a_line(io.StringIO(text, newline="")):
        return _separated(text, between, wanted, csv.QUOTE_NONE, unquoted)
    try:
        return _separated(text, between, wanted)
    except csv.Error:
        if between != "\t":
            raise
        # Quotation marks that only quote: the file knows no quoting.
        return _separated(text, between, wanted, csv.QUOTE_NONE)


def separator(file: Path, header: str, wanted: set[str]) -> str:
    """What stands between the cells of a CSV or TSV file.

    Args:
        file: its name tells a TSV.
        header: its first line.
        wanted: columns that it should have.

    Raises:
        HeadstartError: tabs separate a CSV file, which then lacks what is wanted.
    """
    if file.suffix.lower() == ".tsv":
        return "\t"
    header = mojibake.windows(header)
    by_commas, by_semicolons = ({name.strip(' \r"') for name in header.split(by)} for by in ",;")
    # Spreadsheets write semicolons where the comma is the decimal point.
    if ";" in header and wanted <= by_semicolons:
        return ";"
    if not wanted or wanted & by_commas:
        return ","
    # Whatever is wanted and not there, the error shall name the columns as they are.
    most = max(",;\t", key=QUOTED.sub("", header).count)
    if most == "\t":
        raise HeadstartError(
            "its columns are separated by tabs", where=str(file), do="let its name end in .tsv"
        )
    return most


def a_row_a_line(lines: Iterable[str]) -> bool:
    """Whether each line of a TSV file is a row, with as many cells as the header: so no cell spans lines.

    A text may then begin with a quotation mark that a later row seems to close. Of a single column nothing
    can be told.
    """
    tabs = {line.count("\t") for line in lines if line.strip("\r\n")}
    return len(tabs) == 1 and tabs != {0}


def unquoted(row: list[str]) -> list[str]:
    """The cells of such a row, without the quotation marks that enclose one whole."""
    return [cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell for cell in row]


def _separated(
    text: str,
    separator: str,
    wanted: set[str],
    quoting: int = csv.QUOTE_MINIMAL,
    clean: Callable[[list[str]], list[str]] = list,
) -> tuple[list[str], Columns]:
    csv.field_size_limit(sys.maxsize)  # a field may be a whole book
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)  # type: ignore[arg-type]
    rows = map(clean, reader)
    names = [mojibake.windows(name).strip() for name in next(rows, [])]
    places = {name: names.index(name) for name in wanted if name in names}
    columns: Columns = {name: [] for name in places}
    try:
        for row in rows:
            if any(row[len(names) :]):
                raise ValueError(
                    f"line {reader.line_num}: {len(row)} fields, but the header names {len(names)}"
                )
            if row:
                for name, place in places.items():
                    columns[name].append(row[place] if place < len(row) else "")
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None
    return names, columns


def _json_lines(text: str, wanted: set[str]) -> tuple[list[str], Columns]:
    names: dict[str, None] = {}
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                refuse_depth(line)
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            names |= dict.fromkeys(row)
            rows.append({name: row.get(name) for name in wanted})
    return list(names), {name: [row[name] for row in rows] for name in wanted if name in names}


def refuse_depth(text: str) -> None:
    """Raise if lists and objects of JSON lie in each other so deep that parsers fail, pyarrow's by a crash.

    About 5 ms a megabyte.

    Raises:
        ValueError: they do.
    """
    if text.count("[") + text.count("{") <= MAX_DEPTH:  # as of nearly every single line
        return
    marks = (
        text.encode("ascii", "replace").replace(rb"\\", b"").replace(rb"\"", b"").translate(None, UNMARKED)
    )
    outside = np.frombuffer(b"".join(marks.split(b'"')[::2]), np.uint8)
    opening = (outside == ord("[")) | (outside == ord("{"))
    if np.where(opening, 1, -1).cumsum().max(initial=0) > MAX_DEPTH:
        raise ValueError(f"lists and objects lie in more than {MAX_DEPTH} others")


def _nearest(column: str, names: list[str]) -> str:
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(column.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def elpv(raw: Path, options: Validate) -> pd.DataFrame:
    """The ELPV solar cells (Deitsch et al. 2019): raters' doubt as confidence and weight, modules as groups.

    A cell with a defect probability of 1/3 is functional with confidence 2/3. Weights are the
    paper's: 1, 0.33, 0.67, 1 for probabilities 0, 1/3, 2/3, 1. The 44 modules are not named, but cells
    of one module stand next to each other in the list. A cell that nobody has rated has the probability nan.
    """
    file = raw / "labels.csv"
    if not file.is_file():
        raise HeadstartError("labels.csv is missing", where=str(raw), do="ingest it again")
    listed = pd.read_csv(file, sep=r"\s+", header=None, names=["path", "defect", "type"])
    defective, rated = listed["defect"] >= 0.5, listed["defect"].notna()
    sure = listed["defect"].fillna(0)
    return pd.DataFrame(
        {
            "path": listed["path"],
            "label": defective.map({True: "defective", False: "functional"}).where(rated, None),
            "confidence": sure.where(defective, 1 - sure),
            "weight": sure.map(lambda p: 1.0 if p in (0.0, 1.0) else round(p, 2)),
            "domain": listed["type"],
            "group": modules(listed["type"]),
            "left_out": [None if known else NO_LABEL for known in rated],
        }
    )


def modules(types: pd.Series) -> list[str]:
    """Module of each cell: consecutive runs of one type, cut into blocks of 60 or taken whole."""
    run = (types != types.shift()).cumsum()
    size = run.map(run.value_counts())
    within = run.groupby(run).cumcount()
    block = (within // MODULE_CELLS).where(~size.isin(WHOLE_RUNS), 0)
    return [f"module {r:02}-{b}" for r, b in zip(run, block, strict=True)]


def vader(raw: Path, options: Validate) -> pd.DataFrame:
    """VADER's four snippet files, or some (Hutto & Gilbert 2014): mean ratings from -4 to 4 as two classes.

    A text that nobody has rated has the rating nan.
    """
    domains = {
        "tweets": "tweets",
        "movieReviewSnippets": "movies",
        "amazonReviewSnippets": "products",
        "nytEditorialSnippets": "editorials",
    }
    frames = []
    for stem, domain in domains.items():
        found = sorted(raw.rglob(f"{stem}_GroundTruth.txt"))
        file = next((file for file in found if not any(map(_hidden, file.relative_to(raw).parts))), None)
        if file is None:
            continue
        parts = [line.split("\t", 2) for line in _decode(file).split("\n") if line.strip()]
        try:
            numbers, ratings, texts = zip(*parts, strict=True)
            rating = pd.Series(ratings).astype(float)
        except ValueError as error:
            raise HeadstartError(
                f"a line is not a number, a rating and a text: {error}", where=str(file), do="ingest it again"
            ) from None
        number = pd.Series(numbers)
        fixed, original = _mended([text.strip() for text in texts])
        frames.append(
            pd.DataFrame(
                {
                    "id": domain + ":" + number,
                    "text": fixed,
                    "label": [None if math.isnan(r) else "positive" if r > 0 else "negative" for r in rating],
                    "domain": domain,
                    # `12_3` is the third snippet of document 12.
                    "group": domain + ":" + number.str.replace(r"_\d+$", "", regex=True),
                    "left_out": [
                        NO_LABEL if math.isnan(r) else NEUTRAL if abs(r) <= 0.5 else None for r in rating
                    ],
                    "original": original,
                }
            )
        )
    if not frames:
        what = f"{', '.join(f'{stem}_GroundTruth.txt' for stem in domains)}: each of them is missing"
        raise HeadstartError(what, where=str(raw), do="ingest it again")
    return pd.concat(frames, ignore_index=True)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # macOS' archiver keeps its own notes there


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not _hidden(path.name))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _decode(file: Path) -> str:
    """Text of a file: UTF-8 or marked UTF-16; every byte that is not becomes a lone surrogate."""
    data = file.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16").replace("\r\n", "\n")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def as_text(value: Any) -> str | None:
    """A cell as text without spaces around it: 1.0 is 1 (whole columns turn to floats over one gap)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)).strip()


def _mended(texts: list[str | None]) -> tuple[list[str], list[str | None]]:
    """Texts without mojibake, and what each mended one looked like before."""
    fixed: list[str] = []
    original: list[str | None] = []
    for text in texts:
        before = text or ""
        after = mojibake.mended(before)
        fixed.append(after)
        original.append(mojibake.STRAY.sub("\ufffd", before) if after != before else None)
    return fixed, original


BUILT_IN: dict[str, Adapter] = {"image_folder": image_folder, "table": table, "elpv": elpv, "vader": vader}
