"""Two domains of Gaussian classes, whose shift is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from headstart.adaptation import Source
from headstart.heads import Head

SHIFT, SCALE = np.array([9.0, -4.0, 0.5, 30.0]), np.array([3.0, 0.25, 1.0, 7.0])


def rows(
    n: int = 400, d: int = 4, k: int = 2, *, seed: int = 0, share: float = 0.5, far: float = 3
) -> tuple[Any, Any]:
    """Classes ``far`` out along a dimension each, amid noise; ``share`` of the rows are of the first."""
    chance = np.random.default_rng(seed)
    odds = np.r_[share, np.full(k - 1, (1 - share) / (k - 1))]
    truth = chance.choice(k, n, p=odds)
    return chance.normal(size=(n, d)) + far * np.eye(k, d)[truth], truth


def labelled(x: Any, truth: Any, weights: Any = None) -> Source:
    targets = np.eye(truth.max() + 1)[truth]
    return Source(x.astype(np.float32), targets, np.ones(len(x)) if weights is None else weights)


def accuracy(head: Head, x: Any, truth: Any) -> float:
    return float((head.probabilities(x).argmax(axis=1) == truth).mean())
