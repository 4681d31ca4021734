"""Adaptation: a head for a domain without labels, from the labels of another, on cached features.

Goes in: labelled rows of a source domain and unlabelled rows of a target domain, as a frozen backbone left
them. Comes out: a ``Head`` that takes target rows as they are, whatever the method had to map to find it.
Never trains a backbone, and never sees a target label beyond the few it is given as ``known``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.heads import (
    DEAD,
    Features,
    Head,
    Singles,
    check,
    fit,
    log_softmax,
    minimised,
    moments,
    row_blocks,
    standardised,
)
from headstart.metrics import TINY, Floats
from headstart.packs import Rows

Known = tuple[Rows, Floats] | None  # target rows with a label, and their targets

# Of a head for the target: how far it may move is not for rows of the source to choose. See ``penalty_of``.
PENALTY = 0.1
CORRELATED = 0.9  # share of each covariance that is believed; the rest is its diagonal
COMPONENTS = 64  # of a subspace, at most
DOMAIN_L2 = 0.1  # strong: in a thousand dimensions any two domains can be told apart by heart
DOMAIN_FOLDS = 5
CLIP = 10.0  # a source row counts for at most this many average ones, and for at least one in so many
TEMPERATURE = 2.5  # of Jin et al. 2020
STEPS = 200  # at most, from the start of a loss that is not convex
ROUNDS = 5  # of self-training
CURVE_STEPS = 100  # of expectation and maximisation
NARROWEST = 0.01  # a curve, by the deviation of all scores: a few equal scores are no class
# Of the consensus, and how much each has to say. Texts (seeds 800 and 801) gain as much if all four have the
# same, and 0.4 points less in the pair that gains least.
MEMBERS = {
    "source_only": 1,
    "self_training": 1,
    "minimum_class_confusion": 1,
    "unmoved_class_confusion": 2,
}
# Correlation of a member's logits with those of ``source_only`` below which it parts the rows along other
# lines than the classes. By tuned features of texts all have at least 0.91 on the same seeds; by frozen ones
# the class confusions that lose more than two points have 0.83 and less.
FOLLOWS = 0.9
TOWARDS = 0.25  # of the way from its own boundary of two classes to where the target's rows part
KNOWN_SHARE = 0.1  # weight of all known target rows together, by the source's


@dataclass(frozen=True)
class Source:
    """The labelled domain."""

    features: Features  # [n, d], any float type; a float16 memory map is read in blocks
    targets: Floats  # float64[n, k], each row a distribution over the classes
    weights: Floats  # float64[n], at least 0 with a positive sum


def adapt(
    method: str,
    source: Source,
    target: Features,
    l2: float,
    *,
    seed: int = 0,
    known: tuple[Rows, Floats] | None = None,
) -> Head:
    """A head for target rows, by one of the ``METHODS``.

    All maps between domains are affine, so they are folded into the head's own four arrays: what comes
    out is saved and served like the head of any other training.

    The few target rows with ``known`` labels join the source's labelled rows, mapped as the target is.
    Weighted as what they are, five among thousands would teach nothing; so together they weigh a tenth of
    the source, and each at least as much as the average source row (a weight of 1 where all are 1). More
    than n / 10 of them are therefore simply further rows. The maps themselves look at no labels.

    Memory: a few float32 copies of the features and a few [d, d] matrices, never anything [n, n].

    Args:
        method: a name in ``METHODS``.
        source: at least two labelled rows.
        target: [m, d] of at least two rows, any float type, mostly unlabelled.
        l2: penalty as of ``heads.fit``, positive; measured in the space the head is fitted in.
        seed: of the folds of ``importance_weighting``; the other methods leave nothing to chance.
        known: positions int64[j] within ``target``, each once, and targets float64[j, k] of these rows.

    Raises:
        ValueError: an unknown method, shapes that do not fit, weights or a penalty out of range,
            features not finite, known rows that are not in the target or named twice.
    """
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1, cutoff=0)[0]
        raise ValueError(f"no adaptation method {method!r}; did you mean {near!r}?")
    check(source.features, source.targets, source.weights, [l2])
    _check_target(source, target, known)
    if known is not None and not len(known[0]):
        known = None
    if weigh := METHODS[method].weigh:
        source = replace(source, weights=source.weights * weigh(source, target, seed=seed))
    return _head(method, source, target, known, l2)


def penalty_of(method: str, least: float) -> float:
    """The penalty of a head by this method, where the source's own rows ask for ``least``.

    Those that follow the source's head are held back as much as it is: less, the consensus on frozen features
    of texts loses 0.9 points instead of gaining 0.4. Those that look for the classes anew would find less.
    """
    return max(PENALTY, least) if method in {*MEMBERS, "consensus"} else PENALTY


@dataclass(frozen=True)
class _Affine:
    """A map into the space of a head: ((x - mean) / scale) @ matrix, without the matrix if there is none."""

    mean: Singles  # [d]
    scale: Singles  # [d]
    matrix: Singles | None = None  # [d, r]

    def __call__(self, x: Features) -> Singles:
        """float32[n, r] of features [n, d]."""
        width = len(self.mean) if self.matrix is None else self.matrix.shape[1]
        result = np.empty((len(x), width), np.float32)
        for rows in row_blocks(x.shape):
            scaled = standardised(x[rows], self.mean, self.scale)
            result[rows] = scaled if self.matrix is None else scaled @ self.matrix
        return result

    def then(self, matrix: NDArray[Any]) -> _Affine:
        return replace(self, matrix=matrix.astype(np.float32))

    def folded(self, head: Head) -> Head:
        """The head for rows that have not been mapped, of one for rows that have."""
        weight = head.weight / head.scale.astype(np.float64)
        bias = head.bias - weight @ head.mean
        if self.matrix is not None:
            weight = weight @ self.matrix.T
        return Head(weight.astype(np.float32), bias.astype(np.float32), self.mean, self.scale)


Maps = tuple[_Affine, _Affine]  # of source rows and of target rows, into one space


def unmoved(source: Features, target: Features) -> Maps:
    """Both domains standardised with the source's moments: a shift between them stays."""
    from_source = scaling(source)
    return from_source, from_source


