"""What has not been made yet is named, with commands that make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from headstart import evaluation, examples, recipe, stamps, trials
from headstart.errors import HeadstartError
from headstart.features import features
from headstart.layout import Layout

ROOT = Path(__file__).parents[1]
CHOSEN = recipe.load(ROOT / "recipes/sentiment.yaml")


@pytest.mark.parametrize(
    ("asked", "stage", "missing"),
    [
        (lambda layout: features(CHOSEN, layout), "validate", "manifest/sentiment/manifest.parquet"),
        (lambda layout: trials.manifest(layout, "rows"), "validate", "manifest/sentiment/manifest.parquet"),
        (lambda layout: examples.load(CHOSEN, layout), "features", "manifest/sentiment/manifest.parquet"),
        (lambda layout: stamps.take(CHOSEN, layout), "features", "features/sentiment/features.json"),
        (
            lambda layout: evaluation.predictions(layout.model, layout.truth),
            "train",
            "model/sentiment/predictions.parquet",
        ),
    ],
)
def test_what_has_not_been_made_yet_is_named(
    tmp_path: Path, asked: Callable[[Layout], object], stage: str, missing: str
) -> None:
    with pytest.raises(HeadstartError) as caught:
        asked(Layout(tmp_path, "sentiment"))
    assert caught.value.where == str(tmp_path / missing)
    assert caught.value.do == (
        f"run `headstart ingest recipes/sentiment.yaml`, then `dvc repro {stage}@sentiment`"
    )
