from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtr, ndtri, softmax
from scipy.stats import kstest

from headstart import shifts
from headstart.class_shares import LabelShift, calibrated, label_shift
from headstart.shifts import Interval, diagnose, location, mmd, most_separable, separability

# --- can the sides be told apart?


def test_sides_of_one_distribution_are_inseparable_and_the_interval_says_so() -> None:
    found = []
    for seed in range(40):
        chance = np.random.default_rng(seed)
        found.append(separability(chance.normal(size=(120, 4)), chance.normal(size=(160, 4)), seed=seed))
    assert np.mean([interval.value for interval in found]) == pytest.approx(0.5, abs=0.02)
    assert sum(interval.low <= 0.5 <= interval.high for interval in found) >= 36


@pytest.mark.parametrize("gap", [0.5, 1.0, 2.0])
def test_separability_of_two_gaussians_is_the_auroc_that_theory_gives(gap: float) -> None:
    chance = np.random.default_rng(1)
    source, target = chance.normal(size=(2, 1500, 3))
    target[:, 1] += gap
    found = separability(source * [1, 20, 0.1], target * [1, 20, 0.1] + 0)
    expected = ndtr(gap / np.sqrt(2))
    assert found.value == pytest.approx(expected, abs=0.02)
    assert found.low <= expected <= found.high
    assert found.high - found.low < 0.08


def test_rows_that_are_all_the_same_are_inseparable() -> None:
    same = np.full((20, 3), 7.0)
    assert separability(same, same).value == 0.5
    assert mmd(same, same) == (pytest.approx(0, abs=1e-12), 1.0)
    assert np.isnan(location(same, same))


def test_groups_that_resemble_themselves_do_not_pass_for_a_shift() -> None:
    chance = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 10)
    rows = chance.normal(size=(40, 30))[group] + 0.1 * chance.normal(size=(400, 30))
    source, target = rows[:200], rows[200:]
    assert separability(source, target).low > 0.8
    whole = separability(source, target, (group[:200], group[200:]))
    assert whole.low <= 0.5 <= whole.high


def test_a_group_on_both_sides_is_never_learnt_and_judged_at_once() -> None:
    """The same things seen on either side: one that was learnt makes its twin look like the other side."""
    chance = np.random.default_rng(0)
    things = chance.normal(size=(60, 100))
    pair = np.arange(60)
    tied = separability(things, things + 1e-3, (pair, pair))
    assert separability(things, things + 1e-3, (pair, pair + 60)).high < tied.low


def test_a_memory_map_gives_what_an_array_gives_and_the_seed_decides_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shifts, "SAMPLED", 200)
    chance = np.random.default_rng(0)
    source, target = chance.normal(size=(2, 500, 5)).astype(np.float16)
    np.save(tmp_path / "x.npy", source)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    target[:, 0] += target[:, 1] + np.float16(0.3)
    measures: list[Any] = [separability, partial(mmd, rows=200), location]
    for measure in measures:
        first, again, other = (
            measure(x, target, seed=seed) for x, seed in ((source, 3), (mapped, 3), (source, 4))
        )
        assert first == again != other


def test_mmd_of_four_numbers_is_what_one_computes_by_hand() -> None:
    """Distances 1, 1, 2, 3, 3, 4: median 2.5. Of three ways to deal two and two, none is further apart."""
    value, p = mmd(np.array([[0.0], [1.0]]), np.array([[3.0], [4.0]]), permutations=999)
    kernel = {distance: np.exp(-(distance**2) / (2 * 2.5**2)) for distance in (1, 2, 3, 4)}
    assert value == pytest.approx(
        kernel[1] + kernel[1] - 2 * (kernel[2] + 2 * kernel[3] + kernel[4]) / 4, abs=1e-12
    )
    assert p == pytest.approx(1 / 3, abs=0.05)


