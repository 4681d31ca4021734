from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.linalg import fractional_matrix_power, sqrtm

from headstart import adaptation, heads
from headstart.adaptation import METHODS, Source, adapt, confusion_loss, density_ratio, information_loss
from headstart.heads import Head, fit
from tests.gaussians import SCALE, SHIFT, accuracy, labelled, rows
from tests.slopes import slope_by_differences

L2 = 0.01
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def whitened(x: Any) -> Any:
    centred = x - x.mean(axis=0)
    return centred @ fractional_matrix_power(np.cov(centred.T, bias=True), -0.5)


def turned(x: Any, degrees: float) -> Any:
    """The first two dimensions turned about the middle of the rows."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    result = x - x.mean(axis=0)
    result[:, :2] = result[:, :2] @ np.array([[c, -s], [s, c]])
    return result + x.mean(axis=0)


def fits_seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of every fit from here on."""
    seen: list[Any] = []

    def spy(*arguments: Any, **options: Any) -> Head:
        seen.append(arguments)
        return fit(*arguments, **options)

    monkeypatch.setattr(adaptation, "fit", spy)
    return seen


def test_the_yardstick_comes_first_and_is_the_plain_head_of_the_source() -> None:
    x, truth = rows()
    source = labelled(x, truth)
    assert next(iter(METHODS)) == "source_only"
    head = adapt("source_only", source, turned(x, 90), L2)
    plain = fit(source.features, source.targets, source.weights, L2)
    assert all(
        (ours == theirs).all() for ours, theirs in zip(vars(head).values(), vars(plain).values(), strict=True)
    )


@EVERY_METHOD
def test_without_any_shift_no_method_does_harm(method: str) -> None:
    (x, truth), (other, other_truth) = rows(seed=0), rows(seed=1)
    source = labelled(x, truth)
    plain = accuracy(adapt("source_only", source, other, L2), other, other_truth)
    assert accuracy(adapt(method, source, other, L2), other, other_truth) >= plain - 0.02 > 0.9


@pytest.mark.parametrize(
    ("method", "recovers"),
    [(m, m in adaptation.MOVING) for m in METHODS],
)
def test_a_target_shifted_and_scaled_is_as_easy_as_the_source_to_methods_that_align(
    method: str, recovers: bool
) -> None:
    (x, truth), (other, other_truth) = rows(seed=0), rows(seed=1)
    source, target = labelled(x, truth), other * SCALE + SHIFT
    unmoved = accuracy(adapt("source_only", source, other, L2), other, other_truth)
    found = accuracy(adapt(method, source, target, L2), target, other_truth)
    # Class confusion follows the rows a part of the way, though it moves none.
    most = 0.9 if method in {"unmoved_class_confusion", "consensus"} else 0.75
    assert found > unmoved - 0.02 if recovers else found < most


def test_standardisation_says_of_a_shifted_and_scaled_copy_what_it_says_of_the_source() -> None:
    x, truth = rows()
    source = labelled(x, truth)
    target = x * SCALE + SHIFT
    expected = adapt("source_only", source, target, L2).probabilities(x)
    assert adapt("standardisation", source, target, L2).probabilities(target) == pytest.approx(
        expected, abs=1e-3
    )


@pytest.mark.parametrize("method", ["coral", "optimal_transport"])
def test_a_sheared_target_is_recovered_as_far_as_its_correlations_are_believed(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, truth), (other, other_truth) = rows(d=2, seed=0), rows(d=2, seed=1)
    x, other = turned(whitened(x), 45), turned(whitened(other), 45)  # classes apart along one dimension
    weak = 1e-4  # what the shear has flattened needs a large weight
    source, target = labelled(x, truth), other @ np.array([[1.0, 0.75], [0.75, 1.0]])
    unmoved = accuracy(adapt("source_only", source, other, weak), other, other_truth)
    plain, standardised, mostly = (
        accuracy(adapt(m, source, target, weak), target, other_truth)
        for m in ("source_only", "standardisation", method)
    )
    monkeypatch.setattr(adaptation, "CORRELATED", 1.0)
    wholly = accuracy(adapt(method, source, target, weak), target, other_truth)
    assert max(plain, standardised) < unmoved - 0.1
    assert wholly > unmoved - 0.01
    assert mostly > max(plain, standardised) + 0.05