def standardisation(source: Features, target: Features) -> Maps:
    """Each domain standardised with its own mean and deviation.

    The effect on features of what adaptive batch normalisation does inside a network (Li et al. 2016,
    arXiv:1603.04779): the head of the source, with its mean and scale replaced by the target's. Undoes any
    shift and scaling of single dimensions; goes wrong where the share of the classes differs.
    """
    return scaling(source), scaling(target)


def coral(source: Features, target: Features) -> Maps:
    """Correlation alignment: the source whitened and given the correlations of the target.

    Sun, Feng & Saenko 2016, "Return of frustratingly easy domain adaptation", arXiv:1511.05547, with both
    domains standardised first, as in their experiments. They add the identity to each covariance. Here it
    is shrunk: 0.9 of it and 0.1 of its diagonal, which means the same at any size of the features.
    """
    from_source, from_target = standardisation(source, target)
    own, other = _covariance(source, from_source), _covariance(target, from_target)
    return from_source.then(_power(_shrunk(own), -0.5) @ _power(_shrunk(other), 0.5)), from_target


def optimal_transport(source: Features, target: Features) -> Maps:
    """The source moved onto the target by the linear Monge map, optimal between two Gaussians.

    Flamary, Lounici & Ferrari 2019, "Concentration bounds for linear Monge mapping estimation and optimal
    transport domain adaptation", arXiv:1905.10155, computed by POT. Of all maps that turn one covariance
    into the other it moves the rows least, measured in the source's deviations. The covariances are shrunk
    as for ``coral``.
    """
    from ot.gaussian import bures_wasserstein_mapping

    from_source = scaling(source)
    from_target = replace(from_source, mean=scaling(target).mean)
    own, other = (_shrunk(_covariance(x, to)) for x, to in ((source, from_source), (target, from_target)))
    origin = np.zeros(len(own))  # both are centred
    matrix, _ = bures_wasserstein_mapping(origin, origin, own, other)
    return from_source.then(matrix), from_target


