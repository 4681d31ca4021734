from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from headstart import splits, validation
from headstart.errors import HeadstartError
from headstart.layout import Layout
from headstart.recipe import Recipe
from headstart.validation import validate
from tests import cached, examples

TEXTS: dict[str, Any] = {"adapter": "table", "columns": {"text": "body", "label": "mood", "domain": "shop"}}
PICTURES: dict[str, Any] = {"adapter": "image_folder"}


def recipe(block: dict[str, Any], **changes: Any) -> Recipe:
    return cached.recipe(validate=block | changes)


def texts(root: Path, rows: int = 240) -> Layout:
    layout = Layout(root, "case")
    examples.write_texts(layout.raw / "t.csv", rows)
    return layout


def pictures(root: Path, per_class: int = 30) -> Layout:
    layout = Layout(root, "case")
    examples.write_images(layout.raw, per_class)
    return layout


def lines(layout: Layout) -> list[str]:
    return (layout.raw / "t.csv").read_text().splitlines()


def rewrite(layout: Layout, lines: list[str]) -> None:
    (layout.raw / "t.csv").write_text("\n".join(lines) + "\n")


def written(layout: Layout, name: str = "manifest") -> pd.DataFrame:
    return pd.read_parquet(layout.manifest / f"{name}.parquet")