def test_mmd_is_unbiased_and_its_p_value_uniform_without_a_shift() -> None:
    chance = np.random.default_rng(0)
    found = [mmd(*chance.normal(size=(2, 40, 3)), seed=seed, permutations=99) for seed in range(150)]
    values, p = np.array(found).T
    assert (values < 0).any()
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert kstest(p, "uniform").pvalue > 0.01
    assert p.min() >= 0.01


def test_mmd_sees_what_no_linear_classifier_sees() -> None:
    chance = np.random.default_rng(0)
    source, target = chance.normal(size=(2, 300, 4))
    target *= 2
    blind = separability(source, target)
    assert blind.low <= 0.5 <= blind.high
    value, p = mmd(source, target)
    assert value > 0.01
    assert p < 0.01


def test_mmd_does_not_take_few_groups_of_many_rows_for_a_shift() -> None:
    by_rows, by_groups = [], []
    for seed in range(40):
        chance = np.random.default_rng(seed)
        group = np.repeat(np.arange(16), 8)
        rows = chance.normal(size=(16, 3))[group] + 0.3 * chance.normal(size=(128, 3))
        sides = (rows[:64], rows[64:])
        by_rows.append(mmd(*sides, permutations=99)[1])
        by_groups.append(mmd(*sides, (group[:64], group[64:]), permutations=99)[1])
    assert np.mean(np.array(by_rows) <= 0.05) > 0.8
    assert np.mean(np.array(by_groups) <= 0.05) < 0.15


def test_one_group_on_a_side_cannot_tell() -> None:
    chance = np.random.default_rng(0)
    source, target = chance.normal(size=(2, 30, 2))
    groups = (np.arange(30), np.zeros(30))
    apart = separability(source, target, groups)
    assert np.isnan([apart.value, apart.low, apart.high, *mmd(source, target, groups)]).all()
    assert np.isnan(location(source, target, groups))


# --- what kind of shift


def test_a_move_and_a_stretch_are_all_location() -> None:
    chance = np.random.default_rng(0)
    source, target = (chance.normal(size=(500, 6)) @ np.triu(np.ones((6, 6))) for _ in range(2))
    assert location(source, target * np.linspace(0.5, 2, 6) + np.arange(6)) > 0.95


def test_a_quarter_turn_of_pairs_of_dimensions_is_no_location() -> None:
    """Each dimension keeps its mean and deviation; each pair's correlation of 0.8 becomes -0.8."""
    chance = np.random.default_rng(0)
    source, target = chance.normal(size=(2, 600, 3, 2)) @ np.linalg.cholesky([[1, 0.8], [0.8, 1]]).T
    target = target @ np.array([[0, 1], [-1, 0]])
    assert location(source.reshape(600, 6) + 5, target.reshape(600, 6) + 5) < 0.05


def test_the_share_is_of_the_squared_distance_that_theory_gives() -> None:
    """Of a move and a turn at once: the best classifiers before and after standardising are known."""
    chance = np.random.default_rng(0)
    turn = np.array([[0, 1], [-1, 0]])
    factor = np.linalg.cholesky([[1, 0.6], [0.6, 1]]).T
    source, target = chance.normal(size=(2, 2000, 2)) @ factor
    target = target @ turn

    def distance(move: float) -> float:
        """Squared d' of the likelihood ratio, from 200,000 draws."""
        x, y = chance.normal(size=(2, 200_000, 2)) @ factor
        inverse = np.linalg.inv([[1, 0.6], [0.6, 1]])

        def score(z: Any) -> Any:
            moved = (z - move) @ turn.T
            return ((z @ inverse) * z).sum(axis=1) - ((moved @ inverse) * moved).sum(axis=1)

        ranks = np.argsort(np.argsort(np.concatenate([score(x), score(y @ turn + move)])))
        auroc = (ranks[200_000:].sum() / 2e5 - (2e5 - 1) / 2) / 2e5
        return float(ndtri(auroc)) ** 2

    expected = 1 - distance(0) / distance(1)
    assert 0.3 < expected < 0.7
    assert location(source, target + 1) == pytest.approx(expected, abs=0.08)