def subspace_alignment(source: Features, target: Features) -> Maps:
    """The source's principal components rotated onto the target's, and all else dropped.

    Fernando et al. 2013, "Unsupervised visual domain adaptation using subspace alignment": with bases
    P and Q of the two, standardised domains, the head sees source rows as ``x @ P @ P.T @ Q`` and target
    rows as ``x @ Q``. Components: 64, or as many as there are dimensions, or rows less one, if fewer.
    """
    from_source, from_target = standardisation(source, target)
    own, other = _covariance(source, from_source), _covariance(target, from_target)
    count = min(target.shape[1], COMPONENTS, len(source) - 1, len(target) - 1)
    own, other = _components(own, count), _components(other, count)
    return from_source.then(own @ (own.T @ other)), from_target.then(other)


def scaling(rows: Features) -> _Affine:
    """Standardises a domain by its rows as they come.

    Never by the weights of the source's rows: they make up for rare classes and doubtful labels, which the
    target's rows have as well, but unmarked. By weighted moments the rare class of the target would count as
    part of the shift.
    """
    return _Affine(*moments(rows, _equal_shares(rows)))


def density_ratio(source: Source, target: Features, *, l2: float = DOMAIN_L2, seed: int = 0) -> Floats:
    """How much likelier each source row is in the target than in the source, from a domain classifier.

    Source rows so weighted (Shimodaira 2000) are right where the domains hold the same kinds of rows in other
    shares; they cannot reach a target that lies outside the source.

    Where both domains weigh the same, its odds are the ratio (Bickel, Brückner & Scheffer 2009, JMLR 10).
    Each row is judged by a head fitted without it, as a head knows its own rows too well. The ratios are
    scaled to a weighted mean of 1, cut at 10 and at a tenth, and scaled again.

    Args:
        source: rows to weigh; their weights count in the source's density.
        target: [m, d], every row alike.
        l2: penalty of the domain classifier; a strong one draws the ratios towards 1.
        seed: deals the rows into five folds.

    Returns:
        float64[n], positive, with a mean of 1 under the source's weights.
    """
    chance = np.random.default_rng(seed)
    folds, other_folds = (chance.permutation(len(x)) % DOMAIN_FOLDS for x in (source.features, target))
    log_odds = np.empty(len(source.features))
    head: Head | None = None
    for fold in np.unique(folds):
        own, other = np.flatnonzero(folds != fold), np.flatnonzero(other_folds != fold)
        head = fit(
            np.concatenate([source.features[own], target[other]]),
            np.eye(2)[np.repeat([0, 1], [len(own), len(other)])],
            np.concatenate([_shares(source.weights[own]), np.full(len(other), 1 / len(other))]),
            l2,
            start=head,
        )
        logits = head.logits(source.features[folds == fold])
        log_odds[folds == fold] = logits[:, 1] - logits[:, 0]
    shares = _shares(source.weights)
    ratio: Floats = np.exp(log_odds - log_odds.max())  # the next line scales it
    ratio = np.clip(ratio / float(shares @ ratio), 1 / CLIP, CLIP)
    ratio /= float(shares @ ratio)
    return ratio


def fitted(source: Source, target: Features, known: Known, to: Mapper, l2: float) -> Head:
    """``heads.fit`` on all labelled rows where they are mapped to, for target rows as they are."""
    maps = to(source.features, target)
    return maps[1].folded(fit(*_labelled(source, target, known, maps), l2))


def source_only(source: Source, target: Features, known: Known, to: Mapper, l2: float) -> Head:
    """No adaptation: ``heads.fit`` on the source, the figure that every other method has to beat."""
    if known is None:
        return fit(source.features, source.targets, source.weights, l2)
    return fitted(source, target, known, to, l2)


def information_maximisation(source: Source, target: Features, known: Known, to: Mapper, l2: float) -> Head:
    """Boundaries moved to where target rows are sparse, with the classes in the source's shares.

    Starts from the head of ``standardisation`` and minimises, in the same space and with the same penalty,
    the source's cross-entropy plus ``information_loss`` on the target (Gomes, Krause & Perona 2010; Shi &
    Sha 2012, arXiv:1206.6438; Liang, Hu & Feng 2020, arXiv:2002.08546), each with a factor of 1. The shares
    are those in which the start names the source's rows: where classes are weighed, or confused, these are
    not the shares of the labels, and a head that is as right on the target names them alike there. Not
    convex: the answer is the minimum near that start, or what 200 steps of L-BFGS reach of it.
    """
    return _descended(source, target, known, to, l2, penalty=information_loss)


