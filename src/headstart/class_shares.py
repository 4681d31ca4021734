"""Class shares: how common each class is in a target without labels, from a classifier of the source.

Goes in: probabilities on both sides and the source's true classes. Comes out: shares with intervals, right
where classes look the same on both sides. Never sees a feature; whether they do look the same is for
``shifts`` to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.metrics import TINY, Floats, Ints, levels, resampled

Groups = NDArray[Any]

RESAMPLES = 200
CONFIDENCE = 0.95
# Standard deviation of the prior on inverse temperature and biases: far too wide to move an estimate, but
# rows that are told apart perfectly then have a finite answer.
WIDE = 10.0


Estimate = Callable[[Floats, Floats], Floats]  # weights of source [n] and target rows [m] -> shares [k]


@dataclass(frozen=True)
class LabelShift:
    """Estimated class shares in the target, and the source's own."""

    prior: Floats  # [k], sums to 1
    low: Floats  # [k], lower bound of the 95 % bootstrap interval of each share
    high: Floats  # [k], upper bound; both NaN where a side has a single group
    source_prior: Floats  # [k], shares of the source rows
    by_chance: float  # largest change of a share that chance gives in 95 % of samples; NaN as the bounds are

    @property
    def shown(self) -> bool:
        """Whether the share that has changed most has changed by more than chance; never where that is NaN.

        One test of the largest change, however many classes there are: with a test for each, some class
        would change in most samples of one distribution.
        """
        return bool(np.abs(self.prior - self.source_prior).max() > self.by_chance)


def calibrated(truth: Ints, source_probabilities: Floats, probabilities: Floats) -> Floats:
    """Probabilities by bias-corrected temperature scaling (Alexandari et al. 2020).

    ``softmax(log p / T + b)``: one temperature T and one bias b per class, those that make the true
    classes of held-out source rows most likely. Temperature alone (Guo et al. 2017) leaves a class that is
    named too often named too often, and ``most_likely`` takes that for a shift.

    Args:
        truth: int[n], positions of the true classes of source rows that the classifier has not seen.
        source_probabilities: float64[n, k], of the same rows.
        probabilities: float64[m, k], to recalibrate: of the target, say.

    Returns:
        float64[m, k], rows that sum to 1.

    Raises:
        ValueError: shapes that do not fit, no rows, rows that do not sum to 1.
    """
    from scipy.special import softmax

    mine, theirs = both_sides(truth, source_probabilities, probabilities)
    slope, *bias = _recalibration(truth, logs_of(mine), np.ones(len(mine)))
    result: Floats = softmax(slope * logs_of(theirs) + bias, axis=1)
    return result


def mlls(truth: Ints, mine: Floats, theirs: Floats) -> Estimate:
    """Class shares in the target that make its rows most likely (Saerens et al. 2002).

    Right where classes look the same on both sides and the probabilities are calibrated on the source, which
    is done first, as by ``calibrated``; then the most precise there is (Alexandari et al. 2020; Garg et al.
    2020).
    """
    from scipy.special import softmax

    source_logs, target_logs = logs_of(mine), logs_of(theirs)
    start = _recalibration(truth, source_logs, np.ones(len(mine)))

    def estimate(weights: Floats, target_weights: Floats) -> Floats:
        slope, *bias = _recalibration(truth, source_logs, weights, start)
        p: Floats = softmax(slope * target_logs + bias, axis=1)
        prior = shares_of(truth, mine.shape[1], weights)
        return most_likely(prior, p, target_weights / target_weights.sum())

    return estimate


def bbse(truth: Ints, mine: Floats, theirs: Floats) -> Estimate:
    """Class shares in the target by black-box shift estimation (Lipton et al. 2018).

    Solves ``confusion @ shares = answers``: what the classifier says on rows of each class is known from
    the source, what it says over all from the target. Right where classes look the same on both sides;
    the classifier may be miscalibrated, so long as its answers differ between classes. Non-negative least
    squares, then scaled to sum to 1. Probabilities are averaged rather than top classes counted: less noise.
    """
    from scipy.optimize import nnls

    actual = np.eye(mine.shape[1])[truth]

    def estimate(weights: Floats, target_weights: Floats) -> Floats:
        confusion = (mine * weights[:, None]).T @ actual / (weights @ actual)
        shares = nnls(confusion, target_weights @ theirs / target_weights.sum())[0]
        total = shares.sum()  # 0 where the target's answers are none that the source's rows get
        result: Floats = shares / total if total else np.full_like(shares, np.nan)
        return result

    return estimate


