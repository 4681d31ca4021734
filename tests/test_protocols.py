from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from headstart import protocols
from headstart.errors import HeadstartError
from headstart.examples import load
from headstart.layout import Layout, sha256_of
from headstart.metrics import METRICS
from headstart.protocols import adapt_each_pair, cross_validate, format_pairs, format_table, summarise
from tests import cached

QUICK = cached.recipe(train={"l2": [0.1, 1.0]})


def test_every_row_is_held_out_once_per_seed(tmp_path: Path) -> None:
    rows = cross_validate(QUICK, cached.write(tmp_path), folds=3, seeds=2)
    assert rows.groupby("seed")["rows"].sum().tolist() == [240, 240]
    assert rows.groupby("seed")["groups"].sum().tolist() == [60, 60]
    assert rows[["seed", "fold"]].drop_duplicates().shape == (6, 2)
    assert rows["accuracy"].mean() > 0.7


@pytest.mark.parametrize("random_folds", [False, True])
def test_groups_stay_whole_unless_random_folds_are_asked_for(random_folds: bool, tmp_path: Path) -> None:
    examples = load(QUICK, cached.write(tmp_path))
    group = examples.manifest["group"].to_numpy()
    outer = protocols._split(examples, np.arange(240), 4, 0, random_folds)
    inner = protocols._split(examples, outer[0][0], protocols.INNER_FOLDS, 0, random_folds)
    for others, fold in [*outer, *inner]:
        assert not set(others) & set(fold)
        assert bool(set(group[others]) & set(group[fold])) == random_folds
    assert not {row for part in inner[0] for row in part} & set(outer[0][1])


def test_folds_are_balanced_over_label_and_domain(tmp_path: Path) -> None:
    examples = load(QUICK, cached.write(tmp_path, cached.manifest(400)))
    table = examples.manifest
    for _, fold in protocols._split(examples, np.arange(400), 4, 0, False):
        for column in ("label", "domain"):
            share = (table[column].iloc[fold] == table[column].iloc[0]).mean()
            assert share == pytest.approx((table[column] == table[column].iloc[0]).mean(), abs=0.08)


def test_random_folds_flatter_when_groups_resemble_each_other(tmp_path: Path) -> None:
    table = cached.manifest(240, per_group=12)
    first = table.groupby("group")["label"].transform("first")
    table["label"] = first  # one label per group, and features that give the group away
    layout = cached.write(tmp_path, table, dim=4, group_noise=30)
    layout_features = np.load(layout.features / "features.npy")
    layout_features[:, 0] = np.random.default_rng(0).normal(size=240)  # nothing to learn but the groups
    wide = np.eye(20)[table["group"].str[6:].astype(int)]
    np.save(
        layout.features / "features.npy", np.concatenate([layout_features, wide], axis=1).astype(np.float16)
    )
    safe, leaky = (cross_validate(QUICK, layout, 4, 1, random_folds) for random_folds in (False, True))
    assert leaky["accuracy"].mean() > 0.95
    assert safe["accuracy"].mean() < 0.75


def test_the_rule_that_the_recipe_decides_by_is_chosen_on_the_rows_that_choose(tmp_path: Path) -> None:
    table = cached.manifest(400)
    table.loc[(table["label"] == "yes") & (np.arange(400) % 5 > 0), "label"] = "no"  # yes is rare
    layout = cached.write(tmp_path, table)
    plain = cross_validate(QUICK, layout, 3)
    costly = {"l2": [0.1, 1.0], "decide": {"costs": {"yes": {"no": 20.0}}}}
    found = cross_validate(cached.recipe(train=costly), layout, 3)
    assert found["accuracy"].mean() < plain["accuracy"].mean() - 0.05  # most are called yes, to be safe
    assert found["log_loss"].tolist() == plain["log_loss"].tolist()
    even = {"l2": [0.1, 1.0], "decide": {"metric": "balanced_accuracy"}}
    balanced = cross_validate(cached.recipe(train=even), layout, 3)["balanced_accuracy"]
    assert balanced.mean() > plain["balanced_accuracy"].mean() + 0.05