def minimum_class_confusion(source: Source, target: Features, known: Known, to: Mapper, l2: float) -> Head:
    """Classes told apart on the target, in whatever shares: ``confusion_loss`` beside cross-entropy.

    Penalty and factor are those of ``information_maximisation``. From the head of ``standardisation`` it
    undoes a shift, and takes other class shares for a part of it; as ``unmoved_class_confusion`` it starts
    from the source's own head, in its own space, and does neither.
    """
    return _descended(source, target, known, to, l2, penalty=lambda logits, prior: confusion_loss(logits))


def self_training(source: Source, target: Features, known: Known, to: Mapper, l2: float) -> Head:
    """The head taught by its own surest guesses on the target, more of them each round.

    Class-balanced self-training (Zou et al. 2018, arXiv:1810.07911): in five rounds the surest 20, 40, ...,
    100 % of the target rows of each predicted class are labelled with that class, and a head is fitted to
    them and the source. Together they weigh as much as the source. With the source's moments for both
    domains, a shift between them is left for the rounds to bridge.
    """
    maps = to(source.features, target)
    from_target = maps[1]
    labelled, targets, weights = _labelled(source, target, known, maps)
    rows = from_target(target if known is None else np.delete(target, known[0], axis=0))
    head = fit(labelled, targets, weights, l2)
    for turn in range(1, ROUNDS + 1 if len(rows) else 1):
        probabilities = head.probabilities(rows)
        chosen = _surest(probabilities, turn / ROUNDS)
        guesses = np.eye(targets.shape[1])[probabilities[chosen].argmax(axis=1)]
        head = fit(
            np.concatenate([labelled, rows[chosen]]),
            np.concatenate([targets, guesses]),
            np.concatenate([weights, np.full(len(chosen), source.weights.sum() / len(chosen))]),
            l2,
            start=head,
        )
    return from_target.folded(head)


def _surest(probabilities: Floats, share: float) -> Rows:
    """The rows of each predicted class with the highest probabilities, rounded up; of equals the first."""
    predicted, surety = probabilities.argmax(axis=1), probabilities.max(axis=1)
    chosen = []
    for label in range(probabilities.shape[1]):
        rows = np.flatnonzero(predicted == label)
        order = np.argsort(-surety[rows], kind="stable")
        chosen.append(rows[order[: int(np.ceil(round(share * len(rows), 9)))]])
    return np.sort(np.concatenate(chosen))


Penalty = Callable[[Floats, Floats], tuple[float, Floats]]  # of logits, and of the share of each class


def _descended(
    source: Source, target: Features, known: Known, to: Mapper, l2: float, *, penalty: Penalty
) -> Head:
    """The head of ``fitted``, moved to lower a penalty on the target's logits as well."""
    maps = to(source.features, target)
    from_target = maps[1]
    labelled, targets, weights = _labelled(source, target, known, maps)
    start = fit(labelled, targets, weights, l2)
    rows, shares = from_target(target), _shares(weights)
    prior = start.probabilities(labelled[: len(source.features)]).mean(axis=0)
    k, d = start.weight.shape
    # Steps in units of the spread of both domains, as in heads._curvature, for the same reason.
    both = (_covariance(labelled) + _covariance(rows)) / 2
    spread, axes = np.linalg.eigh(both)
    stretch = 1 / np.sqrt(np.maximum(spread, 0) / 4 + l2)

    def head_of(flat: Floats) -> tuple[Floats, Floats]:
        return (flat[: k * d].reshape(k, d) * stretch) @ axes.T, flat[k * d :]

    def loss(flat: Floats) -> tuple[float, Floats]:
        """The objective and its gradient; ``flat`` is weight @ axes / stretch [k, d], then bias [k]."""
        weight, bias = head_of(flat)
        single = weight.T.astype(np.float32)
        logs = log_softmax((labelled @ single).astype(np.float64) + bias)
        error = (np.exp(logs) - targets) * shares[:, None]
        value, slope_target = penalty((rows @ single).astype(np.float64) + bias, prior)
        value += l2 / 2 * float(np.square(weight).sum()) - float(shares @ (targets * logs).sum(axis=1))
        # This way around BLAS is faster, and much so where other processes want the same cores.
        slope = (labelled.T @ error.astype(np.float32) + rows.T @ slope_target.astype(np.float32)).T
        slope_bias = error.sum(axis=0) + slope_target.sum(axis=0)
        return value, np.concatenate([(((slope + l2 * weight) @ axes) * stretch).ravel(), slope_bias])

    first = start.weight / start.scale.astype(np.float64)
    at_first = np.concatenate([((first @ axes) / stretch).ravel(), start.bias - first @ start.mean])
    weight, bias = head_of(minimised(loss, at_first, STEPS))
    return Head(weight.astype(np.float32), bias.astype(np.float32), from_target.mean, from_target.scale)


