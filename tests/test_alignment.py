from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headstart import adaptation
from headstart.alignment import (
    Discriminator,
    Multilinear,
    centroid_labels,
    conditional_adversarial,
    confusion,
    consistency,
    deep_coral,
    domain_adversarial,
    entropy,
    information,
    joint_mmd,
    mmd,
    ramp,
    reversed_gradient,
)
from tests.slopes import slope_by_differences

Array = np.ndarray[Any, np.dtype[Any]]


K = 3
UNEVEN = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """float64."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


def judge(inputs: int = 4, *, classes: int | None = None, hidden: int = 6, seed: int = 0) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(inputs, hidden, classes=classes).double()


def probabilities(logits: Array) -> Array:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = shares / shares.sum(axis=1, keepdims=True)
    return result


def entropies(shares: Array) -> Array:
    result: Array = -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1)
    return result


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Array:
    at = at.clone().requires_grad_()
    found: Array = torch.autograd.grad(loss(at), at)[0].numpy()
    return found


def descend(
    loss: Callable[[], Tensor], trained: list[Tensor], *, steps: int = 100, rate: float = 0.1
) -> float:
    """SGD; returns the last loss."""
    for tensor in trained:
        tensor.requires_grad_()
    optimizer = torch.optim.SGD(trained, lr=rate)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return float(loss().detach())


# The same in numpy, without looking at the module.


def coral_in_numpy(source: Array, target: Array) -> float:
    gap = np.atleast_2d(np.cov(source.T)) - np.atleast_2d(np.cov(target.T))
    return float(np.linalg.norm(gap, "fro") ** 2 / (4 * source.shape[1] ** 2))


def distances(source: Array, target: Array) -> Array:
    both = np.concatenate([source, target])
    result: Array = np.square(both[:, None] - both[None]).sum(axis=2)
    return result


def mean_distance(source: Array, target: Array) -> float:
    squared = distances(source, target)
    return float(squared[~np.eye(len(squared), dtype=bool)].mean())


def mmd_in_numpy(layers: list[tuple[Array, Array]], widths: list[float]) -> float:
    """By its definition, pair by pair; ``widths`` are the mean distances, for finite differences to hold."""
    n = len(layers[0][0])
    kernels = [
        np.mean([np.exp(-distances(*layer) / (width * 2.0**power)) for power in range(-2, 3)], axis=0)
        for layer, width in zip(layers, widths, strict=True)
    ]
    kernel = np.prod(kernels, axis=0)
    total = 0.0
    for i in range(len(kernel)):
        for j in range(len(kernel)):
            signs = [1 / n if place < n else -1 / (len(kernel) - n) for place in (i, j)]
            total += signs[0] * signs[1] * kernel[i, j]
    return total


def perceptron_in_numpy(network: Discriminator, rows: Array) -> Array:
    """[n] logits."""
    linear = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
    for place, layer in enumerate(linear):
        rows = rows @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        rows = np.maximum(rows, 0) if place < len(linear) - 1 else rows
    return rows[:, 0]


def adversarial_in_numpy(
    network: Discriminator, source: Array, target: Array, logits: tuple[Array, Array] | None = None
) -> float:
    total = 0.0
    for place, rows in enumerate((source, target)):
        weights = np.ones(len(rows))
        if logits is not None:
            shares = probabilities(logits[place])
            weights = 1 + np.exp(-entropies(shares))
            rows = np.einsum("nd,nk->ndk", rows, shares).reshape(len(rows), -1)  # noqa: PLW2901
        of_source = 1 / (1 + np.exp(-perceptron_in_numpy(network, rows)))
        total += np.average(-np.log(of_source if place == 0 else 1 - of_source), weights=weights) / 2
    return total


def losses() -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Each loss of source and target vectors [., 4] and logits [., 3]; both of equally many rows."""
    alone, joined = judge(), judge(classes=K)
    return {
        "deep_coral": lambda s, t, zs, zt: deep_coral(s, t),
        "mmd": lambda s, t, zs, zt: mmd(s, t),
        "joint_mmd": lambda s, t, zs, zt: joint_mmd([s, zs], [t, zt]),
        "confusion": lambda s, t, zs, zt: confusion(zt),
        "information": lambda s, t, zs, zt: information(zt, UNEVEN),
        "entropy": lambda s, t, zs, zt: entropy(zt),
        "domain_adversarial": lambda s, t, zs, zt: domain_adversarial(alone, s, t, 0.7),
        "conditional_adversarial": lambda s, t, zs, zt: conditional_adversarial(joined, s, zs, t, zt, 0.7),
        "consistency": lambda s, t, zs, zt: consistency(100 * zs, zt),
    }


