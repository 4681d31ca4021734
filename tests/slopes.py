"""Gradients by central differences, which losses that say their own are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def slope_by_differences(loss: Callable[[Any], float], at: Any, step: float = 1e-5) -> Any:
    """The gradient of ``loss`` at the float64 array ``at``, of the same shape."""
    slope = np.empty(at.shape)
    for index in np.ndindex(at.shape):
        nudge = np.zeros(at.shape)
        nudge[index] = step
        slope[index] = (loss(at + nudge) - loss(at - nudge)) / (2 * step)
    return slope