def label_shift(
    truth: Ints,
    groups: Groups | None,
    source_probabilities: Floats,
    target_probabilities: Floats,
    *,
    target_groups: Groups | None = None,
    by: Callable[[Ints, Floats, Floats], Estimate] = mlls,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LabelShift:
    """Class shares in the target with bootstrap intervals, from a classifier's probabilities.

    Each resample draws whole groups on both sides and does everything anew, recalibration included. A
    resample that lacks a class on the source side says nothing. Percentiles are expanded for few groups
    (Hesterberg 2015). The source's own shares are an estimate too, so what chance does is read off the change
    from them within each resample.

    The shares, and the intervals with them, suppose that a class looks the same on both sides. Where
    features have moved within a class they can be wrong by any amount; ``diagnose`` looks for that.

    Cost: 2 s for 20,000 rows a side, two classes and 200 resamples.

    Args:
        truth: int[n], positions of the true classes of source rows that the classifier has not seen.
        groups: [n], any values, or None for each row by itself.
        source_probabilities: float64[n, k], of the same rows.
        target_probabilities: float64[m, k].
        target_groups: [m], any values, or None.
        by: ``mlls`` or ``bbse``.
        resamples: number of bootstrap resamples.
        seed: the same seed gives the same intervals.

    Raises:
        ValueError: shapes that do not fit, no rows, rows that do not sum to 1, a class without source rows.
    """
    mine, theirs = both_sides(truth, source_probabilities, target_probabilities)
    sides = group_codes(groups, target_groups, len(mine), len(theirs))
    sizes = [len(np.unique(side)) for side in sides]
    estimate = by(truth, mine, theirs)
    shares = shares_of(truth, mine.shape[1])
    prior = estimate(np.ones(len(mine)), np.ones(len(theirs)))
    drawn, changes = np.full((2, resamples, len(prior)), np.nan)
    if min(sizes) > 1:
        chance = np.random.default_rng(seed)
        draws = (resampled(side, resamples, chance) for side in sides)
        for resample, times in enumerate(zip(*draws, strict=True)):
            if (np.bincount(truth, times[0], len(prior)) > 0).all():
                drawn[resample] = estimate(*times)
                changes[resample] = drawn[resample] - shares_of(truth, len(prior), times[0])
    low, high = interval_bounds(drawn, min(sizes))
    strayed = np.abs(changes - (prior - shares)).max(axis=1)
    # With their negatives, as a change may go either way: the interval's two tails then are one of these.
    _, by_chance = interval_bounds(np.concatenate([-strayed, strayed])[:, None], min(sizes))
    return LabelShift(prior, low, high, shares, float(by_chance[0]))


def most_likely(source_prior: Floats, probabilities: Floats, shares: Floats) -> Floats:
    """The class shares [k] that maximise ``shares @ log(probabilities @ (prior / source_prior))``.

    The likelihood is concave, so there is one answer. Expectation maximisation, accelerated by squared
    extrapolation (SQUAREM, Varadhan & Roland 2008), because where classes overlap the plain steps shrink long
    before they arrive.

    Args:
        source_prior: float64[k], positive, sums to 1: the shares that the probabilities suppose.
        probabilities: float64[m, k], of target rows.
        shares: float64[m], of each row in the sum; they sum to 1.
    """
    ratio = probabilities / source_prior

    def step(prior: Floats) -> Floats:
        result: Floats = prior * ((shares / (ratio @ prior)) @ ratio)
        return result

    def likelihood(prior: Floats) -> float:
        return float(shares @ np.log(ratio @ prior))

    prior = source_prior
    for _ in range(1000):
        once = step(prior)
        twice = step(once)
        if np.abs(twice - once).max() < 1e-8:
            return twice
        first, second = once - prior, twice - once
        bend = float(np.linalg.norm(second - first))
        stride = max(1.0, float(np.linalg.norm(first)) / bend) if bend > 0 else 1.0
        # A share of exactly 0 could never grow again.
        leap = np.maximum(prior + 2 * stride * first + stride**2 * (second - first), 1e-12)
        leap = step(leap / leap.sum())
        prior = leap if likelihood(leap) > likelihood(twice) else twice
    return prior


def _recalibration(truth: Ints, logs: Floats, weights: Floats, start: Floats | None = None) -> Floats:
    """Inverse temperature and biases [1 + k] of the weighted rows; Newton's method on a convex loss."""
    from scipy.special import log_softmax

    n, k = logs.shape
    centred = logs - logs.mean(axis=1, keepdims=True)
    unchanged = np.append(1.0, np.zeros(k))
    rows = np.arange(n)

    def loss(point: Floats) -> tuple[float, Floats]:
        answer = log_softmax(point[0] * centred + point[1:], axis=1)
        value = (
            -float(weights @ answer[rows, truth]) + float(np.square(point - unchanged).sum()) / WIDE**2 / 2
        )
        return value, answer

    point = unchanged if start is None else start
    value, answer = loss(point)
    for _ in range(100):
        p = np.exp(answer)
        pull = p * weights[:, None]
        mean = (p * centred).sum(axis=1)
        slope = (point - unchanged) / WIDE**2
        slope[0] += weights @ (mean - centred[rows, truth])
        slope[1:] += pull.sum(axis=0) - np.bincount(truth, weights, k)
        curve = np.eye(k + 1) / WIDE**2
        curve[0, 0] += weights @ ((p * centred**2).sum(axis=1) - mean**2)
        curve[0, 1:] += (pull * (centred - mean[:, None])).sum(axis=0)
        curve[1:, 0] = curve[0, 1:]
        curve[1:, 1:] += np.diag(pull.sum(axis=0)) - pull.T @ p
        step = np.linalg.solve(curve, slope)
        if slope @ step < 1e-10 * weights.sum():
            break
        size = 1.0
        while (tried := loss(point - size * step))[0] > value and size > 1e-6:
            size /= 2
        point = point - size * step
        value, answer = tried
    return point


def group_codes(groups: Groups | None, target_groups: Groups | None, n: int, m: int) -> tuple[Ints, Ints]:
    """Groups as numbers, equal on both sides where the values are; None gives each row its own."""
    for name, given, size in (("source", groups, n), ("target", target_groups, m)):
        if given is not None and given.shape != (size,):
            raise ValueError(f"{name} groups of shape {given.shape} do not fit {size} rows")
    if groups is not None and target_groups is not None:
        code = np.unique(np.concatenate([groups, target_groups]), return_inverse=True)[1]
        return code[:n], code[n:]
    mine = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    theirs = np.arange(m) if target_groups is None else np.unique(target_groups, return_inverse=True)[1]
    return mine, theirs + n


def interval_bounds(drawn: Floats, groups: int) -> tuple[Floats, Floats]:
    """Bounds [k] from resamples [r, k]; percentiles moved outwards for few groups, as in ``metrics``."""
    known = drawn[np.isfinite(drawn).all(axis=1)]
    if groups < 2 or not len(known):
        nothing = np.full(drawn.shape[1], np.nan)
        return nothing, nothing
    low, high = np.quantile(known, levels(CONFIDENCE, groups), axis=0)
    return low, high


def shares_of(truth: Ints, k: int, weights: Floats | None = None) -> Floats:
    """Share of each class [k] among rows of these classes."""
    counts = np.bincount(truth, weights, k)
    result: Floats = counts / counts.sum()
    return result


def logs_of(p: Floats) -> Floats:
    """Logarithms of probabilities, finite where they are 0."""
    result: Floats = np.log(np.maximum(p, TINY))
    return result


def both_sides(truth: Ints, mine: Floats, theirs: Floats) -> tuple[Floats, Floats]:
    """Both sides' probabilities as float64, checked against each other and against the true classes."""
    p, q = distributions(mine, "source probabilities"), distributions(theirs, "target probabilities")
    k = p.shape[1]
    if truth.shape != (len(p),) or q.shape[1] != k:
        raise ValueError(f"true classes {truth.shape}, probabilities {p.shape} and {q.shape} do not fit")
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= k:
        raise ValueError(f"true classes must be whole numbers from 0 to {k - 1}")
    if not (counts := np.bincount(truth, minlength=k)).all():
        raise ValueError(f"classes {np.flatnonzero(counts == 0).tolist()} have no source rows")
    return p, q


def distributions(p: Floats, name: str) -> Floats:
    """Rows [n, k] as float64; float16 probabilities sum to 1 only within 1e-3."""
    if p.ndim != 2 or not len(p) or p.shape[1] < 2:
        raise ValueError(f"{name} of shape {p.shape} are not rows over two or more classes")
    p = p.astype(np.float64)
    if not (p >= 0).all() or not (np.abs(p.sum(axis=1) - 1) < 2e-3).all():
        raise ValueError(f"{name} must be at least 0, and each row must sum to 1")
    return p
