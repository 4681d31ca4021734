from __future__ import annotations

import numpy as np
import pytest

from headstart import metrics
from headstart.calibration import Decision, decision, temperature, tempered
from headstart.errors import HeadstartError
from headstart.heads import Head, select
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
    assert temperature(truth, tempered(probabilities, 1 / heat)) == pytest.approx(heat, rel=0.05)


def test_an_overconfident_model_is_calibrated_without_changing_an_answer() -> None:
    truth, probabilities = honest()
    loud = tempered(probabilities, 0.3)
    calm = tempered(loud, temperature(truth, loud))
    assert np.array_equal(calm.argmax(axis=1), loud.argmax(axis=1))
    before, after = scores(truth, loud), scores(truth, calm)
    assert after["ece"] < 0.2 * before["ece"]
    assert after["log_loss"] < before["log_loss"]
    assert after["auroc"] == pytest.approx(before["auroc"], abs=0.02)  # of three classes it may move


def test_rows_that_are_all_right_do_not_make_a_model_infinitely_sure() -> None:
    for classes in (2, 5):
        truth = np.arange(20) % classes
        probabilities = np.where(np.eye(classes)[truth] == 1, 0.9, 0.1 / (classes - 1))
        sure = tempered(probabilities, temperature(truth, probabilities)).max(axis=1)
        assert sure == pytest.approx(21 / 22, abs=1e-3)  # as sure as 20 rows without a mistake allow


@pytest.mark.parametrize("classes", [2, 5])
def test_few_validation_rows_do_not_make_the_probabilities_of_a_head_worthless(classes: int) -> None:
    losses = np.array([small(seed, classes) for seed in range(12)])
    assert (losses[:, 1] < losses[:, 0] + 0.1).all()


def small(seed: int, classes: int) -> tuple[float, float]:
    """Test log-loss of a head of 150 rows, before and after 40 validation rows gave it a temperature."""
    chance = np.random.default_rng(seed)
    centres = chance.normal(size=(classes, 30)) * 0.6

    def draw(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        truth = np.arange(n) % classes
        features = (centres[truth] + chance.normal(size=(n, 30))).astype(np.float32)
        return features, np.eye(classes)[truth], np.ones(n)

    train, val, test = draw(150), draw(40), draw(2000)
    head, _, _ = select(train, val, [1e-4, 1e-2, 1.0])
    heat = temperature(val[1].argmax(axis=1), head.probabilities(val[0]))
    before, after = (
        scores(test[1].argmax(axis=1), said.probabilities(test[0]))["log_loss"]
        for said in (head, head.tempered(heat))
    )
    return before, after


def test_a_tempered_head_says_what_tempered_probabilities_are() -> None:
    chance = np.random.default_rng(1)
    d, k = 5, 3
    arrays = (chance.normal(size=(k, d)), chance.normal(size=k), chance.normal(size=d), np.ones(d))
    head = Head(*(array.astype(np.float32) for array in arrays))
    x = chance.normal(size=(50, d)).astype(np.float32)
    assert np.allclose(head.tempered(1.7).probabilities(x), tempered(head.probabilities(x), 1.7), atol=1e-6)


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


def test_of_three_classes_the_rare_one_is_named_more_often_where_every_class_counts_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance = np.random.default_rng(4)
    truth = chance.choice(3, 6000, p=[0.6, 0.35, 0.05])
    logits = np.eye(3)[truth] * 1.2 + chance.normal(0, 1, (6000, 3)) + np.log([0.6, 0.35, 0.05])
    probabilities = tempered(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), 1.0)
    with monkeypatch.context() as patched:
        patched.setattr(metrics._Ranking, "of", None)  # 400 candidates a round need no AUROC
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