def test_what_turns_among_many_dimensions_is_found_in_their_main_components() -> None:
    chance = np.random.default_rng(0)
    latent = chance.normal(size=(2, 800, 2)) @ np.linalg.cholesky([[1, 0.9], [0.9, 1]]).T
    latent[1] = latent[1] @ np.array([[0, 1], [-1, 0]])
    source, target = latent @ chance.normal(size=(2, 50)) + 0.3 * chance.normal(size=(2, 800, 50))
    assert location(source, target) < 0.4


def world(second: float, chance: Any, n: int, gap: float) -> tuple[Any, Any]:
    """Features [n, 6] whose first dimension tells two classes apart, and the classes."""
    truth = (chance.random(n) < second).astype(int)
    x = chance.normal(size=(n, 6))
    x[:, 0] += gap * truth
    return x, truth


def answers(x: Any, gap: float) -> Any:
    """The classifier that is exactly right where the second class has a share of 0.3."""
    odds = gap * x[:, 0] - gap**2 / 2 + np.log(3 / 7)
    return softmax(np.stack([np.zeros(len(x)), odds], axis=1), axis=1)


def diagnosis(
    second: float, change: Any = None, seed: int = 0, *, groups: Any = None, n: int = 400, gap: float = 4.0
) -> Any:
    chance = np.random.default_rng(seed)
    source, truth = world(0.3, chance, n, gap)
    target, _ = world(second, chance, n, gap)
    if change is not None:
        target = change(target)
    sides = [(x, groups, answers(x, gap)) for x in (source, target)]
    return diagnose(source, truth, *sides[0][1:], *sides[1], ["cat", "dog"], seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_without_a_shift_the_words_say_that_none_is_shown(seed: int) -> None:
    found = diagnosis(0.3, seed=seed)
    assert found.separability.low <= 0.5 <= found.separability.high
    assert found.mmd_p > 0.05
    assert np.isnan(found.location)
    assert found.words[0].startswith("No shift")
    assert "label shift" not in " ".join(found.words)


@pytest.mark.parametrize("seed", range(2))
def test_label_shift_is_called_so_with_its_class_and_its_share_by_two_estimates(seed: int) -> None:
    found = diagnosis(0.7, seed=seed)
    assert found.label_shift.prior[1] == pytest.approx(0.7, abs=0.05)
    assert found.predicted[1] == pytest.approx(0.7, abs=0.06)
    words = " ".join(found.words)
    assert "looks like label shift" in words
    assert "'dog' at " in words or "'cat' at " in words
    for by in (found.label_shift, found.black_box):
        assert by.low[1] < 0.7 < by.high[1]
        shares = [f"{by.prior[k]:.0%} ({by.low[k]:.0%}-{by.high[k]:.0%})" for k in (0, 1)]
        assert any(share in words for share in shares)
    assert "not certain" not in words and "Besides" not in words
    assert "standardising the target by its own moments would hide" in words


def test_label_shift_of_classes_that_overlap_is_called_uncertain() -> None:
    words = " ".join(diagnosis(0.8, gap=1.5).words)
    assert "looks like label shift" in words
    assert "That is not certain" in words


def test_chance_differences_between_few_rows_are_not_called_a_change() -> None:
    words = [" ".join(diagnosis(0.3, seed=seed, n=60).words) for seed in range(8)]
    assert sum("No change in class shares" in found for found in words) >= 7
    assert sum("label shift" in found for found in words) <= 1


def stretched(x: Any) -> Any:
    return x * 1.5 + 1


def moved_aside(x: Any) -> Any:
    return x + np.array([0, 1.0, 0, 0, 0, 0])


def moved_towards_a_class(x: Any) -> Any:
    return x + np.array([1.5, 0, 0, 0, 0, 0])


def turned(x: Any) -> Any:
    """No mean or deviation moves, but dimensions that were independent go together."""
    mixed = x.copy()
    mixed[:, 2:] = 0.3 * x[:, 2:] + np.sqrt(0.91) * x[:, 1:2]
    return mixed


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("change", [stretched, moved_aside, moved_towards_a_class, turned])
def test_features_that_changed_within_the_classes_are_not_called_label_shift(change: Any, seed: int) -> None:
    found = diagnosis(0.3, change, seed)
    assert found.mmd_p <= 0.05
    words = " ".join(found.words)
    assert "label shift" not in words
    assert "have shifted" in words or "have probably shifted" in words
    assert (found.location < 1 / 3) == (change is turned)
    assert ("no matter of location" in words) == (change is turned)


def test_a_classifier_that_only_lost_its_threshold_is_recognised() -> None:
    """Everything is called a dog, and yet the two classes lie as far apart as ever."""
    found = diagnosis(0.3, lambda x: x + 4)
    assert found.predicted[1] > 0.95
    assert found.ordered == pytest.approx(ndtr(4 / np.sqrt(2)), abs=0.01)
    words = " ".join(found.words)
    assert "two clumps" in words
    assert "label shift" not in words
    assert "do not trust that share" in words


def test_label_shift_among_moved_features_is_named_together_with_the_rest() -> None:
    words = " ".join(diagnosis(0.8, moved_aside).words)
    assert "looks like label shift" in words
    assert "Besides, the features have moved" in words


def test_class_shares_that_explain_the_answers_but_not_the_features_are_not_to_be_trusted() -> None:
    words = " ".join(diagnosis(0.8, lambda x: x + np.array([0, 3.0, 3.0, 0, 0, 0])).words)
    assert "label shift" not in words
    assert "the classes themselves look different, so do not trust that share" in words


def test_what_few_groups_no_longer_show_is_not_explained_by_class_shares() -> None:
    """Three groups a side are too few for a permutation test, and enough to see that they are far apart."""
    apart = np.array([0, 4.0, 4.0, 0, 0, 0])
    found = diagnosis(0.9, lambda x: x + apart, groups=np.arange(400) % 3)
    assert found.mmd_p > 0.05
    assert found.kind == "none"
    told = most_separable(found.label_shift)
    assert told == pytest.approx(0.8, abs=0.05)
    assert f"told apart with AUROC {told:.2f} at most" in " ".join(found.words)


def test_a_discrepancy_that_is_shown_must_be_gone_not_only_no_longer_shown() -> None:
    shares = (np.array(share) for share in ([0.1, 0.9], [0.0, 0.8], [0.2, 1.0], [0.7, 0.3]))
    shift = LabelShift(*shares, by_chance=0.1)
    found = replace(diagnosis(0.9), label_shift=shift, separability=Interval(0.95, 0.4, 1), mmd_p=0.005)
    rests = [shifts._rest(found, shifts._Explained(gone, 0.1)) for gone in (0.75, 0.85)]
    assert rests == [True, False]
    assert not shifts._rest(replace(found, mmd_p=0.1), shifts._Explained(0.75, 0.1))
    assert shifts._rest(replace(found, separability=Interval(0.95, 0.86, 1)), shifts._Explained(0.9, 0.1))


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [([0.7, 0.3], [0.2, 0.8]), ([0.5, 0.3, 0.2], [0.1, 0.3, 0.6]), ([0.4, 0.6], [0.4, 0.6])],
)
def test_class_shares_allow_the_auroc_of_the_best_order_of_the_classes(mine: Any, theirs: Any) -> None:
    def area(scores: Any) -> float:
        pairs = np.outer(theirs, mine)
        above = np.greater.outer(scores, scores) + np.equal.outer(scores, scores) / 2
        return float((pairs * above).sum())

    best = max(area(np.array(order)) for order in permutations(range(len(mine))))
    unknown = np.full(len(mine), np.nan)
    shift = LabelShift(np.array(theirs), unknown, unknown, np.array(mine), np.nan)
    assert most_separable(shift) == pytest.approx(best)


