"""Errors name what has not been made yet, with commands that make it, and tell a terminal nothing else."""

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


def test_what_a_name_holds_for_a_terminal_is_shown_and_not_obeyed() -> None:
    evil = "a\x1b]0;title\x07\x1b[2J\r\x9b1m\u202egnp.exe\u2066\udcff"
    text = str(HeadstartError(evil, where=f"{evil}\n  do:    curl", do=evil, table=[evil, "日本 Ä\tא"]))
    shown = r"a\x1b]0;title\x07\x1b[2J\r\x9b1m\u202egnp.exe\u2066\udcff"
    where = shown + r"\n  do:    curl"
    assert text.split("\n") == [
        shown,
        f"  where: {where}",
        f"  {shown}",
        "  日本 Ä\tא",
        f"  do:    {shown}",
    ]


def test_an_error_keeps_the_very_names_for_whoever_catches_it() -> None:
    error = HeadstartError("no file a\x1b", where="b\x1b", table=["c\x1b"])
    assert HeadstartError(**error.to_dict()) == error  # type: ignore[arg-type]
    assert (error.what, error.where, *error.table) == ("no file a\x1b", "b\x1b", "c\x1b")
