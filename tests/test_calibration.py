from __future__ import annotations

import numpy as np
import pytest

from headstart.calibration import COLDEST, Calibration, Decision, bias_corrected, decision, temperature
from headstart.errors import HeadstartError
from headstart.heads import Head
from headstart.metrics import scores
from headstart.recipe import Decide, Recipe


def honest(n: int = 20_000, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn from them."""
    chance = np.random.default_rng(seed)
    probabilities = chance.dirichlet(np.full(classes, 0.7), n)
    truth = (probabilities.cumsum(axis=1) < chance.random((n, 1))).sum(axis=1)
    return truth, probabilities


@pytest.mark.parametrize("heat", [0.4, 1.0, 2.5])
def test_the_temperature_that_distorted_honest_probabilities_is_found(heat: float) -> None:
    truth, probabilities = honest()
    assert temperature(truth, Calibration(1 / heat)(probabilities)) == pytest.approx(heat, rel=0.05)


def test_an_overconfident_model_is_calibrated_without_changing_an_answer() -> None:
    truth, probabilities = honest()
    loud = Calibration(0.3)(probabilities)
    calm = Calibration(temperature(truth, loud))(loud)
    assert np.array_equal(calm.argmax(axis=1), loud.argmax(axis=1))
    before, after = scores(truth, loud), scores(truth, calm)
    assert after["ece"] < 0.2 * before["ece"]
    assert after["log_loss"] < before["log_loss"]
    assert after["auroc"] == pytest.approx(before["auroc"], abs=0.02)  # of three classes it may move


def test_rows_that_are_all_right_do_not_make_a_model_infinitely_sure() -> None:
    truth = np.arange(20) % 2
    probabilities = np.where(np.eye(2)[truth] == 1, 0.9, 0.1)
    assert COLDEST <= temperature(truth, probabilities) < 0.1


def test_the_bias_that_distorted_honest_probabilities_is_found() -> None:
    truth, probabilities = honest()
    bent = Calibration(0.6, (0.9, -0.5, 0.1))
    found = bias_corrected(truth, bent.undone(probabilities), np.ones(len(truth)))
    assert found.temperature == pytest.approx(0.6, rel=0.05)
    assert found.bias is not None
    assert np.array(found.bias) - np.mean(found.bias) == pytest.approx(
        np.array([0.9, -0.5, 0.1]) - 0.5 / 3, abs=0.06
    )
    mended = scores(truth, found(bent.undone(probabilities)))
    assert mended["balanced_accuracy"] > scores(truth, bent.undone(probabilities))["balanced_accuracy"] + 0.02


def test_a_handful_of_rows_changes_little() -> None:
    """Four rows that name one class twice too often: a maximum of the likelihood would not exist."""
    truth = np.array([0, 1, 1, 1])
    probabilities = np.array([[0.9, 0.1]] * 4)
    found = bias_corrected(truth, probabilities, np.ones(4))
    assert found.bias is not None
    assert 0 < found.bias[1] < 2
    assert found.bias[0] == pytest.approx(-found.bias[1], abs=1e-4)


def test_a_bias_is_weighed_as_training_weighs_rows() -> None:
    """Every row twice, or weights of two: the same but for the prior, which counts rows."""
    truth, probabilities = honest(400, classes=2)
    weights = np.where(truth == 0, 3.0, 1.0)
    thrice = np.concatenate([np.arange(400), np.flatnonzero(truth == 0), np.flatnonzero(truth == 0)])
    weighed = bias_corrected(truth, probabilities, weights)
    repeated = bias_corrected(truth[thrice], probabilities[thrice], np.ones(len(thrice)))
    assert weighed.bias == pytest.approx(repeated.bias, abs=0.02)


def test_what_calibration_did_can_be_undone() -> None:
    _, probabilities = honest(50)
    done = Calibration(1.7, (0.3, -0.4, 0.0))
    assert np.allclose(done.undone(done(probabilities)), probabilities, atol=1e-9)
    assert Calibration.of({"temperature": 1.7, "bias": [0.3, -0.4, 0.0]}) == done
    assert Calibration.of({}) == Calibration()


@pytest.mark.parametrize("done", [Calibration(1.7), Calibration(0.6, (0.3, -0.4, 0.0))])
def test_a_calibrated_head_says_what_calibrated_probabilities_are(done: Calibration) -> None:
    chance = np.random.default_rng(1)
    d, k = 5, 3
    arrays = (chance.normal(size=(k, d)), chance.normal(size=k), chance.normal(size=d), np.ones(d))
    head = Head(*(array.astype(np.float32) for array in arrays))
    x = chance.normal(size=(50, d)).astype(np.float32)
    assert np.allclose(head.calibrated(done).probabilities(x), done(head.probabilities(x)), atol=1e-6)


def test_by_default_the_likeliest_class_is_named_and_always_one() -> None:
    _, probabilities = honest(200)
    rule = decision(np.zeros(0, np.int64), probabilities, ["a", "b", "c"], Decide())
    assert rule == Decision.likeliest(3) == Decision.of({"classes": ["a", "b", "c"]})
    assert np.array_equal(rule.named(probabilities), probabilities.argmax(axis=1))
    assert rule.sure(probabilities).all()


def test_a_mistake_that_costs_nine_times_as_much_is_risked_nine_times_as_rarely() -> None:
    costs = {"broken": {"whole": 9.0}}
    rule = decision(np.zeros(0, np.int64), np.empty((0, 2)), ["broken", "whole"], Decide(costs=costs))
    at = np.array([[0.09, 0.91], [0.11, 0.89]])  # broken from a tenth on
    assert rule.named(at).tolist() == [1, 0]


def test_costs_of_a_class_that_there_is_not_are_named() -> None:
    with pytest.raises(HeadstartError, match="no class: brokn") as caught:
        decision(
            np.zeros(0, np.int64),
            np.empty((0, 2)),
            ["broken", "whole"],
            Decide(costs={"brokn": {"whole": 9}}),
        )
    assert "broken, whole" in caught.value.do


def test_the_threshold_is_where_the_metric_is_best_on_the_rows_that_choose() -> None:
    chance = np.random.default_rng(3)
    truth = (chance.random(4000) < 0.1).astype(np.int64)  # rare, and never likelier than not
    score = np.clip(0.1 + 0.2 * truth + chance.normal(0, 0.08, 4000), 0.001, 0.499)
    probabilities = np.column_stack([1 - score, score])
    rule = decision(truth[:2000], probabilities[:2000], ["no", "yes"], Decide(metric="balanced_accuracy"))
    plain, chosen = (
        scores(truth[2000:], probabilities[2000:], named=named)["balanced_accuracy"]
        for named in (None, rule.named(probabilities[2000:]))
    )
    assert plain == pytest.approx(0.5)
    best = max(
        scores(truth[2000:], probabilities[2000:], named=(score[2000:] > t).astype(np.int64))[
            "balanced_accuracy"
        ]
        for t in np.linspace(0.05, 0.45, 81)
    )
    assert chosen > best - 0.02


def test_of_three_classes_the_rare_one_is_named_more_often_where_every_class_counts_the_same() -> None:
    chance = np.random.default_rng(4)
    truth = chance.choice(3, 6000, p=[0.6, 0.35, 0.05])
    logits = np.eye(3)[truth] * 1.2 + chance.normal(0, 1, (6000, 3)) + np.log([0.6, 0.35, 0.05])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rule = decision(truth[:3000], probabilities[:3000], list("abc"), Decide(metric="balanced_accuracy"))
    plain, chosen = (
        scores(truth[3000:], probabilities[3000:], named=named)["balanced_accuracy"]
        for named in (None, rule.named(probabilities[3000:]))
    )
    assert chosen > plain + 0.05


def test_where_it_is_too_unsure_a_model_abstains_and_what_it_answers_is_righter() -> None:
    truth, probabilities = honest(5000, classes=2)
    rule = decision(truth, probabilities, ["a", "b"], Decide(abstain=0.9))
    sure, named = rule.sure(probabilities), rule.named(probabilities)
    assert np.array_equal(sure, probabilities.max(axis=1) >= 0.9)
    assert (named == truth)[sure].mean() > (named == truth).mean() + 0.05


def test_a_rule_survives_being_written_into_model_json() -> None:
    rule = Decision(((0.0, 9.0), (1.0, 0.0)), 0.8)
    described = {"classes": ["a", "b"], "decision": {"costs": [[0.0, 9.0], [1.0, 0.0]], "abstain": 0.8}}
    assert Decision.of(described) == rule


def test_a_threshold_cannot_be_chosen_for_a_domain_without_labels() -> None:
    blocks = {
        "ingest": {"source": "file:x"},
        "validate": {"adapter": "table", "target_domain": "b"},
        "fetch": {"backbone": "transformers:bert", "source": "file:y"},
        "features": {},
        "train": {"method": "domain_adaptation", "decide": {"metric": "accuracy"}},
        "evaluate": {},
    }
    with pytest.raises(ValueError, match="validation rows are not of the target domain"):
        Recipe.model_validate(blocks)