@pytest.mark.parametrize(
    ("many", "change", "kind"), [(5, None, "unknown"), (20, None, "unknown"), (20, 4.0, "features")]
)
def test_a_class_in_a_single_source_group_leaves_open_what_has_changed(
    many: int, change: float | None, kind: str
) -> None:
    """Half of the source is of that class, and nearly all of the target, which may have moved as well."""
    chance = np.random.default_rng(1)
    source, truth = world(0.5, chance, 400, 4.0)
    target, _ = world(0.95, chance, 400, 4.0)
    target[:, 1:3] += change or 0
    group = np.arange(400) % many
    lone = np.where(truth == 1, many, group)
    sides = (source, truth, lone, answers(source, 4.0)), (target, group, answers(target, 4.0))
    found = diagnose(*sides[0], *sides[1], ["cat", "dog"])
    words = " ".join(found.words)
    assert found.label_shift.shown
    assert found.kind == kind
    assert ("cannot be told, as the source has 'dog' in a single group" in words) == (kind == "unknown")
    assert "no mixture" not in words and "nan" not in words


def test_class_shares_allow_what_the_far_end_of_their_intervals_allows() -> None:
    """A true change is not refused because its estimate came out a little too small."""
    two = LabelShift(*np.array([[0.25, 0.75], [0.2, 0.7], [0.3, 0.8], [0.7, 0.3]]), by_chance=0.1)
    assert most_separable(two) == pytest.approx((1 + 0.8 - 0.3) / 2)
    # The last class as common as can be, then the second; the first is what they leave.
    three = LabelShift(
        *np.array([[0.1, 0.3, 0.6], [0.0, 0.2, 0.5], [0.3, 0.4, 0.7], [0.5, 0.3, 0.2]]), by_chance=0.1
    )
    assert most_separable(three) == pytest.approx(0.7 * 0.9 + 0.3 * 0.65)
    found = replace(diagnosis(0.9), label_shift=two, separability=Interval(0.8, 0.74, 0.85))
    assert not shifts._too_far(found, shifts._Explained(0.9, 0.1))
    assert shifts._too_far(
        replace(found, separability=Interval(0.8, 0.76, 0.85)), shifts._Explained(0.9, 0.1)
    )