EVERY_LOSS = pytest.mark.parametrize("name", losses())


def test_covariances_are_compared_by_the_formula_of_the_paper() -> None:
    source, target = normal(9, 4, seed=1), normal(6, 4, seed=2, scale=3)
    assert float(deep_coral(source, target)) == pytest.approx(coral_in_numpy(source.numpy(), target.numpy()))
    # By hand: variances 2 and 8 with n - 1, and so (8 - 2)^2 / 4.
    ours, theirs = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert float(deep_coral(ours, theirs)) == pytest.approx(9)


@pytest.mark.parametrize("loss", [deep_coral, mmd])
def test_vectors_far_from_the_origin_survive_float32(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    source, target = normal(30, 3, seed=1), 2 * normal(30, 3, seed=2)
    near = float(loss(source, target))
    assert near > 0.05
    assert float(loss((source + 1000).float(), (target + 1000).float())) == pytest.approx(near, rel=1e-3)


def test_mean_discrepancy_is_that_of_its_definition() -> None:
    source, target = normal(7, 3, seed=1), normal(5, 3, seed=2) + 0.7
    layer = (source.numpy(), target.numpy())
    expected = mmd_in_numpy([layer], [mean_distance(*layer)])
    assert expected > 0.05
    assert float(mmd(source, target)) == pytest.approx(expected)
    # By hand: two rows, any distance apart, have kernels exp(-1 / width).
    single = 2 - 2 * np.exp(-1 / np.array([0.25, 0.5, 1, 2, 4])).mean()
    for far in (0.01, 1.0, 50.0):
        assert float(mmd(torch.tensor([[0.0]]), torch.tensor([[far]]))) == pytest.approx(single, rel=1e-5)


def test_joint_discrepancy_multiplies_the_kernels_of_the_layers() -> None:
    layers = [(normal(6, d, seed=d), normal(4, d, seed=10 + d) + 0.5) for d in (2, 3, 5)]
    arrays = [(source.numpy(), target.numpy()) for source, target in layers]
    expected = mmd_in_numpy(arrays, [mean_distance(*layer) for layer in arrays])
    sources, targets = (list(part) for part in zip(*layers, strict=True))
    assert float(joint_mmd(sources, targets)) == pytest.approx(expected)
    assert float(joint_mmd(sources[:1], targets[:1])) == float(mmd(*layers[0]))
    mixed = [sources[0].float(), *sources[1:]]
    assert float(joint_mmd(mixed, targets)) == pytest.approx(expected, rel=1e-5)
    mixed[1:], single = [x.bfloat16() for x in mixed[1:]], [x.float() for x in targets]
    assert float(joint_mmd(mixed, single)) == pytest.approx(expected, rel=0.05)


def test_joint_discrepancy_sees_what_no_single_layer_shows() -> None:
    """The same vectors and the same classes in both domains, but paired the other way."""
    vectors = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
    classes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(mmd(vectors, vectors.flip(0))) == pytest.approx(0, abs=1e-6)
    assert float(mmd(classes, classes.flip(0))) == pytest.approx(0, abs=1e-6)
    assert float(joint_mmd([vectors, classes], [vectors, classes.flip(0)])) > 0.3


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("scale", [0.5, 3.0, 300.0])
def test_losses_of_logits_are_those_of_adaptation_on_cached_features(k: int, scale: float) -> None:
    logits = normal(20, k, seed=k, scale=scale)
    prior = np.arange(1.0, k + 1) / np.arange(1.0, k + 1).sum()
    pairs: list[tuple[Callable[[Tensor], Tensor], tuple[float, Array]]] = [
        (
            lambda z: information(z, torch.from_numpy(prior)),
            adaptation.information_loss(logits.numpy(), prior),
        ),
        (confusion, adaptation.confusion_loss(logits.numpy())),
    ]
    for loss, (value, expected) in pairs:
        assert float(loss(logits)) == pytest.approx(value, abs=1e-12)
        assert slope(loss, logits) == pytest.approx(expected, abs=1e-12)
        assert float(loss(logits.float())) == pytest.approx(value, abs=2e-6)
        assert slope(loss, logits.float()) == pytest.approx(expected, abs=2e-6)
        assert scale == 300 or np.abs(expected).max() > 1e-4


def test_a_prior_may_leave_out_a_class() -> None:
    logits, prior = normal(20, K), np.array([0.6, 0.4, 0.0])
    value, expected = adaptation.information_loss(logits.numpy(), prior)
    assert float(information(logits.float(), torch.from_numpy(prior))) == pytest.approx(value, rel=1e-5)
    assert slope(lambda z: information(z, torch.from_numpy(prior)), logits) == pytest.approx(expected)


def test_entropy_is_that_of_the_predictions() -> None:
    logits = normal(8, 4, scale=2)
    assert float(entropy(logits)) == pytest.approx(entropies(probabilities(logits.numpy())).mean())
    assert float(entropy(torch.zeros(3, 4))) == pytest.approx(np.log(4))
    assert float(entropy(torch.tensor([[0.0, 1e4]]))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reversed_gradient_changes_nothing_on_the_way_there(dtype: torch.dtype) -> None:
    x = normal(3, 2).to(dtype).requires_grad_()
    same = reversed_gradient(x, 0.25)
    assert same.dtype == dtype
    assert (same == x).all()
    (2 * same).sum().backward()
    assert x.grad is not None
    assert (x.grad == -0.5).all()
    assert not reversed_gradient(x.detach(), 1.0).requires_grad


def test_the_ramp_rises_as_in_the_paper() -> None:
    for progress in (0.0, 0.1, 0.5, 1.0):
        assert ramp(progress) == pytest.approx(2 / (1 + np.exp(-10 * progress)) - 1)
    assert ramp(0) == 0


def test_adversarial_loss_is_the_cross_entropy_with_both_domains_weighing_the_same() -> None:
    network, source, target = judge(), normal(9, 4, seed=1), normal(2, 4, seed=2) + 1
    expected = adversarial_in_numpy(network, source.numpy(), target.numpy())
    assert domain_adversarial(network, source, target, 1.0).item() == pytest.approx(expected)
    last = network.layers[4]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    assert domain_adversarial(network, source, target, 1.0).item() == pytest.approx(np.log(2))
    nn.init.ones_(last.bias)  # high is for the source
    hand = (np.log1p(np.exp(-1)) + np.log1p(np.exp(1))) / 2
    assert domain_adversarial(network, source, target, 1.0).item() == pytest.approx(hand)


def test_conditional_loss_judges_vector_and_prediction_and_weighs_by_certainty() -> None:
    network = judge(classes=K)
    source, target = normal(9, 4, seed=1), normal(5, 4, seed=2)
    logits = normal(9, K, seed=3, scale=3), normal(5, K, seed=4, scale=3)
    found = conditional_adversarial(network, source, logits[0], target, logits[1], 1.0)
    arrays = source.numpy(), target.numpy(), (logits[0].numpy(), logits[1].numpy())
    expected = adversarial_in_numpy(network, *arrays)
    assert float(found.detach()) == pytest.approx(expected)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_discriminator_learns_what_the_vectors_unlearn(conditional: bool) -> None:
    network = judge(classes=K if conditional else None)
    source, target = normal(5, 4, seed=1), normal(3, 4, seed=2)
    logits = normal(5, K, seed=3).requires_grad_(), normal(3, K, seed=4).requires_grad_()
    arrays = logits[0].detach().numpy(), logits[1].detach().numpy()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        if conditional:
            return conditional_adversarial(network, s, logits[0], t, logits[1], 0.3)
        return domain_adversarial(network, s, t, 0.3)

    def plain(s: Array, t: Array) -> float:
        return adversarial_in_numpy(network, s, t, arrays if conditional else None)

    for found, expected in (
        (slope(lambda s: loss(s, target), source), lambda s: plain(s, target.numpy())),
        (slope(lambda t: loss(source, t), target), lambda t: plain(source.numpy(), t)),
    ):
        by_differences = slope_by_differences(expected, source.numpy() if len(found) == 5 else target.numpy())
        assert np.abs(by_differences).max() > 1e-3
        assert found == pytest.approx(-0.3 * by_differences, abs=1e-9)
    loss(source, target).backward()
    assert logits[0].grad is None
    assert logits[1].grad is None
    for parameter in network.parameters():
        before = parameter.detach().numpy().copy()

        def moved(values: Array, parameter: Tensor = parameter) -> float:
            parameter.data.copy_(torch.from_numpy(values))
            return plain(source.numpy(), target.numpy())

        expected_slope = slope_by_differences(moved, before)
        parameter.data.copy_(torch.from_numpy(before))
        assert parameter.grad is not None
        assert parameter.grad.numpy() == pytest.approx(expected_slope, abs=1e-9)


def test_small_outer_products_are_kept_and_large_ones_projected() -> None:
    vectors, shares = normal(4, 8), normal(4, 512, seed=1).softmax(1)
    exact = Multilinear(8, 512)
    assert exact.outputs == 4096
    assert not exact.state_dict()
    outer = np.einsum("nd,nk->ndk", vectors.numpy(), shares.numpy()).reshape(4, -1)
    assert exact(vectors, shares).numpy() == pytest.approx(outer)
    torch.manual_seed(0)
    projected = Multilinear(8, 513)
    assert projected.outputs == 1024
    assert not list(projected.parameters())
    assert {name: tuple(value.shape) for name, value in projected.state_dict().items()} == {
        "of_vectors": (8, 1024), "of_probabilities": (513, 1024)
    }  # fmt: skip
    torch.manual_seed(0)
    again = Multilinear(8, 513)
    rows, wide = normal(4, 8), normal(4, 513, seed=1).softmax(1)
    assert (projected(rows, wide) == again(rows, wide)).all()


def test_the_projection_keeps_the_products_of_rows_with_each_other() -> None:
    torch.manual_seed(0)
    vectors, shares = normal(40, 900), normal(40, 5, seed=1, scale=2).softmax(1)
    found = Multilinear(900, 5)(vectors, shares)
    kept = (found @ found.T).numpy()
    expected = (vectors @ vectors.T).numpy() * (shares @ shares.T).numpy()
    assert np.corrcoef(kept.ravel(), expected.ravel())[0, 1] > 0.95
    assert np.trace(kept) == pytest.approx(np.trace(expected), rel=0.1)


def test_a_wide_discriminator_carries_its_projection_along() -> None:
    torch.manual_seed(0)
    network = Discriminator(900, 8, classes=5)
    rows, logits = normal(6, 900), normal(6, 5, seed=1)
    found = conditional_adversarial(network, rows[:4], logits[:4], rows[4:], logits[4:], 1.0)
    torch.manual_seed(1)
    loaded = Discriminator(900, 8, classes=5)
    loaded.load_state_dict(network.state_dict())
    assert conditional_adversarial(loaded, rows[:4], logits[:4], rows[4:], logits[4:], 1.0) == found


def test_consistency_asks_the_strong_view_only_where_the_weak_one_is_sure() -> None:
    weak = torch.log(torch.tensor([[0.96, 0.04], [0.9, 0.1], [0.02, 0.98], [0.5, 0.5]]))
    strong = torch.log(torch.tensor([[0.3, 0.7], [0.1, 0.9], [0.2, 0.8], [0.9, 0.1]])).requires_grad_()
    weak.requires_grad_()
    loss = consistency(weak, strong)
    assert float(loss.detach()) == pytest.approx(-(np.log(0.3) + np.log(0.8)) / 4)
    loss.backward()
    assert weak.grad is None
    assert strong.grad is not None
    expected = np.array([[0.3 - 1, 0.7], [0, 0], [0.2, 0.8 - 1], [0, 0]]) / 4
    assert strong.grad.numpy() == pytest.approx(expected, abs=1e-6)


def test_consistency_of_nothing_sure_is_zero_and_can_be_differentiated() -> None:
    strong = normal(4, K).requires_grad_()
    loss = consistency(torch.zeros(4, K), strong)
    assert float(loss.detach()) == 0
    loss.backward()
    assert strong.grad is not None
    assert (strong.grad == 0).all()


def test_centroids_correct_predictions_that_their_neighbours_contradict() -> None:
    chance = np.random.default_rng(0)
    truth = chance.integers(0, K, 300)
    vectors = np.eye(K, 6)[truth] + chance.normal(0, 0.15, (300, 6))
    wrong = chance.random(300) < 0.25
    said = np.where(wrong, (truth + 1) % K, truth)
    found = centroid_labels(torch.from_numpy(vectors), torch.from_numpy(2 * np.eye(K)[said]))
    assert found.dtype == torch.int64
    assert (said == truth).mean() < 0.8
    assert (found.numpy() == truth).mean() > 0.99


def test_centroids_are_weighted_by_predictions_and_then_by_labels() -> None:
    """Against the definition, on clouds that overlap, where each round changes labels."""
    vectors, logits = normal(60, 2, seed=5) + 0.3, normal(60, K, seed=6, scale=2)
    shares, by_round = probabilities(logits.numpy()), []
    for _ in range(4):
        centroids = np.stack([np.average(vectors.numpy(), axis=0, weights=shares[:, c]) for c in range(K)])
        cosine = (vectors.numpy() @ centroids.T) / np.linalg.norm(centroids, axis=1)
        by_round.append(cosine.argmax(axis=1))
        shares = np.eye(K)[by_round[-1]]
    assert all((first != second).any() for first, second in pairwise(by_round))
    for rounds, expected in enumerate(by_round, start=1):
        assert (centroid_labels(vectors, logits, rounds).numpy() == expected).all()
    assert (centroid_labels(vectors, logits).numpy() == by_round[1]).all()
    assert (centroid_labels(50 * vectors, logits).numpy() == by_round[1]).all()


def test_nobody_is_given_to_a_class_that_is_empty() -> None:
    vectors = torch.eye(2).repeat(3, 1)
    logits = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 0.0, 1e4]]).repeat(3, 1)
    for rounds in (1, 2, 5):
        assert centroid_labels(vectors, logits, rounds).tolist() == [1, 2] * 3
    # The last row turns its back on the only centroid there is: any other would be nearer.
    away = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.1]])
    assert centroid_labels(away, torch.tensor([[0.0, 1e4, 0.0]]).repeat(4, 1), 3).tolist() == [1] * 4
    hardly = torch.tensor([[0.0, 80.0], [0.0, 80.0], [-90.0, 90.0]])  # shares of 1e-35 and less
    there = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert centroid_labels(there, hardly, 1).tolist() == [0, 0, 1]
    assert not centroid_labels(vectors.clone().requires_grad_(), logits.requires_grad_()).requires_grad


