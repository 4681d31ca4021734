from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, ks_2samp

from headstart import drift
from headstart.drift import Side, detect

CLASSES = ["functional", "defective"]


def side(chance: np.random.Generator, rows: int, shift: float = 0.0, spread: float = 1.0) -> Side:
    """Rows of five features, with answers and brightness that depend on them, and a label each."""
    vectors = spread * chance.normal(size=(rows, 5)) + shift
    defective = 1 / (1 + np.exp(-2 * vectors[:, 0] - chance.normal(size=rows)))
    return Side(
        vectors=vectors.astype(np.float32),
        probabilities=np.stack([1 - defective, defective], axis=1),
        named=(defective > 0.5).astype(np.int64),
        inputs={"brightness": vectors[:, 1] + chance.normal(size=rows), "width": np.full(rows, 300.0)},
        right=(chance.random(rows) < 0.8).astype(np.float64),
    )


def by_name(found: drift.Drift) -> dict[str, drift.Test]:
    return {test.name: test for test in found.tests}


def alarming(found: drift.Drift) -> set[str]:
    return {test.name for test in found.shown}


def test_rows_that_have_not_drifted_alarm_no_more_often_than_the_level_says() -> None:
    draws, level = 250, 0.05
    chance = np.random.default_rng(0)
    found = [
        detect(side(chance, 50), side(chance, 20), CLASSES, level=level, permutations=100, seed=seed)
        for seed in range(draws)
    ]
    most = binom.ppf(0.999, draws, level)
    assert sum(each.alarm for each in found) <= most
    for name in by_name(found[0]):  # each test by itself, uncorrected; and none is blind
        alarms = sum(by_name(each)[name].p <= level for each in found)
        assert binom.ppf(0.001, draws, level / 2) <= alarms <= most, name


def test_moved_features_alarm_and_the_reason_names_what_moved() -> None:
    chance = np.random.default_rng(0)
    found = detect(side(chance, 200), side(chance, 50, shift=1.5), CLASSES)
    assert alarming(found) >= {
        "kernel discrepancy",
        "domain classifier",
        "probability of defective",
        "brightness",
    }
    assert "right answers" not in alarming(found)
    assert found.reason.startswith("drift between 50 recent rows and 200 known ones")
    assert "What the backbone sees" in found.reason
    assert "what comes in: brightness (KS 0." in found.reason


def test_a_change_of_spread_alone_is_seen() -> None:
    chance = np.random.default_rng(0)
    found = detect(side(chance, 200), side(chance, 100, spread=2.5), CLASSES)
    assert "kernel discrepancy" in alarming(found)


def test_darker_pictures_with_the_same_features_alarm_by_their_brightness_alone() -> None:
    chance = np.random.default_rng(0)
    known, recent = side(chance, 200), side(chance, 60)
    darker = recent.inputs | {"brightness": recent.inputs["brightness"] - 1.5}
    found = detect(known, replace(recent, inputs=darker), CLASSES)
    assert alarming(found) == {"brightness"}
    assert by_name(found)["brightness"].recent == pytest.approx(np.median(darker["brightness"]))


def test_more_wrong_answers_alarm_and_more_right_ones_do_not() -> None:
    chance = np.random.default_rng(0)
    known, recent = side(chance, 300), side(chance, 100)
    right = np.arange(100) % 2.0
    worse = detect(known, replace(recent, right=right), CLASSES)
    assert alarming(worse) == {"right answers"}
    assert by_name(worse)["right answers"].recent == 0.5
    assert worse.labelled == 100
    assert not detect(known, replace(recent, right=np.ones(100)), CLASSES).alarm


def test_few_labels_among_many_rows_are_judged_as_few() -> None:
    level, draws = 0.05, 150
    chance = np.random.default_rng(0)
    alarms = 0
    for seed in range(draws):
        known, recent = side(chance, 60), side(chance, 60)
        recent.right[6:] = np.nan
        found = detect(known, recent, CLASSES, permutations=100, seed=seed)
        alarms += by_name(found)["right answers"].p <= level
        assert found.labelled == 6
    assert alarms <= binom.ppf(0.999, draws, level)


def test_without_labels_nothing_is_said_about_right_answers() -> None:
    chance = np.random.default_rng(0)
    known, recent = side(chance, 50), side(chance, 20)
    found = detect(known, replace(recent, right=np.full(20, np.nan)), CLASSES)
    assert "right answers" not in by_name(found)
    assert found.labelled == 0


