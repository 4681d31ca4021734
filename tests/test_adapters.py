from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from headstart.adapters import NO_LABEL, column_names, columns, modules, read
from headstart.errors import HeadstartError
from headstart.recipe import Validate


def touch(root: Path, *names: str) -> Path:
    """Empty files: an adapter reads names, not pictures."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def images(root: Path) -> dict[str, Any]:
    """Label and split of every usable picture; the others' paths under ``left out``."""
    frame = read(root, Validate(adapter="image_folder")).astype(object)
    usable = frame["left_out"].isna()
    found: dict[str, Any] = {
        row.path: row.label if pd.isna(row.split) else (row.split, row.label)
        for row in frame[usable].itertuples()
    }
    return found | ({"left out": list(frame.loc[~usable, "path"])} if not usable.all() else {})


def table(root: Path, name: str, content: str | bytes, **columns: str) -> pd.DataFrame:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(root, Validate.model_validate({"adapter": "table", "columns": columns}))


def cells(frame: pd.DataFrame, *names: str) -> list[tuple[object, ...]]:
    chosen = frame[list(names)].astype(object)
    return list(chosen.where(chosen.notna(), None).itertuples(index=False, name=None))


# Pictures


def test_a_folder_is_a_class(tmp_path: Path) -> None:
    assert images(touch(tmp_path, "cat/1.jpg", "dog/deep/er/2.png")) == {
        "cat/1.jpg": "cat",
        "dog/deep/er/2.png": "dog",
    }


def test_wrapper_folders_and_what_lies_beside_them_are_looked_through(tmp_path: Path) -> None:
    touch(tmp_path, "data/photos/cat/1.jpg", "data/photos/dog/2.jpg", "README.md", "__MACOSX/data/._1.jpg")
    assert images(tmp_path) == {
        "data/photos/cat/1.jpg": "cat",
        "data/photos/dog/2.jpg": "dog",
        "left out": ["README.md"],
    }


