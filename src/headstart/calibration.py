"""Calibration: probabilities that mean what they say, and the label to name given them.

Goes in: true classes and predicted probabilities of validation rows. Comes out: a temperature, and a
``Decision``. Never reads a file, and never changes which of two probabilities is the larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.errors import HeadstartError
from headstart.metrics import TINY, Floats, Ints, scores
from headstart.recipe import Decide

COLDEST, HOTTEST = 0.05, 20.0
ROUNDS = 10  # of the search over classes; it settles in two or three


def temperature(truth: Ints, probabilities: Floats) -> float:
    """What to divide the logits by so that the log-loss is least (Guo et al. 2017, arXiv:1706.04599).

    The loss is convex in the inverse temperature, so there is one answer, kept between ``COLDEST`` and
    ``HOTTEST``. Rows that are all named rightly would ask for a temperature of 0, so each counts as its class
    with (n + 1) / (n + 2) only (Platt 1999, Probabilistic outputs for support vector machines). The other
    classes share the rest: with 1 / (n + 2) for each of them, ten classes would make a model of 40 rows far
    too unsure.

    Args:
        truth: int[n], positions of the true classes.
        probabilities: float64[n, k], rows that sum to 1.
    """
    from scipy.optimize import minimize_scalar

    logs = np.log(np.clip(probabilities, TINY, 1))
    n, k = probabilities.shape
    targets = np.full((n, k), 1 / (n + 2) / max(1, k - 1))
    targets[np.arange(n), truth] = (n + 1) / (n + 2)

    def loss(inverse: float) -> float:
        scaled = inverse * logs
        top = scaled.max(axis=1)
        total = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((total - (targets * scaled).sum(axis=1)).mean())

    found = minimize_scalar(
        loss, bounds=(1 / HOTTEST, 1 / COLDEST), method="bounded", options={"xatol": 1e-6}
    )
    return float(1 / found.x)


def tempered(probabilities: Floats, heat: float) -> Floats:
    """The probabilities, float64[n, k], of the same logits divided by ``heat``."""
    logs = np.log(np.clip(probabilities, TINY, 1)) / heat
    raised = np.exp(logs - logs.max(axis=1, keepdims=True))
    result: Floats = raised / raised.sum(axis=1, keepdims=True)
    return result


@dataclass(frozen=True)
class Decision:
    """Which class to name: the one that is expected to cost least, and none where it is too unsure.

    ``costs[i][j]`` is what naming class j costs where class i is true. With a cost of 1 for every mistake it
    is the likeliest class; with costs t and 1 - t of two classes, it is the second from a probability of t on
    (Elkan 2001, The foundations of cost-sensitive learning).
    """

    costs: tuple[tuple[float, ...], ...]
    abstain: float | None = None  # name no class whose probability is below this

    @classmethod
    def likeliest(cls, classes: int) -> Decision:
        """The decision that most people expect."""
        return cls.weighed(np.ones(classes))

    @classmethod
    def weighed(cls, factors: Floats, abstain: float | None = None) -> Decision:
        """The class with the largest probability times its factor, [k]."""
        costs = np.tile(factors[:, None], len(factors)) * (1 - np.eye(len(factors)))
        return cls(tuple(tuple(map(float, line)) for line in costs), abstain)

    @classmethod
    def of(cls, described: dict[str, Any]) -> Decision:
        """What ``model.json`` says; of a model without that key, the likeliest class."""
        said = described.get("decision")
        if said is None:
            return cls.likeliest(len(described["classes"]))
        return cls(tuple(map(tuple, said["costs"])), said["abstain"])

    def named(self, probabilities: Floats) -> Ints:
        """Position of the class to name in each row of [n, k]; of equals the first. Nobody abstains here."""
        best: Ints = (probabilities @ np.array(self.costs)).argmin(axis=1).astype(np.int64)
        return best

    def sure(self, probabilities: Floats) -> NDArray[np.bool_]:
        """Whether the class to name is named at all, [n]."""
        if self.abstain is None:
            return np.ones(len(probabilities), bool)
        found: NDArray[np.bool_] = (
            probabilities[np.arange(len(probabilities)), self.named(probabilities)] >= self.abstain
        )
        return found


def decision(truth: Ints, probabilities: Floats, classes: list[str], choices: Decide) -> Decision:
    """What the recipe asks for, chosen on validation rows.

    With a cost matrix nothing is left to choose: calibrated probabilities say what each answer costs. For a
    metric, the factor of one class after the other is moved to where the metric is best; of two classes that
    is the threshold. A factor changes answers only where two products are equal, so nothing between those
    places is tried, and the middle of the widest best stretch is taken.

    Args:
        truth: int[n], positions of the true classes.
        probabilities: float64[n, k], calibrated.
        classes: [k], their names.
        choices: the block ``train.decide``.

    Raises:
        HeadstartError: costs of a class that there is not.
    """
    if choices.costs is not None:
        named = {*choices.costs, *(name for line in choices.costs.values() for name in line)}
        if unknown := sorted(named - set(classes)):
            raise HeadstartError(
                f"costs are named for what is no class: {', '.join(unknown)}",
                where="train.decide.costs",
                do=f"the classes are {', '.join(classes)}",
            )
        table = [[choices.costs.get(i, {}).get(j, float(i != j)) for j in classes] for i in classes]
        return Decision(tuple(map(tuple, table)), choices.abstain)
    factors = np.ones(len(classes))
    if choices.metric is not None:
        for _ in range(ROUNDS):
            before = factors.copy()
            for place in range(1, len(classes)):
                factors[place] = _best_factor(truth, probabilities, factors, place, choices.metric)
            if np.array_equal(before, factors):
                break
    return Decision.weighed(factors, choices.abstain)


MOST = 200  # factors tried for a class: quantiles of those that change an answer


def _best_factor(truth: Ints, probabilities: Floats, factors: Floats, place: int, metric: str) -> float:
    """The factor of one class that gives the best metric, the others staying as they are."""
    others = np.delete(probabilities * factors, place, axis=1).max(axis=1)
    turns = np.unique(others / np.clip(probabilities[:, place], TINY, 1))
    if len(turns) > MOST:
        turns = np.unique(np.quantile(turns, np.linspace(0, 1, MOST), method="nearest"))
    middles = np.sqrt(turns[1:] * turns[:-1])
    tried = np.unique([factors[place], *middles])
    values = []
    for factor in tried:
        each = factors.copy()
        each[place] = factor
        named = Decision.weighed(each).named(probabilities)
        values.append(scores(truth, probabilities, named=named, wanted=[metric])[metric])
    best = np.flatnonzero(np.array(values) >= max(values) - 1e-12)
    stretches = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    widest = max(stretches, key=len)
    return float(tried[widest[len(widest) // 2]])