def shrunk(covariance: Any) -> Any:
    return 0.9 * covariance + 0.1 * np.diag(np.diag(covariance))


def correlated(n: int, d: int, seed: int) -> tuple[Any, Any]:
    """Rows whose dimensions are correlated and of different sizes, far from the origin."""
    x, truth = rows(n, d, seed=seed)
    mix = np.eye(d) + 0.4 * np.random.default_rng(seed + 100).normal(size=(d, d))
    return x @ mix * np.linspace(0.5, 4, d) + 5 * seed, truth


@pytest.mark.parametrize("weights", [np.ones(400), np.random.default_rng(5).uniform(0.2, 3, 400)])
def test_coral_is_the_formula_of_the_paper_and_the_head_takes_target_rows_as_they_are(weights: Any) -> None:
    (x, truth), (target, _) = correlated(400, 5, 1), correlated(300, 5, 2)
    mean, scale = x.mean(axis=0), x.std(axis=0)  # weights are of labels, and the target has none
    own = shrunk(np.corrcoef(x.T))
    other = shrunk(np.corrcoef(target.T))
    z = (x - mean) / scale @ fractional_matrix_power(own, -0.5) @ sqrtm(other)
    z_target = (target - target.mean(axis=0)) / target.std(axis=0)
    expected = fit(z, np.eye(2)[truth], weights, L2).logits(z_target)
    found = adapt("coral", labelled(x, truth, weights), target, L2).logits(target)
    assert found == pytest.approx(expected, abs=0.02)


def test_optimal_transport_is_the_closed_form_between_two_gaussians() -> None:
    (x, truth), (target, _) = correlated(400, 5, 1), correlated(300, 5, 2)
    scale = x.std(axis=0)
    own, other = (shrunk(np.cov((rows / scale).T, bias=True)) for rows in (x, target))
    root = sqrtm(own)
    monge = np.linalg.inv(root) @ sqrtm(root @ other @ root) @ np.linalg.inv(root)
    mapped = ((x - x.mean(axis=0)) / scale) @ monge * scale + target.mean(axis=0)
    expected = fit(mapped, np.eye(2)[truth], np.ones(400), L2).logits(target)
    found = adapt("optimal_transport", labelled(x, truth), target, L2).logits(target)
    assert found == pytest.approx(expected, abs=0.02)


def test_of_a_symmetric_stretch_optimal_transport_finds_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "CORRELATED", 1.0)
    x, truth = rows()
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    half = np.random.default_rng(7).normal(size=(4, 4))
    target = x @ (half @ half.T + 0.5 * np.eye(4)) + SHIFT
    expected = fit(target, np.eye(2)[truth], np.ones(400), L2).logits(target)
    found = adapt("optimal_transport", labelled(x, truth), target, L2).logits(target)
    assert found == pytest.approx(expected, abs=0.02)


def test_subspace_alignment_is_a_head_in_the_aligned_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "COMPONENTS", 3)
    (x, truth), (target, _) = correlated(400, 8, 1), correlated(300, 8, 2)
    z, z_target = ((part - part.mean(axis=0)) / part.std(axis=0) for part in (x, target))
    own, other = (np.linalg.svd(part, full_matrices=False)[2][:3].T for part in (z, z_target))
    aligned = fit(z @ own @ own.T @ other, np.eye(2)[truth], np.ones(400), L2)
    found = adapt("subspace_alignment", labelled(x, truth), target, L2)
    assert found.weight.shape == (2, 8)
    assert found.logits(target) == pytest.approx(aligned.logits(z_target @ other), abs=0.02)


def test_the_density_ratio_of_two_gaussians_is_the_true_one() -> None:
    chance = np.random.default_rng(0)
    x, target = chance.normal(0, 1, (4000, 1)), chance.normal(1, 1, (3000, 1))
    source = Source(x, np.eye(2)[np.zeros(4000, int)], np.ones(4000))
    truth = np.clip(np.exp(x[:, 0] - 0.5), 0.1, 10)
    weak = density_ratio(source, target, l2=1e-3)
    assert weak.mean() == pytest.approx(1)
    assert np.abs(weak / truth - 1).max() < 0.25
    assert np.abs(weak / truth - 1).mean() < 0.1
    # The default penalty is made for a thousand dimensions: the same order, less far apart.
    strong = density_ratio(source, target)
    assert np.corrcoef(np.log(strong), np.log(truth))[0, 1] > 0.98
    assert 0.5 < np.polyfit(np.log(truth), np.log(strong), 1)[0] < 0.95