def information_loss(logits: Floats, prior: Floats) -> tuple[float, Floats]:
    """How unsure the predictions are, plus how far their mean is from ``prior``, in nats.

    The mean entropy of a row's prediction and the divergence KL(mean prediction || prior). Against a
    uniform prior that is log(k) less the mutual information between rows and classes (Gomes et al. 2010).

    Args:
        logits: float64[n, k].
        prior: float64[k], the expected share of each class.

    Returns:
        The loss and its gradient, float64[n, k], with respect to the logits.
    """
    logs = log_softmax(logits)
    sure = np.exp(logs)
    entropy = -(sure * logs).sum(axis=1, keepdims=True)
    mean = sure.mean(axis=0)
    surplus = np.log(np.maximum(mean, TINY) / np.maximum(prior, TINY))
    slope = sure * (surplus - (sure @ surplus)[:, None] - logs - entropy) / len(logits)
    return float(entropy.mean() + mean @ surplus), slope


def confusion_loss(logits: Floats) -> tuple[float, Floats]:
    """How often a row that is taken for one class could as well be another: 0 if never, below 1 always.

    Minimum class confusion (Jin et al. 2020, arXiv:1912.03699): predictions at a temperature, rows weighted
    by 1 + exp(-entropy), their class by class correlation with each row scaled to sum to 1, and of that the
    mean mass off the diagonal. Two differences: one batch of all rows, and the gradient goes through the
    weights as well, because a line search needs the gradient of the loss it sees.

    Args:
        logits: float64[n, k].

    Returns:
        The loss and its gradient, float64[n, k], with respect to the logits.
    """
    k = logits.shape[1]
    logs = log_softmax(logits / TEMPERATURE)
    sure = np.exp(logs)
    entropy = -(sure * logs).sum(axis=1, keepdims=True)
    certainty = np.exp(-entropy)
    weights = 1 + certainty  # any common factor would cancel
    # Row j of the correlation sums to the mass of class j, as each prediction sums to 1: only the diagonal
    # has to be known.
    mass = np.maximum((weights * sure).sum(axis=0), TINY)
    kept = (weights * np.square(sure)).sum(axis=0) / mass
    slope_sure = -weights * (2 * sure - kept) / mass / k
    slope_entropy = certainty * (sure * (sure - kept) / mass).sum(axis=1, keepdims=True) / k
    slope = sure * (slope_sure - (sure * slope_sure).sum(axis=1, keepdims=True))
    slope -= slope_entropy * sure * (logs + entropy)
    return float(1 - kept.mean()), slope / TEMPERATURE


def consensus(source: Source, target: Features, known: Known, to: Mapper, l2: float) -> Head:
    """What the ``MEMBERS`` say together; see ``agreed``."""
    return agreed({name: _head(name, source, target, known, l2) for name in MEMBERS}, target)


