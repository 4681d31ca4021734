from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from headstart import splits
from headstart.splits import assign

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def rows(count: int = 1000, per_group: int = 1, domains: int = 2, seed: int = 0) -> pd.DataFrame:
    """A third of the rows ``yes``; a domain for each group."""
    chance = np.random.default_rng(seed)
    group = np.arange(count) // per_group
    return pd.DataFrame(
        {
            "id": [f"row-{i:05}" for i in range(count)],
            "label": np.where(chance.random(count) < 1 / 3, "yes", "no"),
            "domain": [f"place-{g % domains}" for g in group],
            "group": [f"group-{g:05}" for g in group],
        }
    )


def split(frame: pd.DataFrame, seed: int = 0, **more: Any) -> dict[str, str]:
    return dict(zip(frame["id"], assign(frame, SHARES, seed, **more), strict=True))


def shares(frame: pd.DataFrame, by: list[str], seed: int = 0) -> pd.DataFrame:
    table = frame.assign(split=assign(frame, SHARES, seed))
    return pd.crosstab([table[column] for column in by], table["split"], normalize="index")[list(SHARES)]


def test_every_label_of_every_domain_is_split_as_asked() -> None:
    found = shares(rows(), ["label", "domain"])
    assert (found - list(SHARES.values())).abs().max(axis=None) < 0.01


def test_groups_stay_whole_and_splits_still_balance() -> None:
    frame = rows(2640, per_group=60)
    assert frame.assign(split=assign(frame, SHARES, 0)).groupby("group")["split"].nunique().max() == 1
    assert (shares(frame, ["label", "domain"]) - list(SHARES.values())).abs().max(axis=None) < 0.1
    assert (shares(frame.assign(all=1), ["all"]) - list(SHARES.values())).abs().max(axis=None) < 0.04


def test_groups_of_very_different_sizes_balance() -> None:
    frame = rows(3000)
    sizes = np.minimum(np.random.default_rng(1).pareto(1.2, 3000) * 20, 600).astype(int)
    frame["group"] = [f"group-{size}" for size in sizes]
    assert (shares(frame, ["label"]) - list(SHARES.values())).abs().max(axis=None) < 0.03


@pytest.mark.parametrize("per_domain", [2, 3, 7])
def test_many_small_domains_do_not_starve_a_split(per_domain: int) -> None:
    frame = rows(200 * per_domain, domains=200)
    found = shares(frame.assign(all=1), ["all"])
    assert (found - list(SHARES.values())).abs().max(axis=None) < 0.1


def test_large_groups_are_not_all_in_train() -> None:
    frame = rows(1100)
    frame.loc[:599, "group"] = [f"large-{i // 60}" for i in range(600)]
    large = frame["group"].str.startswith("large")
    assert set(assign(frame, SHARES, 0)[large]) == set(SHARES)


def test_the_order_of_the_rows_changes_nothing() -> None:
    frame = rows(400, per_group=3)
    assert split(frame.sample(frac=1, random_state=1)) == split(frame)


def test_the_index_of_the_frame_is_kept() -> None:
    frame = rows(50).sample(frac=1, random_state=1)
    assert assign(frame, SHARES, 0).index.equals(frame.index)


def test_another_seed_splits_otherwise() -> None:
    assert split(rows(), seed=1) != split(rows())


def test_a_split_that_is_not_asked_for_gets_nothing() -> None:
    assert set(assign(rows(), {"train": 0.75, "val": 0.25}, 0)) == {"train", "val"}


def test_newcomers_never_move_a_row_and_are_balanced_around_it() -> None:
    old, grown = rows(300), rows(1000)
    before = split(old)
    after = split(grown, earlier=before)
    assert {row: after[row] for row in before} == before
    found = grown.assign(split=[after[row] for row in grown["id"]])
    counts = pd.crosstab([found["label"], found["domain"]], found["split"], normalize="index")
    assert (counts[list(SHARES)] - list(SHARES.values())).abs().max(axis=None) < 0.02


def test_newcomers_make_up_for_what_earlier_rows_lack() -> None:
    after = split(rows(1000), earlier=dict.fromkeys(rows(300)["id"], "train"))
    assert pd.Series(after).value_counts().to_dict() == {"train": 600, "val": 200, "test": 200}


def test_without_the_earlier_splits_newcomers_would_move_rows() -> None:
    before, after = split(rows(300)), split(rows(1000))
    assert any(after[row] != before[row] for row in before)


def test_a_row_joins_the_split_of_its_group() -> None:
    frame = rows(300, per_group=3)
    before = split(frame[frame.index % 3 != 0])
    after = split(frame, earlier=before)
    for first in range(0, 300, 3):
        assert after[frame["id"][first]] == before[frame["id"][first + 1]]


@pytest.mark.parametrize(
    ("one", "other", "both"), [("train", "test", "test"), ("train", "val", "val"), ("val", "test", "test")]
)
def test_of_two_tied_groups_the_more_protected_split_wins(one: str, other: str, both: str) -> None:
    frame = rows(300)
    before = split(frame)
    tied = [next(row for row in before if before[row] == name) for name in (one, other)]
    frame.loc[frame["id"].isin(tied), "group"] = "tied"
    after = split(frame, earlier=before)
    assert [after[row] for row in tied] == [both, both]
    assert {row for row in before if after[row] != before[row]} == {tied[0]}


def test_rows_that_are_gone_leave_the_others_where_they_were() -> None:
    before = split(rows(300))
    after = split(rows(300).iloc[::2], earlier=before)
    assert all(before[row] == name for row, name in after.items())


def test_folds_hold_whole_groups_and_nearly_the_same_number_of_rows() -> None:
    frame = rows(400, per_group=8)
    fold = splits.folds(frame, 5, seed=0)
    assert frame.groupby(fold)["id"].count().between(72, 88).all()
    assert (
        frame.groupby("group").apply(lambda group: len(set(fold[group.index])), include_groups=False) == 1
    ).all()
    assert not (fold == splits.folds(frame, 5, seed=1)).all()
