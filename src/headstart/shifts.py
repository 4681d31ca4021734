"""Shifts: how unlabelled target rows differ from the labelled source rows that a classifier learnt from.

Goes in: features and probabilities of both sides, the source's true classes, the group of each row. Comes
out: estimates with intervals, and a ``Diagnosis`` that a person can read. Never sees a label of the
target, never changes a model, and never knows what a feature or a class stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, sqrt
from typing import Literal

import numpy as np
import pandas as pd

from headstart import heads
from headstart.class_shares import (
    RESAMPLES,
    Groups,
    LabelShift,
    bbse,
    both_sides,
    group_codes,
    interval_bounds,
    label_shift,
    logs_of,
    mlls,
)
from headstart.clumps import SIGNIFICANT, ordered
from headstart.heads import Features, Singles, fit
from headstart.metrics import TINY, Floats, Ints, resampled
from headstart.splits import folds

# "none": not shown by both tests. "labels": other class shares explain what they see, or nearly. "unknown":
# they may, but the source's groups do not let anyone see whether they do.
Kind = Literal["none", "labels", "features", "unknown"]

PENALTY = 0.1  # of the domain classifier; on 1,280 dimensions 0.01 to 1 give nearly the same AUROC
FOLDS = 5
SAMPLED = 2000  # rows of a side that a domain classifier is made of
UNTOLD = np.nan, np.nan  # what ``mmd`` says of a single group
COMPONENTS = 8  # 44 features with squares and products: few enough for a few hundred rows
FEW_GROUPS = 20
ALIKE_ROWS = 1000  # drawn to resemble the target: as many as ``mmd`` uses
MATTERS = 0.05  # total variation between class shares below which a change is not worth a word
# Parts of a squared discrepancy that class shares must explain to be believed: most of the answers', nearly
# all of it where the test still sees a rest; half of the features', or so much that the test sees no rest.
HALF, MOST, NEARLY_ALL = 0.5, 0.8, 0.9
LOCATIONS = (
    "most of it is no matter of location and scale",
    "a part of it is location and scale",
    "most of it is location and scale, which a domain's own statistics may repair",
)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; NaN is what the rows cannot tell."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found; see there."""

    separability: Interval
    mmd: float
    mmd_p: float
    label_shift: LabelShift
    black_box: LabelShift
    predicted: Floats  # [k], share of each class among the classes that the classifier names on the target
    location: float
    ordered: float
    kind: Kind
    words: list[str]


