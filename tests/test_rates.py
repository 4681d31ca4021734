"""Rates: a short run at rising rates, and what it suggests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from headstart import augmentation, rates
from headstart.errors import HeadstartError
from headstart.recipe import Train
from tests import tuning
from tests.test_cli import ROOT, headstart


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning.write_weights(tmp_path_factory.mktemp("efficientnet"), "timm", "test_efficientnet")


def choices(**keys: Any) -> Train:
    return Train(method="fine_tune", batch=8, precision="float32", **keys)


def made_up() -> pd.DataFrame:
    found = np.geomspace(1e-5, 1e-1, 5)
    return pd.DataFrame({"learning_rate": found, "loss": 1.0, "mean": [0.9, 0.7, 0.5, 0.4, 0.8]})


def test_rates_rise_by_equal_factors_over_more_than_an_epoch(weights: Path) -> None:
    run = tuning.case(weights, choices(layer_decay=0.5))
    table = rates.sweep(run, low=1e-6, high=1e-3, steps=10)
    assert run.per_epoch < 10
    assert table["learning_rate"].to_numpy() == pytest.approx(np.geomspace(1e-6, 1e-3, 10))
    assert np.isfinite(table.to_numpy()).all()


def test_the_fastest_layer_has_the_rate_and_the_others_keep_their_ratio(weights: Path) -> None:
    run = tuning.case(weights, choices(layer_decay=0.5))
    rates.sweep(run, low=1e-6, high=1e-3, steps=2)
    found = [group["lr"] for group in run.optimizer.param_groups]
    assert max(found) == pytest.approx(1e-3)
    assert [rate / max(found) for rate in found] == pytest.approx(
        [rate / max(run.rates) for rate in run.rates]
    )
    assert len(set(found)) > 3


def test_what_is_random_differs_from_step_to_step(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tuning.case(weights, choices(mixup=0.4))
    blended: list[int] = []
    mixed = augmentation.mixed

    def watched(*given: Any) -> Any:
        blended.append(given[-1])
        return mixed(*given)

    monkeypatch.setattr(augmentation, "mixed", watched)
    rates.sweep(run, low=1e-6, high=1e-5, steps=3)
    assert blended == [0, 1, 2]
    assert [line["step"] for line in run.history.steps] == [1, 2, 3]


def test_the_mean_is_not_drawn_to_where_it_starts(weights: Path) -> None:
    table = rates.sweep(tuning.case(weights, choices()), low=1e-6, high=1e-5, steps=3)
    first, second, *_ = table["loss"]
    assert table["mean"][0] == pytest.approx(first)
    assert table["mean"][1] == pytest.approx((0.9 * first + second) / 1.9)


def test_it_ends_where_nothing_is_learned_any_more(weights: Path) -> None:
    run = tuning.case(weights, choices(optimizer="sgd"))
    table = rates.sweep(run, low=1e-3, high=1e6, steps=60)
    assert 1 < len(table) < 60
    assert table["learning_rate"].iloc[-1] < 1e6
    assert 0 < rates.suggested(table) < 1e5
    assert all(math.isfinite(loss) for loss in table["loss"])


def test_what_stops_the_first_step_is_told(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tuning.case(weights, choices())
    monkeypatch.setattr(run, "learn", Mock(side_effect=HeadstartError("it does not fit into memory")))
    with pytest.raises(HeadstartError, match="does not fit into memory"):
        rates.sweep(run)


def test_a_tenth_of_the_rate_of_the_lowest_loss_is_suggested() -> None:
    assert rates.suggested(made_up()) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "given", [{}, {"learning_rate": 0.01}, {"head_learning_rate": 0.3}, {"head_learning_rate": 1e-6}]
)
def test_what_is_suggested_for_the_recipe_makes_the_fastest_layer_learn_at_that_rate(
    given: dict[str, float], weights: Path
) -> None:
    run = tuning.case(weights, choices(**given))
    found = rates.keys(run, 2e-3)
    assert set(found) == {"learning_rate"} | set(given)
    again = tuning.case(weights, choices(**found))
    assert max(again.rates) == pytest.approx(2e-3)
    assert [rate / 2e-3 for rate in again.rates] == pytest.approx(
        [rate / max(run.rates) for rate in run.rates]
    )


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "rates.png"
    rates.plot(made_up(), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_a_recipe_that_fine_tunes_nothing_has_no_rate_to_find(tmp_path: Path) -> None:
    done = headstart("find-learning-rate", "recipes/sentiment.yaml", cwd=ROOT, tmp_path=tmp_path)
    assert done.returncode == 1
    assert "nothing here learns at a rate" in done.stderr
    assert "set it to fine_tune" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