def test_the_same_seed_gives_the_same_table(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    pd.testing.assert_frame_equal(cross_validate(QUICK, layout, 3), cross_validate(QUICK, layout, 3))


def test_the_interval_allows_for_folds_that_share_training_rows() -> None:
    rows = pd.DataFrame({m: [0.7, 0.8, 0.9, 0.8] for m in METRICS} | {"folds": 4, "held_out": range(4)})
    line = summarise(rows).loc["accuracy"]
    std = np.std([0.7, 0.8, 0.9, 0.8], ddof=1)
    reach = 3.182446 * std * sqrt(1 / 4 + 1 / 3)
    assert line.tolist() == pytest.approx([0.8, std, 0.8 - reach, 0.8 + reach])


def test_seeds_that_deal_the_same_folds_do_not_narrow_the_interval(tmp_path: Path) -> None:
    sizes = np.arange(2, 26)  # no two groups of one size: the seed has nothing to decide
    table = cached.manifest(int(sizes.sum()))
    group = np.repeat(np.arange(len(sizes)), sizes)
    layout = cached.write(tmp_path, table.assign(group=[f"group-{g}" for g in group]))
    once, thrice = (cross_validate(QUICK, layout, 4, seeds) for seeds in (1, 3))
    assert thrice["held_out"].tolist() == 3 * [0, 1, 2, 3]
    pd.testing.assert_frame_equal(summarise(thrice), summarise(once))
    note = "only 4 of 12 folds differ and a repeated one counts once"
    assert note in format_table(thrice)
    assert max(len(line) for line in format_table(thrice).splitlines()) <= 110
    assert "differ" not in format_table(once)


def test_seeds_that_deal_other_folds_count_in_full(tmp_path: Path) -> None:
    rows = cross_validate(QUICK, cached.write(tmp_path), 3, 2)  # groups of one size
    assert rows["held_out"].tolist() == list(range(6))
    assert summarise(rows).loc["accuracy", "mean"] == pytest.approx(rows["accuracy"].mean())
    assert "differ" not in format_table(rows)


def test_the_scores_of_a_repeated_fold_are_averaged_whatever_its_number() -> None:
    score = {m: [0.6, 0.8, 0.9, 0.7] for m in METRICS}
    rows = pd.DataFrame(score | {"folds": 2, "held_out": [0, 1, 1, 0]})
    each = pd.DataFrame({m: [0.65, 0.85] for m in METRICS} | {"folds": 2, "held_out": [0, 1]})
    pd.testing.assert_frame_equal(summarise(rows), summarise(each))


def test_the_table_names_its_protocol_and_marks_the_one_that_leaks(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    safe = format_table(cross_validate(QUICK, layout, 3))
    assert safe.startswith("3 group-safe folds, 1 seed, 240 rows")
    assert all(metric in safe for metric in METRICS)
    assert "leak" not in safe
    leaky = format_table(cross_validate(QUICK, layout, 3, 2, random_folds=True))
    assert leaky.startswith("3 random folds, 2 seeds, 240 rows")
    assert "for comparison with the literature only" in leaky
    assert max(len(line) for line in leaky.splitlines()) <= 110


def test_more_folds_than_groups_of_a_class_are_refused(tmp_path: Path) -> None:
    layout = cached.write(tmp_path, cached.manifest(48, per_group=12))
    with pytest.raises(HeadstartError, match="too few groups for 9 folds") as caught:
        cross_validate(QUICK, layout, folds=9)
    assert caught.value.do.startswith("use at most 4 folds")


@pytest.mark.parametrize(
    ("groups", "folds", "advice"),
    [(3, 2, "use more folds, up to 3, or add groups of that class"), (2, 2, "add groups of that class")],
)
def test_folds_that_leave_no_group_of_a_class_to_learn_from_are_refused_before_anything_is_trained(
    groups: int, folds: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = cached.manifest()
    rare = table["group"].isin([f"group-{7 * number + 1}" for number in range(groups)])
    layout = cached.write(tmp_path, table.assign(label=np.where(rare, "yes", "no")))
    monkeypatch.setattr(protocols, "fit", Mock(side_effect=AssertionError("it has begun")))
    with pytest.raises(HeadstartError, match=f"{folds} folds leave no groups of yes to learn from") as caught:
        cross_validate(QUICK, layout, folds)
    assert caught.value.table == [f"yes: {groups}"]
    assert caught.value.do == advice


def test_a_class_without_any_row_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    chosen = cached.recipe(validate={"adapter": "table", "classes": ["no", "perhaps", "yes"]})
    with pytest.raises(HeadstartError, match="too few groups for 3 folds") as caught:
        cross_validate(chosen, cached.write(tmp_path), 3)
    assert caught.value.table == ["perhaps: 0"]


def test_adaptation_is_not_cross_validated(tmp_path: Path) -> None:
    layout, _ = cached.shifted(tmp_path)
    with pytest.raises(HeadstartError, match="those of the target domain are put aside"):
        cross_validate(cached.adapting(), layout)


def moved(root: Path) -> Layout:
    """Two domains with labels, of which ``west`` lies elsewhere."""
    layout = cached.write(root)
    features = np.load(layout.features / "features.npy")
    features[(cached.manifest()["domain"] == "west").to_numpy()] += 4
    np.save(layout.features / "features.npy", features)
    return layout


def test_each_pair_of_domains_is_adapted_and_scored_on_all_rows_of_its_target(tmp_path: Path) -> None:
    found = adapt_each_pair(cached.recipe(), moved(tmp_path), seeds=2)
    assert found[["seed", "source", "target", "rows"]].to_numpy().tolist() == [
        [seed, *pair, 120] for seed in (0, 1) for pair in (("east", "west"), ("west", "east"))
    ]
    assert (found["gain"] > 0.15).all()
    assert found["gain"].to_numpy() == pytest.approx((found["adapted"] - found["source_only"]).to_numpy())
    text = format_pairs(found)
    assert "2 pairs, 2 seeds" in text
    assert f"mean gain {found['gain'].mean():+.3f}" in text


def test_labels_of_a_target_score_and_do_nothing_else(tmp_path: Path) -> None:
    layout = moved(tmp_path)
    honest = adapt_each_pair(cached.recipe(), layout).iloc[0]
    table = pd.read_parquet(layout.manifest / "manifest.parquet")
    west = table["domain"] == "west"
    table.loc[west, "label"] = table.loc[west, "label"].map({"no": "yes", "yes": "no"})
    table.loc[west, ["confidence", "weight"]] = 0.9, 7.0
    table.to_parquet(layout.manifest / "manifest.parquet", index=False)
    described = json.loads((layout.features / "features.json").read_text())
    described["manifest_sha256"] = sha256_of(layout.manifest / "manifest.parquet")
    (layout.features / "features.json").write_text(json.dumps(described))
    flipped = adapt_each_pair(cached.recipe(), layout).iloc[0]
    assert flipped["accuracy"] == pytest.approx(1 - honest["accuracy"])
    assert flipped[["chosen", "expected"]].tolist() == honest[["chosen", "expected"]].tolist()


def test_a_domain_without_rows_of_a_class_to_compare_by_is_named_before_any_pair_is_adapted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = cached.manifest()
    west = table["domain"] == "west"
    table.loc[west, "label"] = np.where(table.loc[west, "group"] == "group-0", "yes", "no")
    layout = cached.write(tmp_path, table)
    monkeypatch.setattr(protocols, "source_of", Mock(side_effect=AssertionError("it has begun")))
    with pytest.raises(HeadstartError, match="no validation rows of yes") as caught:
        adapt_each_pair(cached.recipe(), layout)
    assert caught.value.where == "domain west"


def test_pairs_without_labels_to_score_by_are_refused(tmp_path: Path) -> None:
    layout, _ = cached.shifted(tmp_path)
    with pytest.raises(HeadstartError, match="pairs of domains need at least two, with labels"):
        adapt_each_pair(cached.adapting(), layout)
