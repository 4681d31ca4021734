from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import ndtr, softmax

from headstart.clumps import ordered


@pytest.mark.parametrize(("gap", "second"), [(3.0, 0.5), (4.0, 0.2)])
def test_two_clumps_of_logits_show_how_well_the_classes_are_ranked_whatever_the_threshold(
    gap: float, second: float
) -> None:
    chance = np.random.default_rng(0)
    clumps = chance.normal(size=3000) + gap * (chance.random(3000) < second)
    for scale, place in ((1, 0), (0.5, 6), (4, -9)):
        p = softmax(np.stack([np.zeros(3000), scale * clumps + place], axis=1), axis=1)
        assert ordered(p) == pytest.approx(ndtr(gap / np.sqrt(2)), abs=0.01)


@pytest.mark.parametrize("shape", ["normal", "exponential", "gumbel", "laplace", "t", "lognormal", "spoilt"])
def test_one_clump_of_any_skew_and_tail_is_no_sign(shape: str) -> None:
    signs = []
    for seed in range(10):
        chance = np.random.default_rng(seed)
        odds = {
            "normal": chance.normal(size=800),
            "exponential": chance.exponential(size=800),
            "gumbel": chance.gumbel(size=800),
            "laplace": chance.laplace(size=800),
            "t": chance.standard_t(4, size=800),
            "lognormal": chance.lognormal(0, 0.5, size=800),
            "spoilt": chance.normal(size=800) + (chance.random(800) < 0.2) * chance.normal(1, 2, size=800),
        }[shape]
        signs.append(ordered(softmax(np.stack([-odds, odds], axis=1), axis=1)))
    assert sum(sign > 0.5 for sign in signs) <= 1


def test_the_sign_needs_groups_that_agree() -> None:
    """Two clumps, but each of them a single group: that may be two cameras."""
    chance = np.random.default_rng(0)
    odds = chance.normal(size=600) + 5 * np.repeat([0, 1], 300)
    p = softmax(np.stack([np.zeros(600), odds], axis=1), axis=1)
    assert ordered(p) > 0.99
    assert ordered(p, np.repeat([0, 1], 300)) == 0.5
    assert ordered(p, np.zeros(600)) == 0.5


def test_the_sign_of_several_classes_is_the_mean_over_them() -> None:
    chance = np.random.default_rng(0)
    truth = chance.integers(0, 3, 3000)
    apart = softmax(chance.normal(size=(3000, 3)) + 8 * np.eye(3)[truth], axis=1)
    assert ordered(apart) > 0.95
    assert ordered(softmax(chance.normal(size=(3000, 3)), axis=1)) == 0.5


@pytest.mark.parametrize(("times", "groups"), [(2, None), (1, np.arange(3))])
def test_what_are_no_probabilities_or_no_groups_of_theirs_is_refused(times: float, groups: Any) -> None:
    with pytest.raises(ValueError, match=r"sum to 1|fit"):
        ordered(times * np.full((4, 2), 0.5), groups)