def test_a_single_class_is_not_taken_for_a_wrapper(tmp_path: Path) -> None:
    assert images(touch(tmp_path, "cat/1.jpg", "cat/2.jpg")) == {"cat/1.jpg": "cat", "cat/2.jpg": "cat"}


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "Validation", "TEST"), ("train", "dev", "testing")]
)
def test_train_val_and_test_folders_are_known_by_their_usual_names(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    found = images(touch(tmp_path, *(f"{name}/cat/1.jpg" for name in names)))
    assert found == {
        f"{name}/cat/1.jpg": (split, "cat")
        for name, split in zip(names, ("train", "val", "test"), strict=True)
    }


@pytest.mark.parametrize(
    ("around", "split"), [("test", "test"), ("Validation", "val"), ("train", "train"), ("photos/dev", "val")]
)
def test_a_folder_around_all_classes_may_be_a_split(around: str, split: str, tmp_path: Path) -> None:
    touch(tmp_path, f"{around}/cat/1.jpg", f"{around}/dog/2.jpg", ".batch.json")
    assert images(tmp_path) == {f"{around}/cat/1.jpg": (split, "cat"), f"{around}/dog/2.jpg": (split, "dog")}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert images(touch(tmp_path, "train/1.jpg", "bus/2.jpg")) == {"train/1.jpg": "train", "bus/2.jpg": "bus"}


def test_pictures_without_a_class_are_left_out_not_lost(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "test/3.jpg", "notes/4.jpg", "5.jpg")
    assert images(tmp_path)["left out"] == ["5.jpg", "notes/4.jpg", "test/3.jpg"]


def test_pictures_where_class_folders_would_stand_have_no_label_yet(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.png", "cat/3.jpg", "notes.txt")
    frame = read(tmp_path, Validate(adapter="image_folder")).set_index("path")
    assert frame["left_out"].fillna("").to_dict() == {
        "1.jpg": "no label",
        "2.png": "no label",
        "cat/3.jpg": "",
        "notes.txt": "not an image in a class folder",
    }


def test_any_case_of_suffix_and_any_letters_will_do(tmp_path: Path) -> None:
    names = ["пёс/1.JPG", "пёс/犬 é.Png", "cat/3.WebP"]
    assert set(images(touch(tmp_path, *names))) == set(names)


def test_other_files_are_left_out_and_hidden_ones_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/Thumbs.db", "cat/.2.jpg", ".git/3.jpg", ".splits.parquet", "dog/4.jpg")
    assert images(tmp_path) == {"cat/1.jpg": "cat", "dog/4.jpg": "dog", "left out": ["cat/Thumbs.db"]}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse to write such a name")
def test_a_file_name_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/caf\xe9.jpg")).touch()
    with pytest.raises(HeadstartError, match="1 file names are not UTF-8") as caught:
        images(tmp_path)
    assert "cat/caf" in str(caught.value)


def test_pictures_of_every_usual_kind_are_rows(tmp_path: Path) -> None:
    names = ["cat/1.jfif", "cat/2.jpe", "dog/3.avif"]
    assert set(images(touch(tmp_path, *names))) == set(names)


def test_a_file_of_another_kind_is_left_out_by_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/2.HEIC", "cat/deep/notes.txt", "dog/3.jpg", "dog/LICENSE")
    frame = read(tmp_path, Validate(adapter="image_folder")).set_index("path")
    assert frame["left_out"].dropna().to_dict() == {
        "cat/2.HEIC": "a file of a kind that is not read: .heic",
        "cat/deep/notes.txt": "a file of a kind that is not read: .txt",
        "dog/LICENSE": "not an image in a class folder",
    }


@pytest.mark.parametrize("around", ["", "train/"])
def test_a_class_of_pictures_that_are_not_read_does_not_vanish(around: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{around}{name}" for name in ("cat/1.jpg", "cat/2.heic", "dog/1.heic", "dog/2.DNG")))
    touch(tmp_path, f"{around}papers/notes.txt", f"{around}papers/Thumbs.db")
    touch(tmp_path, *(["test/cat/1.jpg"] if around else []))
    with pytest.raises(HeadstartError, match="kinds that are not read") as caught:
        images(tmp_path)
    assert caught.value.table == [f"{around}dog: .dng, .heic"]


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("Train-Images", "val images")])
def test_a_split_may_be_called_a_set_or_images(names: tuple[str, ...], tmp_path: Path) -> None:
    found = images(touch(tmp_path, *(f"{name}/{side}/1.jpg" for name in names for side in ("cat", "dog"))))
    second = "test" if "test_set" in names else "val"
    assert set(found.values()) == {("train", "cat"), ("train", "dog"), (second, "cat"), (second, "dog")}


@pytest.mark.parametrize(
    ("names", "do"),
    [
        (("train/1.jpg", "test/2.jpg"), "put class folders inside them"),
        (("train2017/1.jpg", "val2017/2.jpg", "README.md"), "put class folders inside them"),
        (("training_set/training_set/cat/1.jpg", "test_set/test_set/cat/1.jpg"), "put class folders inside"),
        (tuple(f"seg_{s}/{c}/1.jpg" for s in ("train", "test") for c in "ab"), "call the splits train"),
        (tuple(f"{s} data/in/{c}/1.jpg" for s in ("train", "test") for c in "ab"), "call the splits train"),
        (("train/a/1.jpg", "train/b/1.jpg", "my_test/a/1.jpg", "my_test/b/1.jpg"), "call the splits train"),
    ],
)
def test_splits_do_not_become_classes(names: tuple[str, ...], do: str, tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(HeadstartError, match="called like splits") as caught:
        images(tmp_path)
    assert do in caught.value.do
    assert len(caught.value.table) == 2


def test_classes_that_the_recipe_names_may_be_called_like_splits(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{day}/1.jpg" for name in ("crash_test", "train_station") for day in "ab"))
    options = Validate(adapter="image_folder", classes=["crash_test", "train_station"])
    assert set(read(tmp_path, options)["label"]) == {"crash_test", "train_station"}


def test_folders_of_the_same_names_inside_of_classes_are_no_classes(tmp_path: Path) -> None:
    names = [f"{name}/2024-0{month}/1.jpg" for name in ("cat", "dog", "train_station") for month in (1, 2)]
    assert set(images(touch(tmp_path, *names)).values()) == {"cat", "dog", "train_station"}


def test_a_folder_that_is_a_known_class_is_no_wrapper(tmp_path: Path) -> None:
    batch = touch(tmp_path / "elsewhere", "photos/cat/2024-03/1.jpg")
    options = Validate(adapter="image_folder", classes=["cat", "dog"])
    assert read(batch, options)["label"].tolist() == ["cat"]


@pytest.mark.parametrize("around", ["", "data/", "data/train/", "train_set/"])
def test_a_class_of_the_source_is_no_wrapper_in_a_batch(around: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{around}{side}/2024-01/1.jpg" for side in ("cat", "dog")))
    touch(tmp_path, *(["test_set/cat/1.jpg"] if around == "train_set/" else []))
    batch = touch(tmp_path / ".batches/march", "cat/2024-03/1.jpg")
    assert images(batch) == {"cat/2024-03/1.jpg": "cat"}


# Tables

ROWS = [("one, two", "yes"), ('three "four"\nfive', "no")]
QUOTED = 'text,label\n"one, two",yes\n"three ""four""\nfive",no\n'
LINES = "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", QUOTED),
        ("with a byte order mark.csv", b"\xef\xbb\xbf" + QUOTED.encode()),
        ("from Windows.csv", QUOTED.replace("\n", "\r\n")),
        ("from a spreadsheet.csv", QUOTED.encode("utf-16")),
        ("spaces in the header.csv", QUOTED.replace("text,label", " text , label ")),
        ("semicolons.CSV", QUOTED.replace("t,l", "t;l").replace('",', '";')),
        ("t.tsv", QUOTED.replace("t,l", "t\tl").replace('",', '"\t')),
        ("t.jsonl", LINES + "\n\n"),
        ("deep/down/t.jsonl", LINES),
    ],
)
def test_every_kind_of_table_reads_the_same(name: str, content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    assert cells(table(tmp_path, name, content), "text", "label") == ROWS


@pytest.mark.parametrize(
    ("labels", "read_as"),
    [
        (pd.Series(["a", "b", None], dtype="category"), ["a", "b", None]),
        (pd.Series([0, 1, 0]), ["0", "1", "0"]),
        (pd.Series([0, 1, None]), ["0", "1", None]),
        (pd.Series([True, False, True]), ["True", "False", "True"]),
        (pd.Series([b"caf\xe9", b"b", b"c"]), ["café", "b", "c"]),
    ],
    ids=["categories", "integers", "integers with a gap", "truth values", "bytes"],
)
def test_labels_of_any_parquet_type_become_names(
    labels: pd.Series, read_as: list[str], tmp_path: Path
) -> None:
    pd.DataFrame({"text": ["x", "y", "z"], "label": labels}).to_parquet(tmp_path / "t.parquet")
    frame = read(tmp_path, Validate(adapter="table"))
    assert [label for (label,) in cells(frame, "label")] == read_as


def test_large_integer_ids_stay_exact(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x", "label": "a", "n": n}) for n in (10**18 + 1, None)]
    assert cells(table(tmp_path, "t.jsonl", "\n".join(lines), id="n"), "id") == [(str(10**18 + 1),), (None,)]


def test_a_column_called_date_stays_as_written(tmp_path: Path) -> None:
    line = json.dumps({"text": "x", "label": "a", "date": "2026-01-31"})
    assert cells(table(tmp_path, "t.jsonl", line, domain="date"), "domain") == [("2026-01-31",)]


def test_spaces_around_labels_do_not_make_classes(tmp_path: Path) -> None:
    assert set(table(tmp_path, "t.csv", "text,label\nx,a \ny, a\nz,a\n")["label"]) == {"a"}


def test_words_that_look_like_missing_values_are_words(tmp_path: Path) -> None:
    assert cells(table(tmp_path, "t.csv", "text,label\nNA,None\n"), "text", "label") == [("NA", "None")]


def test_rows_without_a_label_are_left_out_with_a_reason(tmp_path: Path) -> None:
    frame = table(tmp_path, "t.csv", "text,label\nx,a\ny,\nz, \ncut off")
    assert cells(frame, "text", "left_out") == [
        ("x", None),
        ("y", "no label"),
        ("z", "no label"),
        ("cut off", "no label"),
    ]


def test_several_tables_are_one(tmp_path: Path) -> None:
    table(tmp_path, "a.csv", "text,label\nx,1\n")
    pd.DataFrame({"text": ["y"], "label": [1]}).to_parquet(tmp_path / "b.parquet")
    assert cells(read(tmp_path, Validate(adapter="table")), "text", "label") == [("x", "1"), ("y", "1")]


def test_a_tsv_may_hold_quotation_marks_that_quote_nothing(tmp_path: Path) -> None:
    frame = table(tmp_path, "t.tsv", 'text\tlabel\n"Hello" she said\ta\n"and left\tb\nx\ta\n')
    assert list(frame["text"]) == ['"Hello" she said', '"and left', "x"]


def test_no_row_of_a_tsv_is_lost_between_two_quotation_marks(tmp_path: Path) -> None:
    lines = ["text\tlabel", '"I hate it\ta', "lost\tb", 'he said "hi"\ta', '"he said ""hi"""\tb', '"\ta']
    frame = table(tmp_path, "t.tsv", "\r\n".join([*lines, '""\tb', '"a" or "b"\ta', "", ""]))
    assert cells(frame, "text", "label") == [
        ('"I hate it', "a"),
        ("lost", "b"),
        ('he said "hi"', "a"),
        ('he said "hi"', "b"),
        ('"', "a"),
        ("", "b"),
        ('"a" or "b"', "a"),
    ]


def test_a_quoted_text_of_a_tsv_may_span_lines_and_tabs(tmp_path: Path) -> None:
    content = 'label\ttext\na\t"one\ntwo"\nb\t"three\tfour"\n'
    assert list(table(tmp_path, "t.tsv", content)["text"]) == ["one\ntwo", "three\tfour"]


@pytest.mark.parametrize("folder", ["all.parquet", "all.csv"])
def test_a_folder_of_parts_may_be_called_like_a_table(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    assert len(table(tmp_path, f"{folder}/part-0.csv", "text,label\nx,a\n")) == 1


def test_of_two_columns_alike_the_first_counts_in_every_kind_of_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pa.table([["x"], ["first"], ["second"]], names=["text", "label", "label"])
    pq.write_table(columns, tmp_path / "a.parquet")
    assert list(table(tmp_path, "b.csv", "text,label,label\nx,first,second\n")["label"]) == ["first"] * 2


def test_a_missing_column_between_semicolons_is_the_one_that_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="no column 'customer' for the group") as caught:
        table(tmp_path, "t.csv", "text;label;client\nx;a;1\n", group="customer")
    assert "columns: text, label, client" in caught.value.where


@pytest.mark.parametrize("header", ['text,"a;b;c",label', "text,label,a;b;c;d"])
def test_semicolons_in_the_name_of_a_column_separate_nothing(header: str, tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="no column 'customer'"):
        table(tmp_path, "t.csv", f"{header}\nx,a,b\n", group="customer")


def test_tabs_in_a_csv_are_named(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="separated by tabs") as caught:
        table(tmp_path, "t.csv", "text\tlabel\nx y\ta\n")
    assert ".tsv" in caught.value.do
    assert column_names(tmp_path / "t.csv") == ["text\tlabel"]  # an adapter of one's own may know better


def test_usual_names_of_splits_are_understood_and_others_kept_for_validation(tmp_path: Path) -> None:
    frame = table(
        tmp_path, "t.csv", "text,label,s\nx,a,Train\ny,a,validation\nz,a,dev\nw,a,holdout\nv,a,\n", split="s"
    )
    assert cells(frame, "split") == [("train",), ("val",), ("val",), ("holdout",), (None,)]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("t.csv", "text,label\nx,a\nunquoted, comma,b\n", "line 3: 3 fields, but the header names 2"),
        ("t.csv", 'text,label\n"never closed,a\n', "line 2: unexpected end of data"),
        ("t.jsonl", '{"text": "x", "label": "a"}\n{oops\n', "line 2: "),
        ("t.jsonl", "[1, 2]\n", "line 1 is not a JSON object"),
        (
            "t.jsonl",
            '{"text": "x", "label": "a", "m": ' + "[" * 900 + "]" * 900 + "}",
            "more than 100 others",
        ),
        ("t.jsonl", '{"text": "x", "label": "a", "m": ' + "[" * 50_000, "more than 100 others"),
        ("t.parquet", "nonsense", "Parquet"),
    ],
)
def test_a_damaged_table_is_refused_with_the_line(name: str, content: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="cannot be read") as caught:
        table(tmp_path, name, content)
    assert word in str(caught.value)
    assert name in caught.value.where


@pytest.mark.parametrize("header", ["text,Labels", "text,LABEL", "text,lable"])
def test_a_missing_column_is_named_with_the_nearest_one(header: str, tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="no column 'label' for the label") as caught:
        table(tmp_path, "t.csv", f"{header}\nx,a\n")
    assert header.replace(",", ", ") in caught.value.where
    assert f"did you mean {header.split(',')[1]!r}?" in caught.value.do


def test_lists_as_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="'label' holds lists"):
        table(tmp_path, "t.jsonl", '{"text": "x", "label": ["a", "b"]}')


