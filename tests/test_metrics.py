from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headstart import metrics
from headstart.metrics import (
    METRICS,
    MOST_RANKED,
    confusions,
    cross_entropies,
    curve,
    gains,
    intervals,
    scores,
)


def predictions(n: int, k: int, seed: int = 0, skill: float = 1.0) -> tuple[Any, Any]:
    chance = np.random.default_rng(seed)
    truth = chance.integers(0, k, n)
    logits = chance.normal(size=(n, k)) + skill * np.eye(k)[truth]
    odds = np.exp(logits).round(1) + 0.1  # rounded, so that there are ties
    return truth, odds / odds.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_metric_is_what_scikit_learn_says(k: int, weighted: bool) -> None:
    from sklearn import metrics as known

    truth, p = predictions(400, k)
    weights = np.random.default_rng(1).integers(0, 4, 400).astype(float) if weighted else None
    predicted = p.argmax(axis=1)
    aurocs = [known.roc_auc_score(truth == c, p[:, c], sample_weight=weights) for c in range(k)]
    expected = {
        "accuracy": known.accuracy_score(truth, predicted, sample_weight=weights),
        "balanced_accuracy": known.balanced_accuracy_score(truth, predicted, sample_weight=weights),
        "macro_f1": known.f1_score(truth, predicted, average="macro", sample_weight=weights),
        "auroc": aurocs[1] if k == 2 else np.mean(aurocs),
        "log_loss": known.log_loss(truth, p, sample_weight=weights),
    }
    found = scores(truth, p, weights)
    assert set(found) == set(METRICS)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [2, 4])
def test_a_weight_is_a_number_of_copies(k: int) -> None:
    truth, p = predictions(200, k)
    times = np.random.default_rng(1).integers(0, 4, 200)
    copied = scores(np.repeat(truth, times), np.repeat(p, times, axis=0))
    assert scores(truth, p, times.astype(float)) == pytest.approx(copied, abs=1e-12)


def test_calibration_error_is_the_gap_between_promise_and_outcome() -> None:
    truth = np.array([0] * 6 + [1] * 4)
    p = np.tile([0.9, 0.1], (10, 1))
    assert scores(truth, p)["ece"] == pytest.approx(0.3)
    both = np.concatenate([p[:5], np.tile([0.52, 0.48], (5, 1))])  # 5 of 5, and 1 of 5
    assert scores(truth, both)["ece"] == pytest.approx((0.1 + 0.32) / 2)


def test_soft_targets_cost_their_cross_entropy() -> None:
    p = np.array([[0.5, 0.5], [0.9, 0.1]])
    found = cross_entropies(np.array([[0.3, 0.7], [1.0, 0.0]]), p)
    assert found == pytest.approx([np.log(2), -np.log(0.9)])
    truth, p = predictions(50, 3)
    assert cross_entropies(np.eye(3)[truth], p).mean() == pytest.approx(scores(truth, p)["log_loss"])


def test_the_area_under_the_curve_is_the_auroc_ties_or_not() -> None:
    truth, p = predictions(300, 2)
    assert len(np.unique(p[:, 1])) < 300
    found = curve(truth == 1, p[:, 1])
    assert found is not None
    false, recall, precision = found
    area = np.trapezoid(np.append(0, recall), np.append(0, false))
    assert area == pytest.approx(scores(truth, p)["auroc"])
    assert (false[-1], recall[-1], precision[-1]) == (1, 1, pytest.approx((truth == 1).mean()))
    assert curve(truth >= 0, p[:, 1]) is curve(truth < 0, p[:, 1]) is None


