"""How good predictions are, and how sure one can be: scores and intervals of a classifier.

Goes in: true classes as integers, predicted probabilities, and the group of each row. Comes out: plain
floats by metric. Never reads or writes a file, and never knows which model it judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.progress import bar

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss", "ece")
LOWER_IS_BETTER = frozenset({"log_loss", "ece"})
OF_ROWS = frozenset({"accuracy", "log_loss", "ece"})  # in which rows weigh alike; in the others classes do
SHARES = ("accuracy", "balanced_accuracy", "macro_f1")  # 1 where all rows are named rightly, 0 where none is
MOST_RANKED = 50  # classes of which AUROC is resampled: of 1,000, a thousand resamples would take hours
BINS = 15
# scikit-learn's bound: a probability of 0 costs 36 nats rather than infinity.
TINY = float(np.finfo(np.float64).eps)


def scores(
    truth: Ints,
    probabilities: Floats,
    weights: Floats | None = None,
    named: Ints | None = None,
    wanted: Sequence[str] = METRICS,
) -> dict[str, float]:
    """The metrics wanted, of ``METRICS``, on weighted rows; a weight of 2 counts as the row given twice.

    - ``accuracy``
    - ``balanced_accuracy``: mean recall over the classes that have rows.
    - ``macro_f1``: mean F1 over the classes that are true or predicted somewhere.
    - ``auroc``: of two classes, the second against the first; of more, the mean of each class
      against the rest, over the classes for which it is defined. Ties count half (Mann & Whitney 1947).
    - ``log_loss``: mean negative log-likelihood in nats.
    - ``ece``: expected calibration error of the top probability in 15 equally wide bins
      (Naeini et al. 2015; Guo et al. 2017).

    Args:
        truth: int[n], positions of the true classes.
        probabilities: float64[n, k], rows that sum to 1.
        weights: float64[n], at least 0 with a positive sum; by default 1 each.
        named: int[n], positions of the classes that the model names, -1 for none; by default the likeliest.
        wanted: the metrics to compute; all but ``auroc``, which sorts the rows once a class, cost next to
            nothing.

    Returns:
        A float by name. ``auroc`` is NaN where all rows are of one class.

    Raises:
        ValueError: shapes that do not fit, no rows, or a class beyond the probabilities' columns.
    """
    prepared = _Prepared.of(truth, probabilities, named)
    ones = np.ones(len(truth))
    return dict(zip(wanted, prepared.scores(ones if weights is None else weights, wanted), strict=True))


def intervals(
    truth: Ints,
    probabilities: Floats,
    groups: NDArray[Any],
    *,
    named: Ints | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Every metric with a bootstrap interval that resamples whole groups, not rows.

    Rows of one group resemble each other, so they count as one draw (the cluster bootstrap: Davison &
    Hinkley 1997, section 3.8; Field & Welsh 2007). Percentile intervals of few draws are too narrow;
    their percentiles are moved outwards as Student's t is wider than the normal (the expanded
    percentile interval, Hesterberg 2015, arXiv:1411.5279, section 5.3).

    Of more than ``MOST_RANKED`` classes AUROC has a value and no interval: it costs as much for each class as
    all other metrics together, in every resample.

    A resample that lacks a class scores the classes that it has; where AUROC is undefined in a resample,
    that resample says nothing about AUROC.

    Where every row is named rightly, so is every resample, which does not mean that no other row will be
    wrong. The low end of ``SHARES`` is then the bound (Clopper & Pearson 1934) of the share of groups that
    are named rightly throughout, exact where groups are of one size; and the high end likewise where every
    row is named wrongly. Where all classes have the same say, groups count as if each class had as many as
    the one with the fewest. AUROC of a perfect ranking is no share of groups, and keeps the bounds that the
    resamples give.

    The calibration error is an absolute value, so noise only ever raises it, in the sample above the
    truth as much as in a resample above the sample. Its interval is therefore reflected about the value
    (the basic bootstrap, Davison & Hinkley 1997, section 5.2), and cut at 0.

    Cost: about 0.1 ms a resample of 1,000 rows of two classes; memory: a few arrays of n, and one more for
    each class.

    Args:
        truth: int[n], positions of the true classes.
        probabilities: float64[n, k].
        groups: [n], any values; equal values are one group.
        named: int[n], positions of the classes that the model names, -1 for none; by default the likeliest.
        resamples: number of bootstrap resamples.
        confidence: coverage wanted, such as 0.95.
        seed: the same seed gives the same intervals.

    Returns:
        ``{metric: {"value", "low", "high"}}``. What cannot be known is None: AUROC of a single class, and
        both bounds if there is only one group. So are the bounds of AUROC of many classes.

    Raises:
        ValueError: as for ``scores``.
    """
    prepared = _Prepared.of(truth, probabilities, named)
    values = prepared.scores(np.ones(len(truth)))
    count = len(np.unique(groups))
    bounds = np.full((2, len(METRICS)), np.nan)
    if count > 1:
        wanted = [metric for metric in METRICS if metric != "auroc" or prepared.classes <= MOST_RANKED]
        draws = resampled(groups, resamples, np.random.default_rng(seed))
        shown = bar(draws, total=resamples, desc="resampling groups", unit=" resamples")
        drawn = np.array([prepared.scores(weights, wanted) for weights in shown])
        for metric, column in zip(map(METRICS.index, wanted), drawn.T, strict=True):
            if (known := column[np.isfinite(column)]).size and np.isfinite(values[metric]):
                bounds[:, metric] = np.quantile(known, levels(confidence, count))
        if prepared.hits.all() or not prepared.hits.any():
            for share in SHARES:
                each = count if share in OF_ROWS else _evenly(truth, groups)
                least = ((1 - confidence) / 2) ** (1 / each)
                bounds[:, METRICS.index(share)] = (least, 1) if prepared.hits.all() else (0, 1 - least)
        ece = METRICS.index("ece")
        bounds[:, ece] = np.maximum(2 * values[ece] - bounds[::-1, ece], 0)
    return {
        metric: {"value": _known(value), "low": _known(low), "high": _known(high)}
        for metric, value, low, high in zip(METRICS, values, *bounds, strict=True)
    }