@EVERY_LOSS
def test_gradients_are_those_of_the_losses(name: str) -> None:
    given = [normal(6, 4, seed=1), normal(6, 4, seed=2) + 1, normal(6, K, seed=3), normal(6, K, seed=4)]
    loss = losses()[name]
    if "mmd" in name:  # its widths count as constants, which gradcheck cannot know
        pairs = [(0, 1)] if name == "mmd" else [(0, 1), (2, 3)]
        arrays = [x.numpy() for x in given]
        widths = [mean_distance(arrays[s], arrays[t]) for s, t in pairs]

        def held(place: int, values: Array) -> float:
            moved = [*arrays[:place], values, *arrays[place + 1 :]]
            return mmd_in_numpy([(moved[s], moved[t]) for s, t in pairs], widths)

        for place in (place for pair in pairs for place in pair):
            before, after = given[:place], given[place + 1 :]
            found = slope(lambda x, b=before, a=after: loss(*b, x, *a), given[place])
            expected = slope_by_differences(partial(held, place), given[place].numpy())
            assert np.abs(expected).max() > 1e-3
            assert found == pytest.approx(expected, abs=1e-8)
        return
    if "adversarial" in name:  # reversed on purpose: test_the_discriminator_learns_what_the_vectors_unlearn
        network = judge(classes=K if "conditional" in name else None)
        rows = torch.cat(given[:2])
        judged = (rows,) if "conditional" not in name else (rows, torch.cat(given[2:]).softmax(1))
        assert torch.autograd.gradcheck(network, tuple(x.requires_grad_() for x in judged))
        return
    used = (0, 1) if name == "deep_coral" else (3,)
    for place in used:
        given[place].requires_grad_()
    assert torch.autograd.gradcheck(loss, given)
    assert (
        max(float(g.abs().max()) for g in torch.autograd.grad(loss(*given), [given[p] for p in used])) > 1e-3
    )


