"""The manifest's schema: what every row must be before anything is trained on it (pandera).

Goes in: the frame that will become ``manifest.parquet``. Comes out: a list of failures, one line per
offending row or frame-level rule. Content that needs opening a file is checked in ``validation``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from headstart.layout import HIDDEN
from headstart.recipe import Validate
from headstart.splits import SPLITS

if TYPE_CHECKING:
    import pandera.pandas as pa

COLUMNS = ["rule", "id", "value", "do"]
REMEDY = {
    "confidence_in_range": "a probability above 0 and at most 1",
    "group_in_one_split": "put all rows of the group into one split",
    "known_label": "correct the label, or add it to validate.classes",
    "known_split": "train, val or test, in every row or in none",
    "positive_weight": "a number above 0; leave the row out to ignore it",
    "rows_per_class": "add rows of this class in groups of their own, or lower validate.min_rows_per_class",
    "text_not_empty": "write the text, or delete the row",
    "two_classes": "a classifier needs rows of at least two classes",
    "unique_id": "give each row an id of its own, or none",
    "value_missing": "fill it in, or let the adapter leave the row out with a reason",
}
PANDERA_RULES = {"not_nullable": "value_missing"}


def failures(frame: pd.DataFrame, options: Validate) -> pd.DataFrame:
    """Every broken rule of the usable rows, before splits are assigned.

    Returns:
        Columns ``rule``, ``id`` (or the place of a row without one), ``value``, ``do``; empty if the frame
        is fit.
    """
    import pandera.errors

    try:
        rows(options, "text" in frame).validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        cases = error.failure_cases
        # A row-wise rule names the row; a rule of the whole frame has no index.
        ids = cases["index"].map(lambda i: "" if pd.isna(i) else str(frame["place"].iloc[int(i)]))
        rule = cases["check"].replace(PANDERA_RULES)
        value = cases["failure_case"].astype(str)
        value = value.mask(rule == "value_missing", "no " + cases["column"].astype(str))
        if (rule == "two_classes").any():
            only = next(label for label in frame["label"] if label != HIDDEN)
            value = value.mask(rule == "two_classes", f"every row is {only!r}")
        found = pd.DataFrame({"rule": rule, "id": ids, "value": value})
        unforeseen = ~rule.isin(REMEDY)  # in pandera's own words, such as a wrong type
        found.loc[unforeseen, "value"] = cases["column"].astype(str) + ": " + rule + ": " + value
        found.loc[unforeseen, "rule"] = "schema"
        return _with_remedy(found.drop_duplicates())
    return pd.DataFrame(columns=COLUMNS)


def rows(options: Validate, texts: bool) -> pa.DataFrameSchema:
    """The schema of usable rows, before splits are assigned."""
    import pandera.pandas as pa

    # Named functions throughout: pandera's built-in checks print their arguments in place of a name.
    one_of = options.classes
    hidden = [HIDDEN] if options.target_domain else []
    known = [pa.Check(lambda s: s.isin([*one_of, *hidden]), name="known_label")] if one_of else []
    not_empty = pa.Check(lambda s: s.str.strip().str.len() > 0, name="text_not_empty")
    in_range = pa.Check(lambda s: (s > 0) & (s <= 1), name="confidence_in_range")
    positive = pa.Check(lambda s: (s > 0) & (s < float("inf")), name="positive_weight")
    split = pa.Check(lambda s: s.isin(SPLITS), name="known_split")
    return pa.DataFrameSchema(
        {
            "id": pa.Column(str, pa.Check(lambda s: ~s.duplicated(keep="first"), name="unique_id")),
            "text" if texts else "path": pa.Column(str, not_empty if texts else None),
            "label": pa.Column(str, known),
            "confidence": pa.Column(float, in_range),
            "weight": pa.Column(float, positive),
            "domain": pa.Column(str),
            "group": pa.Column(str),
            "split": pa.Column(str, split, nullable=True),
        },
        # A frame-level rule returns one truth value: a series would be repeated for every column.
        checks=pa.Check(
            lambda frame: bool(frame["label"][~frame["label"].isin(hidden)].nunique() != 1),
            name="two_classes",
        ),
    )


def split_failures(frame: pd.DataFrame, options: Validate, classes: list[str]) -> pd.DataFrame:
    """Broken rules of the frame with its splits: a group on both sides, a class with too few rows."""
    found = []
    by_group = frame.groupby("group")["split"]
    torn = by_group.nunique() > 1
    for group in torn.index[torn]:
        found.append(("group_in_one_split", str(group), ", ".join(sorted(set(by_group.get_group(group))))))
    counts = frame.groupby(["split", "label"]).size()
    groups = frame.groupby("label")["group"].nunique()
    # Where every label is put aside there is nothing to learn a class from, and nothing that could lack one.
    for split in SPLITS if (frame["label"] != HIDDEN).any() else ():
        for label in classes:
            if (n := int(counts.get((split, label), 0))) < options.min_rows_per_class:
                value = f"{n} rows of at least {options.min_rows_per_class}"
                value += f"; groups with this class: {int(groups.get(label, 0))}"
                found.append(("rows_per_class", f"{split}, {label}", value))
    return _with_remedy(pd.DataFrame(found, columns=["rule", "id", "value"]))


def _with_remedy(found: pd.DataFrame) -> pd.DataFrame:
    return found.assign(do=found["rule"].map(REMEDY).fillna("see docs/reference/files.md"))[COLUMNS]
