"""Examples: every row of a manifest with its features, and what it should be.

Goes in: the manifest and the features of one recipe. Comes out: ``Examples``, and the targets and weights
that training minimises. Never shows a label that is put aside: the manifest has none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from headstart import source_free
from headstart.errors import HeadstartError, unmade
from headstart.heads import Features
from headstart.layout import HIDDEN, Layout, sha256_of
from headstart.metrics import Floats, Ints
from headstart.packs import Rows
from headstart.recipe import Recipe, Train

PUT_ASIDE: dict[str, Any] = {"label": HIDDEN, "confidence": 1.0, "weight": 1.0, "split": "train"}


@dataclass(frozen=True)
class Examples:
    """Every row of a manifest with its features, in the manifest's order."""

    manifest: pd.DataFrame
    features: Features  # float16 [n, d], a memory map
    classes: list[str]
    truth: Ints  # [n], position of the label in classes; -1 where it is put aside

    def rows(self, *splits: str) -> Rows:
        """Positions of the labelled rows in these splits."""
        return np.flatnonzero(self.manifest["split"].isin(splits) & (self.truth >= 0))

    def blind(self, target: Rows, held_out: Rows) -> Examples:
        """The same, as if these rows were of a target domain without labels, and some of them for testing.

        As ``validate`` puts them aside: the doubt and the weight of a row tell of its label.
        """
        truth = self.truth.copy()
        truth[target] = -1
        columns = {name: self.manifest[name].to_numpy(copy=True) for name in PUT_ASIDE}
        for name, blank in PUT_ASIDE.items():
            columns[name][target] = blank
        columns["split"][held_out] = "test"
        return replace(self, truth=truth, manifest=self.manifest.assign(**columns))

    def named(self, rows: Rows, probabilities: Floats) -> Examples:
        """The same, with the likeliest classes for labels of these rows, and their doubt."""
        truth, confidence = self.truth.copy(), self.manifest["confidence"].to_numpy(copy=True)
        truth[rows], confidence[rows] = probabilities.argmax(axis=1), probabilities.max(axis=1)
        return replace(self, truth=truth, manifest=self.manifest.assign(confidence=confidence))

    def unlabelled(self, *splits: str) -> Rows:
        """Positions of the target domain's rows in these splits."""
        return np.flatnonzero(self.manifest["split"].isin(splits) & (self.truth < 0))

    def absent(self, rows: Rows) -> list[str]:
        """The classes that none of these rows has."""
        there = set(self.truth[rows].tolist())
        return [name for place, name in enumerate(self.classes) if place not in there]


def load(recipe: Recipe, layout: Layout) -> Examples:
    """The manifest and the features of one recipe, checked against each other.

    Raises:
        HeadstartError: files are missing, or the features are not of this manifest.
    """
    again = f"run `dvc repro features@{layout.recipe}`"
    path = layout.manifest / "manifest.parquet"
    try:
        manifest = pd.read_parquet(path)
        ids = pd.read_parquet(layout.features / "ids.parquet")["id"]
        described: dict[str, Any] = json.loads(
            (layout.features / "features.json").read_text(encoding="utf-8")
        )
        features: Features = np.load(layout.features / "features.npy", mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise unmade("what training reads is missing", error, layout.recipe, "features") from None
    if described["manifest_sha256"] != sha256_of(path) or not ids.equals(manifest["id"]):
        raise HeadstartError(
            "the features were made from another manifest", where=str(layout.features), do=again
        )
    if features.ndim != 2 or len(features) != len(manifest):
        raise HeadstartError(
            f"features of shape {features.shape} for a manifest of {len(manifest)} rows",
            where=str(layout.features / "features.npy"),
            do=again,
        )
    classes = recipe.validate_.classes or sorted(set(manifest["label"]) - {HIDDEN})
    if recipe.train.source_free:
        classes = source_free.Inherited.read(layout.weights).classes
    truth = pd.Index(classes).get_indexer(pd.Index(manifest["label"])).astype(np.int64)
    if unknown := sorted(set(manifest["label"][truth < 0]) - {HIDDEN}):
        raise HeadstartError(
            f"the manifest has labels that the recipe does not name: {', '.join(unknown)}",
            where=str(path),
            do=f"run `dvc repro validate@{layout.recipe}`",
        )
    return Examples(manifest, features, classes, truth)


@dataclass(frozen=True)
class SoftTargets:
    """What rows should be, as distributions that are spread out over the classes only where they are read.

    As one array, those of 3 million rows and 1,000 classes would take 24 GB.
    """

    truth: Ints  # [n]
    confidence: Floats  # [n]
    classes: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and classes."""
        return len(self.truth), self.classes

    def __getitem__(self, rows: slice | Rows) -> Floats:
        return soft_targets(self.truth[rows], self.confidence[rows], self.classes)

    def of(self, rows: Rows) -> SoftTargets:
        """Those of some rows."""
        return replace(self, truth=self.truth[rows], confidence=self.confidence[rows])


def labels(examples: Examples, choices: Train, train: Rows) -> tuple[SoftTargets, Floats]:
    """Targets [n, k] and weights float64 [n] of every row.

    Of a row whose label is put aside they mean nothing, and nobody may read them.
    """
    k = len(examples.classes)
    confidence = examples.manifest["confidence"].to_numpy(np.float64)
    weights = examples.manifest["weight"].to_numpy(np.float64)
    if choices.class_weight == "balanced":
        # Factors of the training rows for all, so that validation judges by what training minimises.
        weights = weights * class_factors(examples.truth[train], weights[train], k)[examples.truth]
    return SoftTargets(examples.truth, confidence, k), weights


def check(examples: Examples, train: Rows, val: Rows) -> None:
    """Raise HeadstartError unless there is something to learn from and to choose by."""
    if absent := examples.absent(train):
        raise HeadstartError(
            f"no training rows of {', '.join(absent)}",
            do="add rows of that class, or name the classes wanted in the recipe: `validate: classes:`",
        )
    if not len(val):
        raise HeadstartError(
            "no validation rows to choose by", do="raise `validate: splits: val:` in the recipe"
        )


def finite(examples: Examples, rows: Rows) -> Features:
    """The features of these rows, unless float16 could not hold one of them."""
    features = examples.features[rows]
    # A maximum and a minimum pass on what is not finite, without a table of booleans half as large again.
    bad = ~(np.isfinite(features.max(axis=1)) & np.isfinite(features.min(axis=1)))
    if bad.any():
        raise HeadstartError(
            f"the features of {np.count_nonzero(bad)} rows are not finite numbers",
            where=f"first: {examples.manifest['id'].iloc[rows[bad][0]]}",
            do="look at these rows, or take other `features: layers:` in the recipe",
        )
    return features


def soft_targets(truth: Ints, confidence: Floats, classes: int) -> Floats:
    """float64[n, k]: ``confidence`` [n] for the label, the rest spread evenly over the other classes."""
    others = (1 - confidence) / (classes - 1)
    targets = np.repeat(others[:, None], classes, axis=1)
    targets[np.arange(len(truth)), truth] = confidence
    return targets


def class_factors(truth: Ints, weights: Floats, classes: int) -> Floats:
    """float64[k]: n / (k n_c), with weights for counts, so that every class weighs the same in total."""
    factors: Floats = weights.sum() / (classes * np.bincount(truth, weights, classes))
    return factors