HARD: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {
    "a single row": (normal(1, 4), normal(1, 4, seed=1), normal(1, K), normal(1, K, seed=1)),
    "a single row twice": (normal(1, 4), normal(1, 4), normal(1, K), normal(1, K)),
    "equal rows": tuple(normal(1, d, scale=30).repeat(5, 1) for d in (4, 4, K, K)),
    "zeros": tuple(torch.zeros(5, d) for d in (4, 4, K, K)),
    "extreme": tuple(1e4 * normal(5, d, seed=d + i).sign() for i, d in enumerate((4, 4, K, K))),
    "one class": (*(normal(5, 4, seed=i) for i in range(2)), *([torch.tensor([[1e4, -1e4, -1e4]] * 5)] * 2)),
}


@EVERY_LOSS
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_stay_finite_where_batches_are_hard(
    name: str, case: str, dtype: torch.dtype
) -> None:
    given = [x.to(dtype, copy=True).requires_grad_() for x in HARD[case]]
    value = losses()[name](*given)
    value.backward()
    assert value.shape == ()
    assert torch.isfinite(value)
    reached = [x.grad for x in given if x.grad is not None]
    assert reached
    assert all(torch.isfinite(grad).all() for grad in reached)


@pytest.mark.parametrize("case", ["a single row twice", "equal rows", "zeros"])
def test_domains_that_are_the_same_cost_nothing(case: str) -> None:
    source, target, ours, theirs = (x.float() for x in HARD[case])
    for value in (
        deep_coral(source, target),
        mmd(source, target),
        joint_mmd([source, ours], [target, theirs]),
        deep_coral(normal(9, 4), normal(9, 4)),
        mmd(normal(9, 4), normal(9, 4).flip(0)),
    ):
        assert float(value) == pytest.approx(0, abs=1e-6)