def blown_up(x: Any) -> Any:
    return x * np.array([1, 1, 1, 4, 4, 4])


@pytest.mark.parametrize(("change", "kind"), [(None, "labels"), (blown_up, "none")])
def test_three_groups_a_side_explain_nothing_by_a_test_that_can_show_nothing(change: Any, kind: str) -> None:
    """Twenty ways to deal them, of which two are the true one and its mirror image: p is never below 0.1."""
    for seed in range(2):
        found = diagnosis(0.9, change, seed, groups=np.arange(400) % 3)
        words = " ".join(found.words)
        assert found.kind == kind
        assert ("The features fit it too" in words) == (kind == "labels")
        assert "3 groups a side are too few for a kernel test" in found.words[-1]
        assert "some 30 labelled rows of the target" in found.words[-1]
        assert "nan" not in words
    assert "too few" not in " ".join(diagnosis(0.9, change, groups=np.arange(400) % 12).words)


@pytest.mark.parametrize(
    ("mine", "theirs", "shown"),
    [(3, 3, False), (4, 2, False), (3, 4, True), (2, 8, True), (4, 4, True), (9000, 9000, True)],
)
def test_a_test_can_show_something_if_groups_can_be_dealt_in_ways_enough(
    mine: int, theirs: int, shown: bool
) -> None:
    assert shifts._can_show(np.arange(mine), np.arange(theirs)) == shown