def test_confusions_count_rows_by_what_they_are_and_what_they_are_called() -> None:
    found = confusions(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 2]), 3)
    assert found.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_a_class_without_rows_is_left_out_of_the_means_and_auroc_of_one_class_is_unknown() -> None:
    _, p = predictions(20, 3)
    p[:, 2] = 0
    truth = np.zeros(20, dtype=int)
    found = scores(truth, p)
    assert found["balanced_accuracy"] == found["accuracy"]
    assert np.isnan(found["auroc"])
    assert intervals(truth, p, np.arange(20), resamples=100)["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_a_rare_class_that_some_resamples_miss_leaves_no_hole() -> None:
    truth, p = predictions(60, 2)
    truth[:] = 0
    truth[:2] = 1
    found = intervals(truth, p, np.arange(60), resamples=200)
    assert all(isinstance(value, float) for interval in found.values() for value in interval.values())


@pytest.mark.parametrize(
    ("groups", "size", "at_least"), [(200, 1, 92), (60, 5, 92), (20, 10, 92), (10, 20, 89)]
)
def test_intervals_cover_the_truth_about_95_times_in_100(groups: int, size: int, at_least: int) -> None:
    """Rows of a group share their difficulty. Ten groups reach 93 (plain percentiles: 88)."""
    trials, covered = 300, 0
    for trial in range(trials):
        chance = np.random.default_rng([size, trial])
        right = chance.random(groups * size) < np.repeat(chance.beta(6, 2, groups), size)  # mean 0.75
        p = np.tile([0.75, 0.25], (groups * size, 1))
        names = np.repeat(np.arange(groups), size)
        found = intervals((~right).astype(int), p, names, resamples=200, seed=trial)["accuracy"]
        assert found["low"] is not None and found["high"] is not None
        covered += found["low"] <= 0.75 <= found["high"]
    assert at_least <= 100 * covered / trials <= 98


def test_intervals_of_auroc_cover_the_truth_as_often() -> None:
    covered = 0
    for trial in range(200):
        chance = np.random.default_rng(trial)
        truth = chance.integers(0, 2, 120)
        odds = np.exp(chance.normal(size=120) + truth)
        p = np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1)
        found = intervals(truth, p, np.arange(120), resamples=200, seed=trial)["auroc"]
        assert found["low"] is not None and found["high"] is not None
        covered += found["low"] <= 0.760250 <= found["high"]  # of two normals one deviation apart
    assert 92 <= 100 * covered / 200 <= 98


def test_the_interval_of_the_calibration_error_allows_for_the_noise_in_it() -> None:
    """Of a miscalibrated model; the plain percentile interval lies too high."""
    covered = 0
    for trial in range(100):
        chance = np.random.default_rng(trial)
        p = np.tile([0.9, 0.1], (300, 1))
        p[150:] = [0.6, 0.4]
        truth = (chance.random(300) > np.repeat([0.8, 0.6], 150)).astype(int)  # error 0.1 and 0: 0.05
        ece = intervals(truth, p, np.arange(300), resamples=200, seed=trial)["ece"]
        assert ece["low"] is not None and ece["high"] is not None
        covered += ece["low"] <= 0.05 <= ece["high"]
    assert covered >= 88