def test_a_source_weighted_like_the_target_needs_no_more_weighting() -> None:
    chance = np.random.default_rng(0)
    kind, other = chance.random(2000) < 0.5, chance.random(2000) < 0.8
    x, target = (chance.normal(size=(2000, 2)) + 4 * which[:, None] for which in (kind, other))
    source = labelled(x, kind.astype(int))
    plain = density_ratio(source, target)
    assert plain[kind].mean() / plain[~kind].mean() > 2
    weighted = density_ratio(replace(source, weights=np.where(kind, 0.8, 0.2)), target)
    assert weighted[kind].mean() / weighted[~kind].mean() == pytest.approx(1, abs=0.15)


def test_no_row_is_judged_by_a_domain_classifier_that_has_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, truth), (other, _) = rows(60, 20, seed=0), rows(40, 20, seed=1)
    source = labelled(x, truth)
    seen = fits_seen(monkeypatch)
    found = density_ratio(source, other.astype(np.float32))
    odds = np.zeros(60)
    for features, targets, *more in seen:
        assert (len(features), targets[:, 1].sum()) == (48 + 32, 32)
        unseen = ~np.isin(source.features[:, 0], features[:, 0])
        odds[unseen] = np.exp(np.diff(fit(features, targets, *more).logits(source.features[unseen]))[:, 0])
    expected = np.clip(odds / odds.mean(), 0.1, 10)
    assert found == pytest.approx(expected / expected.mean(), rel=0.02)


def test_importance_weighting_cares_for_the_region_where_the_target_is() -> None:
    """Classes of a shape that no line follows everywhere, but one does where the target is."""
    chance = np.random.default_rng(0)
    x, target = chance.normal(0, 1.5, (3000, 1)), chance.normal(1.5, 0.7, (1000, 1))
    truth, other_truth = (np.abs(part[:, 0]) > 1.2 for part in (x, target))
    source = labelled(x, truth.astype(int))
    plain, weighted = (adapt(m, source, target, 1e-4) for m in ("source_only", "importance_weighting"))
    assert accuracy(plain, target, other_truth) < 0.8
    assert accuracy(weighted, target, other_truth) > accuracy(plain, target, other_truth) + 0.1


def test_information_is_lost_by_doubt_and_by_a_mean_other_than_the_prior() -> None:
    even = np.array([0.5, 0.5])
    torn, sure = np.zeros((2, 2)), np.array([[50.0, 0.0], [0.0, 50.0]])
    assert information_loss(torn, even)[0] == pytest.approx(np.log(2))
    assert information_loss(sure, even)[0] == pytest.approx(0, abs=1e-12)
    collapsed = sure[[0, 0]]
    assert information_loss(collapsed, even)[0] == pytest.approx(np.log(2))
    assert information_loss(collapsed, np.array([1.0, 0.0]))[0] == pytest.approx(0, abs=1e-12)
    # KL((0.5, 0.5) || (0.8, 0.2)), worked out by hand.
    assert information_loss(sure, np.array([0.8, 0.2]))[0] == pytest.approx(0.2231436)


def test_confusion_of_two_rows_worked_out_by_hand() -> None:
    probabilities = np.array([[0.8, 0.2], [0.4, 0.6]])
    # Entropies 0.500402 and 0.673012, so weights 1.606287 and 1.510170. Class by class: 1.6063 * 0.8 * 0.2
    # + 1.5102 * 0.4 * 0.6 = 0.619447 off the diagonal; the two rows sum to 1.889098 and 1.227360.
    expected = (0.619447 / 1.889098 + 0.619447 / 1.227360) / 2
    assert confusion_loss(2.5 * np.log(probabilities))[0] == pytest.approx(expected, abs=1e-5)
    assert confusion_loss(np.array([[900.0, 0.0], [0.0, 900.0]]))[0] == pytest.approx(0, abs=1e-9)
    assert confusion_loss(np.zeros((5, 4)))[0] == pytest.approx(3 / 4)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: information_loss(z, np.arange(1, z.shape[1] + 1) / np.arange(1, z.shape[1] + 1).sum()),
        confusion_loss,
    ],
    ids=["information", "confusion"],
)
def test_gradients_are_those_of_the_losses(loss: Any, k: int) -> None:
    logits = np.random.default_rng(k).normal(0, 2, (6, k))
    expected = slope_by_differences(lambda z: loss(z)[0], logits)
    assert np.abs(expected).max() > 0.01
    assert loss(logits)[1] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("loss", [lambda z: information_loss(z, np.array([1.0, 0.0])), confusion_loss])
