"""Predicting many rows: every row is answered or explained, in order, whatever it came in."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headstart import adapters, devices, features, inputs, scoring
from headstart.errors import HeadstartError
from headstart.models import Version
from headstart.recipe import Validate
from tests import versions
from tests.conftest import Project, Ran, isolated

ROOT = Path(__file__).parents[1]
TEXTS = versions.TEXTS
ANSWERS = ["label", "p:good", "p:bad", "error"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(devices.DEVICE, "cpu")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return versions.write_texts_version(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def texts(texts_folder: Path) -> Version:
    return versions.read(texts_folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return versions.read(versions.write_images_version(tmp_path_factory.mktemp("images")))


@pytest.fixture
def pictures(images: Version) -> list[Path]:
    return sorted((images.folder.parent / "images").rglob("*.png"))


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": pd.read_csv,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
    ".parquet": pd.read_parquet,
}


def predicted(version: Version, *inputs: str | Path, **options: Any) -> pd.DataFrame:
    """The table that is written."""
    scoring.score(version, list(map(str, inputs)), Path("answers.parquet"), **options)
    return pd.read_parquet("answers.parquet")


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_of_output_holds_what_the_model_says_of_each_row(
    suffix: str, texts: Version, tmp_path: Path
) -> None:
    pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}).to_parquet("rows.parquet")
    done = scoring.score(texts, ["rows.parquet"], tmp_path / f"new/answers{suffix}", chunk=7)
    rows, expected = READERS[suffix](tmp_path / f"new/answers{suffix}"), texts.model(TEXTS)
    assert list(rows.columns) == ["id", "text", *ANSWERS]
    assert rows["id"].tolist() == list(range(len(TEXTS)))
    assert rows["label"].tolist() == expected.labels
    assert rows[["p:good", "p:bad"]].to_numpy() == pytest.approx(expected.probabilities, abs=1e-5)
    assert rows["error"].isna().all()
    assert (done.rows, done.errors) == (len(TEXTS), 0)
    assert done.labels == {label: expected.labels.count(label) for label in set(expected.labels)}


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_of_table_is_read(suffix: str, texts: Version) -> None:
    table = pd.DataFrame({"key": ["007", "8"], "text": ["a delight,\nreally", 'so "dull"']})
    if suffix == ".csv":
        table.to_csv("rows.csv", index=False)
    elif suffix == ".jsonl":
        table.to_json("rows.jsonl", orient="records", lines=True)
    else:
        table.to_parquet("rows.parquet")
    rows = predicted(texts, f"rows{suffix}")
    assert rows[["key", "text"]].to_dict("list") == table.to_dict("list")
    assert rows["label"].tolist() == texts.model(table["text"].tolist()).labels


TABBED = 'key\ttext\n007\t"a café,\treally"\n8\t"dull; ""so"" dull"\n'
LINES = '{"key": "007", "text": "a café,\\treally"}\n{"key": "8", "text": "dull; \\"so\\" dull"}'


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "tabs.tsv": TABBED.encode(),
        "semicolons.csv": TABBED.replace("\tt", " ; t").replace('\t"', ';"').encode(),
        "from Windows.csv": TABBED.replace("\tt", ";t").replace('\t"', ';"').encode("cp1252"),
        "from a spreadsheet.csv": TABBED.replace("\tt", ",t").replace('\t"', ',"').encode("utf-16"),
        "lines.jsonl": LINES.encode("cp1252"),
    }.items(),
)
def test_a_table_that_trains_is_read_the_same_way(
    name: str, content: bytes, texts: Version, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    expected = ["a café,\treally", 'dull; "so" dull']
    options = Validate.model_validate({"adapter": "table", "columns": {"label": "key"}})
    assert adapters.read(tmp_path, options)["text"].tolist() == expected
    rows = predicted(texts, name)
    assert rows[["key", "text"]].to_dict("list") == {"key": ["007", "8"], "text": expected}
    assert rows["label"].tolist() == texts.model(expected).labels


def test_quotation_marks_in_a_tsv_may_be_marks_only(texts: Version, tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('text\tkey\n"dull" he said\t1\n"a bore\t2\n')
    rows = predicted(texts, "rows.tsv")
    assert rows["text"].tolist() == ['"dull" he said', '"a bore']
    assert rows["error"].isna().all()


def test_no_row_of_a_tsv_is_lost_between_two_quotation_marks(texts: Version, tmp_path: Path) -> None:
    lines = ["text\tkey", '"a bore\t1', "a delight\t2", 'he said "dull"\t3', '"he said ""dull"""\t4']
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    expected = ['"a bore', "a delight", 'he said "dull"', 'he said "dull"']
    options = Validate.model_validate({"adapter": "table", "columns": {"label": "key"}})
    assert adapters.read(tmp_path, options)["text"].tolist() == expected
    rows = predicted(texts, "rows.tsv")
    assert rows[["text", "key"]].to_dict("list") == {"text": expected, "key": ["1", "2", "3", "4"]}


