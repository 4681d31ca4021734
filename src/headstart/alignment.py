"""Alignment: what a network loses while its domains look different, or while it doubts the unlabelled one.

Goes in: vectors and logits of a batch of each domain, tensors of any float type. Comes out: a scalar that
gradients flow through (of ``centroid_labels``: labels). All is computed in float32, or in float64 if that is
given, even under autocast; values and gradients are finite for a single row, for rows that are equal and for
logits of ten thousand. Shapes that do not fit raise a ValueError. Never sees a label, moves a weight or seeds
a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt, tanh

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.adaptation import TEMPERATURE
from headstart.metrics import TINY

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the Gaussian kernels, in mean squared distances of the batch
OUTER = 4096  # numbers in an outer product at most; Long et al. 2018 project what is larger
ADVERSARIAL = ("domain_adversarial", "conditional_adversarial")
PROJECTED = 1024  # numbers that are left of it, as in their code
SURE = 0.95  # of a weak view; that of Sohn et al. 2020


def between(
    name: str,
    source: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    discriminator: Discriminator | None,
    factor: float,
) -> Tensor:
    """How differently a network sees two domains, by one of the ways that a recipe names.

    Args:
        name: ``train.alignment``; all but ``consistency``, which compares two views of one domain.
        source: vectors [n, d] and logits [n, k] of a batch.
        target: vectors [m, d] and logits [m, k].
        discriminator: for the two adversarial ways.
        factor: how much it counts at this point of the training: of the loss, or, where a discriminator has
            to learn from the start, of the gradient that it sends back.
    """
    (seen, logits), (there, found) = source, target
    if discriminator is not None:
        if name == "domain_adversarial":
            return domain_adversarial(discriminator, seen, there, factor)
        return conditional_adversarial(discriminator, seen, logits, there, found, factor)
    losses: dict[str, Callable[[], Tensor]] = {
        "deep_coral": lambda: deep_coral(seen, there),
        "mmd": lambda: mmd(seen, there),
        "joint_mmd": lambda: joint_mmd([seen, logits.softmax(dim=1)], [there, found.softmax(dim=1)]),
        "class_confusion": lambda: confusion(found),
        # As on cached features: the shares are those in which the source's rows are named.
        "information_maximisation": lambda: information(found, logits.detach().softmax(dim=1).mean(dim=0)),
    }
    return factor * losses[name]()


def deep_coral(source: Tensor, target: Tensor) -> Tensor:
    """The squared distance between the covariances of source [n, d] and target [m, d], divided by 4 d^2.

    Sun & Saenko 2016, "Deep CORAL", arXiv:1607.01719. Covariances divide by n - 1, as there. Centred before
    they are multiplied, which float32 needs; and a single row has covariance 0, where theirs is undefined.
    """
    source, target = _domains(source, target)
    gap = _covariance(source) - _covariance(target)
    return gap.square().sum() / (4 * source.shape[1] ** 2)


def mmd(source: Tensor, target: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of source [n, d] and target [m, d]: 0 (up to rounding) to 2.

    Long et al. 2015, "Learning transferable features with deep adaptation networks", arXiv:1502.02791, with
    the mean of five Gaussian kernels exp(-distance^2 / width). The widths are a quarter to four times the
    mean squared distance of two rows of the joint batch; they count as constants, as in the authors' code.
    Differs from the paper: the biased estimate over all pairs, which is never negative and needs one row of
    each domain, for their unbiased one in linear time; and the kernels weigh the same, for learned weights.
    """
    return joint_mmd([source], [target])


