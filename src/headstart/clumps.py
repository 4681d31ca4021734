"""Clumps: whether what a classifier says falls into two heaps, one for each class, or into one.

Goes in: probabilities on rows without labels, the group of each row. Comes out: a sign that the classes are
still told apart, wherever the threshold ought to be. Never sees a feature or a label.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np

from headstart.class_shares import Groups, distributions, group_codes, logs_of
from headstart.metrics import Floats, Ints

SIGNIFICANT = 0.05
CURVE = 2000  # quantiles that stand for the target's logits: their shape needs no more
MODES = 101  # places tried for the peak of a single clump
TAILS = (0.7, 1.0, 1.4, 2.0)  # its exponents: from heavier than Laplace's to Gaussian
SMALLEST_CLUMP = 0.03  # share of the rows; fewer are a tail

Density = Callable[[Floats], Floats]  # values [n] -> log-likelihood of each


def ordered(probabilities: Floats, groups: Groups | None = None) -> float:
    """A label-free sign that a classifier still tells classes apart, however wrong its threshold is.

    A classifier that is only badly scaled or located on the target leaves its logits in two clumps there,
    one per class, wherever they lie. Two Gaussians of one deviation are therefore fitted to the log-odds of
    a class, and compared with a single clump: a peak with two tails, each of its own width, Gaussian or
    heavier (so that neither skew nor outliers pass for a second clump). If two explain the log-odds better
    by Vuong's test of non-nested models (1989; one-sided 0.05, its variance from whole groups) and the
    smaller holds 3 % of the rows, the sign is the AUROC between them: the AUROC that the classifier has on
    the target if the clumps are the classes. If not, it is 0.5. Of more than two classes it is the mean
    over each class against the rest.

    Only a sign. Two clumps may be two cameras rather than two classes, and a flat top passes for two. Classes
    may be ordered and make one clump: two equal Gaussians have two peaks only above an AUROC of 0.92, and
    below it only the shape of the one tells. So 0.5 means "cannot tell", not "not ordered".

    Args:
        probabilities: float64[n, k], of target rows.
        groups: [n], any values. By default each row is a group.

    Raises:
        ValueError: shapes that do not fit, no rows, rows that do not sum to 1.
    """
    p = distributions(probabilities, "probabilities")
    code = np.unique(group_codes(groups, None, len(p), 0)[0], return_inverse=True)[1]
    columns = [1] if p.shape[1] == 2 else range(p.shape[1])
    # The others' sum, not 1 - p: in float32 a probability of 1 - 1e-9 is 1, and would stand far off.
    rest = [np.delete(p, column, axis=1).sum(axis=1) for column in columns]
    odds = [logs_of(p[:, column]) - logs_of(other) for column, other in zip(columns, rest, strict=True)]
    return float(np.mean([_clumps(values, code) for values in odds]))


def _clumps(values: Floats, code: Ints) -> float:
    """AUROC between the two clumps of ``values`` [n], rows of the groups ``code`` [n]; 0.5 for one clump."""
    from scipy.special import ndtr, stdtrit

    groups = int(code.max()) + 1
    if groups < 2 or np.ptp(values) < 1e-6:
        return 0.5
    values = (values - values.mean()) / values.std()
    short = len(values) <= CURVE
    curve = values if short else np.quantile(values, (np.arange(CURVE) + 0.5) / CURVE)
    two, gap, smaller = _two_clumps(curve)
    gain = two(values) - _one_clump(curve)(values)
    # Standard error of the summed gain: rows of a group stray together.
    error = sqrt(groups / (groups - 1) * np.square(np.bincount(code, gain - gain.mean())).sum())
    sure = gain.sum() > stdtrit(groups - 1, 1 - SIGNIFICANT) * error
    return float(ndtr(gap / sqrt(2))) if sure and smaller >= SMALLEST_CLUMP else 0.5


def _two_clumps(x: Floats) -> tuple[Density, float, float]:
    """Two Gaussians of one deviation fitted to ``x`` [n]: density, gap in deviations, smaller share.

    Expectation maximisation from five starts at once.
    """

    def parts(values: Floats) -> Floats:
        """Log-density of both clumps, [2, starts, n]."""
        return np.stack(
            [
                np.log(part / deviation / sqrt(2 * np.pi))[:, None]
                - 0.5 * ((values - centre[:, None]) / deviation[:, None]) ** 2
                for part, centre in ((1 - share, low), (share, high))
            ]
        )

    edges = np.quantile(x, [0.05, 0.2, 0.5, 0.8, 0.95])
    upper = (x > edges[:, None]).astype(np.float64)  # [starts, n], chance of the upper clump
    for _ in range(300):
        share = np.clip(upper.mean(axis=1), 1e-9, 1 - 1e-9)
        high = (upper @ x) / (share * len(x))
        low = ((1 - upper) @ x) / ((1 - share) * len(x))
        within = np.mean(x * x) - share * high**2 - (1 - share) * low**2
        deviation = np.sqrt(np.maximum(within, 1e-4))
        logs = parts(x)
        upper = np.exp(logs[1] - np.logaddexp(*logs))
    best = int(np.logaddexp(*logs).mean(axis=1).argmax())
    gap = float(abs(high[best] - low[best]) / deviation[best])
    return lambda values: np.logaddexp(*parts(values))[best], gap, float(min(share[best], 1 - share[best]))


def _one_clump(x: Floats) -> Density:
    """One peak with two tails fitted to ``x`` [n].

    Density b / ((l + r) G(1 / b)) exp(-(|x - m| / s)^b), s = l left of m and r right of it (for b = 2 the
    two-piece normal, John 1982). Given m and b, l and r have a closed form, so both are tried on a grid.
    """
    from scipy.special import gammaln

    peaks = np.quantile(x, np.linspace(0.01, 0.99, MODES))
    distance, left = np.abs(x - peaks[:, None]), x < peaks[:, None]
    fits = []
    for tail in TAILS:
        powers = distance**tail
        sums = np.stack([np.where(side, powers, 0).sum(axis=1) for side in (left, ~left)])
        shape = np.maximum(sums, 1e-12) ** (1 / (tail + 1))
        widths = shape * (tail * shape.sum(axis=0) / len(x)) ** (1 / tail)
        height = np.log(tail / widths.sum(axis=0)) - gammaln(1 / tail)
        means = height - (sums / widths**tail).sum(axis=0) / len(x)
        best = int(means.argmax())
        fits.append((means[best], peaks[best], tail, height[best], widths[:, best]))
    _, peak, tail, height, (below, above) = max(fits, key=lambda fit: float(fit[0]))
    return lambda values: height - (np.abs(values - peak) / np.where(values < peak, below, above)) ** tail