def test_a_line_of_json_may_be_longer_than_what_is_read_at_a_time(texts: Version, tmp_path: Path) -> None:
    lines = [{"text": "a delight", "notes": "x" * size} for size in (5, 3 * inputs.BLOCK, 7)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = predicted(texts, "rows.jsonl")
    assert rows["notes"].str.len().tolist() == [5, 3 * inputs.BLOCK, 7]
    assert rows["error"].isna().all()


@pytest.mark.parametrize(
    ("early", "late", "written"),
    [
        (None, "a word", [None, "a word"]),
        (1, 2.5, [1.0, 2.5]),
        ("2026-01-31", "unknown", ["2026-01-31", "unknown"]),
        ({"a": None}, {"a": "word", "b": 1}, [{"a": None, "b": None}, {"a": "word", "b": 1}]),
    ],
    ids=["nothing", "whole numbers", "dates", "objects"],
)
def test_what_a_column_of_json_lines_holds_may_show_late(
    early: object, late: object, written: list[object], texts: Version, tmp_path: Path
) -> None:
    count = 1 + inputs.BLOCK // 1000
    lines = [json.dumps({"notes": each, "text": "a delight " + 1000 * "x"}) for each in (early, late)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:1] * count, lines[1]]))
    (source,) = inputs.opened(["rows.jsonl"], "small", "text")
    found = [value for chunk in source.chunks(100) for value in chunk.rows.column("notes").to_pylist()]
    assert found == [*written[:1] * count, written[1]]
    assert source.rows == count + 1


@pytest.mark.parametrize(
    ("values", "written"),
    [
        (["18446744073709551617", "18446744073709551618", "7"], ...),
        (["9007199254740993", "9007199254740992", "0.50"], ...),
        (['{"a": 9007199254740993, "b": 0.5}', '{"a": null, "b": 1}', '{"a": 0.50}'], [
            {"a": "9007199254740993", "b": 0.5}, {"a": None, "b": 1.0}, {"a": "0.50", "b": None}
        ]),
        (["[0.5, 9007199254740993]", "null", "[]"], [["0.5", "9007199254740993"], None, []]),
        (["9007199254740993", "9007199254740992", "7"], [9007199254740993, 9007199254740992, 7]),
        (["9007199254740992.5", "0.12345678901234567", "1"], [9007199254740992.5, 0.12345678901234567, 1.0]),
    ],
    ids=["of 65 bits", "beside fractions", "in objects", "in lists", "beside none", "fractions alone"],
)  # fmt: skip
@pytest.mark.parametrize("late", [False, True])
def test_whole_numbers_of_json_lines_are_never_rounded(
    values: list[str], written: Any, late: bool, texts: Version, tmp_path: Path
) -> None:
    long = "x" * inputs.BLOCK if late else ""  # each in what is read at a time, or all together
    lines = [f'{{"text": "a \\"delight\\" {long}", "id": {value}, "n": {1.5}}}' for value in values]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (source,) = inputs.opened(["rows.jsonl"], "small", "text")
    found = [row for chunk in source.chunks(100) for row in chunk.rows.to_pylist()]
    assert [row["id"] for row in found] == (values if written is ... else written)
    assert {row["text"] for row in found} == {f'a "delight" {long}'}
    assert {row["n"] for row in found} == {1.5}