def test_losses_stay_finite_where_a_class_is_never_predicted(loss: Any) -> None:
    value, slope = loss(np.array([[2000.0, -2000.0], [3000.0, 0.0]]))
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("method", ["information_maximisation", "minimum_class_confusion"])
def test_the_head_found_is_at_a_minimum_of_its_objective(method: str) -> None:
    (x, truth), (other, _) = rows(300, 3, 3, seed=0, share=0.6), rows(200, 3, 3, seed=1, share=0.6)
    other = turned(other, 40) * 2 + 1
    targets = np.eye(3)[truth]
    z, z_other = ((part - part.mean(axis=0)) / part.std(axis=0) for part in (x, other))

    def objective(flat: Any) -> float:
        weight, bias = flat[:9].reshape(3, 3), flat[9:]
        logs = z @ weight.T + bias
        logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
        logits = z_other @ weight.T + bias
        extra = information_loss(logits, targets.mean(axis=0)) if method[0] == "i" else confusion_loss(logits)
        return float(-(targets * logs).sum(axis=1).mean() + L2 / 2 * (weight**2).sum() + extra[0])

    start, found = (
        np.concatenate([head.weight.ravel(), head.bias]).astype(np.float64)
        for head in (adapt(m, labelled(x, truth), other, L2) for m in ("standardisation", method))
    )
    at_start, at_end = (np.abs(slope_by_differences(objective, flat)).max() for flat in (start, found))
    assert objective(found) < objective(start) - 0.01
    assert at_end < 1e-3 < at_start / 10


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("information_maximisation", "standardisation"),
        ("minimum_class_confusion", "standardisation"),
        ("self_training", "source_only"),
        ("standardised_self_training", "standardisation"),
    ],
)
def test_learning_from_the_target_improves_the_head_it_starts_from(method: str, start: str) -> None:
    (x, truth), (other, other_truth) = rows(600, 2, seed=0, far=3.5), rows(600, 2, seed=1, far=3.5)
    other = turned(other, 60 if start == "source_only" else 40)
    plain, adapted = (adapt(m, labelled(x, truth), other, L2) for m in (start, method))
    assert accuracy(adapted, other, other_truth) > accuracy(plain, other, other_truth) + 0.04


def test_information_maximisation_keeps_the_classes_in_the_sources_shares() -> None:
    (x, truth), (other, _) = rows(800, 2, share=0.8, far=4.5), rows(800, 2, seed=1, share=0.8, far=4.5)
    other = turned(other, 70)
    plain, adapted = (
        adapt(m, labelled(x, truth), other, L2).probabilities(other).mean(axis=0)[0]
        for m in ("standardisation", "information_maximisation")
    )
    assert abs(plain - 0.8) > 0.1
    assert adapted == pytest.approx((truth == 0).mean(), abs=0.02)


def test_self_training_takes_the_surest_of_each_class_and_weighs_them_as_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (x, truth), (other, _) = rows(300, seed=0), rows(500, seed=1, share=0.9)
    source = labelled(x, truth, np.full(300, 0.7))
    seen = fits_seen(monkeypatch)
    adapt("self_training", source, other, L2)
    first = fit(*seen[0])
    z_other = (other - x.mean(axis=0)) / x.std(axis=0)
    predicted = first.probabilities(z_other)
    assert len(seen) == 6
    for turn, (features, targets, weights, _) in enumerate(seen):
        assert (features[:300] == seen[0][0]).all()
        assert weights[300:].sum() == pytest.approx(210 if turn else 0)
        if turn == 1:
            for label in (0, 1):
                own = np.flatnonzero(predicted.argmax(axis=1) == label)
                surest = own[np.argsort(-predicted[own, label])][: int(np.ceil(len(own) / 5))]
                chosen = features[300:][targets[300:, label] == 1]
                assert chosen == pytest.approx(z_other[np.sort(surest)], abs=1e-4)
    assert [len(features) - 300 for features, *_ in seen[1:]] == pytest.approx(
        [100, 200, 300, 400, 500], abs=2
    )


