"""The inbox: what is complete is taken, whatever is bad stays out, and no kill loses or doubles a thing."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import time
import uuid
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFile
from PIL import Image

from headstart import archives, batches, inbox, validation
from headstart.batches import Kind
from headstart.errors import HeadstartError
from headstart.layout import Layout
from headstart.recipe import Recipe
from tests import cached, examples
from tests.s3 import BUCKET, s3

TEXTS: dict[str, Any] = {"adapter": "table", "columns": {"text": "body", "label": "mood", "domain": "shop"}}
PICTURES: dict[str, Any] = {"adapter": "image_folder"}
FORK = multiprocessing.get_context("fork")


def recipe(validate: dict[str, Any] | None = None, **ingest: Any) -> Recipe:
    given = {"source": "file:elsewhere.csv", "settle": 0} | ingest
    return cached.recipe(ingest=given, validate=validate or TEXTS)


def texts(root: Path) -> Layout:
    layout = Layout(root, "case")
    examples.write_texts(layout.raw / "t.csv")
    return layout


def pictures(root: Path) -> Layout:
    layout = Layout(root, "case")
    examples.write_images(layout.raw, 10)
    return layout


def drop(layout: Layout, name: str, text: str = "body,mood,shop\na new text,happy,a\n") -> Path:
    path = layout.inbox / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def take(chosen: Recipe, layout: Layout) -> dict[str, pd.DataFrame]:
    """What receiving does, but for DVC; the reasons of each batch."""
    inbox.bring(chosen, layout)
    found = {}
    for name in inbox.pending(layout):
        found[name] = inbox.check(chosen, layout, name)
        if found[name].empty:
            inbox.accept(layout, name)
        else:
            inbox.reject(layout, name, found[name])
    return found


def digest(folder: Path) -> str:
    """Of names and contents."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(
            f"{path.relative_to(folder)}\0".encode() + (path.read_bytes() if path.is_file() else b"")
        )
    return whole.hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# What is complete


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = [time.time()]
    monkeypatch.setattr(inbox.time, "time", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_a_batch_waits_until_nothing_of_it_has_changed_for_a_while(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    layout, chosen = texts(tmp_path), recipe(settle=30)
    folder = drop(layout, "monday/part1.csv").parent
    for change in (
        lambda: None,
        lambda: (folder / "part2.csv").write_text("body"),
        lambda: (folder / "part2.csv").write_text("body,mood"),
        lambda: os.utime(folder / "part2.csv", (1, 1)),
        lambda: (folder / "part2.csv").rename(folder / "part3.csv"),
    ):
        change()
        assert inbox.waiting(chosen, layout) == []
        clock(29)
        assert inbox.waiting(chosen, layout) == []
    clock(1)
    assert inbox.waiting(chosen, layout) == ["monday"]


def test_a_file_that_looks_old_counts_from_when_it_was_first_seen(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    layout, chosen = texts(tmp_path), recipe(settle=30)
    old = drop(layout, "monday.csv")
    os.utime(old, (0, 0))  # as `cp -p` and rsync leave it
    assert inbox.waiting(chosen, layout) == []
    clock(31)
    assert inbox.waiting(chosen, layout) == ["monday.csv"]
    old.unlink()
    assert inbox.waiting(chosen, layout) == []
    os.utime(drop(layout, "monday.csv"), (0, 0))  # gone for a moment: it counts anew
    assert inbox.waiting(chosen, layout) == []


def test_a_clock_that_was_put_back_holds_nothing_up_for_longer(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    layout, chosen = texts(tmp_path), recipe(settle=30)
    drop(layout, "monday.csv")
    assert inbox.waiting(chosen, layout) == []
    clock(-1e6)
    assert inbox.waiting(chosen, layout) == []
    clock(30)
    assert inbox.waiting(chosen, layout) == ["monday.csv"]


@pytest.mark.parametrize(
    "name", ["m.csv.part", "m.csv.partial", "m.TMP", "m.zip.crdownload", "m.filepart", ".m.csv"]
)
def test_what_a_program_has_not_finished_is_no_batch(name: str, tmp_path: Path) -> None:
    layout = texts(tmp_path)
    drop(layout, name)
    assert take(recipe(), layout) == {}
    assert (layout.inbox / name).exists()


def test_a_batch_with_an_unfinished_file_inside_or_beside_it_waits_and_says_so(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    inner = drop(layout, "monday/rest.csv.part")
    drop(layout, "monday/first.csv")
    drop(layout, "sunday.csv", "")  # as a browser leaves it while it downloads
    beside = drop(layout, "sunday.csv.part")
    (layout.inbox / "empty").mkdir()
    waits = {arrival.name: arrival.waits for arrival in inbox.look(recipe(), layout)}
    assert waits == {"monday": "/monday/rest.csv.part is not finished", "sunday.csv": ".part is not finished"}
    inner.rename(inner.with_suffix(""))
    beside.rename(layout.inbox / "sunday.csv")
    assert inbox.waiting(recipe(), layout) == ["monday", "sunday.csv"]


def test_a_batch_that_changes_while_it_is_copied_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = texts(tmp_path)
    batch, place = drop(layout, "monday.csv"), archives.place

    def meanwhile(*given: Any, **named: Any) -> None:
        place(*given, **named)
        batch.write_text("body,mood,shop\na text that grew,happy,a\n")

    with monkeypatch.context() as patch:
        patch.setattr(archives, "place", meanwhile)
        assert take(recipe(), layout) == {}
    assert batch.exists() and not list(layout.quarantine.iterdir())
    assert take(recipe(), layout)["monday"].empty
    assert "grew" in (layout.batches / "monday/monday.csv").read_text()


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("name", ["monday.csv", "monday.zip", "monday"])
def test_a_batch_that_is_withdrawn_while_it_or_another_is_copied_is_passed_over(
    name: str, looked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, chosen, place = texts(tmp_path), recipe(), archives.place
    drop(layout, "a.csv")
    if name == "monday":
        drop(layout, "monday/part1.csv")
    else:
        drop(layout, name)
    drop(layout, "tuesday.csv")

    def withdrawn(came: Path, *given: Any, **named: Any) -> None:
        if came.name == ("a.csv" if looked else name):
            path = layout.inbox / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            if looked:  # by somebody else
                inbox.look(chosen, layout)
        place(came, *given, **named)

    monkeypatch.setattr(archives, "place", withdrawn)
    assert take(chosen, layout).keys() == {"tuesday"} | {"a"}
    assert not list(layout.quarantine.iterdir())
    assert not list(layout.inbox.iterdir())


def test_a_file_that_is_withdrawn_from_a_store_while_another_is_copied_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, prefix, place = texts(tmp_path), f"memory://{uuid.uuid4().hex}/new", archives.place
    store, root = fsspec.url_to_fs(prefix)
    for name in ("a.csv", "monday.csv"):
        store.pipe(f"{root}/{name}", b"body,mood,shop\na new text,happy,a\n")

    def withdrawn(*given: Any, **named: Any) -> None:
        store.rm(f"{root}/monday.csv")
        place(*given, **named)

    monkeypatch.setattr(archives, "place", withdrawn)
    assert take(recipe(inbox=prefix), layout).keys() == {"a"}
    assert not list(layout.quarantine.iterdir())


def test_the_source_is_no_batch_though_it_lies_in_the_inbox(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    shutil.copytree(layout.raw, layout.inbox)
    (layout.inbox / "start").mkdir()
    shutil.copy(next(layout.raw.rglob("*.png")), layout.inbox / "start/x.png")
    assert take(recipe(PICTURES, source="file:inbox/case/start"), layout).keys() == {"dark", "light"}
    assert files(layout.inbox) == ["start/x.png"]


@pytest.mark.parametrize("source", ["file:inbox/case", "file:inbox", "file:."])
def test_a_source_that_holds_the_inbox_is_an_error(source: str, tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    layout.inbox.mkdir(parents=True)
    with pytest.raises(HeadstartError, match="the source holds the inbox") as caught:
        take(recipe(PICTURES, source=source), layout)
    assert "another folder in `ingest: inbox:`" in str(caught.value)


# What becomes of it


def test_a_table_an_archive_and_a_folder_become_batches_in_the_order_they_came(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    examples.write_images(tmp_path / "new", 5, seed=1)
    layout.inbox.mkdir(parents=True)
    for name, kind in (("b", "zip"), ("a", "gztar"), ("c", "")):
        if kind:
            shutil.make_archive(str(layout.inbox / name), kind, tmp_path / "new")
        else:
            shutil.copytree(tmp_path / "new", layout.inbox / name)
        assert inbox.waiting(recipe(PICTURES), layout)[-1].startswith(name)
    assert all(reasons.empty for reasons in take(recipe(PICTURES), layout).values())
    assert batches.names(layout) == ["b", "a", "c"]
    for name in "abc":
        (layout.batches / name / ".batch.json").unlink()
        assert digest(layout.batches / name) == digest(tmp_path / "new")
    assert files(layout.inbox) == []
    assert not list(layout.quarantine.iterdir())


def test_a_name_that_was_there_before_is_numbered_and_an_odd_one_is_made_safe(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    given = ["monday.csv", "Monday.jsonl", "monday.csv", "ü .._x;rm -rf.csv", "- .csv"]
    for number, name in enumerate(given):
        rows = {"body": [f"number {number}"], "mood": ["happy"], "shop": ["a"]}
        table = pd.DataFrame(rows)
        json_lines = table.to_json(orient="records", lines=True)
        drop(layout, name, json_lines if name.endswith("jsonl") else table.to_csv(index=False))
        take(recipe(), layout)
    assert batches.names(layout) == ["monday", "Monday-2", "monday-3", "_x-rm--rf", "batch"]


def test_a_damaged_archive_is_rejected_and_kept_as_it_came(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    damaged = drop(layout, "monday.zip", "PK no zip at all")
    content = damaged.read_bytes()
    with zipfile.ZipFile(layout.inbox / "evil.zip", "w") as archive:
        archive.writestr("../../evil.csv", "body,mood,shop\n")
    before = digest(layout.raw)
    reasons = take(recipe(), layout)
    assert set(reasons) == {"monday", "evil"}
    assert "damaged" in reasons["monday"]["value"].iloc[0]
    assert "leads out of it" in reasons["evil"]["value"].iloc[0]
    assert (layout.quarantine / "monday/monday.zip").read_bytes() == content
    assert files(layout.quarantine / "monday") == [".batch.json", "monday.zip", "reasons.csv"]
    assert digest(layout.raw) == before
    assert take(recipe(), layout) == {}  # once is enough


def linked_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def folder_with(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        (path / name).parent.mkdir(parents=True)
        (path / "rows.csv").write_text("body,mood,shop\na new text,happy,a\n")
        make(path / name)

    return made


def deep(path: Path) -> None:
    for _ in range(150):
        path.mkdir()
        path = path / "d"
    path.write_text("body,mood,shop\n")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (linked_to("../../private"), "a link"),
        (linked_to("../../private/secret.csv"), "a link"),
        (linked_to("nowhere"), "a link"),
        (os.mkfifo, "pipe"),
        (folder_with("secret.csv", linked_to("../../../private/secret.csv")), "a link"),
        (folder_with("inner/private", linked_to("../../../../private")), "a link"),
        (folder_with("pipe", os.mkfifo), "pipe"),
        (folder_with(".batch.json/x", Path.touch), ".batch.json"),
        (deep, "more than 100 folders"),
    ],
)
def test_a_link_and_whatever_is_no_file_is_rejected_where_it_lies_and_holds_nothing_up(
    make: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    layout, chosen = texts(tmp_path), recipe()
    (tmp_path / "private").mkdir()
    (tmp_path / "private/secret.csv").write_text("body,mood,shop\nsecret,happy,a\n")
    layout.inbox.mkdir(parents=True)
    make(layout.inbox / "evil")
    drop(layout, "good.csv")
    reasons = take(chosen, layout)
    assert words in reasons["evil"]["value"].iloc[0]
    assert batches.names(layout) == ["good"]
    assert files(layout.quarantine / "evil") == [".batch.json", "reasons.csv"]
    assert [path.name for path in layout.inbox.iterdir()] == ["evil"]
    assert take(chosen, layout) == {}  # once is enough
    waits = {arrival.name: arrival.waits for arrival in inbox.look(chosen, layout)}
    assert waits == {"evil": "it is rejected until it changes"}
    (layout.inbox / "evil").rename(tmp_path / "away")
    drop(layout, "evil", "body,mood,shop\na text that is mended,happy,a\n").rename(layout.inbox / "evil.csv")
    assert take(chosen, layout)["evil-2"].empty


def test_a_link_that_a_kill_left_half_deleted_is_deleted_and_not_what_it_leads_to(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    drop(layout, "good.csv")
    (layout.inbox / ".evil.gone").symlink_to(layout.raw)
    assert take(recipe(), layout)["good"].empty
    assert list(layout.inbox.iterdir()) == []
    assert (layout.raw / "t.csv").exists()


def test_what_a_hidden_link_leads_to_is_passed_over(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    (tmp_path / "private").mkdir()
    (tmp_path / "private/secret.csv").write_text("body,mood,shop\nsecret,happy,a\n")
    drop(layout, "monday/rows.csv")
    (layout.inbox / "monday/.private").symlink_to(tmp_path / "private")
    (layout.inbox / "monday/.#rows.csv").symlink_to("someone@host.123:456")  # an editor's lock
    assert take(recipe(), layout)["monday"].empty
    assert files(layout.batches / "monday") == [".batch.json", "rows.csv"]


@pytest.mark.parametrize(
    "name", [".batch.json/x", ".batch.json.partial/x", ".reasons.csv.partial/x", "d/" * 1000]
)
@pytest.mark.parametrize("label", ["happy", "angry"])
def test_an_archive_with_names_of_our_own_or_without_end_is_rejected_and_holds_nothing_up(
    name: str, label: str, tmp_path: Path
) -> None:
    layout = texts(tmp_path)
    layout.inbox.mkdir(parents=True)
    with tarfile.open(layout.inbox / "evil.tar.gz", "w:gz") as archive:
        for inside, content in (("rows.csv", f"body,mood,shop\nnew,{label},a\n"), (f"{name}x", "x")):
            info = tarfile.TarInfo(inside)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    drop(layout, "good.csv")
    reasons = take(recipe(), layout)
    assert reasons["evil"]["rule"].tolist() == ["readable"]
    said = reasons["evil"]["value"].iloc[0]
    assert name.partition("/x")[0] in said or "more than 100 folders" in said
    assert batches.names(layout) == ["good"]
    assert files(layout.quarantine / "evil") == [".batch.json", "evil.tar.gz", "reasons.csv"]
    assert files(layout.inbox) == []


@pytest.mark.parametrize("name", [b"n" * 250 + b".csv", b"caf\xe9.zip"])
def test_a_name_may_be_as_long_as_a_disk_allows_and_of_any_bytes(name: bytes, tmp_path: Path) -> None:
    layout = texts(tmp_path)
    drop(layout, os.fsdecode(name))
    drop(layout, "good.csv")
    reasons = take(recipe(), layout)
    assert len(reasons) == 2 and reasons["good"].empty
    assert files(layout.inbox) == []


@pytest.mark.parametrize(
    "name",
    [
        "../x.csv",
        "a/../x.csv",
        "a//x.csv",
        "n" * 300,
        "x\0.csv",
        "d/" * 200 + "x",
        "d/" * 2000 + "x",
        "x.csv/y",
    ],
)
def test_what_a_store_names_as_no_file_can_be_named_is_rejected_where_it_lies(
    name: str, tmp_path: Path
) -> None:
    layout, prefix = texts(tmp_path), f"memory://{uuid.uuid4().hex}/new"
    store, root = fsspec.url_to_fs(prefix)
    for given in ("good.csv", "evil/x.csv", f"evil/{name}"):
        store.store[f"{root}/{given}"] = MemoryFile(
            store, f"{root}/{given}", b"body,mood,shop\nnew,happy,a\n"
        )
    reasons = take(recipe(inbox=prefix), layout)
    assert not reasons["evil"].empty and reasons["good"].empty
    assert f"{root}/evil/{name}" in store.store
    assert f"{root}/good.csv" not in store.store
    assert take(recipe(inbox=prefix), layout) == {}


def test_a_rejected_batch_that_is_mended_in_its_place_or_brought_again_is_looked_at_anew(
    tmp_path: Path,
) -> None:
    layout = texts(tmp_path)
    for name in ("one.csv", "two.csv", "three.csv"):
        drop(layout, name, f"body,mood,shop\n{name} is here,angry,a\n")
    assert all(len(reasons) == 1 for reasons in take(recipe(), layout).values())
    for name in ("one", "two", "three"):
        table = layout.quarantine / name / f"{name}.csv"
        table.write_text(table.read_text().replace("angry", "happy"))
    (layout.quarantine / "one/reasons.csv").unlink()
    (layout.quarantine / "two").rename(layout.inbox / "two")
    (layout.quarantine / "three").rename(layout.inbox / "three")
    (layout.inbox / "three/.batch.json").unlink()  # as a copy without hidden files has it
    take(recipe(), layout)
    assert batches.names(layout) == ["one", "three", "two"]
    for name in ("two", "three"):
        assert files(layout.batches / name) == [".batch.json", f"{name}.csv"]


def test_a_rejected_file_that_is_brought_again_as_it_was_is_looked_at_by_the_new_rules(
    tmp_path: Path,
) -> None:
    layout = texts(tmp_path)
    for classes in (["happy", "unhappy"], ["happy", "unhappy", "angry"]):
        came = drop(layout, "monday.csv", "body,mood,shop\na new text,angry,a\n")
        os.utime(came, (1e9, 1e9))
        reasons = take(recipe(TEXTS | {"classes": classes}), layout)
    assert {name: len(table) for name, table in reasons.items()} == {"monday-2": 0}
    assert batches.names(layout) == ["monday-2"]


def test_a_table_that_is_called_as_the_reasons_are_is_a_batch_like_any_other(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    drop(layout, "monday/reasons.csv")
    assert take(recipe(), layout)["monday"].empty
    assert files(layout.batches / "monday") == [".batch.json", "batch-reasons.csv"]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_an_inbox_may_be_a_prefix_of_a_store(
    kind: str, tmp_path: Path, clock: Callable[[float], None]
) -> None:
    layout = pictures(tmp_path)
    prefix = f"memory://{uuid.uuid4().hex}/new" if kind == "memory" else f"file://{tmp_path}/store/new"
    chosen = recipe(PICTURES, inbox=prefix, settle=30)
    assert inbox.waiting(chosen, layout) == []  # there is no such prefix yet
    store, root = fsspec.url_to_fs(prefix)
    examples.write_images(tmp_path / "new", 5, seed=1)
    store.makedirs(root)
    store.put(str(tmp_path / "new"), f"{root}/night", recursive=True)
    shutil.make_archive(str(tmp_path / "day"), "zip", tmp_path / "new")
    store.put(str(tmp_path / "day.zip"), f"{root}/day.zip")
    store.pipe(f"{root}/odd.zip", b"no zip")
    assert inbox.waiting(chosen, layout) == []
    clock(20)
    store.put(str(tmp_path / "new/dark/000.png"), f"{root}/night/dark/more.png")
    clock(10)
    assert inbox.waiting(chosen, layout) == ["day.zip", "odd.zip"]
    clock(30)
    reasons = take(chosen, layout)
    assert {name for name, found in reasons.items() if not found.empty} == {"odd"}
    assert sorted(batches.names(layout)) == ["day", "night"]
    assert len(files(layout.batches / "night")) == 12
    assert store.find(root) == []


@pytest.mark.parametrize("kind", ["memory", pytest.param("s3", marks=[pytest.mark.slow, pytest.mark.long])])
def test_a_name_that_looks_like_a_pattern_takes_no_other_batch_along(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = texts(tmp_path)
    with ExitStack() as running:
        prefix = f"memory://{uuid.uuid4().hex}/new"
        if kind == "s3":
            for name, value in running.enter_context(s3(tmp_path, dict(os.environ))).items():
                monkeypatch.setenv(name, value)
            prefix = f"s3://{BUCKET}/new"
        store, root = fsspec.url_to_fs(prefix, skip_instance_cache=True)
        given = ["*", "*.csv", "[a-z].csv", "?.csv", "a::b.csv", "b.csv", "night/*.csv", "night/deep/[x].csv"]
        for number, name in enumerate(given):
            store.pipe(f"{root}/{name}", b"body,mood,shop\nrow %d,happy,a\n" % number)
        inbox.look(chosen := recipe(inbox=prefix), layout)
        taken = inbox.Inbox.of(chosen, layout)
        taken.remove("*", taken.fingerprint("*"))
        assert taken.names() == ["*.csv", "?.csv", "[a-z].csv", "a::b.csv", "b.csv", "night"]
        assert take(chosen, layout).keys() == {"batch", "a-z", "batch-2", "a-b", "b", "night"}
        kept = [*layout.quarantine.rglob("*.csv"), *layout.batches.rglob("*.csv")]
        rows = {path.read_text().splitlines()[1] for path in kept if path.name != "reasons.csv"}
        assert rows == {f"row {number},happy,a" for number in range(1, 8)}
        store.invalidate_cache()
        assert set(store.find(root)) <= {root}
        assert kind == "s3" or not store.exists(f"{root}/night")  # an empty folder is none in S3


def test_a_store_that_is_not_there_is_an_error_that_may_pass(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    with pytest.raises(HeadstartError) as caught:
        inbox.waiting(recipe(inbox="http://user:secret@127.0.0.1:9/new"), layout)
    assert caught.value.transient
    assert "secret" not in str(caught.value)


# What is good


def test_a_batch_is_rejected_whole_with_every_reason_and_touches_nothing(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    night = layout.inbox / "night"
    examples.write_images(night, 5, seed=1)
    (night / "dark/000.png").write_bytes(b"no picture")
    Image.new("L", (8, 8)).save(night / "dark/001.png")
    (night / "purple").mkdir()
    shutil.copy(night / "light/000.png", night / "purple/0.png")
    before = digest(layout.raw)
    reasons = take(recipe(PICTURES), layout)["night"]
    assert set(zip(reasons["rule"], reasons["id"], strict=True)) == {
        ("decodes", "dark/000.png"),
        ("large_enough", "dark/001.png"),
        ("known_label", "purple/0.png"),
    }
    assert digest(layout.raw) == before
    assert len(pd.read_csv(layout.quarantine / "night/reasons.csv")) == 3
    assert len(files(layout.quarantine / "night")) == 13


@pytest.mark.parametrize(
    ("text", "rule", "words"),
    [
        ("body,mood,shop\n,happy,a\n", "text_not_empty", ""),
        ("body,mood,shop\nfine,sad,a\n", "known_label", "sad"),
        ("text,mood,shop\nfine,happy,a\n", "readable", "no column 'body'"),
        ('body,mood,shop\n"fine,happy,a\n', "readable", "cannot be read"),
        ("body,mood,shop\n", "readable", "no rows"),
        ("", "readable", "no column"),
        ("id,label\nnobody,happy\n", "known_id", "no row"),
        ("id,label\n,happy\n", "value_missing", "no id"),
        ("id,label\n", "usable_rows", "no labels"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(text: str, rule: str, words: str, tmp_path: Path) -> None:
    layout = texts(tmp_path)
    drop(layout, "monday.csv", text)
    reasons = take(recipe(), layout)["monday"]
    assert reasons["rule"].tolist() == [rule]
    assert words in reasons["value"].iloc[0]
    assert reasons["do"].iloc[0]


def test_ids_that_other_rows_have_are_refused_but_a_text_may_come_again(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    rows = [f"r{i},text number {i},{'yes' if i % 2 else 'no'}" for i in range(40)]
    (layout.raw / "t.csv").write_text("\n".join(["id,text,label", *rows]) + "\n")
    named = recipe({"adapter": "table", "columns": {"id": "id"}})
    drop(layout, "again.csv", "id,text,label\nr7,another text,no\nr99,one,no\nr99,two,no\n")
    reasons = take(named, layout)["again"]
    assert set(zip(reasons["rule"], reasons["value"], strict=True)) == {
        ("unique_id", "r7"),
        ("unique_id", "r99"),
    }
    drop(layout, "again.csv", "id,text,label\nr100,text number 7,no\n")
    assert take(named, layout)["again-2"].empty


def test_a_missing_label_is_no_fault_and_neither_is_a_single_class(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    drop(layout, "blank.csv", "body,mood,shop\nfine,,a\nfiner,,b\n")
    drop(layout, "one.csv", "body,mood,shop\ngood,happy,a\n")
    assert all(reasons.empty for reasons in take(recipe(), layout).values())
    assert batches.read(layout, "blank", recipe().validate_)["label"].isna().all()


def test_a_new_class_is_welcome_once_the_recipe_names_it(tmp_path: Path) -> None:
    layout = texts(tmp_path)
    drop(layout, "new.csv", "body,mood,shop\nfine,serene,a\n")
    reasons = take(recipe(), layout)["new"]
    assert "validate: classes:" in reasons["do"].iloc[0]
    (layout.quarantine / "new/reasons.csv").unlink()
    assert take(recipe(TEXTS | {"classes": ["happy", "unhappy", "serene"]}), layout)["new"].empty


def test_a_folder_of_a_single_class_keeps_its_class(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    examples.write_images(layout.inbox / "march", 1, seed=1)
    shutil.rmtree(layout.inbox / "march/light")
    (layout.inbox / "march/dark").rename(layout.inbox / "march/2024-03")
    (layout.inbox / "march/dark").mkdir()
    (layout.inbox / "march/2024-03").rename(layout.inbox / "march/dark/2024-03")
    chosen = recipe(PICTURES)
    assert take(chosen, layout)["march"].empty
    assert batches.read(layout, "march", chosen.validate_)["label"].tolist() == ["dark"]


def test_a_batch_without_any_row_of_use_says_why(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    (layout.inbox / "notes").mkdir(parents=True)
    (layout.inbox / "notes/read.me").write_text("no picture")
    reasons = take(recipe(PICTURES), layout)["notes"]
    assert reasons["value"].tolist() == ["1 rows: not an image in a class folder"]
    options = TEXTS | {"target_domain": "b", "source_domains": ["a"]}
    layout = texts(tmp_path / "texts")
    drop(layout, "alien.csv", "body,mood,shop\nfine,happy,z\n")
    given = {"source": "file:elsewhere.csv", "settle": 0}
    chosen = cached.recipe(ingest=given, validate=options, train={"method": "domain_adaptation"})
    assert "neither source nor target" in take(chosen, layout)["alien"]["value"].iloc[0]


@pytest.mark.parametrize("path", ["/{0}", "../../../private.png", "x\0.png"])
def test_a_batch_that_names_pictures_elsewhere_is_rejected(path: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    for place in ("private.png", "data/case/a.png", "data/case/b.png"):
        Image.new("L", (40, 40)).save(tmp_path / place)
    (layout.raw / "labels.csv").write_text("a.png 0.0 mono\nb.png 1.0 mono\n")
    drop(layout, "odd/labels.csv", f"{path.format(tmp_path / 'private.png')} 0.0 mono\n")
    reasons = take(recipe({"adapter": "elpv"}), layout)["odd"]
    assert reasons["rule"].tolist() == ["readable"]
    assert "lead out of the data" in reasons["value"].iloc[0]


def test_an_adapter_that_falls_over_a_batch_rejects_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    layout.raw.mkdir(parents=True)
    (layout.raw / "labels.csv").write_text("a.png 0.0 mono\nb.png 1.0 mono\n")
    drop(layout, "odd/labels.csv", "a b c d e\nf\n")
    reasons = take(recipe({"adapter": "elpv"}), layout)["odd"]
    assert reasons["rule"].tolist() == ["readable"]


def test_late_labels_are_for_known_rows_that_have_none_or_the_same(tmp_path: Path) -> None:
    layout = pictures(tmp_path)
    for name in ("one", "two"):
        (layout.inbox / name).mkdir(parents=True)
        for i, picture in enumerate(sorted(layout.raw.rglob("*.png"))[:4]):
            shutil.copy(picture, layout.inbox / name / f"{name[0] if i > 1 else ''}{i}.png")
    assert all(reasons.empty for reasons in take(recipe(PICTURES), layout).values())
    lines = [
        "o2.png,dark",  # the only one of this name
        "0.png,dark",  # there are two
        ".batches/two/1.png,purple",
        "dark/000.png,dark",  # as it has it
        "dark/001.png,light",
        "nobody.png,dark",
        "t3.png,",
        "o2.png,dark",
    ]
    drop(layout, "labels.csv", "\n".join(["id,label", *lines]) + "\n")
    reasons = take(recipe(PICTURES), layout)["labels"]
    assert dict(zip(reasons["id"], reasons["rule"], strict=True)) == {
        "0.png": "one_row",
        ".batches/two/1.png": "known_label",
        "dark/001.png": "label_differs",
        "nobody.png": "known_id",
        "t3.png": "value_missing",
        "o2.png": "unique_id",
    }
    drop(layout, "labels.csv", "\n".join(["id,label", lines[0], lines[3], ".batches/two/1.png,dark"]) + "\n")
    assert take(recipe(PICTURES), layout)["labels-2"].empty
    assert batches.names(layout, "labels") == ["labels-2"]
    assert batches.names(layout) == ["one", "two"]
    drop(layout, "other.csv", "id,label\no2.png,light\n")  # it has come to have one
    assert take(recipe(PICTURES), layout)["other"]["rule"].tolist() == ["label_differs"]


def test_what_a_late_label_named_it_names_for_ever(tmp_path: Path) -> None:
    layout, chosen = pictures(tmp_path), recipe(PICTURES)

    def camera(day: str, value: int) -> None:
        (layout.inbox / day).mkdir(parents=True)
        Image.new("L", (40, 40), value).save(layout.inbox / day / "0001.png")
        assert take(chosen, layout)[day].empty

    camera("monday", 10)
    drop(layout, "labels.csv", "id,label\n0001.png,dark\n")
    assert take(chosen, layout)["labels"].empty
    camera("tuesday", 20)
    rows = validation.labelled_late(
        validation.completed(batches.everything(layout, chosen.validate_)), batches.late_labels(layout)
    )
    rows = rows[rows["batch"] != ""].set_index("batch")
    assert rows.loc["monday", "label"] == "dark"
    assert pd.isna(rows.loc["tuesday", "label"])


@pytest.mark.parametrize(
    ("came", "mended", "kind"),
    [
        ("id,label,note\na,happy,sure\n", "id,label\na,happy\n", "labels"),
        ("id,label\nnobody,happy\n", "body,mood,shop\na new text,happy,a\n", "rows"),
    ],
)
def test_a_batch_is_what_it_was_mended_to_be(tmp_path: Path, came: str, mended: str, kind: Kind) -> None:
    layout = Layout(tmp_path, "case")
    examples.write_texts(layout.raw / "t.csv")
    table = pd.read_csv(layout.raw / "t.csv").assign(id=lambda rows: "row " + rows.index.astype(str))
    table.loc[0, "id"], table.loc[0, "mood"] = "a", None
    table.to_csv(layout.raw / "t.csv", index=False)
    options = {**TEXTS, "columns": {**TEXTS["columns"], "id": "id"}} if kind == "labels" else TEXTS
    drop(layout, "batch.csv", came)
    assert not take(recipe(options), layout)["batch"].empty
    (layout.quarantine / "batch/batch.csv").write_text(mended, encoding="utf-8")
    (layout.quarantine / "batch/reasons.csv").unlink()
    assert take(recipe(options), layout)["batch"].empty
    assert batches.names(layout, kind) == ["batch"]


# Kills


WRITES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.truncate",
    "os.utime",
    "shutil.rmtree",
}


def killed_at(step: int, work: Callable[[], object]) -> int:
    """Do the work in a process of its own that dies just before it changes anything for the nth time."""

    def run() -> None:
        steps = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal steps
            writes = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if event in WRITES or writes:
                steps += 1
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()
        os._exit(0)

    child = FORK.Process(target=run)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.slow
def test_killed_at_any_write_the_same_command_ends_as_if_undisturbed(tmp_path: Path) -> None:
    def prepared(root: Path) -> Layout:
        layout = Layout(root, "case")
        examples.write_texts(layout.raw / "t.csv", 20)
        drop(layout, "bad.csv", "body,mood,shop\nfine,angry,b\n")
        with zipfile.ZipFile(layout.inbox / "wednesday.zip", "w") as archive:
            archive.writestr("w/w.csv", "body,mood,shop\nwednesday was fine,unhappy,b\n")
        return layout

    def state(layout: Layout) -> dict[str, str]:
        kept = {}
        for folder in (layout.inbox, layout.quarantine, layout.raw):
            for name in files(folder):
                content = (folder / name).read_text()
                if name.endswith(".batch.json"):
                    content = json.dumps({key: json.loads(content).get(key) for key in ("kind", "entry")})
                kept[f"{folder.name}/{name}"] = content
        return kept

    undisturbed = prepared(tmp_path / "undisturbed")
    take(recipe(), undisturbed)
    expected, killed = state(undisturbed), 0
    assert sum(name.endswith(".csv") for name in expected) == 4  # the source, two batches, and reasons
    for step in range(1, 500, 4):  # all of them take a minute
        layout = prepared(tmp_path / str(step))
        ended = killed_at(step, lambda: take(recipe(), layout))  # noqa: B023
        killed += ended == -signal.SIGKILL
        take(recipe(), layout)
        assert state(layout) == expected, step
        shutil.rmtree(layout.root)
        if ended == 0:
            break
    assert killed > 10


def test_a_batch_that_was_told_of_by_a_clock_that_ran_ahead_is_told_of_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = texts(tmp_path)
    drop(layout, "tuesday.csv")
    inbox.look(recipe(), layout)
    inbox.tell(layout, ["tuesday.csv"])
    assert [arrival.told for arrival in inbox.look(recipe(), layout)] == [True]
    now = time.time()
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: now + 10 * inbox.REMIND)
        inbox.tell(layout, ["tuesday.csv"])
    assert [arrival.told for arrival in inbox.look(recipe(), layout)] == [False]
