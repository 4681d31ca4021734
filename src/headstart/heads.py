"""Heads: multinomial logistic regression on the features of a frozen backbone.

Goes in: features, soft targets, row weights. Comes out: a ``Head``, a few small arrays that turn
features into probabilities. Never reads a manifest or knows what a class is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headstart.metrics import Floats, cross_entropies

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Singles = NDArray[np.float32]
Features = NDArray[np.floating[Any]]

BLOCK_BYTES = 16 << 20  # of float32; large enough for fast products, small enough for any machine
DEAD = 0.01  # a deviation below this share of the median is noise
KEEP_BYTES = 1 << 30  # standardised features are kept in memory up to this size, else made anew each pass


class Targets(Protocol):
    """Float64 [n, k], each row a distribution over the classes: an array, or what makes its blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and classes."""
        ...

    def __getitem__(self, rows: slice, /) -> Floats: ...


@dataclass(frozen=True)
class Head:
    """A linear classifier: logits = ((x - mean) / scale) @ weight.T + bias; all arrays float32."""

    weight: Singles  # [k, d]
    bias: Singles  # [k]
    mean: Singles  # [d]
    scale: Singles  # [d], positive

    def logits(self, x: Features) -> Floats:
        """float64[n, k] of features [n, d], computed in float32 block by block."""
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {x.shape} do not fit a head of {len(self.mean)} dimensions")
        result = np.empty((len(x), len(self.bias)))
        for rows in row_blocks((len(x), max(self.weight.shape))):
            result[rows] = standardised(x[rows], self.mean, self.scale) @ self.weight.T + self.bias
        return result

    def probabilities(self, x: Features) -> Floats:
        """float64[n, k] of features [n, d]; each row sums to 1."""
        return np.exp(log_softmax(self.logits(x)))

    def tempered(self, heat: float) -> Head:
        """The head whose logits are these divided by ``heat``."""
        divisor = np.float32(heat)
        return replace(self, weight=self.weight / divisor, bias=self.bias / divisor)

    def save(self, path: Path) -> None:
        """Write the four arrays as safetensors."""
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(array) for name, array in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> Head:
        """Read what ``save`` wrote."""
        from safetensors.numpy import load_file

        return cls(**load_file(path))


def fit(features: Features, targets: Targets, weights: Floats, l2: float, start: Head | None = None) -> Head:
    """The head that minimises weighted cross-entropy plus ``l2 / 2`` times the squared weights.

    The weights are scaled to sum to 1, so the loss is a mean and ``l2`` means the same for any number of
    rows (scikit-learn's ``C`` is 1 / (l2 n)). The bias is free. The problem is convex: there is one
    answer, whatever the start. Features are standardised with the weighted mean and deviation, so
    that a row of weight 2 is exactly two rows; one that hardly varies is divided by the median deviation.

    Args:
        features: [n, d], any float type; a float16 memory map is read in blocks and never copied whole
            unless it fits ``KEEP_BYTES`` as float32.
        targets: float64[n, k], each row a distribution over the classes.
        weights: float64[n], at least 0 with a positive sum.
        l2: penalty, positive.
        start: a head of another ``l2`` on the same features, to start from.

    Raises:
        ValueError: shapes that do not fit, weights or a penalty out of range, features not finite.
    """
    return next(_path(features, targets, weights, [l2], start))


def select(
    train: tuple[Features, Targets, Floats],
    val: tuple[Features, Targets, Floats],
    l2: Iterable[float],
) -> tuple[Head, float, list[dict[str, float]]]:
    """The head whose penalty gives the lowest validation log-loss, of all penalties in ``l2``.

    Penalties are tried from strong to weak, each starting where the one before it ended (the path of
    Friedman, Hastie & Tibshirani 2010); of equals the strongest wins.

    Args:
        train: features [n, d], targets float64[n, k] and weights float64[n] to fit on.
        val: the same of the rows that choose.
        l2: penalties, all positive, in any order.

    Returns:
        The head, its penalty, and one line per penalty from strong to weak: ``l2``, ``train_log_loss``
        and ``val_log_loss`` (weighted, without the penalty).
    """
    penalties = sorted(set(l2), reverse=True)
    table: list[dict[str, float]] = []
    best: Head | None = None
    lowest = np.inf
    for penalty, head in zip(penalties, _path(*train, penalties), strict=True):
        losses = [_log_loss(head, *rows) for rows in (train, val)]
        table.append({"l2": penalty, "train_log_loss": losses[0], "val_log_loss": losses[1]})
        if losses[1] < lowest:
            best, lowest, chosen = head, losses[1], penalty
    if best is None:
        raise ValueError("no penalty to try gave a finite validation log-loss")
    return best, chosen, table


def _log_loss(head: Head, features: Features, targets: Targets, weights: Floats) -> float:
    """Weighted mean, in memory that does not grow with the classes."""
    each = np.empty(len(features))
    for rows in row_blocks((len(features), max(head.weight.shape))):
        each[rows] = cross_entropies(targets[rows], head.probabilities(features[rows]))
    return float(weights @ each / weights.sum())


def _path(
    features: Features,
    targets: Targets,
    weights: Floats,
    penalties: Sequence[float],
    start: Head | None = None,
) -> Iterator[Head]:
    """One head per penalty, each started from the one before."""
    check(features, targets, weights, penalties)
    k, d = targets.shape[1], features.shape[1]
    shares = weights / weights.sum()
    mean, scale = moments(features, shares)
    blocks = _Standardised(features, mean, scale, max(k, d))
    spread, axes = _curvature(blocks, shares, d)

    def loss(flat: Floats, penalty: float, stretch: Floats) -> tuple[float, Floats]:
        """The objective and its gradient; ``flat`` is weight @ axes / stretch [k, d], then bias [k]."""
        weight, bias = (flat[: k * d].reshape(k, d) * stretch) @ axes.T, flat[k * d :]
        single = weight.T.astype(np.float32)
        value = penalty / 2 * float(np.square(weight).sum())
        slope, slope_bias = penalty * weight, np.zeros(k)
        for rows, x in blocks:
            logs, wanted = log_softmax((x @ single).astype(np.float64) + bias), targets[rows]
            value -= float(shares[rows] @ (wanted * logs).sum(axis=1))
            error = (np.exp(logs) - wanted) * shares[rows, None]
            slope += error.astype(np.float32).T @ x
            slope_bias += error.sum(axis=0)
        return value, np.concatenate([((slope @ axes) * stretch).ravel(), slope_bias])

    weight, bias = np.zeros((k, d)), np.zeros(k)
    if start is not None:
        weight, bias = start.weight.astype(np.float64), start.bias.astype(np.float64)
    for penalty in penalties:
        stretch = 1 / np.sqrt(spread / 4 + penalty)
        at = partial(loss, penalty=penalty, stretch=stretch)
        flat = minimised(at, np.concatenate([((weight @ axes) / stretch).ravel(), bias]))
        weight, bias = (flat[: k * d].reshape(k, d) * stretch) @ axes.T, flat[k * d :]
        yield Head(weight.astype(np.float32), bias.astype(np.float32), mean, scale)


def minimised(loss: Callable[[Floats], tuple[float, Floats]], start: Floats, steps: int = 1000) -> Floats:
    """Where a smooth loss is least, by L-BFGS (Liu & Nocedal 1989).

    scipy computes between two calls of ``loss``, with a BLAS of its own beside numpy's. Each has a thread for
    every core, which goes on waiting for work at full speed: on two cores they took eight times as long as
    they should over a few thousand rows, and twice over ten thousand. So scipy's keeps to one thread, which
    is enough for its few vectors.

    Args:
        loss: its value and gradient, float64[n], at a point, float64[n].
        start: the point to start from.
        steps: at most so many.
    """
    from scipy.optimize import minimize

    with _blas_of_scipy().limit(limits=1):
        found: Floats = minimize(
            loss,
            start,
            jac=True,
            method="L-BFGS-B",
            # Beyond 8 digits the loss is float32 noise, in which a line search only loses its way.
            options={"maxiter": steps, "maxcor": 20, "gtol": 1e-6, "ftol": 1e-8},
        ).x
    return found


@cache
def _blas_of_scipy() -> ThreadpoolController:
    """The BLAS that scipy's wheels bring along; none where it shares one with numpy."""
    import scipy.optimize  # noqa: F401  # what is not loaded yet is not found
    from threadpoolctl import ThreadpoolController

    loaded = ThreadpoolController()
    paths = [library["filepath"] for library in loaded.info()]
    # site-packages/scipy.libs/libscipy_openblas.so; on a Mac site-packages/scipy/.dylibs/libopenblas.dylib
    own = [path for path in paths if any(name.startswith("scipy") for name in Path(path).parts[-3:-1])]
    return loaded.select(filepath=own)


class _Standardised:
    """The features as standardised float32 blocks, to walk over again and again.

    ``widest``: columns of what is made of a block, which must fit into memory as the block does.
    """

    def __init__(self, features: Features, mean: Singles, scale: Singles, widest: int) -> None:
        self.features, self.mean, self.scale, self.widest = features, mean, scale, widest
        small = features.size * 4 <= KEEP_BYTES
        self.kept = list(self._made()) if small else None

    def __iter__(self) -> Iterator[tuple[slice, Singles]]:
        return iter(self.kept) if self.kept is not None else self._made()

    def _made(self) -> Iterator[tuple[slice, Singles]]:
        for rows in row_blocks((len(self.features), self.widest)):
            yield rows, standardised(self.features[rows], self.mean, self.scale)


def _curvature(blocks: _Standardised, shares: Floats, d: int) -> tuple[Floats, Floats]:
    """How far the features spread along their principal axes: variances [d] and axes [d, d].

    The loss curves at most ``spread / 2`` along an axis (Boehning 1992), so steps measured in these units
    are of one size in every direction, and L-BFGS needs a few passes over the rows instead of a hundred.
    Costs d^3 once; where rows are few a pass is cheaper than that, and the axes stay as they are.
    """
    if len(shares) < d:
        return np.ones(d), np.eye(d)
    covariance = np.zeros((d, d))
    for rows, x in blocks:
        covariance += (x * shares[rows, None].astype(np.float32)).T @ x
    spread, axes = np.linalg.eigh(covariance)
    return np.maximum(spread, 0), axes


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices over the rows of an [n, d] array, each ``BLOCK_BYTES`` of float32."""
    size = max(1, BLOCK_BYTES // (4 * shape[1]))
    return (slice(first, min(first + size, shape[0])) for first in range(0, shape[0], size))


def standardised(x: Features, mean: Singles, scale: Singles) -> Singles:
    """float32 [n, d] of features [n, d]."""
    result = x.astype(np.float32)
    result -= mean
    result /= scale
    return result


def moments(features: Features, shares: Floats) -> tuple[Singles, Singles]:
    """Weighted mean and standard deviation of each dimension, [d]; a common one where it is next to nothing.

    Divided by next to nothing, a dimension that is dead in these rows would drown all others as soon as it
    moves: in rows of another domain, or when the backbone is trained. MiniLM has one, 1e-8 times the median.

    Two passes, because the difference of squares loses everything where the mean is large.
    """
    mean, variance = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for rows in row_blocks(features.shape):
        mean += shares[rows] @ features[rows].astype(np.float64)
    for rows in row_blocks(features.shape):
        variance += shares[rows] @ np.square(features[rows] - mean)
    deviation = np.sqrt(variance)
    # Rounding leaves a constant dimension a deviation of about 1e-16 of its mean; that is noise, not signal.
    alive = deviation > 1e-6 * np.maximum(np.abs(mean), deviation.max())
    common = np.median(deviation[alive]) if alive.any() else 1.0
    dead = ~alive | (deviation < DEAD * common)
    return mean.astype(np.float32), np.where(dead, common, deviation).astype(np.float32)


def log_softmax(logits: Floats) -> Floats:
    """Logarithms of probabilities [n, k], of logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def check(features: Features, targets: Targets, weights: Floats, penalties: Sequence[float]) -> None:
    """Raise ValueError if anything does not fit."""
    n = len(features)
    fits = len(targets.shape) == 2 and targets.shape[0] == n and weights.shape == (n,)
    if n == 0 or features.ndim != 2 or not fits:
        raise ValueError(
            f"features {features.shape}, targets {targets.shape}, weights {weights.shape} do not fit"
        )
    if not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError("weights must be at least 0 and have a positive sum")
    if not all(penalty > 0 for penalty in penalties):
        raise ValueError(f"penalties must be positive, not {list(penalties)}")
    if not all(np.isfinite(features[rows]).all() for rows in row_blocks(features.shape)):
        raise ValueError("features that are not finite numbers")
