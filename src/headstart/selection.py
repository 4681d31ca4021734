"""Selection: which way of adapting to take, and what to expect of it, without a label of the target.

Goes in: a head of the source, rows of the source that it was not fitted to, and the target's rows. Comes out:
a method and the reason for it, the accuracy to expect, and what can be said of every other method. Of target
labels it sees the few that it is given.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from headstart.adaptation import MEMBERS, METHODS, MOVING, PENALTY, Source, adapt, agreed, penalty_of, scaling
from headstart.class_shares import calibrated
from headstart.heads import Features, Head
from headstart.metrics import TINY, Floats, Ints

# All classes but one named less often than so many times their share on the source show that the head is
# lost. Of fine-tuned heads, between the largest such number of a pair that had moved, 0.02, and the smallest
# of another, 0.58.
LOST = 0.3
# Of so many rows that should be named them, chance leaves less than ``LOST`` once in 360 times (Poisson); of
# five, once in 25. Fewer say nothing.
EXPECTED = 10
# Of expected accuracies over pairs of domains (seeds 100 and 101): too high on average, and by so much more
# or less in four of five pairs.
OPTIMISM, SPREAD = 0.04, 0.09
KNOWN_ENOUGH = 30  # labelled target rows; fewer choose by chance
CANDIDATES = ("source_only", "consensus", "information_maximisation")  # that they choose among
COMPARED = 2000  # rows of a side that candidates are made from, to be compared
# On 1,280 dimensions these take 14 s of one core for a comparison, and all others together 11 s.
SLOW, WIDE = ("optimal_transport", "importance_weighting", "standardised_self_training"), 512


def choose(head: Head, held_out: Features, target: Features, kind: str) -> tuple[str, str]:
    """A method and the reason for it, without a target label.

    Hands off where other class shares explain the shift, or nobody can tell whether they do: the head is then
    as right about each class as it was, and most methods would force shares that are not there. A head that
    is lost in a target that has moved as a whole names hardly anything but one class:
    ``information_maximisation`` looks for the classes anew, even where groups are too few for a test to show
    anything. That one class of several is missing there shows nothing of the kind, and neither do rows too
    few to tell. Any other head is left alone if no shift is shown, and else followed, by ``consensus``.
    docs/explanation/results.md has the figures.

    Args:
        head: the source's.
        held_out: [n, d], source rows that it was not fitted to.
        target: [m, d].
        kind: of the shift, as ``shifts.diagnose`` finds it.
    """
    if kind == "labels":
        return "source_only", "other class shares explain the shift, so the classes look as they did"
    if kind == "unknown":
        return (
            "source_only",
            "other class shares may be all that has changed, which cannot be told, and most ways would force "
            "the old ones",
        )
    here, there = head.logits(held_out), head.logits(target)
    kept = besides_one(_named(here), _named(there), len(there))
    how = _how("the source's head names", kept, len(head.bias), "there")
    if kept < LOST:
        return "information_maximisation", f"{how}: less than {LOST}, so it is lost"
    if kind == "none":
        return "source_only", "the features are not shown to have shifted, so there is nothing to mend"
    return "consensus", f"the features have moved, but {how}: it is worth following"


def best_on(  # noqa: PLR0917  # two domains, and what is known
    known: Features,
    truth: Ints,
    head: Head,
    source: Source,
    target: Features,
    first: tuple[str, str],
    least: float,
) -> tuple[str, str]:
    """The method that is right on most of a few labelled target rows, and the reason.

    Heads are judged that have not learned from these rows. Of equals the earlier wins, and ``first``, what
    the shift asks for, is the first.

    Args:
        known: [n, d].
        truth: int[n], their classes.
        head: the source's, which ``source_only`` stands for.
        source: labelled rows.
        target: [m, d], all rows to adapt to.
        first: a method and its reason.
        least: penalty that the source's own rows ask for.
    """
    right: dict[str, int] = {}
    for method in dict.fromkeys([first[0], *CANDIDATES]):
        found = head if method == "source_only" else adapt(method, source, target, penalty_of(method, least))
        right[method] = int((found.logits(known).argmax(axis=1) == truth).sum())
    best = max(right, key=lambda method: right[method])
    if best == first[0]:
        return first
    return (
        best,
        f"right on {right[best]} of {len(truth)} labelled target rows, {first[0]} on {right[first[0]]}",
    )


def candidates(
    head: Head, source: Source, target: Features, chosen: str, *, least: float = PENALTY, seed: int = 0
) -> dict[str, Head]:
    """A head by each of the ``METHODS``, to be compared with one another; ``source_only`` is ``head``.

    Made from at most ``COMPARED`` rows of each side, and on features of more than ``WIDE`` dimensions without
    those that are ``SLOW``, but for the one ``chosen``: a comparison should cost less than what it is about.
    """
    wide = target.shape[1] > WIDE
    left_out = {"consensus", *(SLOW if wide else ())} - ({chosen} - {"consensus"})
    chance = np.random.default_rng(seed)
    mine, theirs = (np.sort(chance.permutation(len(x))[:COMPARED]) for x in (source.features, target))
    few = Source(source.features[mine], source.targets[mine], source.weights[mine])
    made = {
        method: adapt(method, few, target[theirs], penalty_of(method, least), seed=seed)
        for method in METHODS
        if method not in left_out
    }
    made["consensus"] = agreed({name: made[name] for name in MEMBERS}, target[theirs])
    return made | {"source_only": head}


def judged(
    heads: dict[str, Head], held_out: tuple[Features, Ints], source: Features, target: Features
) -> dict[str, dict[str, float]]:
    """What can be said of each of these heads without a label of the target.

    Args:
        heads: by method; among them ``source_only``.
        held_out: source rows [n, d] that ``source_only`` was not fitted to, and their classes int[n].
        source: [m, d], all source rows.
        target: [j, d].

    Returns:
        By method: ``rarest_named``, which see; ``diversity``, the entropy of the mean prediction over that of
        equal shares, 0 to 1; ``agreement``, the share of rows that another head names alike, on average over
        the other heads; ``expected_accuracy``, without its interval.
    """
    here = _named(heads["source_only"].logits(held_out[0]))
    answers = {method: head.probabilities(target) for method, head in heads.items()}
    top = np.stack([p.argmax(axis=1) for p in answers.values()])
    found = {}
    for place, (method, head) in enumerate(heads.items()):
        mean = answers[method].mean(axis=0)
        others = np.delete(top, place, axis=0)
        found[method] = {
            "rarest_named": rarest_named(here, _named(answers[method])),
            "diversity": float(-(mean * np.log(np.maximum(mean, TINY))).sum() / np.log(len(mean))),
            "agreement": float((others == top[place]).mean()) if len(others) else 1.0,
            "expected_accuracy": expected_accuracy(head, held_out, source, target, method in MOVING)[0],
        }
    return found


def rarest_named(here: Floats, there: Floats) -> float:
    """Of the shares in which classes are named here [k], the least factor that is left of one there [k].

    A figure to compare ways by. Whether a head is lost is for ``besides_one`` to tell.
    """
    return float(min(after / before for before, after in zip(here, there, strict=True) if before > 0))


def besides_one(here: Floats, there: Floats, rows: int) -> float:
    """Of the shares in which all classes but one are named here, the least factor that is left of one there.

    Little is left where hardly anything but that one is named. Of two classes it is ``rarest_named``; of more
    it is not, as a class may be missing from the target without any harm to the others.

    Args:
        here: share of each class [k].
        there: likewise.
        rows: the number that ``there`` are shares of.

    Returns:
        The factor; NaN if the rows are too few to tell.
    """
    before, after = 1 - here, 1 - there
    told = before * rows >= EXPECTED - 1e-9  # 0.1 of 100 is a little less than 10 in binary
    return float((after[told] / before[told]).min()) if told.any() else np.nan


def found_again(head: Head, target: Features, shares: Floats) -> tuple[Head, str]:
    """A head to go on from without the source, and why: where it is lost, it sees rows by their own moments.

    That is ``standardisation`` as far as it goes without a row of the source. A head that still expects more
    than one class, or has too few rows to tell, is left as it is.

    Args:
        head: takes rows of the source.
        target: [m, d].
        shares: of each class [k], the mean of what the head says of rows like those it learned from.
    """
    kept = besides_one(shares, head.probabilities(target).mean(axis=0), len(target))
    how = _how("the head expects", kept, len(shares), "where it comes from")
    if not kept < LOST:
        return head, f"{how}, so it starts as it is"
    own = scaling(target)
    return (
        replace(head, mean=own.mean, scale=own.scale),
        f"{how}: less than {LOST}, so it starts by their own moments",
    )


def _how(does: str, kept: float, classes: int, where: str) -> str:
    """What ``besides_one`` found, in words."""
    if np.isnan(kept):
        return "the rows are too few to tell whether the head is lost"
    which = "a class" if classes == 2 else "all classes but one, taken together,"
    return f"{does} {which} {kept:.2f} times as often as {where}"


def _named(answers: Floats) -> Floats:
    """The share of rows [k] that logits or probabilities [n, k] name each class."""
    return np.bincount(answers.argmax(axis=1), minlength=answers.shape[1]) / len(answers)


def expected_accuracy(
    head: Head, held_out: tuple[Features, Ints], source: Features, target: Features, moved: bool
) -> tuple[float, float, float]:
    """The accuracy to expect of an adapted head on the target, without its labels, and an 80 % interval.

    How sure the head is of the target's rows on average, once its confidence is calibrated on held-out rows
    of the source (``class_shares.calibrated``). On another domain that is too hopeful, by ``OPTIMISM`` on
    average over pairs of our examples, which is taken off; how far it was off beyond that makes the interval.
    It is a guess for planning what to label, and no proof.

    Args:
        head: for target rows.
        held_out: source rows [n, d] that the head was not fitted to, and their classes int[n].
        source: [m, d], all source rows.
        target: [j, d].
        moved: whether the head expects rows standardised by their own domain, as the source's then are here.
    """
    rows, truth = held_out
    if moved:
        here, there = scaling(source), scaling(target)
        rows = here(rows) * there.scale + there.mean
    sure = calibrated(truth, head.probabilities(rows), head.probabilities(target)).max(axis=1)
    least = 1 / len(head.bias)
    value, low, high = (
        float(np.clip(sure.mean() - OPTIMISM + reach, least, 1)) for reach in (0, -SPREAD, SPREAD)
    )
    return value, low, high
