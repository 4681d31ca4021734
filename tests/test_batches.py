"""Data in batches: they join the source's rows in one manifest, and no earlier row moves for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from headstart import batches
from headstart.layout import Layout
from headstart.recipe import Recipe
from headstart.validation import ALIEN, TIES, validate
from tests import cached, examples

TEXTS: dict[str, Any] = {"adapter": "table", "columns": {"text": "body", "label": "mood", "domain": "shop"}}


def recipe(**changes: Any) -> Recipe:
    return cached.recipe(validate=TEXTS | changes)


def source(root: Path, rows: int = 240) -> Layout:
    layout = Layout(root, "case")
    examples.write_texts(layout.raw / "t.csv", rows)
    return layout


def add(layout: Layout, name: str, text: str | None = None, kind: str = "rows") -> Path:
    """A batch as the inbox leaves it."""
    folder = layout.batches / name
    folder.mkdir(parents=True)
    about = {"number": len(list(layout.batches.iterdir())), "kind": kind}
    (folder / ".batch.json").write_text(json.dumps(about))
    if text is not None:
        (folder / "t.csv").write_text(text)
    return folder


def written(layout: Layout, name: str = "manifest") -> pd.DataFrame:
    return pd.read_parquet(layout.manifest / f"{name}.parquet")


def keep_splits(layout: Layout) -> None:
    written(layout)[["id", "split"]].to_parquet(layout.raw / ".splits.parquet", index=False)


def test_rows_of_batches_follow_those_of_the_source_and_say_where_they_came_from(tmp_path: Path) -> None:
    layout = source(tmp_path)
    for name, start in (("tuesday", 300), ("monday", 240)):
        examples.write_texts(add(layout, name) / "t.csv", 60, start=start)
    assert batches.names(layout) == ["tuesday", "monday"]  # in the order they came
    validate(recipe(), layout)
    assert written(layout)["batch"].value_counts().to_dict() == {"": 240, "tuesday": 60, "monday": 60}
    rows = batches.read(layout, "monday", recipe().validate_)
    assert set(rows["text"]) == set(written(layout).query("batch == 'monday'")["text"])


def test_pictures_of_a_batch_are_named_by_their_path_beside_the_sources(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    examples.write_images(layout.raw, 30)
    examples.write_images(add(layout, "night"), 10, seed=1)
    validate(cached.recipe(validate={"adapter": "image_folder"}), layout)
    rows = written(layout)
    night = rows[rows["batch"] == "night"]
    assert len(night) == 20 and len(rows) == 80
    assert night["path"].str.startswith(".batches/night/").all()
    assert all((layout.raw / path).is_file() for path in night["path"])
    assert (night["id"] == night["path"]).all()


def test_no_earlier_row_changes_its_id_or_split_when_batches_come(tmp_path: Path) -> None:
    layout = source(tmp_path)
    validate(recipe(), layout)
    before = written(layout).set_index("id")[["split", "text", "label"]]
    for number in range(3):
        keep_splits(layout)
        batch = add(layout, f"batch-{number}") / "t.csv"
        examples.write_texts(batch, 120, start=240 + 120 * number)
        if number == 1:  # what the source has, and what the first batch has, under other labels too
            old = [*(layout.raw / "t.csv").read_text().splitlines()[1:41]]
            old += (layout.batches / "batch-0/t.csv").read_text().splitlines()[1:41]
            swapped = [line.replace(",unhappy,", ",sad,").replace(",happy,", ",unhappy,") for line in old]
            batch.write_text("\n".join(["body,mood,shop", *swapped, *old]).replace(",sad,", ",happy,") + "\n")
        validate(recipe(), layout)
        after = written(layout).set_index("id")
        assert after.loc[before.index, ["split", "text", "label"]].equals(before)
        assert after.groupby("text")["split"].nunique().max() == 1
        before = after[["split", "text", "label"]]
    assert len(before) == 240 + 120 + 160 + 120
    assert set(before["split"].iloc[-120:]) == {"train", "val", "test"}


def test_a_newcomer_that_would_tie_a_test_row_to_a_train_row_is_left_out(tmp_path: Path) -> None:
    layout = source(tmp_path)
    start = "once upon a time there was a very long story of a king a queen a cook a thief"
    alike = [f"{start} his wife and her", f"{start} his wife"]  # each a near-duplicate of the one between
    ends = [f"{alike[0]} lover and a dog", start]
    with (layout.raw / "t.csv").open("a") as file:
        file.writelines(f"{text},happy,a\n" for text in ends)
    validate(recipe(), layout)
    table = written(layout).set_index("text")
    moved = table["split"].copy()
    moved[ends[0]], moved[ends[1]] = "test", "train"
    pd.DataFrame({"id": table["id"], "split": moved}).to_parquet(layout.raw / ".splits.parquet", index=False)
    add(layout, "later", "body,mood,shop\n" + "".join(f"{text},happy,a\n" for text in alike))
    validate(recipe(), layout)
    after = written(layout).set_index("text")
    assert after.loc[table.index, "split"].equals(moved)
    assert set(written(layout, "left_out")["reason"]) == {TIES}
    assert len(written(layout, "left_out")) == 1
    assert after.index.isin(alike).sum() == 1
    assert after.groupby("group")["split"].nunique().max() == 1


def test_batches_join_splits_that_the_source_gives(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    for seed, split in enumerate(("train", "test")):
        examples.write_images(layout.raw / split, 30, seed=seed)
    options = cached.recipe(validate={"adapter": "image_folder"})
    validate(options, layout)
    before = written(layout).set_index("id")["split"]
    assert set(before) == {"train", "val", "test"}  # validation rows are cut from train
    keep_splits(layout)
    examples.write_images(add(layout, "plain"), 20, seed=2)
    batch = add(layout, "split")
    for seed, split in enumerate(("train", "val", "test"), 3):
        examples.write_images(batch / split, 10, seed=seed)
    old = before.index[before == "test"][0]
    shutil.copy(layout.raw / old, layout.batches / "split/train/dark/again.png")
    validate(options, layout)
    rows = written(layout).set_index("id")
    assert rows.loc[before.index, "split"].equals(before)
    # Dealt to where the shares ask for them: half of the source is test already.
    assert set(rows.loc[rows["batch"] == "plain", "split"]) == {"train"}
    given = rows[rows["batch"] == "split"]
    assert given.index.str.split("/").str[2].tolist() == given["split"].tolist()
    assert list(written(layout, "left_out")["reason"]) == [TIES]


@pytest.mark.parametrize(
    "given", [("test",), ("train",), ("val",), ("train", "val"), ("train", "test")], ids=" and ".join
)
@pytest.mark.parametrize("split", [False, True], ids=["dealt source", "split source"])
def test_a_batch_that_brings_some_of_the_splits_keeps_them(
    given: tuple[str, ...], split: bool, tmp_path: Path
) -> None:
    layout = Layout(tmp_path, "case")
    for seed, folder in enumerate(("train", "test") if split else (".",), 7):
        examples.write_images(layout.raw / folder, 30, seed=seed)
    options = cached.recipe(validate={"adapter": "image_folder"})
    validate(options, layout)
    before = written(layout).set_index("id")["split"]
    keep_splits(layout)
    batch = add(layout, "more")
    for seed, name in enumerate(given):
        examples.write_images(batch / name, 10, seed=seed)
    for _ in range(2):  # also once they are known
        validate(options, layout)
        rows = written(layout).set_index("id")
        assert rows.loc[before.index, "split"].equals(before)
        more = rows[rows["batch"] == "more"]
        assert more["split"].value_counts().to_dict() == dict.fromkeys(given, 20)
        assert more.index.str.split("/").str[2].tolist() == more["split"].tolist()
        keep_splits(layout)


def test_a_batch_does_not_train_on_what_was_the_test_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    examples.write_images(layout.raw, 30)
    options = cached.recipe(validate={"adapter": "image_folder"})
    validate(options, layout)
    rows = written(layout)
    rows[["id", "split", "digest"]].to_parquet(layout.raw / ".splits.parquet", index=False)
    batch = add(layout, "again")
    examples.write_images(batch / "train", 10, seed=1)
    for path in rows.loc[rows["split"] == "test", "path"]:
        (layout.raw / path).rename(batch / "train" / f"{path.replace('/', '/was-')}")
    validate(options, layout)
    again = written(layout).query("batch == 'again'")
    was = again["id"].str.contains("was-")
    assert set(again.loc[was, "split"]) == {"test"}
    assert set(again.loc[~was, "split"]) == {"train"}


def test_a_group_does_not_move_for_a_row_that_comes_back_into_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    rows = [
        f"{i},text {i} is of {i * 7919 % 1009} words,{'no' if i % 2 else 'yes'},g{i // 4}" for i in range(200)
    ]
    layout.raw.mkdir(parents=True)
    table = layout.raw / "t.csv"
    table.write_text("\n".join(["id,text,label,group", *rows]) + "\n")
    options = cached.recipe(validate={"adapter": "table", "columns": {"id": "id", "group": "group"}})
    validate(options, layout)
    known = written(layout).set_index("id")
    known.reset_index()[["id", "split", "digest"]].to_parquet(layout.raw / ".splits.parquet", index=False)
    tested = int(known.index[known["split"] == "test"][0])
    group = known.loc[known["split"] == "train", "group"].iloc[0]
    back = rows.pop(tested).split(",")
    table.write_text("\n".join(["id,text,label,group", *rows]) + "\n")
    add(layout, "back", f"id,text,label,group\nnew,{back[1]},{back[2]},{group}\n")
    validate(options, layout)
    after = written(layout).set_index("id")["split"]
    earlier = known["split"].drop(str(tested))
    assert after[earlier.index].equals(earlier)


def test_groups_in_a_tables_own_column_are_the_same_everywhere(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    rows = [
        f"text number {i} is of {i * 7919 % 1009} words,{'no' if i % 2 else 'yes'},g{i // 4}"
        for i in range(400)
    ]
    layout.raw.mkdir(parents=True)
    (layout.raw / "t.csv").write_text("\n".join(["text,label,group", *rows[:200]]) + "\n")
    again = [row.replace("text", "tale") for row in rows[100:300]]  # half of these groups are known
    add(layout, "more", "\n".join(["text,label,group", *again]) + "\n")
    validate(cached.recipe(validate={"adapter": "table", "columns": {"group": "group"}}), layout)
    found = written(layout).groupby("group")
    assert found["split"].nunique().max() == 1
    assert (found["batch"].nunique() == 2).sum() == 25


def test_groups_by_position_are_of_one_batch_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    for folder in (layout.raw, add(layout, "one"), add(layout, "two")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "labels.csv").write_text("".join(f"images/{i}.png {i % 2}.0 mono\n" for i in range(150)))
    rows = batches.everything(layout, recipe(adapter="elpv").validate_)
    groups = [set(rows.loc[rows["batch"] == name, "group"]) for name in ("", "one", "two")]
    assert [len(group) for group in groups] == [3, 3, 3]
    assert len(set.union(*groups)) == 9
    assert (rows.loc[rows["batch"] == "one", "path"].str.startswith(".batches/one/images/")).all()


def test_rows_without_a_label_are_left_out_until_their_labels_come(tmp_path: Path) -> None:
    layout = source(tmp_path)
    examples.write_texts(add(layout, "blank") / "t.csv", 60, start=240)
    whole = pd.read_csv(layout.batches / "blank/t.csv")
    whole.assign(mood="").to_csv(layout.batches / "blank/t.csv", index=False)
    validate(recipe(), layout)
    left_out = written(layout, "left_out")
    assert (left_out["reason"] == "no label").all() and len(left_out) == 60
    keep_splits(layout)
    moods = left_out.merge(whole, left_on="value", right_on="body")
    late = moods[["id", "mood"]].rename(columns={"mood": "label"}).head(40)
    add(layout, "late", late.to_csv(index=False), "labels")
    assert (batches.names(layout), batches.names(layout, "labels")) == (["blank"], ["late"])
    validate(recipe(), layout)
    rows = written(layout).set_index("id")
    assert rows.loc[late["id"], "label"].tolist() == late["label"].tolist()
    assert set(rows.loc[late["id"], "batch"]) == {"blank"}
    assert len(written(layout, "left_out")) == 20


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_late_labels_of_pictures_may_name_the_path_within_the_batch(suffix: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    examples.write_images(layout.raw, 30)
    batch = add(layout, "bare")
    examples.write_images(tmp_path / "more", 5, seed=1)
    for i, picture in enumerate(sorted((tmp_path / "more").rglob("*.png"))):
        shutil.copy(picture, batch / f"{i}.png")
    late = pd.DataFrame({"id": ["0.png", ".batches/bare/9.png"], "label": ["dark", "light"]})
    file = add(layout, "late", kind="labels") / f"labels{suffix}"
    write = {".csv": late.to_csv, ".parquet": late.to_parquet, ".jsonl": late.to_json}[suffix]
    write(file, **({"orient": "records", "lines": True} if suffix == ".jsonl" else {"index": False}))
    validate(cached.recipe(validate={"adapter": "image_folder"}), layout)
    rows = written(layout).query("batch == 'bare'")
    assert rows.set_index("id")["label"].to_dict() == {
        ".batches/bare/0.png": "dark",
        ".batches/bare/9.png": "light",
    }
    assert written(layout, "left_out")["reason"].tolist() == ["no label"] * 8


def test_the_target_may_come_later_and_its_late_labels_are_put_aside(tmp_path: Path) -> None:
    layout = source(tmp_path)
    everything = pd.read_csv(layout.raw / "t.csv")
    everything[everything["shop"] == "a"].to_csv(layout.raw / "t.csv", index=False)
    options = cached.recipe(
        validate=TEXTS | {"target_domain": "b", "source_domains": ["a"]},
        train={"method": "domain_adaptation"},
    )
    validate(options, layout)
    assert set(written(layout)["domain"]) == {"a"}
    assert pd.read_parquet(layout.truth / "labels.parquet").empty
    keep_splits(layout)
    before = written(layout).set_index("id")["split"]
    target = everything[everything["shop"] == "b"]
    other = target.head(8).assign(shop="c")
    add(layout, "b", pd.concat([target.assign(mood=""), other]).to_csv(index=False))
    validate(options, layout)
    rows = written(layout).set_index("id")
    assert rows.loc[before.index, "split"].equals(before)
    arrived = rows[rows["domain"] == "b"]
    assert len(arrived) == len(target) and set(arrived["label"]) == {""}
    assert set(arrived["split"]) == {"train", "val", "test"}
    assert set(written(layout, "left_out")["reason"]) == {ALIEN}
    assert pd.read_parquet(layout.truth / "labels.parquet").empty
    manifest = (layout.manifest / "manifest.parquet").read_bytes()
    moods = arrived.reset_index().merge(target, left_on="text", right_on="body")
    late = moods[["id", "mood"]].rename(columns={"mood": "label"})
    add(layout, "late", late.to_csv(index=False), "labels")
    validate(options, layout)
    truth = pd.read_parquet(layout.truth / "labels.parquet")
    pd.testing.assert_frame_equal(truth, late.sort_values("id", ignore_index=True).astype("str"))
    # Nothing that training reads has changed.
    assert (layout.manifest / "manifest.parquet").read_bytes() == manifest