def separability(
    source: Features,
    target: Features,
    groups: tuple[Groups, Groups] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """How well a linear classifier tells target rows from source rows: its cross-validated AUROC.

    0.5 is what one distribution gives, 1 is no overlap. The classifier two-sample test (Lopez-Paz & Oquab
    2017) with AUROC for accuracy, of which the proxy A-distance is made (Ben-David et al. 2010). Both sides
    weigh the same in training, whatever their numbers of rows. A linear classifier sees means only:
    domains of one mean are inseparable to it, however else they differ (see ``mmd``).

    Pairs are compared within a fold: a score of another fold comes from another classifier, one that saw
    this row, and comparing across folds would pull the AUROC of one distribution below 0.5 (Airola et al.
    2011). The interval is the cluster bootstrap's, of whole groups and each side by itself, with the
    classifiers held fixed. As every row also trained the classifiers that score the others, the folds are
    not independent, and that interval is too narrow by a third; it is stretched about the value by the
    factor of Nadeau & Bengio (2003), 1.5 for five folds. It then holds 0.5 in about 95 of 100 samples from
    one distribution, and is somewhat too wide where the AUROC is high.

    Cost: 3 s for 2,000 rows a side of 1,280 dimensions on one core.

    Args:
        source: [n, d], any float type; a memory map is read only where it is sampled.
        target: [m, d].
        groups: [n] and [m], any values; equal values, on one side or on both, share a fold. By default each
            row is a group.
        seed: decides which rows of a side are used, if there are more than 2,000; the folds; the resamples.

    Returns:
        The AUROC with its interval; NaN thrice if a side has one group only.

    Raises:
        ValueError: shapes that do not fit, a side without rows, sampled features that are not finite.
    """
    chance = np.random.default_rng(seed)
    (x, y), sides = _sampled(source, target, groups, SAMPLED, chance)
    sizes = [len(np.unique(side)) for side in sides]
    if min(sizes) < 2:
        return Interval(np.nan, np.nan, np.nan)
    features, codes = np.concatenate([x, y]), np.concatenate(sides)
    of_target = np.repeat([0, 1], [len(x), len(y)])
    names = np.array(["source", "target"])[of_target]
    frame = pd.DataFrame({"label": names, "domain": names, "group": codes})
    count = min(FOLDS, *sizes)
    fold = folds(frame, count, seed)
    times = [np.vstack([np.ones(len(side)), *resampled(side, RESAMPLES, chance)]) for side in sides]
    won, pairs = np.zeros(RESAMPLES + 1), np.zeros(RESAMPLES + 1)
    for held in range(count):
        train, test = fold != held, fold == held
        counts = np.bincount(of_target[train], minlength=2)
        if not counts.all():
            continue  # one group holds nearly all rows of a side; without it there is nothing to learn
        weights = 1 / counts[of_target[train]]
        head = fit(features[train], np.eye(2)[of_target[train]], weights, PENALTY)
        score = head.logits(features[test]) @ [-1, 1]
        mine, theirs = (score[of_target[test] == side] for side in (0, 1))
        above = (mine[:, None] < theirs) + (mine[:, None] == theirs) / 2
        first, second = times[0][:, test[: len(x)]], times[1][:, test[len(x) :]]
        won += ((first @ above) * second).sum(axis=1)
        pairs += first.sum(axis=1) * second.sum(axis=1)
    areas = np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)
    value = float(areas[0])
    stretch = sqrt(1 + count / (count - 1))
    low, high = (
        value + stretch * (bound[0] - value) for bound in interval_bounds(areas[1:, None], min(sizes))
    )
    return Interval(value, float(np.maximum(low, 0)), float(np.minimum(high, 1)))


