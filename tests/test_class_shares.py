from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from headstart.class_shares import bbse, calibrated, label_shift, mlls, most_likely

GAP = 2.0  # between the means of two classes of one deviation


def two_classes(n: int, second: float, chance: Any, source_second: float = 0.3) -> tuple[Any, Any]:
    """True classes, the second with a share of the rows, and what is exactly right to say at the source."""
    truth = (chance.random(n) < second).astype(int)
    x = chance.normal(size=n) + GAP * truth
    odds = GAP * x - GAP**2 / 2 + np.log(source_second / (1 - source_second))
    return truth, softmax(np.stack([np.zeros(n), odds], axis=1), axis=1)


def distorted(p: Any, temperature: float, bias: Any) -> Any:
    """What bias-corrected temperature scaling by ``temperature`` and ``bias`` makes right again."""
    return softmax(temperature * (np.log(p) - bias), axis=1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_class_shares_of_the_target_are_recovered(share: float) -> None:
    chance = np.random.default_rng(0)
    truth, source = two_classes(4000, 0.3, chance)
    _, target = two_classes(4000, share, chance)
    for found in (
        most_likely(np.array([0.7, 0.3]), target, np.full(4000, 1 / 4000)),
        label_shift(truth, None, source, target, resamples=2).prior,
        label_shift(truth, None, source, target, by=bbse, resamples=2).prior,
    ):
        assert found.sum() == pytest.approx(1)
        assert found[1] == pytest.approx(share, abs=0.05)


def test_black_box_shares_are_those_that_mix_the_mean_answers_of_each_class() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1])
    source = np.array([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.2, 0.8], [0.4, 0.6]])
    target = np.array([[0.6, 0.4], [0.1, 0.9]])
    # On average 0.75 and 0.3 for class 0, and 0.35 on the target.
    found = bbse(truth, source, target)(np.ones(6), np.ones(2))
    assert found[0] == pytest.approx((0.35 - 0.3) / (0.75 - 0.3))


def test_shares_of_many_classes_are_recovered_even_where_one_is_gone() -> None:
    chance = np.random.default_rng(0)
    wanted = np.array([0.0, 0.05, 0.25, 0.7])

    def draw(shares: Any) -> tuple[Any, Any]:
        truth = chance.choice(4, size=5000, p=shares)
        x = chance.normal(size=(5000, 4)) + 1.5 * np.eye(4)[truth]
        return truth, softmax(1.5 * x, axis=1)

    truth, source = draw(np.full(4, 0.25))
    _, target = draw(wanted)
    everything = np.ones(5000), np.ones(5000)
    assert most_likely(np.full(4, 0.25), target, np.full(5000, 1 / 5000)) == pytest.approx(wanted, abs=0.05)
    for estimate in (mlls, bbse):
        assert estimate(truth, source, target)(*everything) == pytest.approx(wanted, abs=0.05)


def test_the_most_likely_shares_are_found_even_where_classes_hardly_differ() -> None:
    """Two thousand plain steps of expectation maximisation end 0.03 short; here every share is tried."""
    logs = 0.05 * np.random.default_rng(0).normal(size=500)
    logs -= logs.mean()  # so that neither class alone is best
    p = softmax(np.stack([np.full(500, np.log(0.6)), np.log(0.4) + logs], axis=1), axis=1)
    shares = np.linspace(0, 1, 10_001)
    likelihood = np.log(p[:, :1] * (1 - shares) / 0.6 + p[:, 1:] * shares / 0.4).mean(axis=0)
    found = most_likely(np.array([0.6, 0.4]), p, np.full(500, 1 / 500))
    assert found[1] == pytest.approx(shares[likelihood.argmax()], abs=2e-3)


def test_calibration_recovers_a_known_temperature_and_bias() -> None:
    chance = np.random.default_rng(0)
    logits = chance.normal(size=(40_000, 3)) * 1.5
    right = softmax(logits, axis=1)
    truth = (chance.random((40_000, 1)) > right.cumsum(axis=1)).sum(axis=1)
    wrong = distorted(right, 2.5, np.array([0.5, -0.5, 0.2]))
    found = calibrated(truth, wrong, wrong)
    # log found = log wrong / T + b, up to a constant per row: the columns' differences give both.
    before, after = np.diff(np.log(wrong), axis=1), np.diff(np.log(found), axis=1)
    for column, bias in ((0, -1.0), (1, 0.7)):
        slope, offset = np.polyfit(before[:, column], after[:, column], 1)
        assert 1 / slope == pytest.approx(2.5, abs=0.08)
        assert offset == pytest.approx(bias, abs=0.05)
    assert found == pytest.approx(right, abs=0.03)
    assert found.mean(axis=0) == pytest.approx(np.bincount(truth) / 40_000, abs=1e-4)


@pytest.mark.parametrize("by", [mlls, bbse])
def test_a_row_drawn_several_times_counts_as_so_many_copies(by: Any) -> None:
    chance = np.random.default_rng(0)
    truth, source = two_classes(300, 0.4, chance)
    _, target = two_classes(200, 0.6, chance)
    times, others = chance.integers(0, 4, 300), chance.integers(0, 4, 200)
    copies = np.repeat(truth, times), np.repeat(source, times, axis=0), np.repeat(target, others, axis=0)
    copied = by(*copies)(np.ones(times.sum()), np.ones(others.sum()))
    drawn = by(truth, source, target)(times.astype(float), others.astype(float))
    assert drawn == pytest.approx(copied, abs=1e-5)