def grouped(chance: np.random.Generator, groups: int, shift: float = 0.0) -> Side:
    """Groups of ten rows that resemble each other."""
    own = np.repeat(1.5 * chance.normal(size=(groups, 5)) + shift, 10, axis=0)
    made = side(chance, 10 * groups)
    vectors = (made.vectors * 0.5 + own).astype(np.float32)
    return replace(made, vectors=vectors, groups=np.repeat(np.arange(groups), 10))


def test_new_groups_alarm_by_rows_but_not_when_whole_groups_are_dealt() -> None:
    draws = 40
    chance = np.random.default_rng(0)
    by_rows = by_groups = 0
    for seed in range(draws):
        known, recent = grouped(chance, 8), grouped(chance, 6)
        found = detect(known, recent, CLASSES, permutations=100, seed=seed)
        assert found.grouped
        by_groups += found.alarm
        alone = (replace(each, groups=None) for each in (known, recent))
        by_rows += detect(*alone, CLASSES, permutations=100, seed=seed).alarm
    assert by_rows > draws / 2
    assert by_groups <= binom.ppf(0.999, draws, 0.05)


def test_drift_is_still_seen_when_whole_groups_are_dealt() -> None:
    chance = np.random.default_rng(0)
    found = detect(grouped(chance, 10), grouped(chance, 8, shift=4.0), CLASSES)
    assert found.grouped
    assert {"kernel discrepancy", "domain classifier"} <= alarming(found)


def test_groups_too_few_to_be_dealt_are_named_in_the_reason() -> None:
    chance = np.random.default_rng(0)
    found = detect(grouped(chance, 8), grouped(chance, 2, shift=4.0), CLASSES)
    assert not found.grouped
    assert found.alarm
    assert "All are of 2 groups: being new may explain it" in found.reason


def test_the_rows_that_drifted_come_first() -> None:
    chance = np.random.default_rng(0)
    known, recent = side(chance, 200), side(chance, 60)
    recent.vectors[::6] += 6
    found = detect(known, recent, CLASSES)
    assert len(set(found.drifted[:10]) & set(range(0, 60, 6))) >= 9
    assert sorted(found.drifted) == list(range(60))


def test_holms_correction() -> None:
    tests = [drift.Test("inputs", str(p), "KS", 0.0, p) for p in (0.01, 0.04, 0.03, 0.005)]
    assert [test.adjusted for test in drift._corrected(tests)] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_distances_are_those_of_scipy_with_ties() -> None:
    chance = np.random.default_rng(0)
    known, recent = chance.integers(0, 6, 80).astype(float), chance.integers(0, 7, 30).astype(float)
    dealt = np.repeat([0.0, 1.0], [80, 30])[:, None]
    found = drift._ks(np.concatenate([known, recent]), dealt)
    assert found[0] == pytest.approx(ks_2samp(known, recent).statistic)


def test_of_many_classes_the_one_that_moved_the_most_is_named() -> None:
    chance = np.random.default_rng(0)
    names = [f"class {i}" for i in range(5)]
    sides = []
    for rows, favoured in ((200, None), (60, 3)):
        logits = chance.normal(size=(rows, 5))
        if favoured is not None:
            logits[:, favoured] += 2
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        made = side(chance, rows)
        sides.append(replace(made, probabilities=p, named=p.argmax(axis=1)))
    assert {"probability of class 3", "classes named"} <= alarming(detect(*sides, names))


def test_a_strict_level_gets_the_permutations_that_it_needs() -> None:
    chance = np.random.default_rng(0)
    found = detect(side(chance, 60), side(chance, 30, shift=3.0), CLASSES, level=0.002, permutations=100)
    assert found.alarm


def test_copies_of_one_row_and_features_that_never_vary_are_no_drift() -> None:
    chance = np.random.default_rng(0)
    known, recent = side(chance, 50), side(chance, 20)
    known.vectors[:], recent.vectors[:] = known.vectors[0], known.vectors[0]
    found = by_name(detect(known, recent, CLASSES))
    assert found["kernel discrepancy"].p == 1
    assert found["domain classifier"].p > 0.05
    assert "width" not in found


def test_the_same_seed_gives_the_same_answer() -> None:
    def once(seed: int) -> Any:
        chance = np.random.default_rng(0)
        return detect(side(chance, 50), side(chance, 20), CLASSES, seed=seed)

    assert once(1) == once(1)
    assert once(1) != once(2)


def test_a_handful_of_rows_is_refused() -> None:
    chance = np.random.default_rng(0)
    with pytest.raises(ValueError, match="9 recent rows"):
        detect(side(chance, 50), side(chance, 9), CLASSES)
