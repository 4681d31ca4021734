"""The gate: whether a candidate has shown that it is better than the champion.

Goes in: what both say of the same rows, the truth, and the recipe's rules. Comes out: a ``Verdict`` with the
figures behind each rule. A pure function: never loads a model, asks a registry or changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.metrics import OF_ROWS, Floats, Ints, fewest_groups, gains, groups_by_class, levels, scores
from headstart.recipe import Promote

Figures = dict[str, float | None]
RESAMPLES = 2000  # the 5th percentile is known to a tenth of a deviation
NAMED = 5  # domains without the metric that a reason lists
ROUNDING = 1e-9  # figures that differ by less are equal: in binary 0.78 - 0.80 is below -0.02


@dataclass(frozen=True)
class Answers:
    """What one model says of the rows, and what it costs to ask."""

    probabilities: Floats  # float64 [n, k], classes in the order of the truth's positions
    named: Ints  # int64 [n], position of the class that it names, -1 for one that is none of these
    seconds: float | None = None  # per row
    size: int | None = None  # bytes


@dataclass(frozen=True)
class Check:
    """One rule, whether it holds, and its figures in words."""

    rule: str
    passed: bool
    words: str


@dataclass(frozen=True)
class Verdict:
    """Whether to promote, and why."""

    promoted: bool
    checks: tuple[Check, ...]
    figures: Figures
    by_domain: dict[str, float]  # gain of the metric in each domain, where there is a champion

    @property
    def reasons(self) -> list[str]:
        """What speaks against promoting; if nothing does, what speaks for it."""
        return [check.words for check in self.checks if check.passed == self.promoted]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON-ready values."""
        return asdict(self) | {"reasons": self.reasons}

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> Verdict:
        """The way back from ``to_dict``."""
        checks = tuple(Check(**check) for check in said["checks"])
        return cls(said["promoted"], checks, said["figures"], said["by_domain"])


@dataclass(frozen=True)
class Judged:
    """The rows that both models are judged on, [n] each."""

    truth: Ints  # positions of the true classes
    groups: NDArray[Any]  # any values; rows of one group are drawn together
    domains: NDArray[Any]  # names
    classes: Sequence[str]  # [k], names of the positions


def judge(
    rows: Judged,
    candidate: Answers,
    champion: Answers | None,
    rules: Promote,
    *,
    named: str = "the champion",
) -> Verdict:
    """Compare a candidate with the champion, or with always naming the commonest class if there is none.

    Better is shown by a paired bootstrap over groups: the gain must exceed ``min_gain`` in all but
    1 - ``confidence`` of the resamples (one-sided, the percentile moved outwards as for few groups; see
    ``metrics.intervals``). Where the metric is a mean over classes, the groups of the class that is in the
    fewest are those that count. Where better means more rows named rightly, McNemar's exact test of a gain
    above 0 has to agree (McNemar 1947). It takes rows for independent, so where groups are large it is too
    sure, and the bootstrap decides.

    Args:
        rows: what is true of them.
        candidate: what the new model says.
        champion: what the present one says.
        rules: the recipe's block ``promote``.
        named: what the reasons call the present one.

    Raises:
        ValueError: shapes that do not fit, or no rows.
    """
    rival = champion if champion is not None else commonest(rows.truth, candidate.probabilities.shape[1])
    against = named if champion is not None else "always naming the commonest class"
    shown, figures = _gain(rows, (candidate, rival), rules, against)
    checks = [_floor(figures["candidate"], rules), *shown]
    by_domain: dict[str, float] = {}
    if champion is not None:
        by_domain = _by_domain(rows, (candidate, champion), rules.metric)
        if rules.max_latency_ratio is not None:
            check, of_latency = _latency(candidate, champion, rules.max_latency_ratio)
            checks.append(check)
            figures |= of_latency
        if rules.no_domain_worse_than is not None:
            by_accuracy = _by_domain(rows, (candidate, champion), "accuracy")
            checks.append(_domains(by_domain, by_accuracy, rules.metric, rules.no_domain_worse_than))
    if rules.max_size is not None and candidate.size is not None:
        check, of_size = _size(candidate.size, rules.max_size)
        checks.append(check)
        figures |= of_size
    return Verdict(all(check.passed for check in checks), tuple(checks), figures, by_domain)


def commonest(truth: Ints, classes: int) -> Answers:
    """What a model says that knows nothing but how common each class is."""
    shares = np.bincount(truth, minlength=classes) / len(truth)
    return Answers(np.tile(shares, (len(truth), 1)), np.full(len(truth), shares.argmax(), np.int64))


def mcnemar(wins: int, losses: int) -> float:
    """One-sided p value of so many rows that only one of two models has right: a fair coin's, exactly."""
    from scipy.stats import binom

    return float(binom.sf(wins - 1, wins + losses, 0.5))


def _score(truth: Ints, answers: Answers, metric: str) -> float | None:
    value = scores(truth, answers.probabilities, named=answers.named, wanted=[metric])[metric]
    return value if np.isfinite(value) else None


def _floor(ours: float | None, rules: Promote) -> Check:
    if ours is None:
        return Check("floor", False, f"{rules.metric} is not defined on these rows")
    holds = ours >= rules.floor - ROUNDING
    side = "at least" if holds else "below"
    return Check("floor", holds, f"{rules.metric} {ours:.3f}, {side} the floor of {rules.floor:g}")