@EVERY_LOSS
def test_low_precision_is_raised_to_float32_even_under_autocast(name: str) -> None:
    exact = [normal(16, d, seed=i).bfloat16() for i, d in enumerate((4, 4, K, K))]
    torch.manual_seed(0)
    wanted = losses()[name](*(x.double() for x in exact)).item()
    found = losses()[name](*exact)
    assert found.dtype == (torch.float64 if "adversarial" in name else torch.float32)  # as its parameters
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses()[name](*(x.float() for x in exact)).item() == pytest.approx(wanted, rel=1e-5)
    if "adversarial" not in name:
        assert losses()[name](*(x.double() for x in exact)).dtype == torch.float64


def test_autocast_touches_neither_discriminator_nor_centroids() -> None:
    torch.manual_seed(0)
    network = Discriminator(900, 8, classes=5)
    rows, logits = normal(30, 900).float(), normal(30, 5, seed=1).float()
    plain, labels = network(rows, logits.softmax(1)), centroid_labels(rows, logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(rows, logits.softmax(1)) == plain).all()
        assert (centroid_labels(rows, logits) == labels).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    five, four, flat, empty = torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(4), torch.zeros(0, 4)
    alone, joined, logits = judge(), judge(classes=K), torch.zeros(2, K)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: deep_coral(five, four), r"source \(2, 5\) does not fit target \(2, 4\)"),
        (lambda: deep_coral(flat, flat), "rows of the same dimensions"),
        (lambda: deep_coral(four, empty), "one or more"),
        (lambda: mmd(five, four), "does not fit"),
        (lambda: joint_mmd([four], [four, four]), "1 source and 2 target layers"),
        (lambda: joint_mmd([], []), "0 source"),
        (lambda: joint_mmd([four, four[:1]], [four, four]), "the same rows"),
        (lambda: joint_mmd([four, five], [four, four]), "does not fit"),
        (lambda: confusion(flat), r"logits \(4,\)"),
        (lambda: entropy(empty), r"logits \(0, 4\)"),
        (lambda: information(logits, torch.ones(2)), r"prior \(2,\) does not fit"),
        (lambda: domain_adversarial(alone, five, five, 1.0), "discriminator of 4 inputs"),
        (lambda: domain_adversarial(joined, four, four, 1.0), "with their predictions"),
        (lambda: domain_adversarial(alone, four, five, 1.0), "does not fit"),
        (lambda: conditional_adversarial(alone, four, logits, four, logits, 1.0), "vectors alone"),
        (lambda: conditional_adversarial(joined, four, four, four, four, 1.0), "4 dimensions and 3 classes"),
        (lambda: conditional_adversarial(joined, four, logits[:1], four, logits, 1.0), "do not fit vectors"),
        (lambda: conditional_adversarial(joined, four, logits, four, four, 1.0), "does not fit"),
        (lambda: Multilinear(4, K)(four[:1], logits), "do not fit"),
        (lambda: consistency(logits, logits[:1]), "do not fit"),
        (lambda: consistency(flat, flat), "logits"),
        (lambda: centroid_labels(four[:1], logits), "do not fit"),
    ]
    for wrong, words in cases:
        with pytest.raises(ValueError, match=words):
            wrong()


