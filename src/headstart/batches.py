"""Batches: data that came after the source, each in a folder of its own beside what the source held.

Goes in: ``data/<recipe>/.batches/NAME/``. Comes out: their names, their rows through the recipe's adapter,
and labels that came late. Decides nothing about fitness, and never looks at what is still on its way: that is
the inbox's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from headstart import adapters
from headstart.layout import Layout
from headstart.recipe import Validate

# In a batch: its number, in the order they came; once accepted, whether it holds rows or labels, and labels
# also after which batches of rows they came.
ABOUT = ".batch.json"
LABEL_COLUMNS = {"id", "label"}

Kind = Literal["rows", "labels"]


def names(layout: Layout, kind: Kind = "rows") -> list[str]:
    """Batches taken in so far, in the order they came: those of rows, or those of labels alone."""
    found = []
    for folder in layout.batches.iterdir() if layout.batches.is_dir() else ():
        if folder.is_dir() and not folder.name.startswith("."):
            told = about(folder)
            if told.get("kind", "rows") == kind:
                found.append((told.get("number", 0), folder.name))
    return [name for _, name in sorted(found)]


def about(folder: Path) -> dict[str, Any]:
    """What is noted of a batch."""
    note = folder / ABOUT
    told: dict[str, Any] = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    return told


def read(layout: Layout, name: str, options: Validate) -> pd.DataFrame:
    """Rows of one batch, as ``adapters.read`` gives them: ``path`` is relative to ``layout.raw``.

    ``label`` is missing where a row has none. A column ``batch`` holds the name.
    """
    return rows_of(layout.batches / name, name, options)


def rows_of(folder: Path, name: str, options: Validate) -> pd.DataFrame:
    """Rows of a folder as they will be once it is the batch of this name.

    Names in the data's own columns mean the same everywhere; what an adapter makes up from the order of a
    list means something within that list alone, and bears the batch's name.
    """
    frame = adapters.read(folder, options).assign(batch=name)
    if "path" in frame:
        frame["path"] = f".batches/{name}/" + frame["path"].astype("str")
    if "place" in frame:
        frame["place"] = f"{name}: " + frame["place"].astype("str")
    if options.adapter in adapters.GROUPS_BY_POSITION:
        frame["group"] = f"{name}: " + frame["group"].astype("str")
    return frame


def everything(layout: Layout, options: Validate) -> pd.DataFrame:
    """Rows of the source, of which ``batch`` is empty, then of every batch."""
    source = adapters.read(layout.raw, options).assign(batch="")
    frames = [source, *(read(layout, name, options) for name in names(layout))]
    return pd.concat(frames, ignore_index=True)


def late_labels(layout: Layout) -> pd.DataFrame:
    """What batches of labels say, in the order they came: ``id`` as they write it, ``label``, and ``after``.

    The latter are the batches of rows that were there when the labels were accepted, among which, and in the
    source, the id names a row.
    """
    tables = []
    for name in names(layout, "labels"):
        if (table := label_table(layout.batches / name)) is not None:
            after = about(layout.batches / name).get("after")
            labels = adapters.columns(table, LABEL_COLUMNS)
            tables.append(labels.assign(after=pd.Series([after] * len(labels), dtype=object)))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["id", "label", "after"])


def label_table(folder: Path) -> Path | None:
    """The one table of a folder that holds nothing but ids and labels; None of any other folder."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    if len(files) != 1 or files[0].suffix.lower() not in adapters.TABLE_SUFFIXES:
        return None
    return files[0] if set(adapters.column_names(files[0])) == LABEL_COLUMNS else None
