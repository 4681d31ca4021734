from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from headstart import selection
from headstart.adaptation import METHODS, adapt
from headstart.heads import Head, fit
from tests.gaussians import SCALE, SHIFT, accuracy, labelled, rows

L2 = 0.01


def test_what_is_done_depends_on_the_shift_and_on_whether_the_head_is_lost() -> None:
    head = Head(*(np.array(a, np.float32) for a in ([[-1.0], [1.0]], [0.0, 0.0], [0.0], [1.0])))
    held_out = np.linspace(-1, 1, 100)[:, None]
    for moved, kind, size, method in (
        (0.6, "features", 0.5, "consensus"),
        (0.6, "features", 0.75, "consensus"),  # as far from the boundary as the source's, on average
        (0.6, "none", 0.5, "source_only"),
        (0.6, "labels", 0.5, "source_only"),
        (0.8, "features", 0.5, "information_maximisation"),
        (0.8, "none", 0.5, "information_maximisation"),  # groups may be too few to show what the head shows
        (0.8, "labels", 0.5, "source_only"),
        (0.8, "unknown", 0.5, "source_only"),  # the old shares would be forced on what may only have others
    ):
        found, reason = selection.choose(head, held_out, size * (held_out + moved), kind)
        assert found == method
        if method != "source_only":
            assert f"names a class {1 - moved:.2f} times as often" in reason
    # A class that the source never named says nothing.
    assert selection.choose(head, held_out + 2, held_out, "features")[0] == "consensus"


@pytest.mark.parametrize("classes", [3, 4])
def test_classes_that_a_target_merely_lacks_do_not_make_a_head_lost(classes: int) -> None:
    """Every row lies on the axis of its class; moved along one axis, all are called that class."""
    head = Head(
        *(np.array(a, np.float32) for a in (np.eye(classes), np.zeros(classes), np.zeros(classes), 1.0))
    )
    held_out = np.tile(np.eye(classes), (40, 1))
    lacking = held_out[held_out[:, :2].any(axis=1)]
    for kind, method in (("none", "source_only"), ("features", "consensus")):
        found, reason = selection.choose(head, held_out, lacking, kind)
        assert found == method
        assert "lost" not in reason
        moved, why = selection.choose(head, held_out, held_out + 2 * np.eye(classes)[0], kind)
        assert moved == "information_maximisation"
        assert "names all classes but one, taken together, 0.00 times as often" in why
    shares = np.full(classes, 1 / classes)
    assert selection.found_again(head, 9 * lacking, shares)[0] is head
    assert selection.found_again(head, 9 * held_out + 20 * np.eye(classes)[0], shares)[0] is not head


def test_too_few_rows_of_a_rare_class_do_not_make_a_head_lost() -> None:
    """Both sides are drawn from one distribution, in which one row in twenty is of the rarer class."""
    head = Head(*(np.array(a, np.float32) for a in ([[-1.0], [1.0]], [0.0, 0.0], [0.0], [1.0])))
    chance = np.random.default_rng(0)
    for size in np.linspace(60, 150, 100).astype(int):
        here, there = (np.where(chance.random((size, 1)) < 0.05, 1.0, -1.0) for _ in range(2))
        assert selection.choose(head, here, there, "none")[0] == "source_only"
    few = np.array([[1.0], [-1.0]] * 8)
    for kind, method in (("none", "source_only"), ("features", "consensus")):
        found, reason = selection.choose(head, few, abs(few), kind)
        assert found == method
        assert kind == "none" or "too few to tell whether the head is lost" in reason
    assert selection.choose(head, few, np.tile(abs(few), (2, 1)), "none")[0] == "information_maximisation"


