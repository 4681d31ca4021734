"""Train: from features to a model, its predictions, and stamps of what it was made from.

Goes in: the manifest and the cached features of a frozen backbone. Comes out: ``head.safetensors``,
``model.json`` and ``predictions.parquet``. Never measures itself on the test rows, which take no part in
any choice: they are only predicted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headstart import stamps
from headstart.errors import HeadstartError
from headstart.heads import Features, Head, select
from headstart.layout import Layout, sha256_of, written_whole
from headstart.metrics import Floats, Ints
from headstart.recipe import Recipe, Train

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Every row of a manifest with its features, in the manifest's order."""

    manifest: pd.DataFrame
    features: Features  # float16 [n, d], a memory map
    classes: list[str]
    truth: Ints  # [n], position of the label in classes

    def rows(self, *splits: str) -> Rows:
        """Positions of the rows in these splits."""
        return np.flatnonzero(self.manifest["split"].isin(splits))


def train(recipe: Recipe, layout: Layout) -> None:
    """Write ``model/R/`` from ``manifest/R/`` and ``features/R/``.

    The head that the validation rows chose is the one that is kept. It is not fitted again on train and
    validation together: the validation rows would stop being rows that the model has not seen, and
    whatever is chosen on them later (a threshold, a calibration) would be chosen on its own training data.

    Raises:
        HeadstartError: files are missing or of different runs, features are not finite, or a class has no
            rows to learn from.
    """
    stamped = stamps.take(recipe, layout)  # first: a choice edited from here on is not what was used
    examples = load(recipe, layout)
    head, penalty, table = fit_rows(examples, recipe.train, examples.rows("train"), examples.rows("val"))
    model = {
        "method": recipe.train.method,
        "classes": examples.classes,
        "l2": penalty,
        "l2_tried": [{name: round(value, 6) for name, value in line.items()} for line in table],
        "stamps": stamped,
    }
    held_out = examples.rows("val", "test")
    probabilities = head.probabilities(examples.features[held_out])
    predictions = examples.manifest.iloc[held_out][["id", "split", "label", "domain", "group"]]
    columns = {f"p:{name}": probabilities[:, i] for i, name in enumerate(examples.classes)}
    predictions = predictions.reset_index(drop=True).assign(**columns)
    with written_whole(layout.model) as folder:
        head.save(folder / "head.safetensors")
        (folder / "model.json").write_text(
            json.dumps(model, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        predictions.to_parquet(folder / "predictions.parquet", index=False)


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
        raise HeadstartError("what training reads is missing", where=str(error.filename), do=again) from None
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
    classes = recipe.validate_.classes or sorted(set(manifest["label"]))
    truth = pd.Index(classes).get_indexer(pd.Index(manifest["label"])).astype(np.int64)
    if (truth < 0).any():
        unknown = sorted(set(manifest["label"][truth < 0]))
        raise HeadstartError(
            f"the manifest has labels that the recipe does not name: {', '.join(unknown)}",
            where=str(path),
            do=f"run `dvc repro validate@{layout.recipe}`",
        )
    return Examples(manifest, features, classes, truth)


def fit_rows(
    examples: Examples, choices: Train, train: Rows, val: Rows
) -> tuple[Head, float, list[dict[str, float]]]:
    """The head fitted on the rows ``train`` with the penalty that the rows ``val`` choose; see ``select``.

    Memory: the float16 features of these rows, and at most 1 GiB for working copies.

    Raises:
        HeadstartError: a class has no rows to learn from, no row to choose by, or features not finite.
    """
    k = len(examples.classes)
    if absent := sorted(set(range(k)) - set(examples.truth[train].tolist())):
        raise HeadstartError(
            f"no training rows of {', '.join(examples.classes[c] for c in absent)}",
            do="add rows of that class, or name the classes wanted in the recipe: `validate: classes:`",
        )
    if not len(val):
        raise HeadstartError(
            "no validation rows to choose by", do="raise `validate: splits: val:` in the recipe"
        )
    confidence = examples.manifest["confidence"].to_numpy(np.float64)
    weights = examples.manifest["weight"].to_numpy(np.float64)
    targets = soft_targets(examples.truth, confidence, k)
    if choices.class_weight == "balanced":
        # Factors of the training rows for both, so that validation judges by what training minimises.
        weights = weights * class_factors(examples.truth[train], weights[train], k)[examples.truth]
    parts = [(_finite(examples, rows), targets[rows], weights[rows]) for rows in (train, val)]
    return select(parts[0], parts[1], choices.l2)


def _finite(examples: Examples, rows: Rows) -> Features:
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
