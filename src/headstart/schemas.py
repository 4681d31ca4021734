"""The manifest's schema: what every row must be before anything is trained on it (pandera).

Goes in: the frame that will become ``manifest.parquet``. Comes out: a list of failures, one line per
offending row or frame-level rule. Content that needs opening a file is checked in ``validation``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from headstart.recipe import Validate

if TYPE_CHECKING:
    import pandera.pandas as pa

REMEDY = {
    "unique_id": "give each row an id of its own, or none",
    "known_label": "correct the label, or add it to validate.classes",
    "text_not_empty": "write the text, or delete the row",
    "confidence_in_range": "a probability above 0 and at most 1",
    "positive_weight": "a number above 0; leave the row out to ignore it",
    "known_split": "train, val or test",
    "two_classes": "a classifier needs rows of at least two classes",
    "group_in_one_split": "put all rows of the group into one split",
    "rows_per_class": "add rows of this class, or lower validate.min_rows_per_class",
}


def failures(frame: pd.DataFrame, options: Validate) -> pd.DataFrame:
    """Every broken rule of a frame without splits of its own making.

    Returns:
        Columns ``rule``, ``id``, ``value``, ``do``; empty if the frame is fit.
    """
    import pandera.errors

    try:
        rows(options, "text" in frame).validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        cases = error.failure_cases
        known = cases[cases["check"].isin(REMEDY)]
        # A row-wise rule names the row; a rule of the whole frame has no index.
        ids = known["index"].map(lambda i: "" if pd.isna(i) else str(frame["id"].iloc[int(i)]))
        found = pd.DataFrame(
            {"rule": known["check"], "id": ids, "value": known["failure_case"].astype(str)}
        ).drop_duplicates()
        if found.empty:  # pandera's own words for what our rules did not foresee, such as a wrong type
            found = pd.DataFrame({"rule": ["schema"], "id": [""], "value": [str(cases.iloc[0].to_dict())]})
        return found.assign(do=found["rule"].map(REMEDY).fillna("see docs/reference/files.md"))
    return pd.DataFrame(columns=["rule", "id", "value", "do"])


def rows(options: Validate, texts: bool) -> pa.DataFrameSchema:
    """The schema of usable rows, before splits are assigned."""
    import pandera.pandas as pa

    content = "text" if texts else "path"
    label = [pa.Check.isin(options.classes, name="known_label")] if options.classes else []
    not_empty = pa.Check(lambda s: s.str.strip().str.len() > 0, name="text_not_empty")
    in_range = pa.Check(lambda s: (s > 0) & (s <= 1), name="confidence_in_range")
    return pa.DataFrameSchema(
        {
            "id": pa.Column(str, pa.Check(lambda s: ~s.duplicated(keep="first"), name="unique_id")),
            content: pa.Column(str, not_empty if texts else None),
            "label": pa.Column(str, label),
            "confidence": pa.Column(float, in_range),
            "weight": pa.Column(float, pa.Check(lambda s: s > 0, name="positive_weight")),
            "domain": pa.Column(str),
            "group": pa.Column(str),
            "split": pa.Column(
                str, pa.Check.isin(["train", "val", "test"], name="known_split"), nullable=True, required=False
            ),
        },
        # A frame-level rule returns one truth value: a series would be repeated for every column.
        checks=pa.Check(lambda frame: bool(frame["label"].nunique() > 1), name="two_classes"),
    )


def split_failures(frame: pd.DataFrame, options: Validate, classes: list[str]) -> pd.DataFrame:
    """Broken rules of the frame with its splits: a group on both sides, a class with too few rows."""
    found = []
    spread = frame.groupby("group")["split"].agg(lambda s: ", ".join(sorted(set(s))))
    for group, splits in spread[spread.str.contains(",")].items():
        found.append({"rule": "group_in_one_split", "id": str(group), "value": splits})
    counts = frame.groupby(["split", "label"]).size()
    for split in ("train", "val", "test"):
        for label in classes:
            if (n := int(counts.get((split, label), 0))) < options.min_rows_per_class:
                value = f"{n} rows, at least {options.min_rows_per_class} wanted"
                found.append({"rule": "rows_per_class", "id": f"{split}, {label}", "value": value})
    table = pd.DataFrame(found, columns=["rule", "id", "value"])
    return table.assign(do=table["rule"].map(REMEDY))
