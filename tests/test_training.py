from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import yaml

from headstart import adaptation, domains, heads, stamps
from headstart.errors import HeadstartError
from headstart.evaluation import evaluate
from headstart.examples import Examples, SoftTargets, class_factors, soft_targets
from headstart.fitting import fit_rows
from headstart.heads import Head, fit
from headstart.layout import Layout, sha256_of
from headstart.training import train
from tests import cached

ROOT = Path(__file__).parents[1]


def model(layout: Layout) -> dict[str, object]:
    found: dict[str, object] = json.loads((layout.model / "model.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_train_writes_a_head_its_choices_and_predictions_of_the_rows_it_did_not_fit(tmp_path: Path) -> None:
    layout, table = cached.write(tmp_path), cached.manifest()
    train(cached.recipe(), layout)
    assert set(contents(layout.model)) == {"head.safetensors", "model.json", "predictions.parquet"}
    assert model(layout)["classes"] == ["no", "yes"]
    assert model(layout)["l2"] in {line["l2"] for line in model(layout)["l2_tried"]}  # type: ignore[attr-defined]
    predictions = pd.read_parquet(layout.model / "predictions.parquet")
    assert list(predictions) == ["id", "split", "label", "domain", "group", "p:no", "p:yes"]
    held_out = table[table["split"] != "train"]
    assert list(predictions["id"]) == list(held_out["id"])
    features = np.load(layout.features / "features.npy")[held_out.index]
    expected = Head.load(layout.model / "head.safetensors").probabilities(features)
    assert np.allclose(predictions[["p:no", "p:yes"]], expected, rtol=0, atol=1e-6)  # the head is float32
    assert ((predictions["p:yes"] > 0.5) == (predictions["label"] == "yes")).mean() > 0.7


def test_the_order_of_the_classes_is_the_recipes(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    train(cached.recipe(validate={"adapter": "table", "classes": ["yes", "no"]}), layout)
    assert model(layout)["classes"] == ["yes", "no"]
    predictions = pd.read_parquet(layout.model / "predictions.parquet")
    assert list(predictions)[-2:] == ["p:yes", "p:no"]
    assert ((predictions["p:yes"] > 0.5) == (predictions["label"] == "yes")).mean() > 0.7


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "two"):
        train(cached.recipe(), cached.write(tmp_path / place))
    assert contents(tmp_path / "one/model/case") == contents(tmp_path / "two/model/case")


def test_the_test_labels_choose_nothing(tmp_path: Path) -> None:
    table = cached.manifest()
    shuffled = table.copy()
    test = table["split"] == "test"
    shuffled.loc[test, "label"] = np.random.default_rng(0).permutation(table.loc[test, "label"])
    one, two = cached.write(tmp_path / "one", table), cached.write(tmp_path / "two", shuffled)
    for file in ("features.npy", "ids.parquet"):  # the same features under other labels
        shutil.copy(one.features / file, two.features / file)
    for layout in (one, two):
        train(cached.recipe(), layout)
    assert (one.model / "head.safetensors").read_bytes() == (two.model / "head.safetensors").read_bytes()
    before, after = (pd.read_parquet(layout.model / "predictions.parquet") for layout in (one, two))
    assert not before["label"].equals(after["label"])
    assert before.drop(columns="label").equals(after.drop(columns="label"))


def test_with_few_rows_of_a_class_the_backbone_stays_frozen(tmp_path: Path) -> None:
    few = {"method": "fine_tune", "frozen_below": 100}  # there are some 70; packed rows are not even there
    one, two = cached.write(tmp_path / "one"), cached.write(tmp_path / "two")
    train(cached.recipe(features={"packed": True}, train=few), one)
    train(cached.recipe(), two)
    assert (one.model / "head.safetensors").read_bytes() == (two.model / "head.safetensors").read_bytes()
    assert not (one.model / "backbone").exists()
    assert model(one)["method"] == "fine_tune"


def test_validation_labels_do_choose(tmp_path: Path) -> None:
    table = cached.manifest()
    swapped = table.copy()
    val = table["split"] == "val"
    swapped.loc[val, "label"] = table.loc[val, "label"].map({"no": "yes", "yes": "no"})
    one, two = cached.write(tmp_path / "one", table), cached.write(tmp_path / "two", swapped)
    shutil.copy(one.features / "features.npy", two.features / "features.npy")
    for layout in (one, two):
        train(cached.recipe(), layout)
    assert model(two)["l2"] == 10 != model(one)["l2"]  # when all it learned is wrong, the least of it is best


def test_doubt_is_spread_over_the_other_classes() -> None:
    targets = soft_targets(np.array([0, 2]), np.array([1.0, 0.7]), 4)
    assert targets == pytest.approx(np.array([[1, 0, 0, 0], [0.1, 0.1, 0.7, 0.1]]))


def test_a_head_is_fitted_without_room_for_rows_times_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 4000, 200
    chance, truth = np.random.default_rng(0), np.arange(n) % k
    table = pd.DataFrame(
        {
            "id": [str(i) for i in range(n)],
            "split": np.where(np.arange(n) < 3000, "train", "val"),
            "confidence": chance.choice([1.0, 0.8], n),
            "weight": 1.0,
        }
    )
    features = chance.normal(size=(n, 8)).astype(np.float16)
    examples = Examples(table, features, [str(c) for c in range(k)], truth)
    monkeypatch.setattr(heads, "BLOCK_BYTES", 1 << 16)
    choices = cached.recipe(train={"l2": [1.0]}).train
    tracemalloc.start()
    fit_rows(examples, choices, examples.rows("train"), examples.rows("val"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * k * 8


def test_targets_made_block_by_block_teach_what_an_array_of_them_teaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heads, "BLOCK_BYTES", 1 << 12)
    chance, truth = np.random.default_rng(0), np.arange(300) % 3
    features = chance.normal(size=(300, 8)).astype(np.float16)
    confidence, weights = chance.choice([1.0, 0.8], 300), chance.choice([1.0, 2.0], 300)
    whole = fit(features, soft_targets(truth, confidence, 3), weights, 0.1)
    made = fit(features, SoftTargets(truth, confidence, 3), weights, 0.1)
    assert all(np.array_equal(array, vars(made)[name]) for name, array in vars(whole).items())


def test_balanced_classes_weigh_the_same(tmp_path: Path) -> None:
    truth, weights = np.array([0, 0, 0, 1]), np.array([1.0, 1.0, 2.0, 1.0])
    factors = class_factors(truth, weights, 2)
    assert np.bincount(truth, weights * factors[truth]) == pytest.approx(np.array([2.5, 2.5]))
    table = cached.manifest(400)
    table = table[(table["label"] == "no") | (np.arange(400) % 5 == 0)].reset_index(drop=True)
    recall = {}
    for choice in (None, "balanced"):
        layout = cached.write(tmp_path / str(choice), table)
        train(cached.recipe(train={"class_weight": choice}), layout)
        predictions = pd.read_parquet(layout.model / "predictions.parquet")
        recall[choice] = (predictions.loc[predictions["label"] == "yes", "p:yes"] > 0.5).mean()
    assert recall["balanced"] > recall[None]


def test_rows_of_little_weight_teach_little(tmp_path: Path) -> None:
    table = cached.manifest()
    wrong = (table["split"] == "train") & table["group"].str[-1].isin(list("02468"))
    liar = table.copy()
    liar.loc[wrong, "label"] = table.loc[wrong, "label"].map({"no": "yes", "yes": "no"})
    features = cached.write(tmp_path / "honest", table).features / "features.npy"
    right = {}
    for weight in (1, 1e-4):
        liar.loc[wrong, "weight"] = np.float32(weight)
        layout = cached.write(tmp_path / str(weight), liar)
        shutil.copy(features, layout.features / "features.npy")
        train(cached.recipe(), layout)
        predictions = pd.read_parquet(layout.model / "predictions.parquet")
        right[weight] = ((predictions["p:yes"] > 0.5) == (predictions["label"] == "yes")).mean()
    assert right[1e-4] > right[1] + 0.1


def test_a_failed_training_leaves_the_old_model_alone(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    train(cached.recipe(), layout)
    before = contents(layout.model)
    features = np.load(layout.features / "features.npy")
    features[7, 0] = np.inf
    np.save(layout.features / "features.npy", features)
    with pytest.raises(HeadstartError, match="1 rows are not finite") as caught:
        train(cached.recipe(), layout)
    assert "row-00007" in caught.value.where
    assert contents(layout.model) == before


def test_features_of_another_manifest_are_refused(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    cached.manifest(seed=3).to_parquet(layout.manifest / "manifest.parquet", index=False)
    with pytest.raises(HeadstartError, match="another manifest") as caught:
        train(cached.recipe(), layout)
    assert "dvc repro features@case" in caught.value.do


def test_features_of_too_few_rows_are_refused(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    np.save(layout.features / "features.npy", np.load(layout.features / "features.npy")[:-1])
    with pytest.raises(HeadstartError, match=r"shape \(239, 8\) for a manifest of 240 rows"):
        train(cached.recipe(), layout)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="missing") as caught:
        train(cached.recipe(), Layout(tmp_path, "case"))
    assert "features.json" in caught.value.where


def test_a_class_without_training_rows_is_named(tmp_path: Path) -> None:
    table = cached.manifest()
    table.loc[table["split"] == "train", "label"] = "no"
    with pytest.raises(HeadstartError, match="no training rows of yes"):
        train(cached.recipe(), cached.write(tmp_path, table))


def test_a_label_that_the_recipe_does_not_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="does not name: no"):
        train(
            cached.recipe(validate={"adapter": "table", "classes": ["yes", "perhaps"]}),
            cached.write(tmp_path),
        )


def test_costs_of_a_class_that_there_is_not_are_named_before_anything_is_trained(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    # There are no packed rows, which training would miss first.
    choices = {"method": "fine_tune", "frozen_below": 0, "decide": {"costs": {"yse": {"no": 5}}}}
    with pytest.raises(HeadstartError, match="no class: yse"):
        train(cached.recipe(features={"packed": True}, train=choices), layout)


def test_stamps_match_the_tree_that_the_model_was_made_from(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    train(cached.recipe(), layout)
    assert stamps.differences(model(layout)["stamps"], cached.recipe(), layout) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("recipe", "train block"),
        ("seed", "the seed was 0, the recipe says 5"),
        ("manifest", "manifest.parquet"),
        ("features", "features.npy"),
        ("backbone", "backbone"),
        ("weights gone", "backbone is missing"),
        ("features gone", "features.npy"),
        ("code", "heads.py"),
    ],
)
def test_stamps_notice_what_has_changed_since(
    change: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, recipe = cached.write(tmp_path), cached.recipe()
    taken = stamps.take(recipe, layout)
    match change:
        case "recipe":
            recipe = cached.recipe(train={"l2": [0.5]})
        case "seed":
            recipe = cached.recipe(train={"seed": 5})
        case "manifest":
            cached.manifest(seed=3).to_parquet(layout.manifest / "manifest.parquet", index=False)
        case "features":
            np.save(layout.features / "features.npy", np.zeros((240, 8), np.float16))
        case "backbone":
            (layout.weights / "spec.json").write_text(json.dumps({"sha256": "c" * 64}))
        case "weights gone":
            (layout.weights / "spec.json").unlink()
        case "features gone":
            (layout.features / "features.npy").unlink()
        case "code":
            library = shutil.copytree(stamps.LIBRARY, tmp_path / "library")
            (library / "heads.py").write_text("# better\n")
            monkeypatch.setattr(stamps, "LIBRARY", library)
    assert any(word in line for line in stamps.differences(taken, recipe, layout))


def test_a_choice_that_training_never_reads_makes_no_model_stale(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    taken = stamps.take(cached.recipe(), layout)
    other = cached.recipe(evaluate={"resamples": 2000}, register={"name": "another"})
    assert stamps.differences(taken, other, layout) == []


def test_a_killed_run_is_not_continued_with_its_classes_in_another_order(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    one, other = (
        cached.recipe(validate={"adapter": "table", "classes": classes})
        for classes in (cached.CLASSES, cached.CLASSES[::-1])
    )
    taken = stamps.take(one, layout)
    assert stamps.key(taken) == stamps.key(stamps.take(one, layout)) != stamps.key(stamps.take(other, layout))
    assert stamps.differences(taken, other, layout) == []  # a finished model knows its own order


def test_checkpoints_of_killed_runs_with_other_choices_go_once_a_model_is_there(tmp_path: Path) -> None:
    layout = cached.write(tmp_path)
    for name in ("0123456789abcdef", "0123456789abcdef-taught"):
        (layout.work / "train" / name).mkdir(parents=True)
        (layout.work / "train" / name / "step-5.json").write_text("{}")
    clock = layout.work / "train" / "0123456789abcdef.csv"  # of a model that may be registered again
    clock.write_text("epoch\n1\n")
    train(cached.recipe(), layout)
    assert list((layout.work / "train").iterdir()) == [clock]


def test_stamps_cover_the_modules_that_make_training_stale() -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]
    assert list(stamps.MODULES) == [Path(dep).stem for dep in stage["deps"] if dep.startswith("src/")]


def accuracy_on_target(layout: Layout, truth: pd.DataFrame) -> float:
    predictions = pd.read_parquet(layout.model / "predictions.parquet")
    test = predictions[(predictions["domain"] == "west") & (predictions["split"] == "test")].merge(
        truth, on="id", suffixes=("", "_true")
    )
    assert len(test) > 20
    assert (test["label"] == "").all()
    return float(((test["p:yes"] > 0.5) == (test["label_true"] == "yes")).mean())


def test_adaptation_mends_what_a_moved_domain_breaks(tmp_path: Path) -> None:
    layout, truth = cached.shifted(tmp_path)
    train(cached.adapting(adaptation="source_only"), layout)
    assert accuracy_on_target(layout, truth) < 0.7  # it calls all of them yes
    train(cached.adapting(), layout)
    assert model(layout)["adaptation"] == "information_maximisation"
    assert "so it is lost" in str(model(layout)["reason"])
    expected = model(layout)["expected_accuracy"]
    assert expected["low"] < expected["value"] < expected["high"]  # type: ignore[index]
    assert "The features have shifted" in model(layout)["shift"]["words"][0]  # type: ignore[index]
    assert accuracy_on_target(layout, truth) > 0.75
    predictions = pd.read_parquet(layout.model / "predictions.parquet")
    target = (predictions["domain"] == "west").to_numpy()
    ids = pd.read_parquet(layout.features / "ids.parquet")["id"]
    rows = pd.Index(ids).get_indexer(pd.Index(predictions["id"]))
    features = np.load(layout.features / "features.npy")[rows]
    for name, chosen in (("head", target), ("source", ~target)):
        expected = Head.load(layout.model / f"{name}.safetensors").probabilities(features[chosen])
        assert np.allclose(predictions.loc[chosen, ["p:no", "p:yes"]], expected, rtol=0, atol=1e-6)


def test_every_way_to_adapt_is_compared_and_the_domains_are_shown_in_a_plane(tmp_path: Path) -> None:
    layout, truth = cached.shifted(tmp_path)
    train(cached.adapting(), layout)
    found: Any = model(layout)
    assert set(found["candidates"]) == set(adaptation.METHODS)
    assert found["decided_by"] == "shift"
    assert f"{found['candidates']['source_only']['rarest_named']:.2f} times as often" in found["reason"]
    for name, least in (("rarest_named", 0.5), ("diversity", 0.9), ("expected_accuracy", 0.6)):
        assert found["candidates"]["information_maximisation"][name] > least
        assert found["candidates"]["source_only"][name] <= 1
    assert found["candidates"]["information_maximisation"]["expected_accuracy"] == pytest.approx(
        found["expected_accuracy"]["value"]
    )
    called = pd.read_parquet(layout.model / "candidates.parquet").merge(truth, on="id")
    right = called["information_maximisation"].map({0: "no", 1: "yes"}) == called["label"]
    assert right.mean() == pytest.approx(accuracy_on_target(layout, truth))
    plane = pd.read_parquet(layout.model / "projection.parquet").groupby(["view", "side"])[["x", "y"]].mean()
    before, after = (
        plane.loc[(view, "target")] - plane.loc[(view, "source")] for view in ("before", "after")
    )
    assert np.linalg.norm(before) > 3
    assert np.linalg.norm(after) < 0.01
    given_back(layout, truth, 30)
    train(cached.adapting(), layout)
    found = model(layout)
    assert found["decided_by"] == "labels"
    assert all(0 <= line["right"] <= 1 for line in found["candidates"].values())


def test_labels_that_are_put_aside_are_not_within_reach_of_training(tmp_path: Path) -> None:
    layout, truth = cached.shifted(tmp_path)
    train(cached.adapting(), layout)
    before = contents(layout.model)
    flipped = truth.assign(label=truth["label"].map({"no": "yes", "yes": "no"}))
    flipped.to_parquet(layout.truth / "labels.parquet", index=False)
    train(cached.adapting(), layout)
    assert contents(layout.model) == before
    shutil.rmtree(layout.truth)
    train(cached.adapting(), layout)
    assert contents(layout.model) == before


def test_test_rows_of_the_target_take_no_part_in_adaptation(tmp_path: Path) -> None:
    layout, _ = cached.shifted(tmp_path)
    train(cached.adapting(), layout)
    before = (layout.model / "head.safetensors").read_bytes()
    table = pd.read_parquet(layout.manifest / "manifest.parquet")
    features = np.load(layout.features / "features.npy")
    for split, moves in (("test", False), ("val", True)):
        moved = features.copy()
        moved[((table["domain"] == "west") & (table["split"] == split)).to_numpy()] += 1
        np.save(layout.features / "features.npy", moved)
        train(cached.adapting(), layout)
        assert ((layout.model / "head.safetensors").read_bytes() != before) == moves


def test_a_target_without_rows_is_an_error(tmp_path: Path) -> None:
    layout, _ = cached.shifted(tmp_path)
    table = pd.read_parquet(layout.manifest / "manifest.parquet")
    table.loc[table["domain"] == "west", "split"] = "test"
    cached.write(tmp_path, table)
    with pytest.raises(HeadstartError, match="the target domain has no rows to adapt to"):
        train(cached.adapting(), layout)


def test_validation_rows_without_a_class_cannot_tell_a_shift_and_are_named(tmp_path: Path) -> None:
    layout, _ = cached.shifted(tmp_path)
    table = pd.read_parquet(layout.manifest / "manifest.parquet")
    table.loc[(table["domain"] == "east") & (table["split"] == "val"), "label"] = "no"
    cached.write(tmp_path, table)
    with pytest.raises(HeadstartError, match="no validation rows of yes") as caught:
        train(cached.adapting(), layout)
    assert caught.value.where == "domain east"


def test_the_shares_of_the_classes_are_handed_down_where_no_row_of_the_source_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = cached.write(tmp_path, cached.manifest().assign(domain="west", label=""))
    given = layout.weights / "registered"
    given.mkdir()
    Head(*(np.ones(shape, np.float32) for shape in ((2, 8), (2,), (8,), (8,)))).save(
        given / "head.safetensors"
    )
    (given / "features.json").write_text("{}")
    (given / "model.json").write_text(json.dumps({"classes": cached.CLASSES, "shares": [0.2, 0.8]}))
    made = Mock(said={}, publish=lambda folder, rows: np.full((len(rows), 2), 0.5))
    monkeypatch.setattr(domains, "tuning_of", Mock())
    monkeypatch.setattr(domains, "Tuned", Mock(return_value=made))
    recipe = cached.recipe(
        validate={"adapter": "table", "target_domain": "west"},
        features={"packed": True},
        train={"method": "domain_adaptation", "source_free": "hypothesis_transfer"},
    )
    train(recipe, layout)
    assert model(layout)["shares"] == [0.2, 0.8]


def test_before_any_row_of_the_target_has_come_the_model_is_the_sources(tmp_path: Path) -> None:
    layout = cached.write(tmp_path, cached.manifest().assign(domain="east"))
    train(cached.recipe(), layout)
    head = (layout.model / "head.safetensors").read_bytes()
    train(cached.adapting(), layout)
    assert (layout.model / "head.safetensors").read_bytes() == head
    assert model(layout)["adaptation"] is None
    assert "no row of west has come yet" in str(model(layout)["reason"])
    evaluate(cached.adapting(), layout)
    summary = (layout.evidence / "summary.md").read_text()
    assert "measured on the source domains" in summary
    assert "Not adapted: no row of west has come yet" in summary


def test_where_nothing_has_moved_the_sources_head_is_kept_to_the_bit(tmp_path: Path) -> None:
    layout, _ = cached.shifted(tmp_path)
    features = np.load(layout.features / "features.npy")
    west = (cached.manifest()["domain"] == "west").to_numpy()
    features[west] = (features[west] - 4) / 1.5
    np.save(layout.features / "features.npy", features)
    train(cached.adapting(), layout)
    assert model(layout)["adaptation"] == "source_only"
    assert "nothing to mend" in str(model(layout)["reason"])
    head, source = ((layout.model / f"{name}.safetensors").read_bytes() for name in ("head", "source"))
    assert head == source
    train(cached.adapting(adaptation="coral"), layout)
    assert model(layout)["reason"] == "named in the recipe"


def given_back(layout: Layout, truth: pd.DataFrame, count: int, flipped: bool = False) -> None:
    """The labels of ``count`` training rows of the target are left in the manifest."""
    path = layout.manifest / "manifest.parquet"
    table = pd.read_parquet(path).set_index("id")
    labels = truth.set_index("id")["label"]
    rows = [row for row in labels.index if table.at[row, "split"] == "train"][:count]
    table.loc[rows, "label"] = labels[rows].map({"no": "yes", "yes": "no"}) if flipped else labels[rows]
    table.reset_index().to_parquet(path, index=False)
    described = json.loads((layout.features / "features.json").read_text())
    described["manifest_sha256"] = sha256_of(path)
    (layout.features / "features.json").write_text(json.dumps(described))


def test_a_few_labels_of_the_target_are_learned_from_and_never_predicted(tmp_path: Path) -> None:
    layout, truth = cached.shifted(tmp_path)
    train(cached.adapting(adaptation="consensus"), layout)
    before = (layout.model / "head.safetensors").read_bytes()
    source = (layout.model / "source.safetensors").read_bytes()
    given_back(layout, truth, 10)
    train(cached.adapting(adaptation="consensus"), layout)
    assert (layout.model / "head.safetensors").read_bytes() != before
    assert (layout.model / "source.safetensors").read_bytes() == source
    assert set(pd.read_parquet(layout.model / "predictions.parquet")["split"]) == {"val", "test"}


@pytest.mark.parametrize(("way", "held"), [("consensus", True), ("standardisation", False)])
def test_what_follows_the_sources_head_is_held_back_as_much_as_it_is(
    tmp_path: Path, way: str, held: bool
) -> None:
    layout, _ = cached.shifted(tmp_path)
    sizes = {}
    for l2 in (10.0, adaptation.PENALTY, adaptation.PENALTY / 100):
        train(cached.adapting(adaptation=way, l2=[l2]), layout)
        sizes[l2] = np.abs(Head.load(layout.model / "head.safetensors").weight).sum()
    assert (sizes[10.0] < sizes[adaptation.PENALTY] / 2) == held
    assert sizes[adaptation.PENALTY / 100] == sizes[adaptation.PENALTY]


def test_enough_labels_of_the_target_choose_the_way(tmp_path: Path) -> None:
    layout, truth = cached.shifted(tmp_path)
    given_back(layout, truth, 29)
    train(cached.adapting(), layout)
    assert "so it is lost" in str(model(layout)["reason"])
    # Labels that are all wrong make the head that is lost the best of all: it is right on the others.
    given_back(layout, truth, 40, flipped=True)
    train(cached.adapting(), layout)
    assert model(layout)["adaptation"] != "information_maximisation"
    assert "of 40 labelled target rows, information_maximisation on" in str(model(layout)["reason"])