def test_the_head_of_self_training_takes_target_rows_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, truth), (other, _) = correlated(300, 4, 1), correlated(300, 4, 2)
    for method, by in (("self_training", x), ("standardised_self_training", other)):
        seen = fits_seen(monkeypatch)
        head = adapt(method, labelled(x, truth), other, L2)
        z_other = (other - by.mean(axis=0)) / by.std(axis=0)
        assert seen[-1][0][300:] == pytest.approx(z_other, abs=1e-4)  # the last round takes every row
        assert head.logits(other) == pytest.approx(fit(*seen[-1]).logits(z_other), abs=0.02)


@EVERY_METHOD
def test_a_few_known_labels_help(method: str) -> None:
    """The first dimension misleads in the target; a few labels tell that it does."""
    chance = np.random.default_rng(3)
    truth, other_truth = chance.integers(0, 2, 500), chance.integers(0, 2, 500)
    sign, other_sign = 2 * truth - 1, 2 * other_truth - 1
    x = chance.normal(size=(500, 3)) + np.stack([1.2 * sign, 1.0 * sign, 0 * sign], axis=1)
    other = chance.normal(size=(500, 3)) + np.stack([-0.4 * other_sign, 1.0 * other_sign, 0 * sign], axis=1)
    positions = np.arange(60)
    known = (positions, np.eye(2)[other_truth[:60]])
    without, helped = (
        accuracy(adapt(method, labelled(x, truth), other, L2, known=k), other[60:], other_truth[60:])
        for k in (None, known)
    )
    assert helped > without + 0.01


@pytest.mark.parametrize(("count", "each"), [(5, 0.1 * 2 * 400 / 5), (80, 2.0)])
def test_known_rows_weigh_a_tenth_of_the_source_or_each_as_much_as_one_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, count: int, each: float
) -> None:
    (x, truth), (other, other_truth) = rows(seed=0), rows(seed=1)
    seen = fits_seen(monkeypatch)
    positions = np.arange(count) * 3
    targets = np.eye(2)[other_truth[positions]]
    adapt("standardisation", labelled(x, truth, np.full(400, 2.0)), other * 3, L2, known=(positions, targets))
    features, given, weights, _ = seen[-1]
    z = (other - other.mean(axis=0)) / other.std(axis=0)
    assert features[400:] == pytest.approx(z[positions], abs=1e-4)
    assert (given[400:] == targets).all()
    assert weights[400:] == pytest.approx(each)


def test_no_known_rows_are_the_same_as_none_given() -> None:
    (x, truth), (other, _) = rows(seed=0), rows(seed=1)
    nothing = (np.zeros(0, np.int64), np.zeros((0, 2)))
    ours, theirs = (adapt("coral", labelled(x, truth), other, L2, known=k) for k in (nothing, None))
    assert (ours.weight == theirs.weight).all()


def test_self_training_does_not_guess_where_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, truth), (other, other_truth) = rows(100, seed=0), rows(100, seed=1)
    seen = fits_seen(monkeypatch)
    positions = np.arange(0, 100, 2)
    known = (positions, np.eye(2)[1 - other_truth[positions]])
    adapt("self_training", labelled(x, truth), other, L2, known=known)
    assert len(seen[0][0]) == 150
    assert len(seen[-1][0]) == 200


@EVERY_METHOD
def test_the_size_of_the_weights_means_nothing(method: str) -> None:
    (x, truth), (other, other_truth) = correlated(200, 3, 1), correlated(200, 3, 2)
    known = (np.array([4, 9]), np.eye(2)[other_truth[[4, 9]]])
    once, tenfold = (
        adapt(method, labelled(x, truth, np.full(200, w)), other, 0.1, known=known) for w in (1.0, 10.0)
    )
    assert once.probabilities(other) == pytest.approx(tenfold.probabilities(other), abs=5e-3)