def report(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((layout.manifest / "report.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def keep_splits(layout: Layout) -> None:
    """What ingest does before a new snapshot."""
    written(layout)[["id", "split"]].to_parquet(layout.raw / ".splits.parquet", index=False)


def refused(recipe: Recipe, layout: Layout) -> pd.DataFrame:
    """The failures of data that must be refused, from the file that holds all of them."""
    with pytest.raises(HeadstartError, match="not fit to train on") as caught:
        validate(recipe, layout)
    path = layout.work / "failures.parquet"
    assert str(path) in caught.value.where
    assert not layout.manifest.parent.exists()
    failures = pd.read_parquet(path)
    assert list(failures) == ["rule", "id", "value", "do"]
    assert failures["do"].str.len().min() > 0
    shown = str(caught.value)
    for rule, cases in failures.groupby("rule"):
        assert f"{rule}: {len(cases)} failure" in shown
    return failures


# The manifest


def test_texts_become_a_manifest_as_the_reference_describes_it(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    validate(recipe(TEXTS), layout)
    assert set(contents(layout.manifest)) == {
        "manifest.parquet",
        "left_out.parquet",
        "repaired.parquet",
        "report.json",
    }
    table = written(layout)
    assert {name: str(kind) for name, kind in table.dtypes.items()} == {
        "id": "str",
        "text": "str",
        "label": "str",
        "confidence": "float32",
        "weight": "float32",
        "domain": "str",
        "group": "str",
        "split": "str",
        "digest": "str",
        "batch": "str",
    }
    assert len(table) == 240
    assert table["id"].is_monotonic_increasing
    assert table["id"].is_unique
    assert set(table["label"]) == {"happy", "unhappy"}
    assert set(table["domain"]) == {"a", "b"}
    assert table["digest"].str.fullmatch(r"[0-9a-f]{64}").all()
    assert table.groupby("group")["split"].nunique().max() == 1
    assert list(written(layout, "left_out")) == ["id", "reason", "value"]
    assert list(written(layout, "repaired")) == ["id", "before", "after"]


def test_pictures_become_a_manifest_with_the_digest_of_their_bytes(tmp_path: Path) -> None:
    import hashlib

    layout = pictures(tmp_path)
    validate(recipe(PICTURES), layout)
    table = written(layout)
    assert list(table)[:2] == ["id", "path"]
    assert list(table["id"]) == list(table["path"])
    assert table["digest"][0] == hashlib.sha256((layout.raw / table["path"][0]).read_bytes()).hexdigest()
    assert set(table["domain"]) == {"all"}
    assert report(layout)["modes"] == {"RGB": 60}


def test_the_report_counts_what_is_in_the_files(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    rewrite(layout, [*lines(layout), lines(layout)[1], "no label here,,a", "a cafÃ© of moods,happy,b"])
    validate(recipe(TEXTS), layout)
    table, counted = written(layout), report(layout)
    assert counted["rows"] == len(table) == 242
    assert counted["by_split"] == table["split"].value_counts().sort_index().to_dict()
    for by in ("label", "domain"):
        sizes = table.groupby(["split", by]).size()
        assert counted[f"by_split_and_{by}"] == {"/".join(key): n for key, n in sizes.items()}  # type: ignore[arg-type]
    assert counted["groups"] == table["group"].nunique() == 241
    assert (counted["duplicate_pairs"], counted["near_duplicate_pairs"]) == (1, 0)
    assert counted["left_out"] == {"no label": 1}
    assert written(layout, "left_out")[["reason", "value"]].to_numpy().tolist() == [
        ["no label", "no label here"]
    ]
    assert counted["repaired"] == 1
    repaired = written(layout, "repaired")
    assert repaired[["before", "after"]].to_numpy().tolist() == [["a cafÃ© of moods", "a café of moods"]]
    assert repaired["id"][0] == table.set_index("text")["id"]["a café of moods"]


def test_the_soft_labels_weights_and_modules_of_solar_cells_reach_the_manifest(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    doubts = ["1.0", "0.6666666666666666", "0.3333333333333333", "0.0"]
    listed = []
    for i in range(600):
        listed.append(f"{i}.png {doubts[i * 7 % 4]} {'mono' if i < 360 else 'poly'}")
        noise = np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(noise).save(layout.raw / f"{i}.png")
    (layout.raw / "labels.csv").write_text("\n".join(listed))
    validate(recipe({"adapter": "elpv"}), layout)
    table = written(layout)
    assert table["group"].nunique() == 10
    assert table.groupby("group")["split"].nunique().max() == 1
    found = table.groupby(["label", "confidence"])["weight"].unique()
    assert {key: [round(float(w), 2) for w in weights] for key, weights in found.items()} == {
        ("defective", np.float32(2 / 3)): [0.67],
        ("defective", np.float32(1)): [1.0],
        ("functional", np.float32(2 / 3)): [0.33],
        ("functional", np.float32(1)): [1.0],
    }


# The same in, the same out


@pytest.mark.parametrize("kind", ["texts", "pictures"])
def test_the_same_data_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    for place in ("one", "two"):
        layout = texts(tmp_path / place) if kind == "texts" else pictures(tmp_path / place)
        validate(recipe(TEXTS if kind == "texts" else PICTURES), layout)
    assert contents(tmp_path / "one/manifest/case") == contents(tmp_path / "two/manifest/case")


def test_the_order_of_the_rows_changes_nothing(tmp_path: Path) -> None:
    one, two = texts(tmp_path / "one"), texts(tmp_path / "two")
    header, *rows = [
        *lines(one),
        "the same words,happy,a",
        "the same words,unhappy,a",
        "no mood,,b",
        "no mood,,a",
    ]
    rewrite(one, [header, *rows])
    rewrite(two, [header, *reversed(rows)])
    for layout in (one, two):
        validate(recipe(TEXTS), layout)
    assert contents(one.manifest) == contents(two.manifest)
    assert report(one)["duplicates_with_another_label"] == 1


def test_an_id_does_not_depend_on_the_label_nor_on_the_rows_before(tmp_path: Path) -> None:
    one, two = texts(tmp_path / "one"), texts(tmp_path / "two")
    header, first, *rest = lines(two)
    assert ",happy," in first
    rewrite(two, [header, "a new row,happy,a", first.replace(",happy,", ",unhappy,"), *rest])
    for layout in (one, two):
        validate(recipe(TEXTS), layout)
    assert set(written(two)["id"]) > set(written(one)["id"])


# Splits


def test_more_rows_never_move_an_earlier_one(tmp_path: Path) -> None:
    layout = texts(tmp_path, 240)
    validate(recipe(TEXTS), layout)
    before = written(layout).set_index("id")["split"]
    keep_splits(layout)
    examples.write_texts(layout.raw / "t.csv", 480)
    validate(recipe(TEXTS), layout)
    after = written(layout).set_index("id")["split"]
    assert after[before.index].equals(before)
    assert report(layout)["by_split"] == {"test": 96, "train": 288, "val": 96}


def test_a_picture_that_moves_to_another_folder_keeps_its_split(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    validate(recipe(PICTURES), layout)
    before = written(layout).set_index("id")["split"]
    written(layout)[["id", "split", "digest"]].to_parquet(layout.raw / ".splits.parquet", index=False)
    (layout.raw / "dark").rename(layout.raw / "dim")
    tested = next(row for row in before.index[before == "test"] if row.startswith("light"))
    (layout.raw / tested).rename(layout.raw / "dim/was-light.png")  # its label was wrong
    validate(recipe(PICTURES), layout)
    after = written(layout).set_index("id")["split"]
    assert after["dim/was-light.png"] == "test"
    dark = before[before.index.str.startswith("dark")]
    assert after[dark.index.str.replace("dark", "dim")].tolist() == dark.tolist()


def test_content_that_had_several_splits_keeps_the_most_protected(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    validate(recipe(PICTURES), layout)
    rows = written(layout)[["id", "split", "digest"]].head(2)
    gone = pd.concat([rows.assign(id=rows["id"] + split, split=split) for split in ("val", "test", "train")])
    gone.to_parquet(layout.raw / ".splits.parquet", index=False)
    validate(recipe(PICTURES), layout)
    assert set(written(layout).set_index("id").loc[rows["id"], "split"]) == {"test"}


def test_a_newcomer_that_ties_a_test_row_to_a_train_row_moves_only_the_train_row(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    start = "once upon a time there was a very long story of a king a queen a cook a thief"
    alike = [f"{start} his wife and her", f"{start} his wife"]  # each a near-duplicate of the one between
    ends = [f"{alike[0]} lover and a dog", start]
    rewrite(layout, [*lines(layout), f"{ends[0]},happy,a", f"{ends[1]},happy,a"])
    validate(recipe(TEXTS), layout)
    table = written(layout).set_index("text")
    assert report(layout)["near_duplicate_pairs"] == 0
    moved = table["split"].copy()
    moved[ends[0]], moved[ends[1]] = "test", "train"
    earlier = pd.DataFrame({"id": table["id"], "split": moved})
    earlier.to_parquet(layout.raw / ".splits.parquet", index=False)
    rewrite(layout, [*lines(layout), *(f"{text},happy,a" for text in alike)])
    validate(recipe(TEXTS), layout)
    after = written(layout).set_index("text")
    assert set(after.loc[[*ends, *alike], "split"]) == {"test"}
    assert after.loc[[*ends, *alike], "group"].nunique() == 1
    others = table.index.difference(ends)
    assert after.loc[others, "split"].equals(moved[others])


def test_copies_share_a_split_even_under_another_label_and_are_counted(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    shutil.copy(layout.raw / "dark/000.png", layout.raw / "light/copy.png")
    Image.open(layout.raw / "dark/001.png").point(lambda v: int(v * 0.9)).save(layout.raw / "dark/darker.png")
    validate(recipe(PICTURES), layout)
    table, counted = written(layout).set_index("id"), report(layout)
    assert table["group"]["light/copy.png"] == table["group"]["dark/000.png"]
    assert table["group"]["dark/darker.png"] == table["group"]["dark/001.png"]
    assert (counted["duplicate_pairs"], counted["near_duplicate_pairs"]) == (1, 1)
    assert counted["duplicates_with_another_label"] == 1


def test_near_duplicates_may_be_ignored_but_copies_may_not(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    first = lines(layout)[1].split(",")[0]
    rewrite(layout, [*lines(layout), f"{first.upper()}!,happy,a", f"rt my friend {first},happy,a"])
    groups = {}
    for near in (True, False):
        validate(recipe(TEXTS, near_duplicates=near), layout)
        groups[near] = report(layout)["groups"]
    assert groups == {True: 240, False: 241}


def folders(root: Path, **counts: int) -> Layout:
    """``train=9`` puts nine pictures of each class into the folder train."""
    layout = Layout(root, "case")
    for seed, (split, count) in enumerate(counts.items()):
        examples.write_images(layout.raw / split, count, seed=seed)
    return layout


def test_splits_that_the_data_give_stay_and_copies_leave_the_less_protected_one(tmp_path: Path) -> None:
    layout = folders(tmp_path, train=20, valid=8, test=7)
    shutil.copy(layout.raw / "test/dark/000.png", layout.raw / "train/dark/leak.png")
    shutil.copy(layout.raw / "test/dark/001.png", layout.raw / "valid/dark/leak.png")
    validate(recipe(PICTURES), layout)
    assert report(layout)["by_split"] == {"test": 14, "train": 40, "val": 16}
    table = written(layout)
    folder = table["path"].str.split("/").str[0]
    assert (table["split"] == folder.replace("valid", "val")).all()
    left_out = written(layout, "left_out").set_index("id")["reason"].to_dict()
    reason = "repeats a row of a more protected split"
    assert left_out == {"train/dark/leak.png": reason, "valid/dark/leak.png": reason}


def test_every_copy_of_a_test_row_leaves_the_other_splits(tmp_path: Path) -> None:
    layout = folders(tmp_path, train=20, val=8)  # of these alone val is the test, and comes later
    for side, count in (("dark", 3), ("light", 1)):
        whole = layout.raw / "val" / side / "000.png"
        for number in range(count):
            shutil.copy(whole, layout.raw / "train" / side / f"0leak{number}.png")
    # Nearly the same as a test row, twice; and as a training row that goes itself, which is no reason.
    for name in ("0pale0", "0pale1"):
        picture = Image.open(layout.raw / "val/dark/001.png")
        picture.point(lambda value: value * 9 // 10).save(layout.raw / "train/dark" / f"{name}.png")
    validate(recipe(PICTURES), layout)
    assert sorted(written(layout, "left_out")["id"]) == [
        "train/dark/0leak0.png",
        "train/dark/0leak1.png",
        "train/dark/0leak2.png",
        "train/dark/0pale0.png",
        "train/dark/0pale1.png",
        "train/light/0leak0.png",
    ]


def test_a_row_that_repeats_only_one_that_goes_stays() -> None:
    # A chain: the test row is nearly the validation row, and that is nearly the training row.
    rank = np.array([splits.PROTECTED[split] for split in ("train", "val", "test")])
    place = np.arange(3)
    known = validation._Known(np.zeros(3, int), place, place, rank, np.ones(3, bool))
    gone = validation._repeats(known, np.array([[0, 1], [1, 2]]))
    assert gone.tolist() == [False, True, False]


def test_with_train_and_val_alone_val_is_the_test_and_validation_is_cut_from_train(tmp_path: Path) -> None:
    layout = folders(tmp_path, train=40, val=10)
    validate(recipe(PICTURES), layout)
    table = written(layout)
    assert (table["path"].str.startswith("val/") == (table["split"] == "test")).all()
    assert report(layout)["by_split"] == {"test": 20, "train": 60, "val": 20}


def test_validation_rows_cut_from_train_stay_when_more_come(tmp_path: Path) -> None:
    layout = folders(tmp_path, train=30, test=8)
    validate(recipe(PICTURES), layout)
    before = written(layout).set_index("id")["split"]
    keep_splits(layout)
    examples.write_images(layout.raw / "train", 60)
    validate(recipe(PICTURES), layout)
    assert written(layout).set_index("id")["split"][before.index].equals(before)
    assert report(layout)["by_split"]["val"] == 30


def test_a_folder_called_train_around_everything_gives_nothing(tmp_path: Path) -> None:
    layout = folders(tmp_path, train=30)
    validate(recipe(PICTURES), layout)
    assert report(layout)["by_split"] == {"test": 12, "train": 36, "val": 12}
    assert set(written(layout)["label"]) == {"dark", "light"}


def test_with_train_alone_all_three_are_cut_from_it(tmp_path: Path) -> None:
    layout = folders(tmp_path, train=30)
    examples.write_images(layout.raw / "unlabelled", 2)
    for file in (layout.raw / "unlabelled").rglob("*.png"):
        file.rename(layout.raw / "unlabelled" / f"{file.parent.name}{file.name}")
    validate(recipe(PICTURES), layout)
    assert report(layout)["by_split"] == {"test": 12, "train": 36, "val": 12}
    assert report(layout)["left_out"] == {"not an image in a class folder": 4}


def test_a_class_that_is_far_off_in_a_split_is_reported(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    header, *rows = lines(layout)
    given = [f"{row},{('train', 'val', 'test', 'train')[i // 2 % 4]}" for i, row in enumerate(rows)]
    block = TEXTS | {"columns": TEXTS["columns"] | {"split": "part"}}
    rewrite(layout, [f"{header},part", *given])
    validate(recipe(block), layout)
    assert report(layout)["far_off"] == []
    scarce = [
        row for i, row in enumerate(given) if not (",unhappy," in row and row.endswith("test") and i % 3)
    ]
    rewrite(layout, [f"{header},part", *scarce])
    validate(recipe(block), layout)
    assert report(layout)["far_off"] == [
        "test: 30 rows of happy, 22 expected",
        "test: 10 rows of unhappy, 18 expected",
    ]


# Rules, each with a bad example


def only(failures: pd.DataFrame, rule: str) -> dict[str, str]:
    assert set(failures["rule"]) == {rule}
    return dict(zip(failures["id"], failures["value"], strict=True))


def test_an_empty_text_is_refused_with_its_row(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    rewrite(layout, [*lines(layout), " ,happy,a"])
    assert only(refused(recipe(TEXTS), layout), "text_not_empty") == {"t.csv, row 241": ""}


def test_an_unknown_label_is_refused_with_its_row(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    rewrite(layout, [*lines(layout), "quite a day,hapy,a"])
    failures = refused(recipe(TEXTS, classes=["happy", "unhappy"]), layout)
    assert only(failures, "known_label") == {"t.csv, row 241": "hapy"}


def test_an_id_that_repeats_is_refused(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    header, *rows = lines(layout)
    rewrite(layout, [f"{header},number", *(f"{row},{max(i, 1)}" for i, row in enumerate(rows))])
    block = TEXTS | {"columns": TEXTS["columns"] | {"id": "number"}}
    assert only(refused(recipe(block), layout), "unique_id") == {"1": "1"}


def test_splits_are_given_for_every_row_or_for_none(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    header, *rows = lines(layout)
    parts = ["holdout", "", *["train", "val", "test"] * 80][:240]
    rewrite(layout, [f"{header},part", *(f"{row},{part}" for row, part in zip(rows, parts, strict=True))])
    block = TEXTS | {"columns": TEXTS["columns"] | {"split": "part"}}
    assert only(refused(recipe(block), layout), "known_split") == {
        "t.csv, row 1": "holdout",
        "t.csv, row 2": "none",
    }


def test_a_group_in_two_of_the_given_splits_is_refused(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    header, *rows = lines(layout)
    given = [
        f"{row},{('train', 'val', 'test')[i // 2 % 3]},document {i // 2 % 120}" for i, row in enumerate(rows)
    ]
    given[0] = given[0].replace("document 0", "document 1")
    rewrite(layout, [f"{header},part,of", *given])
    block = TEXTS | {"columns": TEXTS["columns"] | {"split": "part", "group": "of"}}
    assert only(refused(recipe(block), layout), "group_in_one_split") == {"document 1": "train, val"}


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    shutil.rmtree(layout.raw / "light")
    assert only(refused(recipe(PICTURES), layout), "two_classes") == {"": "every row is 'dark'"}


def test_a_class_with_too_few_rows_in_a_split_is_refused(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    (layout.raw / "odd").mkdir()
    (layout.raw / "dark/000.png").rename(layout.raw / "odd/1.png")
    found = only(refused(recipe(PICTURES), layout), "rows_per_class")
    assert set(found) == {"train, odd", "val, odd", "test, odd"}
    assert sorted(found.values())[-1] == "1 rows of at least 5; groups with this class: 1"


def test_a_class_of_the_recipe_without_any_row_is_refused(tmp_path: Path) -> None:
    failures = refused(recipe(TEXTS, classes=["happy", "unhappy", "so so"]), texts(tmp_path))
    assert set(only(failures, "rows_per_class")) == {"train, so so", "val, so so", "test, so so"}


def test_damaged_and_unsuitable_pictures_are_refused_all_at_once(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    dark = layout.raw / "dark"
    whole = (dark / "000.png").read_bytes()
    (dark / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (dark / "empty.png").touch()
    (dark / "words.jpg").write_bytes(b"not a picture")
    (dark / "bomb.png").write_bytes(whole[:16] + struct.pack(">II", 10**6, 10**6) + whole[24:])
    Image.new("RGB", (1, 1)).save(dark / "pixel.png")
    Image.new("F", (64, 64)).save(dark / "numbers.tiff")
    failures = refused(recipe(PICTURES), layout)
    found = {(case.rule, case.id.removeprefix("dark/")): case.value for case in failures.itertuples()}
    assert set(found) == {
        ("decodes", "truncated.png"),
        ("decodes", "empty.png"),
        ("decodes", "words.jpg"),
        ("decodes", "bomb.png"),
        ("large_enough", "pixel.png"),
        ("known_mode", "numbers.tiff"),
    }
    assert found["decodes", "empty.png"] == "not a picture (0 bytes)"
    assert found["large_enough", "pixel.png"] == "1 x 1"
    assert "0x" not in " ".join(failures["value"])  # an address in memory would differ every time


def test_a_listed_picture_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    (layout.raw / "labels.csv").write_text("gone.png 1.0 mono\nlost.png 0.0 mono\n")
    assert set(only(refused(recipe({"adapter": "elpv"}), layout), "file_exists")) == {"gone.png", "lost.png"}


def test_pictures_of_every_usual_mode_are_fine_and_counted(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (7, 40, 40, 3), dtype=np.uint8)
    scenes = [Image.fromarray(array) for array in noise]
    for scene, mode, name in zip(
        scenes,
        ["CMYK", "P", "L", "LA", "RGBA", "1"],
        ["a.JPG", "b.png", "c.Png", "d.png", "e.png", "f.bmp"],
        strict=False,
    ):
        scene.convert(mode).save(layout.raw / "dark" / name)
    scenes[0].save(layout.raw / "dark/moving.gif", save_all=True, append_images=scenes[1:])
    for i in range(2):  # all brighter than 255, yet not the same picture
        depth = np.random.default_rng(i).integers(256, 65536, (40, 40), dtype=np.uint16)
        Image.fromarray(depth).save(layout.raw / f"dark/{i} of 16 bits.png")
    validate(recipe(PICTURES), layout)
    counted = report(layout)
    assert counted["modes"] == {"1": 1, "CMYK": 1, "I;16": 2, "L": 1, "LA": 1, "P": 2, "RGB": 60, "RGBA": 1}
    assert counted["first_frame_only"] == 1
    assert counted["groups"] == counted["rows"] == 69


@pytest.mark.parametrize(
    ("top", "kind", "do"),
    [
        (255, np.uint16, "save them with 8 bits, or multiply their values by 256"),
        (255, np.int32, "save them with 8 bits, or multiply their values by 256"),
        (4095, np.uint16, "save them with 8 bits, or multiply their values by 16"),
    ],
)
def test_pictures_of_fewer_bits_in_larger_files_are_refused_not_black(
    top: int, kind: type, do: str, tmp_path: Path
) -> None:
    layout = pictures(tmp_path)
    for i in range(3):
        values = np.random.default_rng(i).integers(0, top, (48, 48)).astype(kind)
        values[0, 0] = top - i
        Image.fromarray(values).save(layout.raw / f"dark/deep-{i}.tif")
    found = refused(recipe(PICTURES), layout)
    assert found[["rule", "id", "value", "do"]].to_numpy().tolist() == [
        ["full_range", "", f"values of 3 16-bit pictures end at {top} of 65535", do]
    ]


def test_a_dark_picture_among_others_of_16_bits_is_fine(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    for top in (255, 8192):
        values = np.random.default_rng(top).integers(0, top + 1, (48, 48)).astype(np.uint16)
        values[0, 0] = top
        Image.fromarray(values).save(layout.raw / f"dark/deep-{top}.png")
    validate(recipe(PICTURES), layout)
    assert report(layout)["modes"] == {"I;16": 2, "RGB": 60}


def test_a_picture_turned_by_its_camera_and_the_same_turned_for_good_are_near_duplicates(
    tmp_path: Path,
) -> None:
    layout = pictures(tmp_path)
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    scene = Image.fromarray(small).resize((160, 120))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    scene.save(layout.raw / "dark/camera.jpg", exif=exif)
    scene.transpose(Image.Transpose.ROTATE_270).save(layout.raw / "dark/turned.png")
    validate(recipe(PICTURES), layout)
    assert report(layout)["near_duplicate_pairs"] == 1


ADAPTER = """
import pandas as pd

def rows(raw, options):
    frame = pd.DataFrame({
        "text": [f"text number {i} of many" for i in range(60)],
        "label": [i % 2 for i in range(60)],
        "id": range(60),
    })
    for column, value in CHANGES.items():
        frame[column] = [value] + [1.0] * 59 if column != "label" else [value, *frame["label"][1:]]
    return frame
"""


@pytest.mark.parametrize(
    ("changes", "rule", "value"),
    [
        ("{'confidence': 0.0}", "confidence_in_range", "0.0"),
        ("{'confidence': 1.5}", "confidence_in_range", "1.5"),
        ("{'confidence': 'much'}", "value_missing", "no confidence"),
        ("{'weight': -1.0}", "positive_weight", "-1.0"),
        ("{'weight': float('inf')}", "positive_weight", "inf"),
        ("{'label': None}", "value_missing", "no label"),
        ("{'text': None}", "value_missing", "no text"),
    ],
)
def test_rows_of_ones_own_adapter_obey_the_same_rules(
    changes: str, rule: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "adapter_" + "".join(filter(str.isalnum, changes)).lower()
    (tmp_path / f"{module}.py").write_text(ADAPTER.replace("CHANGES", changes))
    monkeypatch.syspath_prepend(tmp_path)
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    assert only(refused(recipe({"adapter": f"{module}:rows"}), layout), rule) == {"0": value}


def test_numbers_for_labels_and_ids_become_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_of_numbers.py").write_text(ADAPTER.replace("CHANGES", "{}"))
    monkeypatch.syspath_prepend(tmp_path)
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    validate(recipe({"adapter": "adapter_of_numbers:rows", "near_duplicates": False}), layout)
    assert set(written(layout)["label"]) == {"0", "1"}
    assert "59" in set(written(layout)["id"])


def test_a_gap_does_not_turn_the_names_of_classes_into_fractions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap = "frame.assign(label=frame['label'].astype(float), left_out=['no label'] + [None] * 59)"
    module = ADAPTER.replace("CHANGES", "{'label': None}").replace("return frame", f"return {gap}")
    (tmp_path / "adapter_with_a_gap.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    validate(recipe({"adapter": "adapter_with_a_gap:rows", "near_duplicates": False}), layout)
    assert set(written(layout)["label"]) == {"0", "1"}


def test_a_class_that_is_1_here_and_1_0_there_is_refused(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    swapped = [line.replace(",unhappy,", ",1,").replace(",happy,", ",0,") for line in lines(layout)]
    rewrite(layout, [*swapped, "a word,1.0,a", "another,v1,a", "a third,v1.0,a"])
    found = refused(recipe(TEXTS, min_rows_per_class=1), layout)
    assert found[["rule", "value"]].to_numpy().tolist() == [["one_spelling", "1 and 1.0"]]
    with pytest.raises(HeadstartError) as caught:  # for want of rows alone
        validate(recipe(TEXTS, classes=["0", "1", "1.0", "v1", "v1.0"]), layout)
    assert "one_spelling" not in str(caught.value)


def test_a_row_without_a_group_does_not_join_the_group_of_its_number(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    header, *rows = lines(layout)
    rewrite(
        layout, [f"{header},n,of", *(f"{row},{i},{'' if i % 2 else i + 1}" for i, row in enumerate(rows))]
    )
    block = TEXTS | {"columns": TEXTS["columns"] | {"id": "n", "group": "of"}}
    validate(recipe(block), layout)
    assert report(layout)["groups"] == 240


# Failing well


def test_the_error_shows_twenty_failures_a_rule_on_one_screen_and_the_file_all(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    rewrite(
        layout, [*lines(layout), *([f",happy,{'x' * 500}"] * 50), *[f"very {i},cross,a" for i in range(30)]]
    )
    block = recipe(TEXTS, classes=["happy", "unhappy"])
    failures = refused(block, layout)
    assert failures["rule"].value_counts().to_dict() == {"text_not_empty": 50, "known_label": 30}
    with pytest.raises(HeadstartError) as caught:
        validate(block, layout)
    table = list(caught.value.table)
    assert table[0] == "known_label: 30 failures; correct the label, or add it to validate.classes"
    assert table[1] == "  t.csv, row 291: cross"
    assert table[21] == "  ... and 10 more"
    assert table[22].startswith("text_not_empty: 50 failures")
    assert table[-1] == "  ... and 30 more"
    assert max(map(len, table)) <= 130


def test_a_value_of_many_lines_takes_one_line_of_the_table(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    rewrite(layout, [*lines(layout), 'good,"very\n\n\tcross",a'])
    with pytest.raises(HeadstartError) as caught:
        validate(recipe(TEXTS, classes=["happy", "unhappy"]), layout)
    assert list(caught.value.table)[1:] == ["  t.csv, row 241: very cross"]


def test_refused_data_leave_the_earlier_manifest_as_it_was(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    validate(recipe(TEXTS), layout)
    before = contents(layout.manifest)
    rewrite(layout, [*lines(layout), " ,happy,a"])
    with pytest.raises(HeadstartError):
        validate(recipe(TEXTS), layout)
    assert contents(layout.manifest) == before
    assert [path.name for path in layout.manifest.parent.iterdir()] == ["case"]


def test_a_failure_while_writing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = texts(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(HeadstartError, match="could not write case: No space left"):
        validate(recipe(TEXTS), layout)
    assert list(layout.manifest.parent.iterdir()) == []


def test_data_without_any_usable_row_say_why(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    rewrite(layout, ["body,mood,shop", *(f"text {i},,a" for i in range(9))])
    with pytest.raises(HeadstartError, match="no row is usable") as caught:
        validate(recipe(TEXTS), layout)
    assert list(caught.value.table) == ["9 rows: no label"]


def test_texts_that_are_all_one_template_are_refused_with_the_number_of_groups(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    story = "the quick brown fox jumps over the lazy dog and then sleeps all day number"
    rewrite(layout, ["body,mood,shop", *(f"{story} {i},{('happy', 'unhappy')[i % 2]},a" for i in range(99))])
    found = only(refused(recipe(TEXTS), layout), "rows_per_class")
    assert set(found.values()) == {"0 rows of at least 5; groups with this class: 1"}
    validate(recipe(TEXTS, near_duplicates=False), layout)
    assert report(layout)["groups"] == 99


# A target domain, whose labels are put aside.

ADAPTING = {"method": "domain_adaptation"}


def adapting(**changes: Any) -> Recipe:
    return cached.recipe(validate=TEXTS | {"target_domain": "b"} | changes, train=ADAPTING)


def test_labels_of_the_target_are_put_aside(tmp_path: Path) -> None:
    layout, open_layout = texts(tmp_path / "one"), texts(tmp_path / "two")
    validate(adapting(), layout)
    validate(recipe(TEXTS), open_layout)
    table, whole = written(layout), written(open_layout)
    target = (table["domain"] == "b").to_numpy()
    assert 0 < target.sum() < len(table)
    assert (table.loc[target, "label"] == "").all()
    assert set(table.loc[~target, "label"]) == {"happy", "unhappy"}
    truth = pd.read_parquet(layout.truth / "labels.parquet")
    expected = whole.loc[whole["domain"] == "b", ["id", "label"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(truth, expected)
    assert set(table.loc[target, "split"]) == {"train", "val", "test"}
    assert pd.read_parquet(open_layout.truth / "labels.parquet").empty


def test_as_many_labels_of_the_target_as_the_recipe_asks_for_are_left_to_training(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    seen: set[str] = set()
    for count in (0, 5, 12, 10_000):
        validate(adapting(target_labels=count), layout)
        target = written(layout).query("domain == 'b'")
        kept = target[target["label"] != ""]
        training = target[target["split"] == "train"]
        assert len(kept) == min(count, len(training))
        assert set(kept["split"]) <= {"train"}
        assert set(kept["id"]) >= seen
        truth = pd.read_parquet(layout.truth / "labels.parquet").set_index("id")["label"]
        assert (kept.set_index("id")["label"] == truth[kept["id"]]).all()
        seen = set(kept["id"])


def test_nothing_written_for_training_depends_on_the_labels_put_aside(tmp_path: Path) -> None:
    layouts = [texts(tmp_path / name) for name in ("given", "swapped", "absent")]
    for layout, word in zip(layouts[1:], ("swap", ""), strict=True):
        rows = []
        for line in lines(layout):
            body, mood, shop = line.rsplit(",", 2)
            other = {"happy": "unhappy", "unhappy": "happy"}.get(mood, mood) if word else ""
            rows.append(f"{body},{other if shop == 'b' else mood},{shop}")
        rewrite(layout, rows)
    for layout in layouts:
        validate(adapting(), layout)
    assert contents(layouts[0].manifest) == contents(layouts[1].manifest) == contents(layouts[2].manifest)
    assert pd.read_parquet(layouts[2].truth / "labels.parquet").empty


def test_doubt_and_weight_of_the_target_are_put_aside_too(tmp_path: Path) -> None:
    (tmp_path / "doubt.py").write_text(
        "import pandas as pd\n"
        "def rows(raw, options):\n"
        "    n = range(80)\n"
        "    return pd.DataFrame({'text': [f'text number {i} of many' for i in n],\n"
        "        'label': ['ab'[i % 2] for i in n], 'domain': ['xy'[i // 2 % 2] for i in n],\n"
        "        'confidence': [0.6 + 0.4 * (i % 2) for i in n], 'weight': [1.0 + i % 2 for i in n]})\n"
    )
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    block = {"adapter": "doubt:rows", "target_domain": "y", "min_rows_per_class": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        validate(cached.recipe(validate=block, train=ADAPTING), layout)
    table = written(layout).groupby("domain")[["confidence", "weight"]].nunique()
    assert table.loc["y"].tolist() == [1, 1]
    assert table.loc["x"].tolist() == [2, 2]


def test_domains_on_neither_side_are_left_out(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    rewrite(
        layout, [line.replace(",a", ",c") if i % 8 == 1 else line for i, line in enumerate(lines(layout))]
    )
    validate(adapting(source_domains=["a"]), layout)
    assert set(written(layout)["domain"]) == {"a", "b"}
    reasons = written(layout, "left_out")["reason"]
    assert set(reasons) == {"of a domain that is neither source nor target"}


def test_a_class_that_only_the_target_has_is_an_error_that_names_it(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    rows = lines(layout)
    of_target = next(i for i, row in enumerate(rows) if row.endswith(",happy,b"))
    rows[of_target] = rows[of_target].replace(",happy,b", ",torn,b")
    rewrite(layout, rows)
    with pytest.raises(HeadstartError, match="labels that are no class: torn") as caught:
        validate(adapting(), layout)
    assert caught.value.where == "rows of the domain b"
    assert not layout.manifest.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_domain": "z"}, "no row is of the domain z"),
        ({"source_domains": ["a", "z"]}, "no row is of the domain z"),
        ({"source_domains": ["a", "b"]}, "b is both source and target"),
        ({"classes": ["happy", "sad"]}, "labels that are no class: unhappy"),
    ],
)
def test_domains_that_do_not_fit_are_errors(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    layout = texts(tmp_path)
    with pytest.raises(HeadstartError, match=words):
        validate(adapting(**changes), layout)
    assert not layout.manifest.exists()