def test_lines_of_a_text_file_are_texts(texts: Version, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/one.txt").write_text("\ufeffa delight\r\na bore, truly\n", encoding="utf-8")
    (tmp_path / "notes/.hidden.txt").write_text("not this one\n")
    rows = predicted(texts, "notes")
    assert rows["text"].tolist() == ["a delight", "a bore, truly"]
    assert rows["label"].tolist() == texts.model(["a delight", "a bore, truly"]).labels


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize("given", ["notes.txt", "-"])
def test_lines_are_decoded_as_tables_are(
    given: str, encoding: str, texts: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["a café, \u201ctruly\u201d", "a delight"]
    (tmp_path / "notes.txt").write_bytes("\r\n".join([*lines, ""]).encode(encoding))
    with (tmp_path / "notes.txt").open() as pipe:
        monkeypatch.setattr(sys, "stdin", Mock(fileno=lambda: os.dup(pipe.fileno())))
        rows = predicted(texts, given)
    assert rows["text"].tolist() == lines
    assert rows["label"].tolist() == texts.model(lines).labels


def test_a_link_that_leads_back_is_passed_over_and_other_links_are_followed(
    images: Version, pictures: list[Path], tmp_path: Path
) -> None:
    for name in ("photos/of", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(pictures[0], tmp_path / name / "a.png")
    for link, target in {"again": ".", "of/back": "..", "once": "../elsewhere", "twice": "of"}.items():
        (tmp_path / "photos" / link).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to("../photos")
    rows = predicted(images, "photos")
    assert rows["path"].tolist() == [f"photos/{name}/a.png" for name in ("of", "once", "twice")]


def test_folders_patterns_and_tables_of_images_give_the_same_answers(
    images: Version, pictures: list[Path], tmp_path: Path
) -> None:
    folder, expected = images.folder.parent / "images", images.model(pictures).labels
    of_folder, of_pattern = predicted(images, folder), predicted(images, f"{folder}/**/*.png")
    assert of_folder["path"].tolist() == of_pattern["path"].tolist() == list(map(str, pictures))
    assert of_folder["label"].tolist() == of_pattern["label"].tolist() == expected
    of_folders = predicted(images, f"{folder.parent}/./images/**")  # the folders as well as what is in them
    assert of_folders["path"].tolist() == of_folder["path"].tolist()
    names = [path.relative_to(folder).as_posix() for path in pictures]
    pd.DataFrame({"path": names}).to_csv(folder / "list.csv", index=False)
    try:
        of_paths = predicted(images, folder / "list.csv")
    finally:
        (folder / "list.csv").unlink()
    assert of_paths["path"].tolist() == names
    pd.DataFrame({"id": names, "image": [path.read_bytes() for path in pictures]}).to_parquet("bytes.parquet")
    of_bytes = predicted(images, "bytes.parquet", chunk=5)
    assert list(of_bytes.columns) == ["id", *ANSWERS]
    assert of_paths["label"].tolist() == of_bytes["label"].tolist() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse to write such a name")
@pytest.mark.parametrize("suffix", READERS)
def test_an_image_whose_name_is_not_utf_8_is_answered_too(
    suffix: str, images: Version, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(pictures[0], os.fsdecode(b"photos/caf\xe9.png"))
    scoring.score(images, ["photos"], tmp_path / f"answers{suffix}")
    rows = READERS[suffix](tmp_path / f"answers{suffix}")
    assert rows["path"].tolist() == ["photos/caf\\udce9.png"]
    assert rows["label"].tolist() == images.model(pictures[:1]).labels
    assert rows["error"].isna().all()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse to write such a name")
def test_a_path_on_standard_input_may_be_one_that_is_not_utf_8(
    images: Version, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(pictures[0], os.fsdecode(b"caf\xe9.png"))
    (tmp_path / "list").write_bytes(b"caf\xe9.png\nth\xe9.png\n")
    with (tmp_path / "list").open() as pipe:
        monkeypatch.setattr(sys, "stdin", Mock(fileno=lambda: os.dup(pipe.fileno())))
        rows = predicted(images, "-")
    assert rows["path"].tolist() == ["caf\\udce9.png", "th\\udce9.png"]
    assert rows["label"][0] == images.model(pictures[:1]).labels[0]
    assert rows["error"].notna().tolist() == [False, True]


def test_an_image_that_cannot_be_read_says_why_and_leaves_the_others_as_they_are(
    images: Version, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "words.png").write_text("words")
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:200])
    paths = [*map(str, pictures[:3]), "words.png", "gone.png", "", *map(str, pictures[3:]), "cut.png"]
    pd.DataFrame({"path": paths}).to_csv("list.csv", index=False)
    rows = predicted(images, "list.csv").set_index("path")
    bad = rows[rows["error"].notna()]
    assert list(bad.index) == ["words.png", "gone.png", "", "cut.png"]
    assert set(bad["label"]) == {""}
    assert bad[["p:good", "p:bad"]].isna().all(axis=None)
    assert "not a picture" in bad.loc["words.png", "error"]
    assert "No such file" in bad.loc["gone.png", "error"]
    assert bad.loc["", "error"] == "there is no path"
    expected = images.model(pictures)
    good = rows.loc[list(map(str, pictures))]
    assert good["label"].tolist() == expected.labels
    assert good[["p:good", "p:bad"]].to_numpy() == pytest.approx(expected.probabilities, abs=1e-5)


def test_a_text_that_is_missing_or_empty_says_so(texts: Version) -> None:
    table = pd.DataFrame({"text": ["a delight", None, "", "  ", "a bore"]})
    table.to_parquet("rows.parquet")
    done = scoring.score(texts, ["rows.parquet"], Path("answers.parquet"))
    rows = pd.read_parquet("answers.parquet")
    assert rows["error"].tolist()[1:4] == ["there is no text"] * 3
    assert rows["label"].tolist()[1:4] == [""] * 3
    assert done.errors == 3
    assert "3 failed" in str(done)
    assert rows["label"].tolist()[::4] == texts.model(["a delight", "a bore"]).labels


def test_a_row_of_a_csv_with_cells_too_many_is_not_guessed_at(texts: Version, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,key\na delight,1\na bore, truly,2\nbright,3\n")
    rows = predicted(texts, "rows.csv")
    assert rows["error"].tolist()[1] == "the row has 3 cells, the table 2 columns"
    assert rows["label"].tolist()[::2] == texts.model(["a delight", "bright"]).labels


def test_a_text_of_parquet_that_is_not_utf_8_is_a_fault_of_its_row(texts: Version, tmp_path: Path) -> None:
    broken = pa.array([b"bright", b"caf\xe9", b"dull"], pa.binary()).view(pa.string())
    sound = pa.array(["bright", "grim", "dull"])
    expected = texts.model(["bright", "dull"]).labels
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), broken)
    for named in ({"text": broken}, {"text": sound, "notes": broken}, {"text": sound, "notes": nested}):
        pq.write_table(pa.table(named), "rows.parquet")
        for suffix, read in READERS.items():
            scoring.score(texts, ["rows.parquet"], tmp_path / f"answers{suffix}")
            rows = read(tmp_path / f"answers{suffix}")
            said = f"the text in {list(named)[-1]} is not UTF-8"
            assert rows["error"].fillna("").tolist() == ["", said, ""]
            assert rows["label"].tolist()[::2] == expected


def test_a_chunk_without_a_single_good_row_is_answered_too(images: Version, texts: Version) -> None:
    pd.DataFrame({"path": ["gone.png", None]}).to_parquet("paths.parquet")
    assert predicted(images, "paths.parquet")["error"].notna().all()
    pd.DataFrame({"text": pd.Series([None, None], dtype=object)}).to_parquet("rows.parquet")
    assert predicted(texts, "rows.parquet")["error"].notna().all()


def test_a_column_named_like_an_answer_is_kept_under_another_name(texts: Version) -> None:
    pd.DataFrame({"text": TEXTS[:2], "label": ["x", "y"]}).to_parquet("rows.parquet")
    once = predicted(texts, "rows.parquet")
    assert once["given:label"].tolist() == ["x", "y"]
    once.to_parquet("rows.parquet")
    twice = predicted(texts, "rows.parquet")
    assert twice["given:label"].tolist() == ["x", "y"]
    assert twice["given:given:label"].tolist() == once["label"].tolist() == twice["label"].tolist()


def test_columns_without_a_name_of_their_own_are_told_apart(texts: Version, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,note,,note,,column 3\na delight,1,2,3,4,5\n")
    rows = predicted(texts, "rows.csv")
    assert list(rows) == ["text", "note", "column 3 3", "note 4", "column 5", "column 3", *ANSWERS]
    assert rows.iloc[0, 1:6].tolist() == ["1", "2", "3", "4", "5"]
    rows = predicted(texts, "rows.csv", column="note 4")
    assert rows["label"].tolist() == texts.model(["3"]).labels
    with pytest.raises(HeadstartError, match="several columns note"):
        predicted(texts, "rows.csv", column="note")


def test_a_csv_quotes_every_kind_of_line_end_and_no_more(
    texts: Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["old\rMac", "DOS\r\n", "Unix\n", 'a "mark"', "comma, so", "plain"]
    pq.write_table(pa.table({"text": given}), "rows.parquet")
    scoring.score(texts, ["rows.parquet"], tmp_path / "answers.csv")
    scoring.score(texts, ["rows.parquet"])
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        written = file.read()
    assert written == capsys.readouterr().out
    assert [row[0] for row in csv.reader(written.splitlines(keepends=True))] == ["text", *given]
    assert written.startswith('text,label,p:good,p:bad,error\n"old\rMac",')
    assert "\nplain," in written and '\n"comma, so",' in written


def test_json_lines_are_json_whatever_the_other_columns_hold(texts: Version, tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a delight", "a bore"],
            "score": [float("nan"), 1.5],
            "nested": [[{"a": float("inf")}], [{"a": 0.5}]],
            "picture": [b"\x89PNG", None],
            "when": pa.array([0, None], pa.timestamp("s")),
        }
    )
    pq.write_table(table, "rows.parquet")
    scoring.score(texts, ["rows.parquet"], tmp_path / "answers.jsonl")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["score"], first["nested"], first["picture"]) == (None, [{"a": None}], "iVBORw==")
    assert (second["score"], second["nested"], second["picture"]) == (1.5, [{"a": 0.5}], None)
    assert first["when"] == "1970-01-01 00:00:00"


def test_several_inputs_become_one_table_in_their_order(texts: Version) -> None:
    for name, start in (("b", 0), ("a", 5)):
        pd.DataFrame({"text": TEXTS[start : start + 5]}).to_csv(f"{name}.csv", index=False)
    assert predicted(texts, "b.csv", "a.csv")["text"].tolist() == TEXTS[:10]


@pytest.mark.parametrize(
    ("kind", "given", "column", "words"),
    [
        ("texts", "gone.csv", None, "no file matches"),
        ("texts", "*.nothing", None, "no file matches"),
        ("texts", "empty", None, "no texts are found here"),
        ("images", "empty", None, "no images are found here"),
        ("texts", "rows.csv", "words", "no column words"),
        ("images", "rows.csv", None, "no column image or path"),
        ("texts", "numbers.parquet", None, "the column text holds int64, not texts"),
        ("texts", "photo.png", None, "small reads texts, not what is in this file"),
        ("images", "notes.txt", None, "small reads images, not what is in this file"),
        ("texts", "report.docx", None, ".csv, .jsonl, .parquet or .tsv"),
        ("texts", "broken.parquet", None, "the table cannot be read"),
        ("texts", "broken.jsonl", None, "the table cannot be read"),
        ("texts", "deep.jsonl", None, "lists and objects lie in more than 100 others"),
        ("texts", "lines.jsonl", None, "Expecting value"),
        ("texts", "twice.csv", None, "several columns text"),
    ],
)
def test_what_cannot_be_predicted_is_one_clear_error(
    kind: str, given: str, column: str | None, words: str, request: pytest.FixtureRequest
) -> None:
    tmp_path = Path.cwd()
    (tmp_path / "empty").mkdir()
    for name in ("photo.png", "notes.txt", "report.docx", "broken.parquet"):
        (tmp_path / name).write_text("words\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\nwords\n')
    (tmp_path / "deep.jsonl").write_text('{"text": "a", "m": ' + "[" * 50_000 + "]" * 50_000 + "}\n")
    (tmp_path / "lines.jsonl").write_text('{"text": "a", "m": ' + '{"}":\n' * 500 + "1" + "}" * 500 + "}\n")
    (tmp_path / "rows.csv").write_text("text\na delight\n")
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    pd.DataFrame({"text": [1]}).to_parquet("numbers.parquet")
    with pytest.raises(HeadstartError) as caught:
        predicted(request.getfixturevalue(kind), given, column=column)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) < 8
    assert not (tmp_path / "answers.parquet").exists()


def test_inputs_of_different_columns_are_refused_before_anything_is_predicted(texts: Version) -> None:
    pd.DataFrame({"text": ["a"]}).to_csv("a.csv", index=False)
    pd.DataFrame({"text": ["b"], "key": ["1"]}).to_csv("b.csv", index=False)
    with pytest.raises(HeadstartError, match="different columns"):
        predicted(texts, "a.csv", "b.csv")


def test_lines_that_may_not_be_read_are_not_taken_for_an_output_that_cannot_be_written(
    texts: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("a delight\n")

    def refuse(file: str, **options: Any) -> None:  # who runs the tests may be allowed everything
        raise PermissionError(errno.EACCES, "Permission denied", file)

    monkeypatch.setattr(inputs, "open", refuse, raising=False)
    with pytest.raises(HeadstartError, match="the lines cannot be read") as caught:
        scoring.score(texts, ["notes.txt"], tmp_path / "answers.csv")
    assert caught.value.where == "notes.txt"
    assert "Permission denied" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "notes.txt"]


@pytest.mark.parametrize("given", ["photos", "photos/hidden/list.csv"])
def test_a_folder_that_may_not_be_read_is_one_clear_error(
    given: str, images: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos/hidden").mkdir(parents=True)
    real = {name: getattr(Path, name) for name in ("iterdir", "exists")}

    def refuse(name: str) -> Callable[[Path], Any]:  # who runs the tests may be allowed everything
        def called(path: Path) -> Any:
            if "hidden" in {path.name, path.parent.name}:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real[name](path)

        return called

    for name in real:
        monkeypatch.setattr(Path, name, refuse(name))
    with pytest.raises(HeadstartError, match="cannot be read") as caught:
        predicted(images, given)
    assert "Permission denied" in str(caught.value)
    assert caught.value.where in {"photos/hidden", "photos/hidden/list.csv"}


@pytest.mark.parametrize(
    ("output", "words"),
    [("folder.csv", "the output is a folder"), ("rows.csv/answers.csv", "the output lies below a file")],
)
def test_an_output_that_cannot_be_a_file_is_refused_before_anything_is_predicted(
    output: str, words: str, texts: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.csv").write_text("text\na delight\n")
    (tmp_path / "folder.csv").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(scoring, "scored", None)
    with pytest.raises(HeadstartError, match=words):
        scoring.score(texts, ["rows.csv"], Path(output))
    assert sorted(tmp_path.iterdir()) == before


def test_objects_without_a_key_are_refused_for_parquet_alone(texts: Version, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a delight", "m": {}}\n')
    with pytest.raises(HeadstartError, match="Parquet cannot hold these columns") as caught:
        predicted(texts, "rows.jsonl")
    assert "'m'" in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]
    scoring.score(texts, ["rows.jsonl"], tmp_path / "answers.jsonl")
    assert json.loads((tmp_path / "answers.jsonl").read_text())["m"] == {}


@pytest.mark.parametrize("suffix", READERS)
def test_of_two_runs_with_one_output_the_second_is_refused_and_the_first_is_whole(
    suffix: str, texts: Version, tmp_path: Path
) -> None:
    output, pipe = tmp_path / f"answers{suffix}", tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    (tmp_path / "rows.csv").write_text("text\na bore\n")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(scoring.score, texts, [str(pipe)], output)
        with pipe.open("w") as lines:  # which the first run has opened by then, and its output before it
            with pytest.raises(HeadstartError, match="another run is writing this file"):
                scoring.score(texts, ["rows.csv"], output)
            lines.write("a delight\n" * 3)
        assert first.result().rows == 3
    assert READERS[suffix](output)["text"].tolist() == ["a delight"] * 3
    scoring.score(texts, ["rows.csv"], output)
    assert READERS[suffix](output)["text"].tolist() == ["a bore"]
    assert sorted(tmp_path.iterdir()) == sorted([output, pipe, tmp_path / "rows.csv"])


def test_an_output_of_unknown_kind_is_refused(texts: Version, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na delight\n")
    with pytest.raises(HeadstartError, match=r"written as \.xlsx"):
        scoring.score(texts, ["rows.csv"], Path("answers.xlsx"))


def test_a_failure_half_way_leaves_the_earlier_output_and_nothing_else(
    texts: Version, tmp_path: Path
) -> None:
    table = pa.table({"text": TEXTS * 500})
    pq.write_table(table, "rows.parquet", compression="none", use_dictionary=False, data_page_size=4096)
    whole = (tmp_path / "rows.parquet").read_bytes()
    # Noise in the pages of later rows; the beginning and the footer are sound.
    damaged = whole[: len(whole) // 2] + b"\xff" * 20_000 + whole[len(whole) // 2 + 20_000 :]
    (tmp_path / "rows.parquet").write_bytes(damaged)
    (tmp_path / "answers.csv").write_text("earlier")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(HeadstartError, match="the table cannot be read"):
        scoring.score(texts, ["rows.parquet"], tmp_path / "answers.csv", chunk=100)
    assert (tmp_path / "answers.csv").read_text() == "earlier"
    assert sorted(tmp_path.iterdir()) == before


SCORE = """
import sys
from pathlib import Path
from headstart import scoring
from tests import versions
folder, given, output, chunk = sys.argv[1:]
done = scoring.score(versions.read(Path(folder)), [given], Path(output) if output else None, chunk=int(chunk))
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(done.rows, int(peak.split()[1]) / 1024, file=sys.stderr)
"""


def command(folder: Path, given: str, output: str, chunk: int) -> list[str]:
    return [sys.executable, "-c", SCORE, str(folder), given, output, str(chunk)]


def environment(tmp_path: Path) -> dict[str, str]:
    return isolated(tmp_path) | {devices.DEVICE: "cpu", "PYTHONPATH": str(ROOT)}


def test_lines_from_a_pipe_are_answered_before_the_pipe_ends(texts_folder: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command(texts_folder, "-", "", 1),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(tmp_path),
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("a delight, really\n")
        process.stdin.flush()
        assert process.stdout.readline() == "text,label,p:good,p:bad,error\n"
        text, label, *_ = next(csv.reader([process.stdout.readline()]))
        assert text == "a delight, really"
        assert label in {"good", "bad"}
        process.stdin.write("bright\n")
        process.stdin.close()
        assert len(process.stdout.readlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "suffix",
    [pytest.param(suffix, marks=() if suffix == ".parquet" else pytest.mark.long) for suffix in READERS],
)
def test_a_kill_half_way_leaves_the_earlier_output(suffix: str, texts_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / f"answers{suffix}"
    output.write_text("earlier")
    with subprocess.Popen(
        command(texts_folder, "-", str(output), 1),
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(tmp_path),
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write("a delight\n" * 5)
        process.stdin.flush()
        partial, deadline = tmp_path / f".answers{suffix}.partial", time.monotonic() + 120
        while not partial.exists() or not partial.stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert output.read_text() == "earlier"
    again = subprocess.run(
        command(texts_folder, "-", str(output), 1), input="a delight\n", env=environment(tmp_path), text=True
    )
    assert again.returncode == 0
    assert len(READERS[suffix](output)) == 1
    assert not partial.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "suffix",
    [pytest.param(suffix, marks=() if suffix == ".csv" else pytest.mark.long) for suffix in READERS],
)
def test_ten_times_the_rows_take_no_more_memory(suffix: str, texts_folder: Path, tmp_path: Path) -> None:
    peaks = []
    for rows in (2_000, 20_000):
        # What is kept of all rows at once, 6 kB of each, would be 108 MB more.
        table = pa.table({"text": ["a delight"] * rows, "notes": [f"{i:6000}" for i in range(rows)]})
        path = tmp_path / f"rows{suffix}"
        if suffix == ".parquet":
            pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
        elif suffix == ".csv":
            table.to_pandas().to_csv(path, index=False)
        else:
            table.to_pandas().to_json(path, orient="records", lines=True)
        del table
        done = subprocess.run(
            command(texts_folder, str(path), str(tmp_path / f"answers{suffix}"), 500),
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        )
        counted, peak = done.stderr.split()[-2:]
        assert int(counted) == rows
        peaks.append(float(peak))
    assert peaks[1] < peaks[0] + 50, peaks


@pytest.mark.long
def test_a_network_that_is_compiled_on_the_way_gives_the_same_answers(
    texts: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd.DataFrame({"text": TEXTS}).to_parquet("rows.parquet")
    plain = predicted(texts, "rows.parquet")
    monkeypatch.setitem(features.COMPILE_FROM, "text", 6)
    made = []
    compiled = scoring._compiled
    monkeypatch.setattr(scoring, "_compiled", lambda version: made.append(compiled(version)) or made[-1])
    rows = predicted(texts, "rows.parquet", chunk=5)
    assert len(made) == 1
    assert made[0].extractor.compiled is not None  # it did not fall back
    assert rows["label"].tolist() == plain["label"].tolist()
    assert rows["p:good"].to_numpy() == pytest.approx(plain["p:good"].to_numpy(), abs=1e-4)


@pytest.fixture(params=["moods", "photos"])
def finished(request: pytest.FixtureRequest, photos: Ran, tmp_path: Path) -> tuple[Project, str]:
    """A project with registered models, and the name of one."""
    return photos.project.copy(tmp_path / "project"), request.param


@pytest.mark.slow
def test_the_command_names_what_was_evaluated(finished: tuple[Project, str], tmp_path: Path) -> None:
    project, name = finished
    evaluated = pd.read_parquet(project.root / f"model/{name}/predictions.parquet").set_index("id")
    rows = pd.read_parquet(project.root / f"manifest/{name}/manifest.parquet")
    if name == "photos":
        rows["path"] = [str(project.root / "data/photos" / path) for path in rows["path"]]
    rows.to_parquet(tmp_path / "rows.parquet")
    done = project(
        "headstart", "predict", name, str(tmp_path / "rows.parquet"), "--version", "candidate",
        "--output", str(tmp_path / "answers.parquet"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{len(rows)} rows in ")
    answers = pd.read_parquet(tmp_path / "answers.parquet").set_index("id").loc[evaluated.index]
    columns = [column for column in evaluated if column.startswith("p:")]
    expected = evaluated[columns].to_numpy()
    assert answers[columns].to_numpy() == pytest.approx(expected, abs=2e-2)  # bfloat16 has 8 bits
    clear = abs(expected[:, 0] - expected[:, 1]) > 4e-2
    named = evaluated[columns].idxmax(axis=1).str.removeprefix("p:")
    assert clear.mean() > 0.5
    assert (answers["label"] == named)[clear].all()


@pytest.mark.slow
def test_the_command_prints_csv_and_tells_how_many_rows_failed(finished: tuple[Project, str]) -> None:
    project, name = finished
    if name == "photos":
        lines = ["start/photos/dark/000.png", "start/photos/none.png"]
    else:
        lines = ["a delight, truly", ""]
    done = subprocess.run(
        ["headstart", "predict", name, "-", "--version", "1"],
        input="\n".join(lines) + "\n",
        cwd=project.root,
        env=project.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = csv.DictReader(done.stdout.splitlines())
    assert first["label"] and not first["error"]
    assert second["error"] and not second["label"]
    assert "1 failed" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_outside_a_project_and_without_a_store_the_command_says_where_to_go(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headstart.cli", "predict", "moods", "-"],
        cwd=tmp_path,
        env=isolated(tmp_path),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert "change into the folder that holds dvc.yaml" in done.stderr
    assert "Traceback" not in done.stderr