def test_calibration_lowers_no_likelihood() -> None:
    chance = np.random.default_rng(0)
    truth, p = two_classes(300, 0.4, chance)
    p = distorted(p, 0.4, np.array([1.0, 0.0]))
    rows = np.arange(300)
    best = np.log(calibrated(truth, p, p)[rows, truth]).sum()
    for slope in (0.3, 1.0, 2.0, 2.5, 3.0):
        for bias in (-1.0, 0.0, 1.0, 2.0):
            other = log_softmax(slope * np.log(p) + [0, bias], axis=1)[rows, truth].sum()
            assert best > other - 0.05  # the wide prior costs less than this


def test_classes_told_apart_perfectly_leave_calibration_finite() -> None:
    truth = np.arange(50) % 2
    p = np.where(np.eye(2)[truth] == 1, 0.8, 0.2)
    found = calibrated(truth, p, np.array([[0.8, 0.2], [0.5, 0.5], [1.0, 0.0]]))
    assert np.isfinite(found).all()
    assert found[0, 0] > 0.98
    assert found[1, 0] == pytest.approx(0.5, abs=1e-6)


def test_miscalibrated_probabilities_mislead_the_likelihood_but_not_label_shift() -> None:
    chance = np.random.default_rng(0)
    truth, source = two_classes(4000, 0.3, chance)
    _, target = two_classes(4000, 0.6, chance)
    source, target = (distorted(p, 3, np.array([0.0, 1.0])) for p in (source, target))
    likely = most_likely(np.array([0.7, 0.3]), target, np.full(4000, 1 / 4000))
    assert abs(likely[1] - 0.6) > 0.1
    for by in (mlls, bbse):
        found = label_shift(truth, None, source, target, by=by, resamples=2)
        assert found.prior[1] == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(("by", "share"), [(mlls, 0.6), (bbse, 0.6), (bbse, 0.2)])
def test_intervals_cover_the_true_share(by: Any, share: float) -> None:
    covered = 0
    for seed in range(40):
        chance = np.random.default_rng([seed, 7])
        truth, source = two_classes(150, 0.3, chance)
        _, target = two_classes(150, share, chance)
        source, target = (distorted(p, 2, np.array([0.0, 0.5])) for p in (source, target))
        found = label_shift(truth, None, source, target, by=by, resamples=80, seed=seed)
        assert (found.low <= found.prior).all() and (found.prior <= found.high).all()
        covered += bool(found.low[1] <= share <= found.high[1])
    assert covered >= 32


def test_whole_groups_are_resampled_so_intervals_cover_where_rows_are_near_copies() -> None:
    covered, ignorant = 0, 0
    group = np.repeat(np.arange(40), 8)
    for seed in range(40):
        chance = np.random.default_rng([seed, 8])
        truth, source = two_classes(40, 0.3, chance)
        _, target = two_classes(40, 0.6, chance)
        rows = truth[group], source[group], target[group]
        found = label_shift(rows[0], group, *rows[1:], target_groups=group, by=bbse, resamples=100, seed=seed)
        plain = label_shift(rows[0], None, *rows[1:], by=bbse, resamples=100, seed=seed)
        covered += bool(found.low[1] <= 0.6 <= found.high[1])
        ignorant += bool(plain.low[1] <= 0.6 <= plain.high[1])
    assert covered >= 32 > ignorant


def test_samples_of_one_distribution_show_no_change_however_many_classes_there_are() -> None:
    """The source's own shares are a sample too, and of ten classes one is always far off."""

    def draw(shares: Any, chance: Any) -> tuple[Any, Any]:
        truth = chance.choice(len(shares), size=300, p=shares)
        return truth, softmax(
            2 * (chance.normal(size=(300, len(shares))) + 2 * np.eye(len(shares))[truth]), 1
        )

    alarms, seen = 0, 0
    for classes in (2, 5, 10):
        for seed in range(6):
            chance = np.random.default_rng([seed, classes])
            alike = np.full(classes, 1 / classes)
            other = np.where(np.arange(classes) == 0, 0.2, -0.2 / (classes - 1)) + alike
            truth, source = draw(alike, chance)
            same, changed = (
                label_shift(truth, None, source, draw(shares, chance)[1], resamples=80, seed=seed).shown
                for shares in (alike, other)
            )
            alarms, seen = alarms + same, seen + changed
    assert alarms <= 2
    assert seen >= 14


def test_the_same_seed_gives_the_same_intervals_and_one_group_gives_none() -> None:
    chance = np.random.default_rng(0)
    truth, source = two_classes(200, 0.3, chance)
    _, target = two_classes(200, 0.6, chance)
    first, again, other = (
        label_shift(truth, None, source, target, resamples=20, seed=seed) for seed in (0, 0, 1)
    )
    assert (first.low == again.low).all() and (first.high == again.high).all()
    assert first.low[1] != other.low[1]
    assert first.source_prior == pytest.approx(np.bincount(truth) / 200)
    assert first.shown
    alone = label_shift(truth, None, source, target, target_groups=np.zeros(200), resamples=20)
    assert alone.prior == pytest.approx(first.prior)
    assert np.isnan(alone.low).all() and np.isnan(alone.high).all()
    assert not alone.shown