def gains(
    truth: Ints,
    probabilities: Floats,
    other: Floats,
    groups: NDArray[Any],
    *,
    named: tuple[Ints | None, Ints | None] = (None, None),
    wanted: Sequence[str] = METRICS,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Floats]:
    """How much better one model is than another, in bootstrap resamples of whole groups.

    Both are scored on the same resamples: what makes rows hard for both cancels out (the paired bootstrap,
    Efron & Tibshirani 1993, chapter 16).

    Args:
        truth: int[n], positions of the true classes.
        probabilities: float64[n, k] of the one.
        other: float64[n, k] of the other.
        groups: [n], any values; equal values are one group.
        named: int[n] of each, positions of the classes that it names, -1 for none; by default the likeliest.
        wanted: the metrics to compute.
        resamples: number of bootstrap resamples.
        seed: the same seed gives the same resamples.

    Returns:
        float64[resamples] by metric: score of the one less score of the other, NaN where undefined.

    Raises:
        ValueError: as for ``scores``.
    """
    pair = [
        _Prepared.of(truth, said, classes)
        for said, classes in zip((probabilities, other), named, strict=True)
    ]
    draws = resampled(groups, resamples, np.random.default_rng(seed))
    scored = np.array([[prepared.scores(weights, wanted) for prepared in pair] for weights in draws])
    return dict(zip(wanted, (scored[:, 0] - scored[:, 1]).T, strict=True))


def resampled(groups: NDArray[Any], resamples: int, chance: np.random.Generator) -> Iterator[Floats]:
    """How often each row counts, float64[n], in resamples that draw as many groups as there are.

    ``chance`` is asked when a resample is: of two sides taken in turns, it is asked in turns.
    """
    names, group_of = np.unique(groups, return_inverse=True)
    size = len(names)
    for _ in range(resamples):
        times = np.bincount(chance.integers(size, size=size), minlength=size)
        yield times[group_of].astype(np.float64)


def cross_entropies(targets: Floats, probabilities: Floats) -> Floats:
    """Cross-entropy of each row in nats against soft targets, float64[n].

    Args:
        targets: float64[n, k], rows that sum to 1.
        probabilities: float64[n, k].
    """
    each: Floats = -(targets * np.log(np.clip(probabilities, TINY, 1))).sum(axis=1)
    return each


def confusions(truth: Ints, named: Ints, classes: int) -> Ints:
    """int64[k, k]: rows by true class and by the class named, positions int[n] each."""
    found = np.zeros((classes, classes), np.int64)
    np.add.at(found, (truth, named), 1)
    return found


def curve(positive: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats, Floats] | None:
    """What each threshold gives, from the highest down: false positive rate, recall and precision.

    A threshold lies below each different score. None if all rows [n] are positive, or none is.
    """
    if positive.all() or not positive.any():
        return None
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # of each run of equal scores
    hits = np.cumsum(positive[order])[last]
    return (last + 1 - hits) / (~positive).sum(), hits / positive.sum(), hits / (last + 1)


