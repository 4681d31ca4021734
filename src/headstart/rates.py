"""Rates: which learning rate a recipe can bear, found before the hours are spent.

Goes in: a fine-tuning that has not begun. Comes out: the loss at each rate of a short run in which the rate
rises, a suggestion, and a plot. Never keeps the weights of that run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from headstart import schedules
from headstart.errors import HeadstartError
from headstart.progress import bar

if TYPE_CHECKING:
    from headstart.finetuning import Tuning

SMOOTHING = 0.9  # share of the running mean that each step keeps
DIVERGED = 2.0  # times the lowest mean loss: from there on nothing is learned from going on


def sweep(tuning: Tuning, low: float = 1e-6, high: float = 1.0, steps: int = 100) -> pd.DataFrame:
    """The range test of Smith 2017 (arXiv:1506.01186): steps at rates that rise from ``low`` to ``high``.

    Args:
        tuning: a run that has not begun; the rates are its fastest layer's, the others keep their ratio.
        low: first rate.
        high: last rate.
        steps: how many at most; it ends early when the loss has grown to ``DIVERGED`` times its lowest.

    Returns:
        ``learning_rate``, ``loss``, and ``mean``: the running mean of the loss, corrected for its start.

    Raises:
        HeadstartError: not even the first step can be taken.
    """
    lines: list[dict[str, float]] = []
    mean, lowest = 0.0, float("inf")
    for step in bar(range(steps), desc="trying learning rates", unit=" steps"):
        epoch, place = divmod(step, tuning.per_epoch)
        if place == 0:
            order = tuning.order(epoch)
        rate = low * (high / low) ** (step / max(1, steps - 1))
        try:
            loss = tuning.learn(order[place], epoch, rate / max(tuning.rates))["loss"]
        except HeadstartError:
            if not lines:  # whatever is wrong, it is not that the rate has risen
                raise
            break  # no longer a number
        tuning.step += 1  # what is random in a step depends on it
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth = mean / (1 - SMOOTHING ** (step + 1))
        lines.append({"learning_rate": rate, "loss": loss, "mean": smooth})
        lowest = min(lowest, smooth)
        if smooth > DIVERGED * lowest:
            break
    return pd.DataFrame(lines)


def suggested(table: pd.DataFrame) -> float:
    """A tenth of the rate at which the mean loss was lowest: there it still falls, with room for noise.

    As those of the table, it is the fastest layer's.
    """
    return float(table["learning_rate"].iloc[int(np.argmin(table["mean"]))] / 10)


def keys(tuning: Tuning, fastest: float) -> dict[str, float]:
    """The keys of ``train`` with which the fastest layer learns at this rate, the others in their ratio."""
    choices = tuning.choices
    rate = choices.learning_rate or schedules.LEARNING_RATE[tuning.classifier.spec.modality]
    share = fastest / max(tuning.rates)
    found = {"learning_rate": rate * share}
    if choices.head_learning_rate:
        found["head_learning_rate"] = choices.head_learning_rate * share
    return found


def plot(table: pd.DataFrame, path: Path) -> None:
    """Loss over rate as a picture; its ending, such as ``.png`` or ``.svg``, says of what kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(table["learning_rate"], table["loss"], color="0.8", label="each step")
    axes.plot(table["learning_rate"], table["mean"], label="running mean")
    rate = suggested(table)
    axes.axvline(rate, linestyle="--", color="tab:green", label=f"suggested: {rate:.1e}")
    axes.set(xscale="log", xlabel="learning rate of the fastest layer", ylabel="loss")
    axes.legend()
    figure.savefig(path)