def _gain(
    rows: Judged, pair: tuple[Answers, Answers], rules: Promote, against: str
) -> tuple[list[Check], Figures]:
    """Whether it is shown to be better, and the figures of both tests."""
    ours, theirs = (_score(rows.truth, answers, rules.metric) for answers in pair)
    figures: Figures = {"candidate": ours, "against": theirs, "gain": None}
    (count, those), fewest = _counted(rows, rules.metric), fewest_groups(rules.confidence)
    if ours is None or theirs is None:
        words = f"{rules.metric} is not defined on these rows, so it shows nothing"
        return [Check("min_gain", False, words)], figures
    figures["gain"] = ours - theirs
    sure = f"{100 * rules.confidence:g}% confidence"
    if count < fewest:
        words = f"{count} {those} cannot show with {sure} that one model is better"
        return [Check("min_gain", False, f"{words}: that takes {fewest}")], figures
    drawn = gains(
        rows.truth,
        pair[0].probabilities,
        pair[1].probabilities,
        rows.groups,
        named=(pair[0].named, pair[1].named),
        wanted=[rules.metric],
        resamples=RESAMPLES,
    )[rules.metric]
    ends = levels(2 * rules.confidence - 1, count)  # one-sided, at each end
    low, high = (float(bound) for bound in np.nanquantile(drawn, ends))
    shown = low > rules.min_gain + ROUNDING
    words = (
        f"{rules.metric} {ours:.3f} against {theirs:.3f} of {against}: "
        f"{ours - theirs:+.3f}, with {sure} above {low:+.3f}; "
        f"{'more' if shown else 'not shown to be more'} than {rules.min_gain:g}"
    )
    checks = [Check("min_gain", shown, words)]
    right = [answers.named == rows.truth for answers in pair]
    wins, losses = (int((a & ~b).sum()) for a, b in (right, right[::-1]))
    p, most = mcnemar(wins, losses), 1 - rules.confidence
    figures |= {"gain_low": low, "gain_high": high, "wins": wins, "losses": losses, "mcnemar_p": p}
    if rules.metric == "accuracy":
        words = (
            f"it alone is right on {wins} rows and {against} alone on {losses}: McNemar's p is {p:.3f}, "
            f"{'below' if p < most else 'not below'} {most:.3g}"
        )
        checks.append(Check("mcnemar", p < most, words))
    return checks, figures


def _counted(rows: Judged, metric: str) -> tuple[int, str]:
    """The groups that a gain in the metric can be shown by: how many, and which in words.

    A mean over classes is no surer than the class that is in the fewest groups: resamples of two hardly
    vary, and those that have neither say nothing of the class. What AUROC holds against a class, all rows of
    others, is in no fewer groups than those others are, so it need not be counted.
    """
    every, whole = len(np.unique(rows.groups)), "groups of test rows"
    if metric in OF_ROWS:
        return every, whole
    held = groups_by_class(rows.truth, rows.groups)
    rarest = min(held, key=held.__getitem__)
    if held[rarest] == every:
        return every, whole
    return held[rarest], f"{whole} with class {rows.classes[rarest]}"


def _by_domain(rows: Judged, pair: tuple[Answers, Answers], metric: str) -> dict[str, float]:
    """Gain in each domain in which it is defined."""
    found: dict[str, float] = {}
    for domain in np.unique(rows.domains):
        here = rows.domains == domain
        ours, theirs = (
            _score(rows.truth[here], Answers(said.probabilities[here], said.named[here]), metric)
            for said in pair
        )
        if ours is not None and theirs is not None:
            found[str(domain)] = ours - theirs
    return found


def _domains(by_domain: dict[str, float], by_accuracy: dict[str, float], metric: str, most: float) -> Check:
    """Whether no domain has lost more than this: of the metric or, where that is not defined, of accuracy.

    A domain of one class has no AUROC. Left out, it could be ruined unseen; refused for it, no candidate
    would ever pass.
    """
    instead = [domain for domain in by_accuracy if domain not in by_domain]
    found = by_accuracy | by_domain
    worst = min(found, key=found.__getitem__)
    holds = found[worst] >= -most - ROUNDING
    of = "accuracy " if worst in instead else ""
    words = f"worst domain {worst}: {of}{found[worst]:+.3f}, {'within' if holds else 'beyond'} -{most:g}"
    if instead:
        more = f" and {len(instead) - NAMED} more" if len(instead) > NAMED else ""
        where = ", ".join(instead[:NAMED]) + more
        words += f"; in {where} {metric} is not defined, so accuracy is compared"
    return Check("no_domain_worse_than", holds, words)


def _latency(candidate: Answers, champion: Answers, most: float) -> tuple[Check, Figures]:
    if not candidate.seconds or not champion.seconds:
        return Check("max_latency_ratio", False, "latency was not measured"), {}
    ratio = candidate.seconds / champion.seconds
    side = "within" if ratio <= most else "over"
    words = f"{ratio:.2f} times the champion's seconds per row, {side} the {most:g} allowed"
    return Check("max_latency_ratio", ratio <= most, words), {"latency_ratio": ratio}


def _size(size: int, most: float) -> tuple[Check, Figures]:
    megabytes = size / 1e6
    fits = megabytes <= most
    words = f"{megabytes:.1f} MB, {'within' if fits else 'over'} the {most:g} MB allowed"
    return Check("max_size", fits, words), {"megabytes": megabytes}