# Encodings


def test_mojibake_is_mended_and_what_was_there_is_kept(tmp_path: Path) -> None:
    frame = table(tmp_path, "t.csv", "text,label\na cafÃ© â€“ here,a\nplain,a\n")
    assert cells(frame, "text", "original") == [("a café \u2013 here", "a cafÃ© â€“ here"), ("plain", None)]


def test_bytes_of_an_older_encoding_are_read_as_windows_1252(tmp_path: Path) -> None:
    data = (
        b"text,label\n" + "caf\u00e9 \u201cx\u201d,cr\u00e8me\n".encode("cp1252") + "na\u00efve,a\n".encode()
    )
    frame = table(tmp_path, "t.csv", data)
    assert cells(frame, "text", "label", "original") == [
        ("café “x”", "crème", "caf\ufffd \ufffdx\ufffd"),
        ("naïve", "a", None),
    ]


@pytest.mark.parametrize("by", [",", ";"])
def test_names_of_columns_in_an_older_encoding_are_read_as_windows_1252(by: str, tmp_path: Path) -> None:
    data = f"Größe{by}Priorität\nx{by}hoch\n".encode("cp1252")
    frame = table(tmp_path, "t.csv", data, text="Größe", label="Priorität")
    assert cells(frame, "text", "label") == [("x", "hoch")]


