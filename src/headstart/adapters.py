"""Adapters: from a folder of raw files to a frame of rows.

Goes in: ``data/<recipe>/`` and the recipe's ``validate`` block. Comes out: a frame with ``path`` or
``text``, and ``label``; optionally ``id``, ``domain``, ``group``, ``split``, ``confidence``, ``weight``,
``left_out`` (why a row is not used) and ``original`` (a text before its encoding was mended). Decides
nothing about fitness: that is validation's. Hidden files are passed over.
"""

from __future__ import annotations

import difflib
import importlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from headstart.errors import HeadstartError
from headstart.recipe import Validate

Adapter = Callable[[Path, Validate], pd.DataFrame]

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
TABLE_SUFFIXES = {".csv", ".tsv", ".parquet", ".jsonl"}
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# A module of 60, 72, 54, 50 or 48 cells: the formats that occur in the ELPV data set.
MODULE_CELLS, WHOLE_RUNS = 60, {72, 54, 50, 48}


def read(raw: Path, options: Validate) -> pd.DataFrame:
    """Rows of a raw folder, by the adapter that the recipe names.

    Raises:
        HeadstartError: the folder is missing, the adapter is unknown or cannot be imported, or
            the files are not what the adapter expects.
    """
    if not raw.is_dir():
        raise HeadstartError("there are no raw data", where=str(raw), do="run `headstart ingest RECIPE` first")
    frame = _find(options.adapter)(raw, options)
    if frame.empty:
        raise HeadstartError(
            "the raw data hold no rows",
            where=str(raw),
            do=f"check that the files suit the adapter {options.adapter!r}",
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
    except (ImportError, AttributeError) as error:
        raise HeadstartError(
            f"the adapter {name!r} cannot be imported: {error}",
            where="validate.adapter",
            do="put the module in the project's root, or install it",
        ) from error
    return adapter


def image_folder(raw: Path, options: Validate) -> pd.DataFrame:
    """Images in one folder per class, with or without train, val and test folders on top.

    With only train and val, val is the held-out test, and validation rows are cut from train: a set
    that training looks at cannot also be the judge.
    """
    top = raw
    while len(inner := _visible(top)) == 1 and inner[0].is_dir():  # a wrapper folder is looked through
        top = inner[0]
    names = {folder.name for folder in _visible(top) if folder.is_dir()}
    given = bool(names) and names <= set(SPLIT_FOLDERS)
    no_test = given and "test" not in names
    rows = []
    for file in sorted(top.rglob("*")):
        parts = file.relative_to(top).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        split = SPLIT_FOLDERS[parts[0]] if given and len(parts) > 1 else None
        folders = parts[1:-1] if given else parts[:-1]
        known = file.suffix.lower() in IMAGE_SUFFIXES
        rows.append(
            {
                "path": file.relative_to(raw).as_posix(),
                "label": folders[0] if folders else None,
                "split": "test" if no_test and split == "val" else split,
                "left_out": None if known and folders else "not an image in a class folder",
            }
        )
    return pd.DataFrame(rows, columns=["path", "label", "split", "left_out"])


def table(raw: Path, options: Validate) -> pd.DataFrame:
    """Rows of every CSV, TSV, Parquet and JSONL file, by the recipe's column names."""
    files = [file for file in _visible(raw) if file.suffix.lower() in TABLE_SUFFIXES]
    if not files:
        raise HeadstartError(
            "there is no table",
            where=str(raw),
            do=f"a table's name ends in {', '.join(sorted(TABLE_SUFFIXES))}",
        )
    return pd.concat([_one_table(file, options) for file in files], ignore_index=True)


def _one_table(file: Path, options: Validate) -> pd.DataFrame:
    mended: dict[str, str] = {}
    try:
        if file.suffix.lower() == ".parquet":
            content = pd.read_parquet(file)
        else:
            text, mended = _decode(file)
            if file.suffix.lower() == ".jsonl":
                content = pd.read_json(io.StringIO(text), lines=True, dtype=False)
            else:
                separator = "\t" if file.suffix.lower() == ".tsv" else ","
                content = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parsers raise subclasses of these
        raise HeadstartError(
            "the table cannot be read", where=str(file), table=str(error).splitlines()[:5], do="mend the file"
        ) from error
    frame = pd.DataFrame(index=content.index)
    for role, column in options.columns.model_dump().items():
        if column is None:
            continue
        if column not in content:
            near = difflib.get_close_matches(column, map(str, content.columns), n=1)
            raise HeadstartError(
                f"the table has no column {column!r} for the {role}",
                where=f"{file}, columns: {', '.join(map(str, content.columns))}",
                do=f"set validate.columns.{role}" + (f"; did you mean {near[0]!r}?" if near else ""),
            )
        frame[role] = content[column].map(lambda value: None if pd.isna(value) else str(value).strip())
    frame["left_out"] = frame["label"].map(lambda label: None if label else "no label")
    return _mend(frame, mended)


def elpv(raw: Path, options: Validate) -> pd.DataFrame:
    """The ELPV solar cells (Deitsch et al. 2019): raters' doubt as confidence and weight, modules as groups.

    A cell with a defect probability of 1/3 is functional with confidence 2/3. Weights are the
    paper's: 1, 0.33, 0.67, 1 for probabilities 0, 1/3, 2/3, 1. The 44 modules are not named, but cells
    of one module stand next to each other in the list.
    """
    listed = pd.read_csv(raw / "labels.csv", sep=r"\s+", header=None, names=["path", "defect", "type"])
    defective = listed["defect"] >= 0.5
    return pd.DataFrame(
        {
            "path": listed["path"],
            "label": defective.map({True: "defective", False: "functional"}),
            "confidence": listed["defect"].where(defective, 1 - listed["defect"]),
            "weight": listed["defect"].map(lambda p: 1.0 if p in (0.0, 1.0) else round(p, 2)),
            "domain": listed["type"],
            "group": modules(listed["type"]),
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
    """The four VADER snippet files (Hutto & Gilbert 2014): mean ratings from -4 to 4 as two classes."""
    domains = {
        "tweets": "tweets",
        "movieReviewSnippets": "movies",
        "amazonReviewSnippets": "products",
        "nytEditorialSnippets": "editorials",
    }
    frames = []
    for stem, domain in domains.items():
        file = next(iter(sorted(raw.rglob(f"{stem}_GroundTruth.txt"))), None)
        if file is None:
            raise HeadstartError(f"{stem}_GroundTruth.txt is missing", where=str(raw), do="ingest it again")
        text, mended = _decode(file)
        parts = [line.split("\t", 2) for line in text.split("\n") if line.count("\t") >= 2]
        frame = pd.DataFrame(parts, columns=["number", "rating", "text"])
        rating = frame["rating"].astype(float)
        document = frame["number"].str.extract(r"^(\d+)_", expand=False)
        frame = pd.DataFrame(
            {
                "id": domain + ":" + frame["number"],
                "text": frame["text"].str.strip(),
                "label": rating.map(lambda r: "positive" if r > 0 else "negative"),
                "domain": domain,
                "group": domain + ":" + document.fillna(frame["number"]),
                "left_out": rating.map(lambda r: "neutral: |mean rating| <= 0.5" if abs(r) <= 0.5 else None),
            }
        )
        frames.append(_mend(frame, mended))
    return pd.concat(frames, ignore_index=True)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _decode(file: Path) -> tuple[str, dict[str, str]]:
    """Text of a file, and what each line that is not valid UTF-8 looks like with its bytes replaced.

    Such a line is read as Windows-1252, the usual culprit; the few bytes that this leaves undefined
    become Latin-1. The result maps a decoded line to its broken form.
    """
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8").replace("\r\n", "\n"), {}
    except UnicodeDecodeError:
        pass
    lines, mended = [], {}
    for piece in data.replace(b"\r\n", b"\n").split(b"\n"):
        try:
            lines.append(piece.decode("utf-8"))
        except UnicodeDecodeError:
            try:
                line = piece.decode("cp1252")
            except UnicodeDecodeError:
                line = piece.decode("latin-1")
            mended[line] = piece.decode("utf-8", errors="replace")
            lines.append(line)
    return "\n".join(lines), mended


def _mend(frame: pd.DataFrame, mended: dict[str, str]) -> pd.DataFrame:
    """Undo mojibake and HTML entities in the texts; ``original`` keeps what was there before.

    The entities and double encodings are ftfy's business (Speer 2019). Only repairs count: ftfy's
    cosmetic changes (curly quotes, widths) are switched off.
    """
    import ftfy

    config = ftfy.TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, normalization=None, explain=False
    )
    broken_lines = list(mended.items())

    def before(text: str, after: str) -> str | None:
        if after != text:
            return text
        if any(text in line for line, _ in broken_lines) and not text.isascii():
            return next(re.sub(r"^.*\t", "", old) for line, old in broken_lines if text in line)
        return None

    texts = frame["text"].map(lambda text: text or "")
    fixed = texts.map(lambda text: ftfy.fix_text(text, config) if text else text)
    frame["original"] = [before(old, new) for old, new in zip(texts, fixed, strict=True)]
    frame["text"] = fixed
    return frame


BUILT_IN: dict[str, Adapter] = {"image_folder": image_folder, "table": table, "elpv": elpv, "vader": vader}