# What minimising each of them does.


def test_deep_coral_moves_covariances_together() -> None:
    source, target = normal(200, 3, seed=1), normal(200, 3, seed=2) @ normal(3, 3, seed=3)
    matrix = torch.eye(3, dtype=torch.float64)
    before = coral_in_numpy(source.numpy(), target.numpy())
    descend(lambda: deep_coral(source @ matrix, target), [matrix], steps=600, rate=0.2)
    ours, theirs = (np.cov(x.detach().numpy().T) for x in (source @ matrix, target))
    assert before > 0.1
    assert ours == pytest.approx(theirs, abs=0.05)


def test_mmd_moves_means_together() -> None:
    source, target = normal(100, 2, seed=1), normal(100, 2, seed=2) + torch.tensor([2.0, -1.0])
    shift = torch.zeros(2, dtype=torch.float64)
    descend(lambda: mmd(source + shift, target), [shift], rate=2.0)
    assert shift.detach().numpy() == pytest.approx([2.0, -1.0], abs=0.4)


def test_joint_mmd_moves_each_class_to_its_own() -> None:
    """The classes lie the other way around, and the vectors alone look the same from the start."""
    chance = np.random.default_rng(0)
    classes = torch.from_numpy(np.eye(2)[np.arange(80) % 2])
    noise = torch.from_numpy(chance.normal(0, 0.3, (2, 80, 1)))
    source, target = classes[:, :1] * 2 - 1 + noise[0], 1 - classes[:, :1] * 2 + noise[1]
    shift = torch.zeros(2, 1, dtype=torch.float64)
    assert float(mmd(source, target)) < 0.02
    descend(lambda: joint_mmd([source + classes @ shift, classes], [target, classes]), [shift], rate=2.0)
    assert shift.detach().numpy().ravel() == pytest.approx([-2, 2], abs=0.2)


