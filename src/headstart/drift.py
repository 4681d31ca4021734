"""Drift: whether recent rows still look like those that a model knows.

Goes in: of known and of recent rows the features, the probabilities, what the inputs measure, and where
labels are known whether they were named rightly. Comes out: a ``Drift``, with every test and a sentence.
Never reads a file, never changes a model, and never knows what a feature or a class stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, comb
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headstart import shifts
from headstart.heads import Features
from headstart.metrics import Floats, Ints

Family = Literal["features", "predictions", "inputs", "labels"]

FOLDS = 5
# Of the domain classifier, over the variance of a row. Told apart are few rows by many dimensions: on cells
# and on sentences a thousandth to a tenth find about as many shifts.
PENALTY = 1 / 32
FEWEST = 10  # rows of a side that are worth a test
# Of tests on whole groups: ways to deal the groups, for each one that the corrected level needs. Of two sides
# with as many groups each, every way has a mirror image that is as far.
ROOM = 2
TITLES: dict[Family, str] = {
    "features": "what the backbone sees",
    "predictions": "what the model says",
    "inputs": "what comes in",
    "labels": "how often the model is right",
}


@dataclass(frozen=True)
class Side:
    """What is compared of some rows."""

    vectors: Features  # [n, d], any float type: what the model's head reads
    probabilities: Floats  # float64 [n, k]
    named: Ints  # int64 [n], position of the class named, -1 for none
    inputs: Mapping[str, Floats]  # float64 [n] by what is measured
    right: Floats  # float64 [n]: 1 named rightly, 0 wrongly, NaN where the label is not known
    groups: NDArray[Any] | None = None  # [n]: rows of one group came together

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class Test:
    """One two-sample test."""

    family: Family
    name: str
    measure: str  # what ``value`` is
    value: float
    p: float
    known: float | None = None  # median or share among the known rows
    recent: float | None = None
    adjusted: float = 1.0  # by Holm's method, over all tests

    def __str__(self) -> str:
        moved = "" if self.known is None else f", {self.known:.3g} before and {self.recent:.3g} now"
        return f"{self.name} ({self.measure} {self.value:.3f}{moved})"


@dataclass(frozen=True)
class Drift:
    """What ``detect`` found."""

    tests: tuple[Test, ...]
    level: float
    known: int  # rows that the model knows
    recent: int  # rows that are new
    labelled: int  # recent rows whose label is known
    groups: int  # recent groups; 0 where no row belongs with another
    grouped: bool  # whether whole groups were dealt, and not rows
    drifted: tuple[int, ...]  # positions of all recent rows, the least like the known ones first

    @property
    def alarm(self) -> bool:
        """Whether any test is significant after correction."""
        return bool(self.shown)

    @property
    def shown(self) -> list[Test]:
        """The significant tests, the surest first."""
        return sorted((t for t in self.tests if t.adjusted <= self.level), key=lambda t: t.adjusted)

    @property
    def reason(self) -> str:
        """One sentence."""
        compared = f"{self.recent:,} recent rows and {self.known:,} known ones"
        if not self.alarm:
            least = min(test.adjusted for test in self.tests)
            return (
                f"no drift is shown between {compared}: the smallest of {len(self.tests)} corrected p-values "
                f"is {least:.2g}, the level {self.level:g}"
            )
        families = {test.family: TITLES[test.family] for test in self.shown}
        first = [next(test for test in self.shown if test.family == family) for family in families]
        told = "; ".join(f"{families[test.family]}: {test}" for test in first)
        alone = f". All are of {self.groups} groups: being new may explain it" if self.new_groups else ""
        return f"drift between {compared}. {told[0].upper()}{told[1:]}{alone}"

    @property
    def new_groups(self) -> bool:
        """Whether rows belong together in groups too few to be dealt, so that any new group may alarm."""
        return self.groups > 0 and not self.grouped


def detect(
    known: Side,
    recent: Side,
    classes: Sequence[str],
    *,
    level: float = 0.05,
    permutations: int = 1000,
    seed: int = 0,
) -> Drift:
    """Test whether two sides are draws from one distribution, in several ways at once.

    Which tests, and that they are corrected together, is what Rabanser et al. (2019, "Failing loudly") found
    to work on networks' representations:

    - features: the maximum mean discrepancy (Gretton et al. 2012), as ``shifts.mmd`` has it, and a domain
      classifier (Lopez-Paz & Oquab 2017): ridge regression on which side a row is of, scored on the folds
      that it has not seen by AUROC.
    - predictions: the largest Kolmogorov-Smirnov distance of any class's probability, and the population
      stability index of the classes named. An index of 0.1 is often called a small change, of 0.25 a large
      one; here its p-value counts, for of few rows it is large by chance.
    - inputs: the Kolmogorov-Smirnov distance of each measure.
    - labels: by how much the share of rows named rightly has fallen.

    Every p-value is of permutations: rows are dealt to the sides anew and everything is measured again. So
    each test holds its level exactly, at any number of rows, with ties, and however the features are
    distributed. Textbook p-values do not: rows scored by folds are not independent, and probabilities tie.
    It takes that nothing is fitted on the known rows alone: features are standardised over both sides. Where
    a model was chosen by the known rows, a few more of them are named rightly than of rows like them, and
    ``labels`` alarms a little too often.
    The smallest adjusted p-value (Holm 1979) is at or below ``level`` in at most that share of draws,
    whatever the tests have in common.

    Rows of one group resemble each other, so new groups differ from known ones even where nothing has
    drifted: dealt as rows, every new solar module is drift. Where both sides have groups enough to reach
    ``level``, whole groups are dealt and fill whole folds; where they have not, rows are, and ``reason``
    says so. Dealt groups hold the level as far as those of both sides are of like sizes.

    Cost: 3 s for 1,000 rows a side of 1,280 dimensions on one core.

    Args:
        known: rows that the model knows, but was not trained on.
        recent: rows that came since.
        classes: k names, for the sentences.
        level: chance of an alarm where nothing has drifted.
        permutations: of each test; more are used where so few could not reach ``level``.
        seed: the same seed gives the same answer.

    Raises:
        ValueError: fewer than ``FEWEST`` rows on a side, or shapes that do not fit.
    """
    if min(len(known), len(recent)) < FEWEST:
        raise ValueError(f"{len(known)} known and {len(recent)} recent rows: {FEWEST} are the fewest to test")
    measured = _measured(known, recent)
    judged = all(np.isfinite(side.right).any() for side in (known, recent))
    count = 4 + len(measured) + judged  # two of features, two of predictions
    # Deal, features and labels draw from it in this sequence, which is part of what a seed stands for.
    chance = np.random.default_rng(seed)
    deal = _deal(known, recent, count / level, permutations, chance)
    tests, unlike = _features(known, recent, deal, seed, chance)
    tests += _predictions(known, recent, classes, deal) + _inputs(measured, deal)
    tests += _labels(known, recent, deal, chance) if judged else []
    return Drift(
        tests=_corrected(tests),
        level=level,
        known=len(known),
        recent=len(recent),
        labelled=int(np.isfinite(recent.right).sum()),
        groups=_groups(recent),
        grouped=deal.grouped,
        drifted=tuple(np.argsort(-unlike, kind="stable").tolist()),
    )


@dataclass(frozen=True)
class _Deal:
    """How the rows of both sides, the n known ones first, are dealt to the sides anew."""

    codes: Ints  # int64 [n + m]: rows of one code are dealt as a whole
    grouped: bool  # whether a code is a group's, and not a row's own
    sides: NDArray[np.bool_]  # [n + m], whether a row is recent
    order: Ints  # int64 [n + m], positions in an order that knows no side, so that nothing depends on it
    permutations: int
    dealt: Floats  # float64 [n + m, 1 + permutations], rows in ``order``: as ``_dealt`` has it


def _deal(known: Side, recent: Side, needed: float, permutations: int, chance: np.random.Generator) -> _Deal:
    """As many deals as asked for, or as are ``needed`` if these are more; of groups where they allow it."""
    permutations = max(permutations, ceil(needed))
    units = _units(known, recent, ROOM * needed)
    codes = np.arange(len(known) + len(recent)) if units is None else units
    sides = np.arange(len(codes)) >= len(known)
    order = chance.permutation(len(codes))
    dealt = _dealt(codes[order], sides[order], permutations, chance)
    return _Deal(codes, units is not None, sides, order, permutations, dealt)


def _both(known: NDArray[Any], recent: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([known, recent])


def _measured(known: Side, recent: Side) -> dict[str, Floats]:
    """What the inputs of both sides measure, [n + m] by name, where it varies at all."""
    shared = [name for name in known.inputs if name in recent.inputs]
    measured = {name: _both(known.inputs[name], recent.inputs[name]) for name in shared}
    return {name: values for name, values in measured.items() if np.ptp(values) > 0}


def _features(
    known: Side, recent: Side, deal: _Deal, seed: int, chance: np.random.Generator
) -> tuple[list[Test], Floats]:
    """The tests of what the head reads, and how unlike the known rows each recent one is, [m]."""
    x, y = known.vectors, recent.vectors
    codes, rows = (deal.codes[~deal.sides], deal.codes[deal.sides]), max(len(known), len(recent))
    distance, p = shifts.mmd(x, y, codes, seed=seed, rows=rows, permutations=deal.permutations)
    areas, scores = _told_apart(_both(x, y)[deal.order], deal.codes[deal.order], deal.dealt, chance)
    tests = [
        Test("features", "kernel discrepancy", "MMD²", distance, p),
        _test("features", "domain classifier", "AUROC", areas),
    ]
    return tests, scores[np.argsort(deal.order)][deal.sides]


def _predictions(known: Side, recent: Side, classes: Sequence[str], deal: _Deal) -> list[Test]:
    """The tests of the probabilities, by the class whose moved the most, and of the classes named."""
    probabilities = _both(known.probabilities, recent.probabilities)
    named = _both(known.named, recent.named)[deal.order]
    first = 1 if len(classes) == 2 else 0  # of two classes, one's probability is all there is to know
    distances = np.stack([_ks(column, deal.dealt) for column in probabilities[deal.order].T[first:]])
    most = first + int(distances[:, 0].argmax())
    moved = _medians(probabilities[:, most], deal)
    return [
        # The furthest of all classes in every deal, as in the true one.
        _test("predictions", f"probability of {classes[most]}", "KS", distances.max(axis=0), moved),
        _test("predictions", "classes named", "PSI", _psi(named, deal.dealt)),
    ]


def _inputs(measured: Mapping[str, Floats], deal: _Deal) -> list[Test]:
    """A test of each measure, [n + m] by name."""
    return [
        _test("inputs", name, "KS", _ks(values[deal.order], deal.dealt), _medians(values, deal))
        for name, values in measured.items()
    ]


def _labels(known: Side, recent: Side, deal: _Deal, chance: np.random.Generator) -> list[Test]:
    """The test of how far the share of right answers has fallen; some labels of both sides are known."""
    right = _both(known.right, recent.right)
    # Of the rows whose labels are known, which may be none of some groups: these are dealt.
    some = np.isfinite(right)
    right, dealt = right[some], _dealt(deal.codes[some], deal.sides[some], deal.permutations, chance)
    theirs, size = right @ dealt, dealt.sum(axis=0)
    after, before = theirs / size, (right.sum() - theirs) / (len(right) - size)
    return [_test("labels", "right answers", "fall", before - after, (float(before[0]), float(after[0])))]


def _medians(values: Floats, deal: _Deal) -> tuple[float, float]:
    """Of the known and of the recent rows; values [n + m]."""
    return float(np.median(values[~deal.sides])), float(np.median(values[deal.sides]))


def _units(known: Side, recent: Side, wanted: float) -> Ints | None:
    """What is dealt as a whole, int64 [n + m]; None if rows are, for want of groups."""
    if known.groups is None or recent.groups is None:
        return None
    mine = np.unique(known.groups, return_inverse=True)[1]
    theirs = np.unique(recent.groups, return_inverse=True)[1]
    sizes = int(mine.max()) + 1, int(theirs.max()) + 1
    if min(sizes) < 2 or comb(sum(sizes), sizes[0]) < wanted:
        return None
    return np.concatenate([mine, theirs + sizes[0]])


def _groups(side: Side) -> int:
    """Groups of a side; 0 where each row is one by itself."""
    count = 0 if side.groups is None else len(np.unique(side.groups))
    return count if count < len(side) else 0


def _dealt(units: Ints, recent: NDArray[np.bool_], permutations: int, chance: np.random.Generator) -> Floats:
    """1 where a row is dealt to the recent side, float64 [rows, 1 + permutations]; first as it truly is."""
    names, unit = np.unique(units, return_inverse=True)
    truly = np.zeros(len(names))
    truly[unit[recent]] = 1
    dealt = np.tile(truly[:, None], permutations)
    return np.concatenate([truly[:, None], chance.permuted(dealt, axis=0)], axis=1)[unit]


def _test(
    family: Family, name: str, measure: str, statistics: Floats, moved: tuple[float, float] | None = None
) -> Test:
    """The test of a statistic for each deal, float64 [1 + permutations]: the larger, the further."""
    true = float(statistics[0])
    # The true deal counts as well. Rounding must not decide whether an equal one does.
    p = float((statistics >= true - 1e-9 * max(1, abs(true))).mean())
    return Test(family, name, measure, true, p, *(moved or ()))


def _told_apart(
    features: Features, units: Ints, dealt: Floats, chance: np.random.Generator
) -> tuple[Floats, Floats]:
    """AUROC of a domain classifier for each deal, [deals], and the rows' scores for the true one, [rows].

    Ridge regression is linear in what it learns: the scores of the rows that a fold holds out are a fixed
    matrix times the deal. So a thousand classifiers cost one. Its direction is that of Fisher's discriminant,
    which no imbalance of the sides turns. Pairs are compared within a fold (Airola et al. 2011).
    """
    from scipy.linalg import cho_factor, cho_solve

    x = features.astype(np.float64)
    x -= x.mean(axis=0)
    spread = x.std(axis=0)
    x = x[:, spread > 1e-6 * max(spread.max(), 1e-12)]
    x /= x.std(axis=0)
    names, unit = np.unique(units, return_inverse=True)
    fold = (chance.permutation(len(names)) % FOLDS)[unit]
    scores = np.zeros(dealt.shape)
    won, pairs = np.zeros(dealt.shape[1]), np.zeros(dealt.shape[1])
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        if not test.any() or x.shape[1] == 0:
            continue
        centre = x[train].mean(axis=0)
        learnt = x[train] - centre
        products = learnt @ learnt.T
        products[np.diag_indices_from(products)] += PENALTY * x.shape[1] * len(learnt)
        weights = cho_solve(cho_factor(products, overwrite_a=True), dealt[train] - dealt[train].mean(axis=0))
        scores[test] = (x[test] - centre) @ learnt.T @ weights
        rank = scores[test].argsort(axis=0).argsort(axis=0) + 1
        theirs = dealt[test].sum(axis=0)
        won += (rank * dealt[test]).sum(axis=0) - theirs * (theirs + 1) / 2
        pairs += theirs * (test.sum() - theirs)
    return np.divide(won, pairs, out=np.full(len(won), 0.5), where=pairs > 0), scores[:, 0]


def _ks(values: Floats, dealt: Floats) -> Floats:
    """Kolmogorov-Smirnov distance between the sides for each deal, [deals]."""
    order = np.argsort(values, kind="stable")
    last = np.append(np.diff(values[order]) > 0, True)  # of each run of equal values
    recent = np.cumsum(dealt[order], axis=0)
    known = np.arange(1, len(values) + 1)[:, None] - recent
    apart: Floats = np.abs(recent[last] / recent[-1] - known[last] / known[-1]).max(axis=0)
    return apart


def _psi(named: Ints, dealt: Floats) -> Floats:
    """Population stability index of the classes named for each deal, [deals]; half a row more in each."""
    bins = named[:, None] == np.unique(named)
    recent = bins.T.astype(np.float64) @ dealt + 0.5
    known = bins.sum(axis=0)[:, None] + 1 - recent
    p, q = recent / recent.sum(axis=0), known / known.sum(axis=0)
    index: Floats = ((p - q) * np.log(p / q)).sum(axis=0)
    return index


def _corrected(tests: Sequence[Test]) -> tuple[Test, ...]:
    """The tests with p-values adjusted for their number (Holm 1979)."""
    p = np.array([test.p for test in tests])
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return tuple(replace(test, adjusted=float(value)) for test, value in zip(tests, adjusted, strict=True))