def calibration_bins(confidence: Floats) -> Ints:
    """The bin, 0 to ``BINS`` - 1, of each probability; a bin includes its upper edge."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


@dataclass(frozen=True)
class _Ranking:
    """One class against the rest, sorted once so that each weighting costs one cumulative sum."""

    positives: Ints  # rows of the class, [p]
    negatives: Ints  # the other rows, by rising score, [n - p]
    below: Ints  # negatives that score less than each positive, [p]
    not_above: Ints  # negatives that score at most as much, [p]

    @classmethod
    def of(cls, positive: NDArray[np.bool_], score: Floats) -> _Ranking:
        positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
        negatives = negatives[np.argsort(score[negatives], kind="stable")]
        # Positives in order as well: their look-ups below then walk through memory instead of jumping.
        positives = positives[np.argsort(score[positives], kind="stable")]
        sides = (np.searchsorted(score[negatives], score[positives], side) for side in ("left", "right"))
        return cls(positives, negatives, *sides)

    def auroc(self, weights: Floats) -> float:
        """Chance that a random positive scores above a random negative, ties half; NaN without both."""
        reached = np.concatenate([[0.0], np.cumsum(weights[self.negatives])])
        own = weights[self.positives]
        pairs = own.sum() * reached[-1]
        won = own @ (reached[self.below] + reached[self.not_above]) / 2
        return float(won / pairs) if pairs > 0 else np.nan


@dataclass(frozen=True)
class _Prepared:
    """What does not depend on the weights, computed once for a thousand weightings."""

    classes: int
    truth: Ints
    predicted: Ints  # position of the class named, k for none
    hits: Floats  # 1 where the class named is the true one
    surprise: Floats  # negative log of the true class's probability
    bins: Ints  # calibration bin of the top probability
    excess: Floats  # top probability, less 1 where the likeliest class is the true one
    probabilities: Floats

    @classmethod
    def of(cls, truth: Ints, probabilities: Floats, named: Ints | None = None) -> _Prepared:
        n, classes = probabilities.shape if probabilities.ndim == 2 else (0, 0)
        if n == 0 or truth.shape != (n,):
            raise ValueError(f"{probabilities.shape} probabilities do not fit {truth.shape} true classes")
        if truth.min() < 0 or truth.max() >= classes:
            raise ValueError(f"true classes {truth.min()}..{truth.max()} beyond {classes} columns")
        if not np.isfinite(probabilities).all():
            raise ValueError("probabilities that are not finite numbers")
        likeliest = probabilities.argmax(axis=1)
        predicted = likeliest if named is None else np.where(named < 0, classes, named)
        top = probabilities[np.arange(n), likeliest]
        surprise = -np.log(np.clip(probabilities[np.arange(n), truth], TINY, 1))
        return cls(
            classes=classes,
            truth=truth,
            predicted=predicted,
            hits=(predicted == truth).astype(np.float64),
            surprise=surprise,
            bins=calibration_bins(top),
            excess=top - (likeliest == truth),
            probabilities=probabilities,
        )

    @cached_property
    def rankings(self) -> list[_Ranking]:
        """Of the classes that AUROC is the mean of; made when it is first asked for, as a sort each."""
        ranked = [1] if self.classes == 2 else range(self.classes)
        return [_Ranking.of(self.truth == c, self.probabilities[:, c]) for c in ranked]

    def scores(self, weights: Floats, wanted: Sequence[str] = METRICS) -> list[float]:
        """The metrics wanted, in their order."""
        return [float(getattr(self, f"_{metric}")(weights)) for metric in wanted]

    def _accuracy(self, weights: Floats) -> float:
        return float(weights @ self.hits / weights.sum())

    def _balanced_accuracy(self, weights: Floats) -> float:
        actual = np.bincount(self.truth, weights, self.classes)
        right = np.bincount(self.truth, weights * self.hits, self.classes)
        seen = actual > 0
        return float((right[seen] / actual[seen]).mean())

    def _macro_f1(self, weights: Floats) -> float:
        # Per class: rows of it, rows called it, and rows rightly called it, float64[k] each.
        actual = np.bincount(self.truth, weights, self.classes)
        called = np.bincount(self.predicted, weights, self.classes + 1)[:-1]
        right = np.bincount(self.truth, weights * self.hits, self.classes)
        named = actual + called > 0
        return float((2 * right[named] / (actual + called)[named]).mean())

    def _auroc(self, weights: Floats) -> float:
        areas = [area for ranking in self.rankings if not np.isnan(area := ranking.auroc(weights))]
        return float(np.mean(areas)) if areas else np.nan

    def _log_loss(self, weights: Floats) -> float:
        return float(weights @ self.surprise / weights.sum())

    def _ece(self, weights: Floats) -> float:
        return float(np.abs(np.bincount(self.bins, weights * self.excess)).sum() / weights.sum())


def levels(confidence: float, groups: int) -> list[float]:
    """The two percentiles, as fractions, that give ``confidence`` with this many groups."""
    from scipy.special import ndtr, stdtrit

    tail = (1 - confidence) / 2
    low = float(ndtr(sqrt(groups / (groups - 1)) * stdtrit(groups - 1, tail)))
    return [low, 1 - low]


def fewest_groups(confidence: float) -> int:
    """Groups without which nothing can be shown with this one-sided confidence.

    No resample is worse than the worst group alone, and that one too is better by luck once in 2 to the power
    of their number, if there is nothing to show.
    """
    return ceil(-log2(1 - confidence))


def groups_by_class(truth: Ints, groups: NDArray[Any]) -> dict[int, int]:
    """In how many groups each class that has rows is; a mean over classes is no surer than the fewest."""
    pairs = np.unique(np.stack([truth, np.unique(groups, return_inverse=True)[1]]), axis=1)
    return dict(zip(*(each.tolist() for each in np.unique(pairs[0], return_counts=True)), strict=True))


def _evenly(truth: Ints, groups: NDArray[Any]) -> int:
    """Number of groups, but no more than if each class were in as few as the class that is in the fewest."""
    held = groups_by_class(truth, groups)
    return min(len(np.unique(groups)), len(held) * min(held.values()))


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