def test_less_confusion_is_less_doubt_between_classes() -> None:
    logits = normal(30, K, seed=1)
    before, named = confusion(logits).item(), logits.argmax(dim=1)
    after = descend(lambda: confusion(logits), [logits], steps=200, rate=30.0)
    assert before > 0.4
    assert after < 0.1
    assert (logits.argmax(dim=1) == named).double().mean() > 0.9


def test_more_information_is_sure_predictions_in_the_shares_expected() -> None:
    logits = normal(100, K, seed=1)
    before = logits.softmax(1).mean(dim=0)
    descend(lambda: information(logits, UNEVEN), [logits], steps=300, rate=20.0)
    shares = logits.detach().softmax(1)
    assert float((before - UNEVEN).abs().max()) > 0.1
    assert shares.mean(dim=0).numpy() == pytest.approx(UNEVEN.numpy(), abs=0.03)
    assert entropies(shares.numpy()).mean() < 0.1


def test_less_entropy_is_surer_of_what_was_said_before() -> None:
    logits = normal(30, K, seed=1)
    before, named = entropy(logits).item(), logits.argmax(dim=1)
    assert descend(lambda: entropy(logits), [logits], steps=300, rate=10.0) < before / 5
    assert (logits.argmax(dim=1) == named).all()


def test_descending_a_reversed_gradient_climbs() -> None:
    x = torch.tensor([1.0])
    descend(lambda: reversed_gradient(x, 1.0).square().sum(), [x], steps=5)
    assert x.item() == pytest.approx(1.2**5)