def joint_mmd(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The same of several layers together: above 0 also where each agrees, but they go together differently.

    Long et al. 2017, "Deep transfer learning with joint adaptation networks", arXiv:1605.06636: the kernel of
    two rows is the product of their kernels in each layer. Layers are commonly vectors and probabilities.
    Differs from the authors' code: the layers have the same kernels, those of ``mmd``, where theirs has a
    single one of fixed width for the probabilities; and the biased estimate, as in ``mmd``.

    Args:
        sources: [n, d] of each layer, where d may differ from layer to layer.
        targets: [m, d] of each layer, in the same order.
    """
    rows = {(len(source), len(target)) for source, target in zip(sources, targets, strict=False)}
    if len(sources) != len(targets) or len(rows) != 1:
        raise ValueError(
            f"{len(sources)} source and {len(targets)} target layers, of {sorted(rows)} rows: both domains "
            "need the same layers, each of the same rows"
        )
    layers = [_domains(*layer) for layer in zip(sources, targets, strict=True)]
    kernel = torch.stack([_kernel(torch.cat(layer)) for layer in layers]).prod(dim=0)
    n = len(layers[0][0])
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def confusion(logits: Tensor) -> Tensor:
    """How often a row taken for one class could as well be another: ``adaptation.confusion_loss`` of a batch.

    Minimum class confusion (Jin et al. 2020, arXiv:1912.03699). Differs from the authors' code as there: the
    gradient goes through the weights of the rows as well. Logits are [n, k].
    """
    logs = _logs(_exact(logits) / TEMPERATURE)
    sure = logs.exp()
    weights = 1 + torch.exp(-_entropies(logs))[:, None]
    mass = (weights * sure).sum(dim=0).clamp(min=TINY)
    return 1 - ((weights * sure.square()).sum(dim=0) / mass).mean()


def information(logits: Tensor, prior: Tensor) -> Tensor:
    """Mean entropy, plus KL(mean prediction || prior): ``adaptation.information_loss`` of a batch.

    Gomes, Krause & Perona 2010; Shi & Sha 2012, arXiv:1206.6438; Liang, Hu & Feng 2020, arXiv:2002.08546.
    Logits are [n, k], the prior [k]; in all three papers it is uniform, and need not be here.
    """
    logs = _logs(logits)
    if prior.shape != logs.shape[1:]:
        raise ValueError(f"a prior {tuple(prior.shape)} does not fit logits {tuple(logs.shape)}")
    mean = logs.exp().mean(dim=0)
    surplus = (mean.clamp(min=TINY) / prior.to(mean).clamp(min=TINY)).log()
    return _entropies(logs).mean() + (mean * surplus).sum()


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy, in nats, of predictions by logits [n, k]: 0 if all are sure, be it of one class.

    Wang et al. 2021, "Tent: fully test-time adaptation by entropy minimization", arXiv:2006.10726. It trains
    the scales and shifts of normalisation alone; what is trained here is for the caller to choose.
    """
    return _entropies(_logs(logits)).mean()


def reversed_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` as it is, of any shape and dtype; on the way back the gradient is multiplied by ``-factor``.

    Ganin et al. 2016, "Domain-adversarial training of neural networks", arXiv:1505.07818.
    """
    same = x.view_as(x)
    if same.requires_grad:
        same.register_hook(lambda slope: -factor * slope)  # type: ignore[no-untyped-call]
    return same


def ramp(progress: float) -> float:
    """2 / (1 + exp(-10 p)) - 1: from 0 to nearly 1 as a training's ``progress`` goes from 0 to 1.

    The factor of the reversed gradient in Ganin et al. 2016, arXiv:1505.07818: while a discriminator knows
    nothing yet, it should not be listened to.
    """
    return tanh(5 * progress)  # the same number


class Multilinear(nn.Module):
    """Vectors and predictions in one: their outer product, or a random projection of it beyond 4096 numbers.

    Long et al. 2018, arXiv:1705.10667. The projection is (vectors @ A) * (probabilities @ B) / sqrt(1024),
    with standard normal A and B. They are buffers, so they are never trained and stay with the weights; they
    are drawn from torch's own generator, for the caller to seed. ``dim`` is d, and ``classes`` k.
    """

    of_vectors: Tensor | None  # [d, 1024]
    of_probabilities: Tensor | None  # [k, 1024]

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.sizes = (dim, classes)
        wide = dim * classes > OUTER
        self.outputs = PROJECTED if wide else dim * classes
        for name, size in (("of_vectors", dim), ("of_probabilities", classes)):
            self.register_buffer(name, torch.randn(size, PROJECTED) if wide else None)

    def forward(self, vectors: Tensor, probabilities: Tensor) -> Tensor:
        """[n, outputs] of vectors [n, d] and probabilities [n, k]."""
        given = (vectors.shape[-1], probabilities.shape[-1])
        if given != self.sizes or len(vectors) != len(probabilities):
            raise ValueError(
                f"vectors {tuple(vectors.shape)} and predictions {tuple(probabilities.shape)} do not fit "
                f"{self.sizes[0]} dimensions and {self.sizes[1]} classes"
            )
        vectors, probabilities = _exact(vectors), _exact(probabilities)
        if self.of_vectors is None or self.of_probabilities is None:
            return (vectors[:, :, None] * probabilities[:, None, :]).flatten(1)
        with torch.autocast(vectors.device.type, enabled=False):
            ours = vectors @ self.of_vectors.to(vectors)
            theirs = probabilities @ self.of_probabilities.to(probabilities)
        return ours * theirs / sqrt(PROJECTED)


class Discriminator(nn.Module):
    """Tells the domains apart: a perceptron with two hidden layers, whose logit is high for the source.

    That of Long et al. 2018, arXiv:1705.10667, without its dropout. It normalises no batches, so a batch may
    be of one row. Computes in the dtype of its own parameters.

    Args:
        inputs: d, of a vector.
        hidden: units of each hidden layer.
        classes: k, if a vector is judged together with its prediction, as ``conditional_adversarial`` does.
    """

    def __init__(self, inputs: int, hidden: int = 256, *, classes: int | None = None) -> None:
        super().__init__()
        self.inputs = inputs
        self.joined = None if classes is None else Multilinear(inputs, classes)
        width = inputs if self.joined is None else self.joined.outputs
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, vectors: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """Logits [n] of vectors [n, d] and, if made for them, probabilities [n, k]."""
        if (probabilities is None) != (self.joined is None):
            made = "vectors alone" if self.joined is None else "vectors with their predictions"
            raise ValueError(f"this discriminator judges {made}: see its argument `classes`")
        if vectors.ndim != 2 or vectors.shape[1] != self.inputs:
            raise ValueError(
                f"vectors {tuple(vectors.shape)} do not fit a discriminator of {self.inputs} inputs"
            )
        seen = vectors if self.joined is None else self.joined(vectors, probabilities)
        with torch.autocast(seen.device.type, enabled=False):
            logits: Tensor = self.layers(seen.to(next(self.parameters()).dtype))
        return logits.squeeze(1)


def domain_adversarial(discriminator: nn.Module, source: Tensor, target: Tensor, factor: float) -> Tensor:
    """How badly a discriminator tells the domains apart; it learns to, and the vectors to prevent it.

    Ganin et al. 2016, arXiv:1505.07818: cross-entropy on vectors whose gradient is reversed. The domains
    count half each, however many rows they have, so log(2) is the loss of one that cannot tell; the paper
    adds up the two means, which is twice that.

    Args:
        discriminator: logits [n] of vectors [n, d], as of ``Discriminator(d)``.
        source: [n, d].
        target: [m, d].
        factor: of the reversed gradient, at least 0; ``ramp`` of the progress, in the paper.
    """
    rows = torch.cat(_domains(source, target))
    logits = discriminator(reversed_gradient(rows, factor))
    return _told_apart(logits, len(source), torch.ones_like(logits))


def conditional_adversarial(  # noqa: PLR0917  # a domain has two parts
    discriminator: nn.Module,
    source: Tensor,
    source_logits: Tensor,
    target: Tensor,
    target_logits: Tensor,
    factor: float,
) -> Tensor:
    """The same of vectors joined with their predictions, and the surer a row, the more it counts.

    Long et al. 2018, "Conditional adversarial domain adaptation" (CDAN+E), arXiv:1705.10667: a row weighs
    1 + exp(-entropy), and the weights of a domain add up to a half. No gradient reaches the logits: in the
    authors' code none goes through the predictions either, but a reversed one goes through the weights.

    Args:
        discriminator: logits [n] of vectors [n, d] and probabilities [n, k], as of
            ``Discriminator(d, classes=k)``.
        source: [n, d].
        source_logits: [n, k].
        target: [m, d].
        target_logits: [m, k].
        factor: of the reversed gradient, at least 0.
    """
    rows = torch.cat(_domains(source, target))
    if (len(source), len(target)) != (len(source_logits), len(target_logits)):
        raise ValueError(
            f"logits {tuple(source_logits.shape)} and {tuple(target_logits.shape)} do not fit vectors "
            f"{tuple(source.shape)} and {tuple(target.shape)}"
        )
    logs = _logs(torch.cat(_domains(source_logits, target_logits))).detach()
    logits = discriminator(reversed_gradient(rows, factor), logs.exp())
    return _told_apart(logits, len(source), 1 + torch.exp(-_entropies(logs)))


def consistency(weak_logits: Tensor, strong_logits: Tensor) -> Tensor:
    """Cross-entropy of much changed views against what little changed ones of the same rows are sure of.

    Sohn et al. 2020, "FixMatch", arXiv:2001.07685: the label of the weak view counts where its probability
    is at least 0.95, and no gradient goes through it. The mean is over all rows, as there: 0 if no
    row is sure. Logits of both are [n, k].
    """
    if weak_logits.shape != strong_logits.shape:
        raise ValueError(
            f"logits of the views, {tuple(weak_logits.shape)} and {tuple(strong_logits.shape)}, do not fit"
        )
    sure, labels = _logs(weak_logits).detach().exp().max(dim=1)
    losses = -_logs(strong_logits).gather(1, labels[:, None]).squeeze(1)
    return (losses * (sure >= SURE)).mean()


def centroid_labels(vectors: Tensor, logits: Tensor, rounds: int = 2) -> Tensor:
    """int64 [n], the class whose centroid is nearest to each row by cosine; no gradient.

    Liang, Hu & Feng 2020, "Do we really need to access the source data?" (SHOT), arXiv:2002.08546, as in the
    paper: centroids of rows weighted by their predictions, and in each further round of the rows that were
    labelled so. The authors' code also appends a 1 to each vector, scales rows to length 1 first, and leaves
    out classes that no row is predicted to be. Here a class is left out only when nothing at all is in it.

    Args:
        vectors: [n, d], best of the whole target.
        logits: [n, k].
        rounds: how often centroids are taken; the paper takes them twice.
    """
    shares = _logs(logits).detach().exp()
    if vectors.ndim != 2 or len(vectors) != len(shares):
        raise ValueError(f"vectors {tuple(vectors.shape)} do not fit logits {tuple(logits.shape)}")
    rows = _exact(vectors.detach())
    directions = functional.normalize(rows, eps=TINY)
    with torch.autocast(rows.device.type, enabled=False):
        for _ in range(rounds):
            mass = shares.sum(dim=0)
            # Means and not sums: the sum of a class that is hardly there is too short to have a direction.
            centroids = (shares / mass.clamp(min=torch.finfo(mass.dtype).tiny)).to(rows).T @ rows
            alike = directions @ functional.normalize(centroids, eps=TINY).T
            labels = alike.masked_fill(mass == 0, -torch.inf).argmax(dim=1)
            shares = functional.one_hot(labels, len(mass)).to(rows)
    return labels


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _domains(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the same dtype, float32 or float64, if they are rows of the same dimensions."""
    fitting = source.ndim == target.ndim == 2 and source.shape[1] == target.shape[1]
    if not (fitting and source.numel() and target.numel()):
        raise ValueError(
            f"source {tuple(source.shape)} does not fit target {tuple(target.shape)}: "
            "rows of the same dimensions are needed, one or more"
        )
    dtype = torch.promote_types(_exact(source).dtype, _exact(target).dtype)
    return source.to(dtype), target.to(dtype)


def _logs(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits {tuple(logits.shape)}: a row or more of a class or more is needed")
    return _exact(logits).log_softmax(dim=1)


def _entropies(logs: Tensor) -> Tensor:
    return -(logs.exp() * logs).sum(dim=1)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=0)
    with torch.autocast(x.device.type, enabled=False):
        return centred.T @ centred / max(len(x) - 1, 1)


def _kernel(rows: Tensor) -> Tensor:
    """[n, n], between 0 and 1."""
    # By differences: from products of float32 rows, two that are equal would be some way apart.
    squared = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    n = len(rows)
    mean = (squared.detach().sum() / (n * (n - 1))).clamp(min=TINY)  # a row's distance to itself is no pair
    return torch.stack([torch.exp(-squared / (width * mean)) for width in WIDTHS]).mean(dim=0)


def _told_apart(logits: Tensor, n: int, weights: Tensor) -> Tensor:
    """Cross-entropy of logits of which the first n should be high; both domains weigh a half."""
    logits = _exact(logits)
    losses = -functional.logsigmoid(torch.cat([logits[:n], -logits[n:]])) * weights
    return (losses[:n].sum() / weights[:n].sum() + losses[n:].sum() / weights[n:].sum()) / 2