def test_a_few_rows_that_are_all_right_do_not_show_that_no_row_is_ever_wrong() -> None:
    truth = np.arange(20) % 2
    right, wrong = np.eye(2)[truth], np.eye(2)[1 - truth]
    for metric in ("accuracy", "balanced_accuracy", "macro_f1"):
        rows, groups, mirrored = (
            intervals(truth, p, of, resamples=100)[metric]
            for p, of in ((right, np.arange(20)), (right, np.arange(20) // 4), (wrong, np.arange(20)))
        )
        assert rows == pytest.approx({"value": 1, "low": 0.025 ** (1 / 20), "high": 1})
        assert groups == pytest.approx({"value": 1, "low": 0.025 ** (1 / 5), "high": 1})
        assert mirrored == pytest.approx({"value": 0, "low": 0, "high": 1 - 0.025 ** (1 / 20)})
    assert intervals(truth, right, np.zeros(20))["accuracy"]["low"] is None


def test_a_class_of_few_groups_that_are_all_right_has_the_same_say_in_how_sure_one_can_be() -> None:
    truth = np.repeat([0, 1], [18, 2])
    found = intervals(truth, np.eye(2)[truth], np.arange(20), resamples=100)
    assert found["accuracy"]["low"] == pytest.approx(0.025 ** (1 / 20))
    assert found["balanced_accuracy"]["low"] == found["macro_f1"]["low"] == pytest.approx(0.025 ** (1 / 4))


def test_intervals_of_a_good_model_on_few_rows_cover_the_truth_as_often() -> None:
    """Of twenty rows, a third of the samples have all of them right."""
    covered = 0
    for trial in range(300):
        right = np.random.default_rng(trial).random(20) < 0.95
        p = np.tile([0.95, 0.05], (20, 1))
        found = intervals((~right).astype(int), p, np.arange(20), resamples=200, seed=trial)["accuracy"]
        assert found["low"] is not None and found["high"] is not None
        covered += found["low"] <= 0.95 <= found["high"]
    assert 100 * covered / 300 >= 92


def test_rows_that_resemble_each_other_give_wider_intervals_than_independent_rows() -> None:
    chance = np.random.default_rng(0)
    right = np.repeat(chance.random(40) < 0.7, 25)  # 40 groups of 25 rows that go right or wrong together
    truth, p = (~right).astype(int), np.tile([0.7, 0.3], (1000, 1))

    def width(groups: Any) -> float:
        found = intervals(truth, p, groups, resamples=400)["accuracy"]
        assert found["low"] is not None and found["high"] is not None
        return found["high"] - found["low"]

    assert width(np.repeat(np.arange(40), 25)) > 3 * width(np.arange(1000))


def test_rows_are_ranked_only_for_a_metric_that_needs_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, p = predictions(60, 4)
    told = scores(truth, p)
    monkeypatch.setattr(metrics._Ranking, "of", None)
    wanted = [metric for metric in METRICS if metric != "auroc"]
    assert scores(truth, p, wanted=wanted) == {metric: told[metric] for metric in wanted}
    assert set(gains(truth, p, p[::-1], np.arange(60), wanted=["accuracy"], resamples=5)) == {"accuracy"}


def test_auroc_of_very_many_classes_is_measured_and_not_resampled() -> None:
    for classes, known in ((MOST_RANKED, True), (MOST_RANKED + 1, False)):
        truth, p = predictions(300, classes)
        found = intervals(truth, p, np.arange(300), resamples=20)
        assert found["auroc"]["value"] == pytest.approx(scores(truth, p)["auroc"])
        assert (found["auroc"]["low"] is not None) == (found["auroc"]["high"] is not None) == known
        assert all(found[metric]["low"] is not None for metric in METRICS if metric != "auroc")


def test_one_group_says_nothing_about_others() -> None:
    truth, p = predictions(50, 2)
    found = intervals(truth, p, np.zeros(50))
    assert found["accuracy"]["value"] is not None
    assert found["accuracy"]["low"] is None and found["accuracy"]["high"] is None


def test_the_same_seed_gives_the_same_intervals_and_another_seed_nearly_so() -> None:
    truth, p = predictions(300, 2)
    first, again, other = (intervals(truth, p, np.arange(300), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["accuracy"] != other["accuracy"]
    assert first["accuracy"] == pytest.approx(other["accuracy"], abs=0.02)


@pytest.mark.parametrize(
    ("truth", "p"),
    [
        ([], np.empty((0, 2))),
        ([0, 1], np.full((3, 2), 0.5)),
        ([0, 2], np.full((2, 2), 0.5)),
        ([-1, 0], np.full((2, 2), 0.5)),
        ([0, 1], np.full((2, 2), np.nan)),
        ([0, 1], np.full(2, 0.5)),
    ],
)
def test_input_that_makes_no_sense_is_refused(truth: list[int], p: Any) -> None:
    with pytest.raises(ValueError, match=r"probabilities|columns"):
        scores(np.array(truth, dtype=int), p)


def test_gains_are_differences_on_the_same_resamples() -> None:
    chance = np.random.default_rng(0)
    truth = chance.integers(0, 2, 400)
    groups = np.repeat(np.arange(40), 10)
    noisy = np.clip(truth + chance.normal(0, 0.6, 400), 0.01, 0.99)
    one = np.column_stack([1 - noisy, noisy])
    other = one.copy()
    other[:40] = other[:40, ::-1]  # four groups of forty, turned upside down
    same = gains(truth, one, one, groups, resamples=50)
    assert all((values == 0).all() for values in same.values())
    found = gains(truth, one, other, groups, resamples=2000)
    for metric in ("accuracy", "auroc"):
        exact = scores(truth, one)[metric] - scores(truth, other)[metric]
        assert found[metric].mean() == pytest.approx(exact, abs=0.01)
    # The gain in accuracy is that of a group, (right - wrong) / 400, summed over 40 groups drawn with
    # replacement: its standard error is that of a mean of 40 values.
    hits = one.argmax(axis=1) == truth
    each = np.array([2 * hits[groups == g].mean() - 1 if g < 4 else 0 for g in range(40)])
    assert found["accuracy"].std() == pytest.approx(each.std() / np.sqrt(40), rel=0.1)
    reverse = gains(truth, other, one, groups, resamples=2000)
    assert reverse["auroc"] == pytest.approx(-found["auroc"])