def mmd(
    source: Features,
    target: Features,
    groups: tuple[Groups, Groups] | None = None,
    *,
    seed: int = 0,
    rows: int = 1000,
    permutations: int = 200,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy and the p-value of no difference (Gretton et al. 2012).

    The kernel is exp(-|x - y|^2 / (2 s^2)), s the median distance between any two rows of both sides. The
    estimate is unbiased: 0 on average, and as often below as above, where both sides are one distribution.
    Unlike ``separability`` it sees a difference of any kind, though best one that is large beside the
    spread of the features. Rows of one group resemble each other, so pairs within a group are left out, and
    permutations move whole groups.

    Cost: 1 s for 1,000 rows a side of 1,280 dimensions, and (2 rows)^2 x 8 bytes a few times over.

    Args:
        source: [n, d], any float type.
        target: [m, d].
        groups: [n] and [m], any values. By default each row is a group.
        seed: decides the rows and the permutations.
        rows: at most so many rows of a side are used.
        permutations: how often the groups are dealt to the sides anew; the smallest possible p-value is
            1 / (permutations + 1).

    Returns:
        The squared discrepancy, between about 0 and 2, and its p-value; NaN twice if a side has one group.

    Raises:
        ValueError: as for ``separability``, or no permutation.
    """
    if permutations < 1:
        raise ValueError(f"at least one permutation, not {permutations}")
    chance = np.random.default_rng(seed)
    (x, y), sides = _sampled(source, target, groups, rows, chance)
    sizes = [len(np.unique(side)) for side in sides]
    if min(sizes) < 2:
        return np.nan, np.nan
    sums, pairs = _between_groups(x, y, *sides)
    first = np.repeat([1.0, 0.0], sizes)
    dealt = np.stack([first, *(chance.permutation(first) for _ in range(permutations))], axis=1)
    values = _discrepancies(sums, pairs, dealt)
    # Rounding must not decide whether a deal that equals the true one counts.
    as_far = (values[1:] >= values[0] - 1e-12).sum()
    return float(values[0]), float((1 + as_far) / (1 + permutations))


def location(
    source: Features,
    target: Features,
    groups: tuple[Groups, Groups] | None = None,
    *,
    seed: int = 0,
) -> float:
    """Share of the distance between the domains that standardising each by its own moments removes.

    1: dimensions were only moved and stretched (another exposure, another sensor), which the statistics
    of each domain undo (Li et al. 2016). 0: means and deviations are the same already, and what
    differs is how dimensions go together.

    The distance is d' = sqrt(2) * probit(AUROC), in deviations, of a domain classifier on the 8 largest
    principal components of both sides, their squares and their products; the share is
    1 - d'^2 after / d'^2 before. The AUROC itself saturates: from 0.99 to 0.95 looks like little, and is
    half of the squared distance. A linear classifier cannot measure this (once both means are 0 its best
    weights are 0, whatever is left), and a kernel with one width for all dimensions hardly sees more than
    means where there are hundreds.

    A change in class shares moves the means too. Where there is one, standardising moves the classes
    apart although this share is high; ``diagnose`` therefore looks at the classes first.

    Cost: 1 s for 2,000 rows a side of 1,280 dimensions on one core.

    Args:
        source: [n, d], any float type.
        target: [m, d].
        groups: as for ``separability``.
        seed: decides which rows of a side are used, if there are more than 2,000; the folds; the resamples.

    Returns:
        The share, 0 to 1; NaN if the domains are not apart to begin with, or a side has one group only.

    Raises:
        ValueError: as for ``separability``.
    """
    from scipy.special import ndtri

    (x, y), sides = _sampled(source, target, groups, SAMPLED, np.random.default_rng(seed))
    before, after = (
        separability(*_squares(*pair), sides, seed=seed).value
        for pair in ((x, y), (_standardised(x), _standardised(y)))
    )
    # Half a row on the wrong side: without overlap the distance is beyond measure.
    most = 1 - 0.5 / min(len(x), len(y))
    far, near = (float(ndtri(np.clip(area, 0.5, most))) for area in (before, after))
    return max(0.0, 1 - (near / far) ** 2) if far > 0 else np.nan


def diagnose(  # noqa: PLR0917  # two sides of features, groups and probabilities
    source: Features,
    truth: Ints,
    groups: Groups | None,
    source_probabilities: Floats,
    target: Features,
    target_groups: Groups | None,
    target_probabilities: Floats,
    classes: Sequence[str],
    *,
    seed: int = 0,
) -> Diagnosis:
    """What kind of shift lies between labelled source rows and unlabelled target rows.

    ``separability`` and ``mmd`` say whether there is one. ``label_shift`` (by ``mlls``) says which class
    shares would explain the classifier's answers, and ``black_box`` (by ``bbse``) says it in another way.
    Source rows drawn in the former are compared with the target once more: if the discrepancy is gone, it
    was label shift; if not, classes look different, and the shares mean little. Groups so few that a test can
    show nothing explain nothing by it: then nearly all must be gone. Where the source has the target's main
    class in a single group, nobody can tell. ``location`` (NaN where no shift is shown) and ``ordered`` say
    whether statistics of the domain, or a threshold, may repair the classifier.

    Cost: 8 s for 20,000 rows a side of 1,280 dimensions on one core, and about 100 MB beside the features.

    Args:
        source: [n, d], any float type.
        truth: int[n], positions of the true classes.
        groups: [n], any values, or None for each row by itself.
        source_probabilities: float64[n, k], of the same rows, by classifiers that have not seen them.
        target: [m, d].
        target_groups: [m], any values, or None.
        target_probabilities: float64[m, k].
        classes: k names, for the sentences.
        seed: the same seed gives the same diagnosis.

    Raises:
        ValueError: shapes that do not fit, a side without rows, rows that do not sum to 1, a class without
            source rows, sampled features that are not finite.
    """
    mine, theirs = both_sides(truth, source_probabilities, target_probabilities)
    k = mine.shape[1]
    if len(classes) != k:
        raise ValueError(f"{len(classes)} names do not fit {k} classes")
    if (len(source), len(target)) != (len(mine), len(theirs)):
        raise ValueError(
            f"features of {len(source)} and {len(target)} rows do not fit "
            f"{len(mine)} and {len(theirs)} rows of probabilities"
        )
    sides = group_codes(groups, target_groups, len(mine), len(theirs))
    apart = separability(source, target, sides, seed=seed)
    distance, p = mmd(source, target, sides, seed=seed)
    shift, other = (
        label_shift(truth, sides[0], mine, theirs, target_groups=sides[1], by=by, seed=seed)
        for by in (mlls, bbse)
    )
    alike = _in_shares(truth, shift.prior, ALIKE_ROWS, np.random.default_rng(seed))
    drawn, lone = (sides[0][alike], sides[1]), _lone(truth, sides[0], shift)
    answers = logs_of(mine), logs_of(theirs)
    by_features, by_answers = (
        _Explained.of(before, UNTOLD if lone else mmd(x[alike], y, drawn, seed=seed), drawn)
        for before, x, y in ((distance, source, target), (mmd(*answers, sides, seed=seed)[0], *answers))
    )
    found = Diagnosis(
        separability=apart,
        mmd=distance,
        mmd_p=p,
        label_shift=shift,
        black_box=other,
        predicted=np.bincount(theirs.argmax(axis=1), minlength=k) / len(theirs),
        location=location(source, target, sides, seed=seed) if p <= SIGNIFICANT else np.nan,
        ordered=ordered(theirs, sides[1]),
        kind="none",
        words=[],
    )
    few = min(len(np.unique(side)) for side in sides)
    kind: Kind = "none" if _tests(found) < 2 else "features"
    explained = _of_labels(found, by_features, by_answers) and _fit(by_features)
    if explained and not _rest(found, by_features):
        kind = "labels"
    elif _untold(found, by_answers):
        kind = "unknown"
    return replace(found, kind=kind, words=_words(found, by_features, by_answers, few, classes))


@dataclass(frozen=True)
class _Explained:
    """What becomes of a discrepancy once source rows are drawn in the class shares of the target."""

    gone: float  # share of the squared discrepancy; 0 where there was none, NaN if it cannot be told
    p: float  # p-value of no difference between those rows and the target; NaN if the test can show none

    @classmethod
    def of(cls, before: float, after: tuple[float, float], groups: tuple[Ints, Ints]) -> _Explained:
        left, p = after
        if np.isnan(left):
            return cls(np.nan, np.nan)
        return cls(1 - left / before if before > 0 else 0.0, p if _can_show(*groups) else np.nan)


def _can_show(mine: Ints, theirs: Ints) -> bool:
    """Whether the groups can be dealt in so many ways that ``mmd`` could show a difference.

    The true deal is one of them and, if the sides have as many groups, its mirror image is as far apart.
    Three groups a side, 20 deals, can show none: that nothing is shown then explains nothing.
    """
    few, more = sorted(len(np.unique(side)) for side in (mine, theirs))
    as_far = 2 if few == more else 1
    return few > 3 or comb(few + more, few) >= as_far / SIGNIFICANT


def _tests(found: Diagnosis) -> int:
    """How many of the two tests show that the features have shifted."""
    return int(found.separability.low > 0.5) + int(found.mmd_p <= SIGNIFICANT)


def _differs(shift: LabelShift) -> bool:
    """Whether the classes have other shares, and so much that it matters."""
    return shift.shown and float(np.abs(shift.prior - shift.source_prior).sum()) / 2 >= MATTERS


def _lone(truth: Ints, groups: Ints, shift: LabelShift) -> bool:
    """Whether half of the target or more would be of a class that the source has in a single group.

    As pairs within a group are left out, rows drawn in such shares hardly show how that class looks.
    """
    most = int(shift.prior.argmax())
    return bool(shift.prior[most] >= HALF) and len(np.unique(groups[truth == most])) < 2


def _untold(found: Diagnosis, answers: _Explained) -> bool:
    """Whether the classes may only have other shares, but the source's groups do not let it be seen."""
    return _differs(found.label_shift) and bool(np.isnan(answers.gone)) and not _too_far(found, answers)


def _mixed(answers: _Explained) -> bool:
    """Whether a mixture of the source's classes gives the answers that the target gets."""
    return answers.gone >= MOST and (answers.p > SIGNIFICANT or answers.gone >= NEARLY_ALL)


def _of_labels(found: Diagnosis, features: _Explained, answers: _Explained) -> bool:
    """Whether it looks like label shift, perhaps among other things."""
    fits = features.p > SIGNIFICANT or features.gone >= HALF
    return _differs(found.label_shift) and _mixed(answers) and fits


def _fit(features: _Explained) -> bool:
    """Whether the features, too, are as class shares would have them: most is gone or no rest is seen."""
    return features.p > SIGNIFICANT or features.gone >= MOST


def _rest(found: Diagnosis, features: _Explained) -> bool:
    """Whether the features have surely moved by more than class shares explain.

    That a test no longer sees a difference is no explanation of one that was shown: where groups are few it
    soon sees nothing. Most of it must be gone.
    """
    return _too_far(found, features) or (found.mmd_p <= SIGNIFICANT and features.gone < MOST)


def _too_far(found: Diagnosis, explained: _Explained) -> bool:
    """Whether the sides are told apart better than class shares allow, which few groups may show as well."""
    return found.separability.low > _allowed(found.label_shift, explained)


def _allowed(shift: LabelShift, explained: _Explained) -> float:
    """The largest AUROC between the sides that class shares allow, as ``separability`` measures it.

    It compares the rows of a fold. Where the source has the target's main class in a single group, most folds
    hold no source row of it, as if the source had none.
    """
    if np.isnan(explained.gone):
        others = np.where(np.arange(len(shift.prior)) == shift.prior.argmax(), 0.0, shift.source_prior)
        shift = replace(shift, source_prior=others / others.sum())
    return most_separable(shift)


def most_separable(shift: LabelShift) -> float:
    """The largest AUROC between source and target rows that another mixture of the same classes allows.

    Of the mixtures that the intervals hold it is the one that allows most, if the classes keep the order of
    the estimate; without intervals it is the estimate. Given its class, nothing about a row tells which side
    it is of, so no classifier of the sides beats one that knows the class. That one ranks classes by how much
    more common they are in the target; of two classes, it has (1 + the change of a share) / 2.
    """
    order = np.argsort(shift.prior / np.maximum(shift.source_prior, TINY))
    mine, theirs = shift.source_prior[order], shift.prior[order]
    low, high = shift.low[order], shift.high[order]
    if np.isfinite(low).all():
        # Those that have become more common, from the last, take what the others can spare.
        taken = np.minimum(np.cumsum((high - low)[::-1]), 1 - low.sum())
        theirs = low + np.diff(taken, prepend=0)[::-1]
    return float(theirs @ (np.cumsum(mine) - mine / 2))


def _words(
    found: Diagnosis, features: _Explained, answers: _Explained, few: int, classes: Sequence[str]
) -> list[str]:
    """Two to five sentences; ``few`` is the number of groups of the side that has fewer."""
    shift, apart = found.label_shift, found.separability
    changed = int(np.abs(shift.prior - shift.source_prior).argmax())
    likely, solved = (_share(by, changed, few) for by in (shift, found.black_box))
    other = f", or {solved} by black-box shift estimation" if np.isfinite(found.black_box.prior).all() else ""
    share = (
        f"{classes[changed]!r} at {likely} of the target{other}, against {shift.source_prior[changed]:.0%} "
        "of the source"
    )

    tests = _tests(found)
    figures = (
        f"a linear classifier tells the two sides apart with AUROC {apart.value:.2f} "
        f"({apart.low:.2f}-{apart.high:.2f}, where 0.5 is no difference), and the kernel test of one "
        f"distribution gives p = {found.mmd_p:.3f}."
    )
    opening = (
        "No shift of the features is shown",
        "The features have probably shifted, though only one of two tests shows it",
        "The features have shifted",
    )[tests]
    words = [f"{opening}: {figures}"]
    if few < 2:
        words = ["Whether the features have shifted cannot be told: one side is a single group."]

    if _of_labels(found, features, answers):
        sign = (
            f"{answers.gone:.0%} of the squared discrepancy is gone"
            if np.isnan(answers.p)
            else f"p = {answers.p:.2f}"
        )
        words.append(
            f"It looks like label shift: {share}; source rows drawn in the estimated shares get the same "
            f"answers as the target ({sign})."
        )
        if found.ordered == 0.5:
            words.append(
                "That is not certain: the classifier's answers overlap so much that features which moved "
                "from one class towards another would look alike."
            )
        if features.p <= SIGNIFICANT or _rest(found, features):
            rest = (
                "by them alone the sides could be told apart with AUROC "
                f"{_allowed(shift, features):.2f} at most"
                if _too_far(found, features)
                else f"{1 - features.gone:.0%} of the squared discrepancy is left"
            )
            words.append(
                f"Besides, the features have moved in a way that class shares do not explain: {rest}."
            )
        elif tests and _fit(features):
            words.append(
                "The features fit it too; standardising the target by its own moments would hide the "
                "change in shares, not repair anything."
            )
    elif _untold(found, answers):
        lone = classes[int(shift.prior.argmax())]
        words.append(
            f"Taken at face value the answers put {share}. Whether it is that, or the features have moved "
            f"within the classes, cannot be told, as the source has {lone!r} in a single group: more groups "
            "of it would tell, or some 30 labelled rows of the target."
        )
    else:
        if not np.isnan(found.location):
            kind = LOCATIONS[int(found.location > 1 / 3) + int(found.location > 2 / 3)]
            words.append(
                f"Standardising each side by its own mean and deviation removes {found.location:.0%} of the "
                f"squared distance: {kind}."
            )
        words.append(
            f"Taken at face value the answers put {share}, but {_doubt(found, features, answers)}, so do not "
            "trust that share."
            if _differs(shift)
            else f"No change in class shares that matters is shown: the largest is {share}."
        )
        if tests:
            words.append(
                f"The answers on the target still fall into two clumps (AUROC {found.ordered:.2f} between "
                "them): the classifier may still rank the classes and need only another scale or threshold."
                if found.ordered > 0.5
                else "The answers on the target form one clump, which leaves open whether the classifier "
                "still ranks the classes."
            )
    if 1 < few < FEW_GROUPS:
        mute = found.mmd_p > SIGNIFICANT and np.isnan(answers.p) and not np.isnan(answers.gone)
        words.append(
            f"As few as {few} groups a side are too few for a kernel test to show a shift, and make the "
            "intervals rough: some 30 labelled rows of the target would tell."
            if mute
            else f"All this rests on as few as {few} groups a side, so the intervals are rough."
        )
    return words


def _doubt(found: Diagnosis, features: _Explained, answers: _Explained) -> str:
    """Why shares that differ are not to be trusted."""
    if np.isnan(answers.p):
        allowed = _allowed(found.label_shift, answers)
        return (
            f"by class shares alone the sides could be told apart with AUROC {allowed:.2f} at most"
            if _too_far(found, answers)
            else "groups are too few to tell whether class shares explain the answers"
        )
    if _mixed(answers):
        return (
            f"{min(1 - features.gone, 1):.0%} of the features' squared discrepancy is left when source rows "
            "are drawn so: the classes themselves look different"
        )
    return "no mixture of the source's classes gives such answers"


def _share(shift: LabelShift, place: int, few: int) -> str:
    """The share of one class and its interval, if the groups are enough for one."""
    interval = f" ({shift.low[place]:.0%}-{shift.high[place]:.0%})" if few > 1 else ""
    return f"{shift.prior[place]:.0%}{interval}"


def _between_groups(x: Singles, y: Singles, mine: Ints, theirs: Ints) -> tuple[Floats, Floats]:
    """Kernel summed over the rows of each two groups [g, g], and how many pairs those are; source first.

    0 on the diagonal: the pairs within a group say nothing about the difference between groups.
    """
    z = np.concatenate([x, y]).astype(np.float64)
    z -= z.mean(axis=0)
    code = np.unique(np.concatenate([mine, theirs + mine.max() + 1]), return_inverse=True)[1]
    z = z[np.argsort(code, kind="stable")]
    counts = np.bincount(code)
    squares = np.square(z).sum(axis=1)
    apart = np.maximum(squares[:, None] + squares - 2 * z @ z.T, 0)
    distances = np.sqrt(apart[np.triu_indices(len(z), 1)])
    # Where most rows are copies of one another the median is 0, and the mean has to do.
    width = float(np.median(distances)) or float(distances.mean()) or 1.0
    kernel = np.exp(apart / (-2 * width**2))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sums = np.add.reduceat(np.add.reduceat(kernel, starts, axis=0), starts, axis=1)
    pairs = np.outer(counts, counts).astype(np.float64)
    np.fill_diagonal(sums, 0)
    np.fill_diagonal(pairs, 0)
    return sums, pairs


def _discrepancies(sums: Floats, pairs: Floats, dealt: Floats) -> Floats:
    """Squared discrepancy [p] of each way to deal groups to the source; ``dealt`` is 0 or 1, [g, p]."""

    def parts(table: Floats) -> tuple[Floats, Floats, Floats]:
        both = table.sum(axis=1) @ dealt
        source = (dealt * (table @ dealt)).sum(axis=0)
        across = both - source
        return source, across, table.sum() - source - 2 * across

    source, across, target = (part / count for part, count in zip(parts(sums), parts(pairs), strict=True))
    return source + target - 2 * across


def _squares(x: Singles, y: Singles) -> tuple[Floats, Floats]:
    """The largest principal components of both sides together, their squares and products."""
    z = np.concatenate([x, y]).astype(np.float64)
    z -= z.mean(axis=0)
    spread, axes = np.linalg.eigh(z.T @ z)
    kept = slice(-COMPONENTS, None)
    z = z @ (axes[:, kept] / np.sqrt(np.maximum(spread[kept], TINY * spread[-1] + TINY)))
    first, second = np.triu_indices(z.shape[1])
    z = np.hstack([z, z[:, first] * z[:, second]])
    return z[: len(x)], z[len(x) :]


def _standardised(x: Singles) -> Singles:
    """By own mean and deviation."""
    return heads.standardised(x, *heads.moments(x, np.full(len(x), 1 / len(x))))


def _sampled(
    source: Features,
    target: Features,
    groups: tuple[Groups, Groups] | None,
    rows: int,
    chance: np.random.Generator,
) -> tuple[tuple[Singles, Singles], tuple[Ints, Ints]]:
    """At most ``rows`` rows of each side as float32, and their groups, numbered over both sides."""
    shapes = f"source {source.shape} and target {target.shape}"
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1] or not source.shape[1]:
        raise ValueError(f"features of {shapes} do not fit")
    if min(len(source), len(target), rows) < 1:
        raise ValueError(f"no rows to compare: {shapes}, {rows} rows")
    first, second = groups or (None, None)
    codes = group_codes(first, second, len(source), len(target))
    taken = [np.sort(chance.permutation(len(side))[:rows]) for side in (source, target)]
    x, y = (side[some].astype(np.float32) for side, some in zip((source, target), taken, strict=True))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features that are not finite numbers")
    return (x, y), (codes[0][taken[0]], codes[1][taken[1]])


def _in_shares(truth: Ints, prior: Floats, rows: int, chance: np.random.Generator) -> Ints:
    """At most ``rows`` source rows, drawn so that the classes have the shares ``prior``."""
    counts = np.bincount(truth, minlength=len(prior))
    total = min(rows, (counts[prior > 0] / prior[prior > 0]).min())
    shuffled = chance.permutation(len(truth))
    # Rounded sums rather than rounded parts: at least one row is left, however few there are.
    wanted = np.diff(np.round(np.cumsum(total * prior)), prepend=0).astype(int)
    parts = [shuffled[truth[shuffled] == c][:size] for c, size in enumerate(wanted)]
    return np.sort(np.concatenate(parts))