def agreed(heads: Mapping[str, Head], target: Features) -> Head:
    """The consensus of the ``MEMBERS``, by name, on these rows.

    The mean of their logits, as the ``MEMBERS`` are weighed: they err in different ways, so gains of each are
    smaller, and losses more so. What no longer puts the rows nearly in the order in which ``source_only``
    does has no say. The boundary between two classes then moves a quarter of the way to where the rows part
    by themselves, the ``crossing`` of their scores, as all inherit some of the source's shares.
    """
    order = heads["source_only"].logits(target)
    heard = [
        name
        for name, head in heads.items()
        if name == "source_only" or _correlation(head.logits(target), order) >= FOLLOWS
    ]
    head = averaged([heads[name] for name in heard], [MEMBERS[name] for name in heard])
    if len(head.bias) != 2:
        return head
    moved = TOWARDS * crossing(np.diff(head.logits(target), axis=1)[:, 0]) / 2  # each logit by half of it
    return replace(head, bias=head.bias + np.array([moved, -moved], np.float32))


def _correlation(logits: Floats, other: Floats) -> float:
    """Between two heads' logits [n, k] of the same rows, apart from what all rows or all classes share."""
    mine, theirs = (
        x - x.mean(axis=1, keepdims=True) - x.mean(axis=0, keepdims=True) + x.mean() for x in (logits, other)
    )
    return float((mine * theirs).sum() / max(np.linalg.norm(mine) * np.linalg.norm(theirs), TINY))


def crossing(scores: Floats) -> float:
    """Where two weighted normal curves fitted to scores [n] cross between their means.

    By expectation and maximisation, from the quartiles and equal weights. 0 where all scores are alike.
    """
    spread = scores.std()
    if not spread > TINY:
        return 0.0
    mean, deviation, weight = np.quantile(scores, (0.25, 0.75)), np.full(2, spread / 2), np.full(2, 0.5)

    def curves(x: Floats) -> Floats:
        logs: Floats = np.log(weight / deviation) - ((x[:, None] - mean) / deviation) ** 2 / 2
        return logs

    for _ in range(CURVE_STEPS):
        belongs = np.exp(log_softmax(curves(scores)))
        count = np.maximum(belongs.sum(axis=0), TINY)
        weight, mean = count / len(scores), (belongs * scores[:, None]).sum(axis=0) / count
        variance = (belongs * (scores[:, None] - mean) ** 2).sum(axis=0) / count
        deviation = np.sqrt(np.maximum(variance, (NARROWEST * spread) ** 2))
    between = np.linspace(mean[0], mean[1], 1001)
    return float(between[np.abs(np.diff(curves(between), axis=1)[:, 0]).argmin()])


def averaged(heads: Sequence[Head], shares: Sequence[float]) -> Head:
    """The head whose logits are the mean of these heads' logits, weighted by their ``shares``."""
    first = heads[0]
    weights = [head.weight / head.scale.astype(np.float64) for head in heads]
    biases = [head.bias - (head.weight / head.scale) @ head.mean.astype(np.float64) for head in heads]
    weight, bias = (np.average(arrays, axis=0, weights=shares) for arrays in (weights, biases))
    return Head(
        (weight * first.scale).astype(np.float32),
        (bias + weight @ first.mean).astype(np.float32),
        first.mean,
        first.scale,
    )


Mapper = Callable[[Features, Features], Maps]  # of source rows [n, d] and target rows [m, d]


class Method(NamedTuple):
    """Where rows are moved, how a head is fitted to them there, and how source rows are weighted before."""

    maps: Mapper
    head: Callable[[Source, Features, Known, Mapper, float], Head]
    weigh: Callable[..., Floats] | None = None


METHODS = {
    "source_only": Method(unmoved, source_only),
    "standardisation": Method(standardisation, fitted),
    "coral": Method(coral, fitted),
    "optimal_transport": Method(optimal_transport, fitted),
    "subspace_alignment": Method(subspace_alignment, fitted),
    "importance_weighting": Method(unmoved, source_only, density_ratio),
    "information_maximisation": Method(standardisation, information_maximisation),
    "minimum_class_confusion": Method(standardisation, minimum_class_confusion),
    "unmoved_class_confusion": Method(unmoved, minimum_class_confusion),
    "self_training": Method(unmoved, self_training),
    "standardised_self_training": Method(standardisation, self_training),
    "consensus": Method(unmoved, consensus),
}


# Those whose head takes target rows standardised by the target's own moments.
MOVING = frozenset(name for name, method in METHODS.items() if method.maps is not unmoved)