@EVERY_METHOD
def test_the_same_seed_gives_the_same_head(method: str) -> None:
    (x, truth), (other, _) = correlated(200, 3, 1), correlated(200, 3, 2)
    first, second, another = (adapt(method, labelled(x, truth), other, L2, seed=s) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    assert (first.weight == another.weight).all() == (method != "importance_weighting")


@EVERY_METHOD
def test_memory_maps_walked_in_blocks_give_what_arrays_in_memory_give(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, truth), (other, _) = correlated(300, 4, 1), correlated(200, 4, 2)
    x, other = x.astype(np.float16), other.astype(np.float16)
    targets = np.eye(2)[truth]
    whole = adapt(method, Source(x.astype(np.float32), targets, np.ones(300)), other.astype(np.float32), 0.1)
    for name, part in (("x", x), ("other", other)):
        np.save(tmp_path / f"{name}.npy", part)
    monkeypatch.setattr(heads, "BLOCK_BYTES", 16 * 70)  # 70 rows of 4 dimensions
    monkeypatch.setattr(heads, "KEEP_BYTES", 0)
    mapped, mapped_other = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x", "other"))
    in_blocks = adapt(method, Source(mapped, targets, np.ones(300)), mapped_other, 0.1)
    assert in_blocks.probabilities(other) == pytest.approx(whole.probabilities(other), abs=5e-3)


@EVERY_METHOD
def test_a_head_is_like_any_other_even_from_few_rows_with_dead_dimensions(
    method: str, tmp_path: Path
) -> None:
    (x, truth), (other, other_truth) = rows(60, 90, 3, seed=0), rows(50, 90, 3, seed=1)
    x[:, :3] *= 3
    other[:, :3] *= 3
    x[:, 80], x[:, 81], other[:, 81], other[:, 82] = 7, 1e-9 * x[:, 81], 0, 0.3
    head = adapt(method, labelled(x, truth), other, 0.1)
    shapes = {name: (array.shape, array.dtype) for name, array in vars(head).items()}
    single = np.dtype(np.float32)
    assert shapes == {
        "weight": ((3, 90), single), "bias": ((3,), single), "mean": ((90,), single), "scale": ((90,), single)
    }  # fmt: skip
    assert all(np.isfinite(array).all() for array in vars(head).values())
    assert (head.scale > 0).all()
    head.save(tmp_path / "head.safetensors")
    assert accuracy(Head.load(tmp_path / "head.safetensors"), other, other_truth) > 0.5


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    x, truth = rows(20)
    for wrong, near in (("corall", "coral"), ("standardization", "standardisation"), ("?", "")):
        with pytest.raises(ValueError, match=f"did you mean '{near}"):
            adapt(wrong, labelled(x, truth), x, L2)


def test_input_that_makes_no_sense_is_refused() -> None:
    x, truth = rows(30)
    source, eye = labelled(x, truth), np.eye(2)
    spoilt = x.copy()
    spoilt[3, 2] = np.nan
    one = np.array([5])
    cases: list[tuple[Source, Any, float, Any, str]] = [
        (source, x[:, :3], L2, None, "does not fit"),
        (source, x[0], L2, None, "does not fit"),
        (source, x[:1], L2, None, "two rows"),
        (source, spoilt, L2, None, "finite"),
        (source, x, 0.0, None, "penalties"),
        (replace(source, features=source.features[:9]), x, L2, None, "do not fit"),
        (replace(source, weights=-source.weights), x, L2, None, "weights"),
        (source, x, L2, (one, np.eye(3)[:1]), "2 classes"),
        (source, x, L2, (one, eye), "2 classes"),
        (source, x, L2, (np.array([30]), eye[:1]), "beyond 30"),
        (source, x, L2, (np.array([-1]), eye[:1]), "beyond 30"),
        (source, x, L2, (np.array([5, 5]), eye), "twice"),
    ]
    for given, target, l2, known, words in cases:
        with pytest.raises(ValueError, match=words):
            adapt("standardisation", given, target, l2, known=known)


def test_weights_of_the_source_do_not_pass_for_a_shift() -> None:
    """The rare class weighed up, as a balanced training does: the target has it as rarely as the source."""
    x, truth = rows(share=0.85)
    balanced = labelled(x, truth, np.where(truth == 1, 0.85, 0.15))
    plain = adapt("source_only", balanced, x, L2).probabilities(x)
    found = adapt("standardisation", balanced, x * SCALE + SHIFT, L2).probabilities(x * SCALE + SHIFT)
    assert found == pytest.approx(plain, abs=0.01)


def test_classes_are_sought_in_the_shares_in_which_the_source_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head of balanced classes names the rare one oftener than it is there, in the target as well."""
    (x, truth), (other, _) = rows(share=0.85, far=1.5), rows(share=0.85, far=1.5, seed=1)
    balanced = labelled(x, truth, np.where(truth == 1, 0.85, 0.15))
    sought: list[Any] = []

    def spy(logits: Any, prior: Any) -> Any:
        sought.append(prior)
        return information_loss(logits, prior)

    monkeypatch.setattr(adaptation, "information_loss", spy)
    adapt("information_maximisation", balanced, other, L2)
    expected = adapt("source_only", balanced, x, L2).probabilities(x).mean(axis=0)
    assert 0.3 < expected[1] < 0.4  # neither the labels' share nor a half
    assert all(prior == pytest.approx(expected, abs=0.01) for prior in sought)
    assert sought


def test_a_consensus_is_the_mean_of_its_members_logits_with_its_boundary_moved_a_quarter() -> None:
    (x, truth), (other, _) = rows(), rows(seed=1)
    source, target = labelled(x, truth), other + 1
    members = (
        "source_only",
        "self_training",
        "minimum_class_confusion",
        "unmoved_class_confusion",
        "unmoved_class_confusion",
    )
    mean = np.mean([adapt(name, source, target, L2).logits(target) for name in members], axis=0)
    moved = adaptation.crossing(mean[:, 1] - mean[:, 0]) / 4
    assert abs(moved) > 0.01
    expected = mean + np.array([moved / 2, -moved / 2])
    assert adapt("consensus", source, target, L2).logits(target) == pytest.approx(expected, abs=1e-3)


def test_what_parts_the_rows_along_other_lines_than_the_source_has_no_say_in_a_consensus() -> None:
    (x, truth), (other, _) = rows(), rows(seed=1)
    source = labelled(x, truth)
    heads = {name: adapt(name, source, other, L2) for name in adaptation.MEMBERS}
    said = adaptation.agreed(heads, other).logits(other)
    for name in ("minimum_class_confusion", "unmoved_class_confusion", "self_training"):
        head = heads[name]
        turned = heads | {name: replace(head, weight=-9 * head.weight, bias=-9 * head.bias)}
        few = {other_name: head for other_name, head in heads.items() if other_name != name}
        without = adaptation.agreed(few, other).logits(other)
        assert adaptation.agreed(turned, other).logits(other) == pytest.approx(without)
        assert not np.allclose(without, said)


def test_a_consensus_on_rows_that_are_all_alike_is_no_error() -> None:
    x, truth = rows()
    found = adapt("consensus", labelled(x, truth), np.repeat(x[:1], 40, axis=0), L2)
    assert np.isfinite(found.logits(x)).all()


@pytest.mark.parametrize(("share", "at"), [(0.5, 1.0), (0.8, 1.0 + np.log(4) / 4)])
def test_scores_part_where_two_normal_curves_cross(share: float, at: float) -> None:
    chance = np.random.default_rng(0)
    left, right = chance.normal(-1, 1, int(40_000 * share)), chance.normal(3, 1, int(40_000 * (1 - share)))
    # Of equal deviation s and means 4 s apart, s log(w / v) / 4 beyond the middle.
    assert adaptation.crossing(np.concatenate([left, right])) == pytest.approx(at, abs=0.05)


def test_scores_that_do_not_part_move_no_boundary_far() -> None:
    assert adaptation.crossing(np.zeros(9)) == 0
    assert abs(adaptation.crossing(np.array([0.0] * 50 + [1.0] * 50))) <= 1
    assert abs(adaptation.crossing(np.random.default_rng(0).normal(0, 1, 5000))) < 1


@pytest.mark.parametrize("method", ["standardisation", "coral", "optimal_transport"])
def test_a_method_that_moves_rows_brings_the_domains_together_in_the_plane(method: str) -> None:
    (x, _), (other, _) = rows(seed=0), rows(seed=1)
    everything = np.arange(len(x)), np.arange(len(other))
    apart = {}
    for name in ("source_only", method):
        mine, theirs = adaptation.projection(name, x, other * SCALE + SHIFT, everything)
        spread = np.cov(mine.T)
        assert spread[0, 1] == pytest.approx(0, abs=1e-3)  # principal axes of the source
        assert spread[0, 0] >= spread[1, 1]
        apart[name] = np.linalg.norm(mine.mean(axis=0) - theirs.mean(axis=0))
    assert apart["source_only"] > 1
    assert apart[method] < 1e-3
    (mine, theirs) = adaptation.projection("source_only", x[:, :1], x[:, :1], everything)
    assert (mine[:, 1] == 0).all()