def test_a_head_that_is_lost_without_its_source_sees_rows_by_their_own_moments() -> None:
    chance = np.random.default_rng(0)
    truth = np.arange(400) % 2
    source = chance.normal(size=(400, 8)) + 2 * truth[:, None]
    head = fit(source, np.eye(2)[truth], np.ones(400), 0.1)
    shares = head.probabilities(source).mean(axis=0)
    for target, moved in ((source + 0.2, False), (3 * source + 20, True)):
        found, reason = selection.found_again(head, target, shares)
        right = float((found.logits(target).argmax(axis=1) == truth).mean())
        assert right > 0.95
        assert (found is not head) == moved
        assert ("by their own moments" in reason) == moved


def test_expected_accuracy_is_the_true_one_less_the_usual_optimism_where_nothing_has_moved() -> None:
    (x, truth), (held, held_truth), (other, other_truth) = (rows(4000, far=1.5, seed=s) for s in range(3))
    source = labelled(x, truth)
    head = adapt("source_only", source, other, L2)
    value, low, high = selection.expected_accuracy(head, (held, held_truth), x, other, moved=False)
    assert value + selection.OPTIMISM == pytest.approx(accuracy(head, other, other_truth), abs=0.02)
    assert (low, high) == pytest.approx((value - selection.SPREAD, value + selection.SPREAD))
    # A head that is far too sure of itself is taken at its worth.
    loud = replace(head, weight=20 * head.weight, bias=20 * head.bias)
    assert selection.expected_accuracy(loud, (held, held_truth), x, other, moved=False)[0] == pytest.approx(
        value, abs=0.01
    )


def test_of_a_target_that_has_moved_the_accuracy_is_expected_as_if_the_source_had_moved_with_it() -> None:
    (x, truth), (held, held_truth), (other, _) = (rows(4000, far=1.5, seed=s) for s in range(3))
    still = adapt("standardisation", labelled(x, truth), other, L2)
    moved = adapt("standardisation", labelled(x, truth), other * SCALE + SHIFT, L2)
    expected = [
        selection.expected_accuracy(head, (held, held_truth), x, target, moved=True)[0]
        for head, target in ((still, other), (moved, other * SCALE + SHIFT))
    ]
    assert expected[0] == pytest.approx(expected[1], abs=0.005)
    assert expected[0] > 0.7


def test_candidates_are_judged_without_a_label_of_the_target() -> None:
    """Two heads worked out by hand: one names the second class half as often as the source is named it."""
    rows = np.array([-3.0, -2, -1, 1, 2, 3, 4, 5])[:, None]
    held_out = rows[[1, 2, 3, 4]], np.array([0, 0, 1, 1])
    heads_by_name = {
        name: Head(*(np.array(a, np.float32) for a in ([[-9.0], [9.0]], bias, [0.0], [1.0])))
        for name, bias in (("source_only", [0.0, 0.0]), ("coral", [31.5, -31.5]))
    }
    found = selection.judged(heads_by_name, held_out, held_out[0], rows)
    assert found["source_only"]["rarest_named"] == pytest.approx(3 / 8 / 0.5)
    assert found["coral"]["rarest_named"] == pytest.approx(2 / 8 / 0.5)
    assert found["source_only"]["agreement"] == found["coral"]["agreement"] == pytest.approx(5 / 8)
    for name, share in (("source_only", 5 / 8), ("coral", 2 / 8)):
        entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share)) / np.log(2)
        assert found[name]["diversity"] == pytest.approx(entropy, abs=1e-3)


def test_slow_methods_are_left_out_of_a_comparison_on_wide_features_but_for_the_one_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (x, truth), (other, _) = rows(40, seed=0), rows(40, seed=1)
    head = adapt("source_only", labelled(x, truth), other, 0.1)
    slow, dimensions = set(selection.SLOW), x.shape[1]
    for wide, chosen, absent in (
        (dimensions - 1, "consensus", slow),
        (dimensions - 1, "optimal_transport", slow - {"optimal_transport"}),
        (dimensions, "consensus", set()),
    ):
        monkeypatch.setattr(selection, "WIDE", wide)
        found = selection.candidates(head, labelled(x, truth), other, chosen)
        assert set(METHODS) - set(found) == absent