def _head(method: str, source: Source, target: Features, known: Known, l2: float) -> Head:
    maps, head, _ = METHODS[method]
    return head(source, target, known, maps, l2)


def projection(
    method: str, source: Features, target: Features, shown: tuple[Rows, Rows]
) -> tuple[Floats, Floats]:
    """Rows of both sides [n, 2] and [m, 2] where a method sees them, on the source's principal axes there.

    Of ``source_only`` that is where the source's own moments put them.
    """
    from_source, from_target = METHODS[method].maps(source, target)
    covariance = _covariance(source, from_source)
    axes = _components(covariance, min(2, len(covariance)))[:, ::-1]  # the largest first
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, np.arange(len(largest))])  # a sign means nothing, but must not change
    axes = np.pad(axes, ((0, 0), (0, 2 - len(largest))))
    mine, theirs = shown
    return from_source(source[mine]) @ axes, from_target(target[theirs]) @ axes


def _shares(weights: Floats) -> Floats:
    return weights / float(weights.sum())


def _equal_shares(x: Features) -> Floats:
    return np.full(len(x), 1 / len(x))


def _labelled(source: Source, target: Features, known: Known, maps: Maps) -> tuple[Singles, Floats, Floats]:
    """Features, targets and weights of all rows with a label, mapped."""
    from_source, from_target = maps
    rows = from_source(source.features)
    if known is None:
        return rows, source.targets, source.weights
    positions, targets = known
    each = max(KNOWN_SHARE * source.weights.sum() / len(positions), source.weights.mean())
    return (
        np.concatenate([rows, from_target(target[positions])]),
        np.concatenate([source.targets, targets]),
        np.concatenate([source.weights, np.full(len(positions), each)]),
    )


def _covariance(x: Features, centred: _Affine | None = None) -> Floats:
    """Second moments [d, d] of the rows, mapped if there is a map; float32 products, summed in float64."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for rows in row_blocks(x.shape):
        block = x[rows] if centred is None else centred(x[rows])
        total += block.T @ block
    return (total + total.T) / (2 * len(x))


def _shrunk(covariance: Floats) -> Floats:
    """0.9 of a covariance and 0.1 of its diagonal, in which a dead dimension counts as a faint one.

    So it can be inverted however few the rows are, and chance correlations of a thousand dimensions do not
    decide where the source is mapped.
    """
    variances = np.diag(covariance)
    kept = np.maximum(variances, max(DEAD**2 * variances.mean(), TINY))
    return CORRELATED * covariance + (1 - CORRELATED) * np.diag(kept)


def _power(matrix: Floats, exponent: float) -> Floats:
    """A power of a symmetric, positive definite matrix."""
    values, axes = np.linalg.eigh(matrix)
    result: Floats = (axes * values**exponent) @ axes.T
    return result


def _components(covariance: Floats, count: int) -> Floats:
    """The ``count`` principal axes, [d, count]."""
    from scipy.linalg import eigh

    d = len(covariance)
    axes: Floats = eigh(covariance, subset_by_index=(d - count, d - 1))[1]
    return axes


def _check_target(source: Source, target: Features, known: Known) -> None:
    """Raise ValueError if the target does not fit the source, or the known rows the target."""
    shape, k = source.features.shape, source.targets.shape[1]
    if target.ndim != 2 or target.shape[1] != shape[1] or min(len(target), shape[0]) < 2:
        raise ValueError(
            f"target {target.shape} does not fit source {shape}: two rows each, of the same dimensions"
        )
    if not all(np.isfinite(target[rows]).all() for rows in row_blocks(target.shape)):
        raise ValueError("target features that are not finite numbers")
    if known is None:
        return
    positions, targets = known
    if positions.ndim != 1 or targets.shape != (len(positions), k):
        raise ValueError(f"known rows {positions.shape} and targets {targets.shape} do not fit {k} classes")
    if len(positions) and (positions.min() < 0 or positions.max() >= len(target)):
        raise ValueError(f"known rows {positions.min()}..{positions.max()} beyond {len(target)} target rows")
    if len(np.unique(positions)) != len(positions):
        raise ValueError("known rows that are named twice")