def test_few_groups_are_mentioned_and_one_group_tells_nothing() -> None:
    found = diagnosis(0.3, moved_aside, groups=np.arange(400) % 12)
    assert "as few as 12 groups" in found.words[-1]
    alone = diagnosis(0.3, moved_aside, groups=np.zeros(400))
    assert alone.words[0].startswith("Whether the features have shifted cannot be told")
    assert "nan" not in " ".join(alone.words)
    assert len(alone.words) >= 2


def test_a_diagnosis_is_short_and_the_same_seed_gives_the_same() -> None:
    for second, change in ((0.7, moved_aside), (0.3, moved_towards_a_class)):
        first, again = (diagnosis(second, change, groups=np.arange(400) // 27) for _ in range(2))
        assert 2 <= len(first.words) <= 5
        assert first.words == again.words
        assert (first.separability, first.mmd, first.mmd_p) == (again.separability, again.mmd, again.mmd_p)
        assert (first.label_shift.low == again.label_shift.low).all()


# --- input that makes no sense

X = np.zeros((4, 2)) + np.arange(4)[:, None]
P = np.full((4, 2), 0.5)
TRUTH = np.array([0, 1, 0, 1])
HALVES = np.array([0.5, 0.5])


@pytest.mark.parametrize("measure", [separability, mmd, location])
@pytest.mark.parametrize(
    ("source", "target", "groups"),
    [
        (X[:0], X, None),
        (X, X[:0], None),
        (X, X[:, :1], None),
        (X[:, 0], X[:, 0], None),
        (X, np.where(X == 2, np.nan, X), None),
        (X, X, (np.arange(3), np.arange(4))),
        (X, X, (np.arange(4), np.arange(8).reshape(4, 2))),
    ],
)
def test_features_that_do_not_fit_are_refused(measure: Any, source: Any, target: Any, groups: Any) -> None:
    with pytest.raises(ValueError, match=r"fit|no rows|finite"):
        measure(source, target, groups)


@pytest.mark.parametrize(
    ("truth", "source", "target"),
    [
        (TRUTH, P, P[:0]),
        (TRUTH[:0], P[:0], P),
        (TRUTH[:3], P, P),
        (TRUTH, P, np.full((4, 3), 1 / 3)),
        (TRUTH, P, P * 1.1),
        (TRUTH, P * 0.9, P),
        (TRUTH, P, np.tile([1.5, -0.5], (4, 1))),
        (TRUTH, P * np.nan, P),
        (TRUTH, P, P[0]),
        (TRUTH + 1, P, P),
        (TRUTH - 1, P, P),
        (TRUTH / 1, P, P),
        (TRUTH * 0, P, P),
        (TRUTH, np.ones((4, 1)), np.ones((4, 1))),
    ],
)
def test_probabilities_that_do_not_fit_are_refused(truth: Any, source: Any, target: Any) -> None:
    with pytest.raises(ValueError, match=r"fit|sum to 1|whole numbers|no source rows|not rows over"):
        calibrated(truth, source, target)
    with pytest.raises(ValueError, match=r"fit|sum to 1|whole numbers|no source rows|not rows over"):
        label_shift(truth, None, source, target)
    with pytest.raises(ValueError, match=r"fit|sum to 1|whole numbers|no source rows|not rows over"):
        diagnose(X[: len(source)], truth, None, source, X[: len(target)], None, target, ["a", "b"])


@pytest.mark.parametrize(
    "call",
    [
        lambda: label_shift(TRUTH, np.arange(3), P, P),
        lambda: label_shift(TRUTH, None, P, P, target_groups=np.arange(3)),
        lambda: mmd(X, X, permutations=0),
        lambda: mmd(X, X, rows=0),
        lambda: diagnose(X, TRUTH, None, P, X, None, P, ["a"]),
        lambda: diagnose(X[:3], TRUTH, None, P, X, None, P, ["a", "b"]),
        lambda: diagnose(X, TRUTH, None, P, X[:3], None, P, ["a", "b"]),
    ],
)
def test_arguments_out_of_range_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"fit|sum to 1|at least|no rows|not rows over"):
        call()