def test_columns_of_an_older_encoding_are_read_as_windows_1252(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("id,label\n caf\u00e9.jpg,cr\u00e8me\nb, \n".encode("cp1252"))
    found = columns(tmp_path / "t.csv", {"id", "label"})
    assert cells(found, "id", "label") == [("café.jpg", "crème"), ("b", None)]


@pytest.mark.parametrize(
    "text",
    [
        "AT&amp;T &lt;3 café",
        "“curly” \u2018quotes\u2019…",
        "\ufb01ne \uff57\uff49\uff44\uff45",
        "e\u0301",
        "naïve café 犬 😀",
        "Ã",
    ],
)
def test_only_broken_encodings_are_mended(text: str, tmp_path: Path) -> None:
    assert cells(table(tmp_path, "t.csv", f"text,label\n{text},a\n"), "text", "original") == [(text, None)]


def test_half_an_emoji_becomes_a_replacement_character(tmp_path: Path) -> None:
    frame = table(tmp_path, "t.jsonl", '{"text": "so \\ud83d sad", "label": "a"}')
    assert cells(frame, "text", "original") == [("so \ufffd sad", "so \ufffd sad")]


# Examples


def test_solar_modules_are_runs_of_one_type_in_blocks_of_60_or_whole() -> None:
    types = pd.Series(["mono"] * 120 + ["poly"] * 72 + ["mono"] * 50 + ["poly"] * 130)
    sizes = pd.Series(modules(types)).value_counts(sort=False)
    assert list(sizes) == [60, 60, 72, 50, 60, 60, 10]
    assert sizes.index.is_unique


def test_solar_cells_keep_the_raters_doubt_as_confidence_and_weight(tmp_path: Path) -> None:
    listed = ["1.0", "0.6666666666666666", "0.3333333333333333", "0.0", "nan"]
    lines = [f"images/{i}.png  {p}   mono" for i, p in enumerate(listed)]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    frame = read(tmp_path, Validate(adapter="elpv"))
    assert list(frame["label"][:4]) == ["defective", "defective", "functional", "functional"]
    assert list(frame["confidence"]) == pytest.approx([1, 2 / 3, 2 / 3, 1, 1])
    assert list(frame["weight"]) == [1, 0.67, 0.33, 1, 1]
    assert list(frame["left_out"].fillna("")) == [""] * 4 + [NO_LABEL]  # nobody rated it
    assert pd.isna(frame["label"][4])
    assert set(frame["domain"]) == {"mono"}


def test_solar_cells_that_nobody_has_rated_have_no_label(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("a.png nan poly\nb.png 0.0 poly\n")
    frame = read(tmp_path, Validate(adapter="elpv"))
    assert cells(frame, "label", "confidence", "weight", "left_out") == [
        (None, 1, 1, "no label"),
        ("functional", 1, 1, None),
    ]


STEMS = ["tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets"]


def test_rated_texts_are_two_classes_with_the_neutral_band_left_out(tmp_path: Path) -> None:
    lines = ["7_1\t2.5\tGood.", "7_2\t-0.51\tBad.", "8\t0.5\tSo so.", '9\t-0.5\t"Hm\tm.']
    for stem in STEMS:
        (tmp_path / f"{stem}_GroundTruth.txt").write_text("\r\n".join(lines) + "\r\n")
    frame = read(tmp_path, Validate(adapter="vader"))
    assert len(frame) == 16
    neutral = "neutral: |mean rating| <= 0.5"
    assert cells(frame[:4], "id", "text", "label", "domain", "group", "left_out") == [
        ("tweets:7_1", "Good.", "positive", "tweets", "tweets:7", None),
        ("tweets:7_2", "Bad.", "negative", "tweets", "tweets:7", None),
        ("tweets:8", "So so.", "positive", "tweets", "tweets:8", neutral),
        ("tweets:9", '"Hm\tm.', "negative", "tweets", "tweets:9", neutral),
    ]


def test_some_of_the_rated_texts_will_do_and_unrated_ones_have_no_label(tmp_path: Path) -> None:
    for folder, line in ((".batches/x", "1\t2.0\tGood."), ("here", "2\tnan\tHm.")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tweets_GroundTruth.txt").write_text(f"{line}\n")
    frame = read(tmp_path, Validate(adapter="vader"))
    assert cells(frame, "id", "label", "left_out") == [("tweets:2", None, "no label")]


@pytest.mark.parametrize("path", ["/etc/passwd", "../other.png", "a/../../other.png"])
def test_a_list_may_name_only_what_lies_in_the_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/labels.csv").write_text(f"a/..b.png 0.0 mono\n{path} 1.0 mono\n")
    with pytest.raises(HeadstartError, match="1 paths of pictures lead out of the data") as caught:
        read(tmp_path / "raw", Validate(adapter="elpv"))
    assert list(caught.value.table) == [path]


def test_pictures_and_the_folder_itself_may_be_links_as_a_cache_makes_them(tmp_path: Path) -> None:
    touch(tmp_path / "cache", "1.png")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/a.png").symlink_to(tmp_path / "cache/1.png")
    (tmp_path / "kept/labels.csv").write_text("a.png 0.0 mono\n")
    (tmp_path / "raw").symlink_to(tmp_path / "kept")
    assert list(read(tmp_path / "raw", Validate(adapter="elpv"))["path"]) == ["a.png"]


@pytest.mark.parametrize("adapter", ["elpv", "vader"])
def test_an_example_without_its_files_says_so(adapter: str, tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="is missing") as caught:
        read(tmp_path, Validate(adapter=adapter))
    assert "ingest" in caught.value.do


# Choosing an adapter


@pytest.mark.parametrize(
    ("adapter", "word"),
    [
        ("tabel", "did you mean 'table'?"),
        ("qqq", "image_folder, table, elpv, vader or `module:function`"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("json:no_such_function", "no_such_function"),
        (":f", "cannot be imported"),
    ],
)
def test_an_adapter_that_does_not_exist_is_explained(adapter: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(HeadstartError) as caught:
        read(tmp_path, Validate(adapter=adapter))
    assert word in str(caught.value)


def test_an_adapter_of_ones_own_gives_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_adapter.py").write_text(
        "import pandas as pd\n"
        "def good(raw, options): return pd.DataFrame({'text': ['x'], 'label': ['a']})\n"
        "def poor(raw, options): return pd.DataFrame({'body': ['x'], 'label': ['a']})\n"
        "def none(raw, options): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert len(read(tmp_path, Validate(adapter="my_own_adapter:good"))) == 1
    with pytest.raises(HeadstartError, match="gives the columns body, label"):
        read(tmp_path, Validate(adapter="my_own_adapter:poor"))
    with pytest.raises(HeadstartError, match="no rows"):
        read(tmp_path, Validate(adapter="my_own_adapter:none"))


@pytest.mark.parametrize(
    ("adapter", "name", "word"),
    [
        ("image_folder", "", "no raw data"),
        ("table", "notes.xlsx", "there is no table"),
        ("table", "t.csv", "no column 'text'"),
    ],
)
def test_an_empty_source_is_explained(adapter: str, name: str, word: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    if name:
        touch(raw, name)
    with pytest.raises(HeadstartError, match=word) as caught:
        read(raw, Validate(adapter=adapter))
    assert caught.value.do