def test_vectors_learn_to_look_alike_to_a_discriminator() -> None:
    source, target = normal(200, 2, seed=1), normal(200, 2, seed=2) + torch.tensor([2.0, -1.0])
    shift, network = torch.zeros(2, dtype=torch.float64), judge(2, hidden=16)
    trained = [shift, *network.parameters()]
    told = descend(lambda: domain_adversarial(network, source, target, 0.0), trained, steps=200, rate=0.3)
    assert told < 0.4
    assert (shift == 0).all()
    found = descend(lambda: domain_adversarial(network, source + shift, target, 0.3), trained, steps=300)
    assert shift.detach().numpy() == pytest.approx([2.0, -1.0], abs=0.4)
    assert found == pytest.approx(np.log(2), abs=0.05)


def test_a_conditional_discriminator_moves_each_class_to_its_own() -> None:
    """The case of joint_mmd's, which a discriminator of vectors alone has nothing to tell by."""
    chance = np.random.default_rng(0)
    classes = torch.from_numpy(np.eye(2)[np.arange(80) % 2])
    noise = torch.from_numpy(chance.normal(0, 0.3, (2, 80, 1)))
    source, target = classes[:, :1] * 2 - 1 + noise[0], 1 - classes[:, :1] * 2 + noise[1]
    logits, shift = 20 * classes, torch.zeros(2, 1, dtype=torch.float64)
    alone, joined = judge(1, hidden=16), judge(1, hidden=16, classes=2)

    def both(factor: float) -> Tensor:
        moved = source + classes @ shift
        return conditional_adversarial(joined, moved, logits, target, logits, factor)

    trained = [shift, *joined.parameters()]
    blind = descend(
        lambda: domain_adversarial(alone, source, target, 1.0), list(alone.parameters()), steps=200, rate=0.3
    )
    assert blind > 0.6
    assert descend(lambda: both(0.0), trained, steps=100, rate=0.3) < 0.2
    assert descend(lambda: both(1.0), trained, steps=400, rate=0.3) == pytest.approx(np.log(2), abs=0.05)
    assert shift.detach().numpy().ravel() == pytest.approx([-2, 2], abs=0.4)


def test_consistency_teaches_the_strong_view_what_the_weak_one_knows() -> None:
    weak = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.5, 0.0, 0.0]])
    strong = torch.zeros(3, K)
    descend(lambda: consistency(weak, strong), [strong], rate=1.0)
    assert strong[:2].argmax(dim=1).tolist() == [0, 1]
    assert float(strong[:2].detach().softmax(1).max(dim=1).values.min()) > 0.9
    assert (strong[2] == 0).all()
