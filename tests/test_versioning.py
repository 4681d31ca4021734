"""What tasks and flows ask of DVC, of a source and of an inbox, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

from flows import monitor, retrain, watch
from headstart import inbox, runs, trials
from headstart.errors import HeadstartError
from headstart.layout import EARLIER_SPLITS, Layout
from tasks import ingest, receive, versioning
from tests import cached, examples
from tests.conftest import Project, isolated
from tests.servers import Loopback, serving

GRAPH = """
stages:
  train:
    matrix:
      recipe: [moods]
    cmd: echo at work && sleep 300
"""
UNTIL_TOLD = """
stages:
  train:
    matrix:
      recipe: [moods]
    cmd: touch begun && while [ ! -e go ]; do sleep 0.1; done && echo 1 > model/moods
    outs:
      - model/moods
"""
TABLE = {"adapter": "table", "columns": {"text": "body", "label": "mood", "domain": "shop"}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """DVC alone, which knows no stage yet; this process is in it, with its environment."""
    root = tmp_path / "project"
    root.mkdir()
    project = Project(root, isolated(tmp_path))
    project.ok("git", "init", "--quiet")
    project.ok("dvc", "init", "--quiet")
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(root)
    return project


def test_a_stage_ends_when_a_timeout_or_a_stop_ends_the_wait_for_it(project: Project) -> None:
    root = project.root
    (root / "dvc.yaml").write_text(GRAPH)
    asleep: list[psutil.Process] = []

    def stop(line: str) -> None:
        if line == "at work":
            deadline = time.monotonic() + 20
            while not asleep and time.monotonic() < deadline:  # the line comes before what follows it
                for each in psutil.Process(os.getpid()).children(recursive=True):
                    with contextlib.suppress(psutil.Error):  # it ended meanwhile
                        asleep.extend([each] if "sleep 300" in " ".join(each.cmdline()) else [])
            raise TimeoutError

    with pytest.raises(TimeoutError):
        versioning.reproduce(root, "train", "moods", stop)
    assert asleep
    _, alive = psutil.wait_procs(asleep, 20)
    assert not alive


@pytest.fixture
def elsewhere(project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """Another run, in a stage that ends once there is a file `go`."""
    (project.root / "dvc.yaml").write_text(UNTIL_TOLD)
    (project.root / "model").mkdir()
    with subprocess.Popen(
        ["dvc", "repro", "train@moods"],
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as run:
        try:
            deadline = time.monotonic() + 60
            while not (project.root / "begun").exists():
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            yield run
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def test_a_stage_that_another_run_is_in_is_waited_for_however_long_it_trains(
    project: Project, elsewhere: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versioning, "BUSY", 0.0)  # of what nobody holds for long
    told: list[str] = []

    def go(line: str) -> None:
        told.append(line)
        if line.startswith("waiting"):
            (project.root / "go").touch()
            elsewhere.wait(60)

    assert not versioning.is_fresh(project.root, "train@moods")
    versioning.reproduce(project.root, "train", "moods", go)
    assert sum(versioning.BLOCKED in line for line in told) == 1
    assert versioning.is_fresh(project.root, "train@moods")


@pytest.mark.usefixtures("elsewhere")
def test_whoever_has_waited_for_another_run_long_enough_is_told_which_one(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versioning, "STAGE_BUSY", 0.0)
    with pytest.raises(HeadstartError, match="another run is at what") as caught:
        versioning.reproduce(project.root, "train", "moods", lambda line: None)
    assert "dvc repro train@moods" in str(caught.value)
    assert "wait for it, or stop it" in str(caught.value)


def test_a_stage_of_whose_own_something_is_busy_is_not_tried_again(project: Project) -> None:
    (project.root / "dvc.yaml").write_text(GRAPH.replace("sleep 300", "echo the GPU is busy && exit 1"))
    told: list[str] = []
    with pytest.raises(HeadstartError, match="failed with exit code"):
        versioning.reproduce(project.root, "train", "moods", told.append)
    assert told.count("the GPU is busy") == 1


def test_a_source_is_known_by_its_content_whatever_bytes_its_names_are(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/photos/caf\xe9.jpg"))
    odd.parent.mkdir()
    odd.write_bytes(b"1")
    layout = Layout(tmp_path, "photos")
    first = ingest._digest(odd.parent, layout)
    odd.write_bytes(b"22")
    assert ingest._digest(odd.parent, layout) != first


def test_a_source_is_known_by_what_its_links_lead_to(tmp_path: Path) -> None:
    for folder in ("photos", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "elsewhere/1.jpg").write_bytes(b"1")
    (tmp_path / "photos/cat").symlink_to(tmp_path / "elsewhere")
    layout = Layout(tmp_path, "photos")
    first = ingest._digest(tmp_path / "photos", layout)
    (tmp_path / "elsewhere/1.jpg").write_bytes(b"22")
    assert ingest._digest(tmp_path / "photos", layout) != first


def test_another_query_is_another_source_and_its_values_are_told_to_nobody(project: Project) -> None:
    layout, said = Layout(project.root, "case"), list[str]()
    with serving(Loopback(files={"/moods.csv": b"body,mood\n"})) as server:

        def brought(query: str) -> str:
            source = f"{server.url}/moods.csv?{query}"
            return ingest.bring(cached.recipe(ingest={"source": source}), layout, said.append)

        assert brought("month=01&key=secret") == "ran"
        assert brought("month=01&key=secret") == "fresh"
        assert brought("month=02&key=secret") == "ran"
        origin = layout.raw / ".source.json"
        assert "secret" not in origin.read_text()
        now = json.loads(origin.read_text())
        older = {name: fact for name, fact in now.items() if name != "address"}
        origin.write_text(json.dumps(older))  # an older version did not keep it
        assert brought("month=02&key=secret") == "fresh"
        origin.write_text(
            json.dumps(now | {"source": f"{server.url}/moods.csv?month=***&key=***"})
        )  # or more
        assert brought("month=02&key=secret") == "fresh"
        assert brought("secret1") == "ran"
        assert "secret1" not in origin.read_text()
        assert brought("secret2") == "ran"
        plain = {"source": f"{server.url}/moods.csv?v2", "sha256": None}  # or told what had no name
        origin.write_text(json.dumps(plain))
        assert brought("v2") == "fresh"
        assert brought("v3") == "ran"


def test_splits_are_kept_of_rows_that_are_missing_today(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "moods")
    for folder in (layout.raw, layout.manifest):
        folder.mkdir(parents=True)

    def keep(**rows: str) -> bytes:
        table = pd.DataFrame({"id": rows.keys(), "split": rows.values(), "digest": list(rows)}, dtype="str")
        table.to_parquet(layout.manifest / "manifest.parquet", index=False)
        kept = ingest.earlier_splits(layout)
        assert kept is not None
        (layout.raw / EARLIER_SPLITS).write_bytes(kept)
        return kept

    def splits() -> dict[str, str]:
        table = pd.read_parquet(layout.raw / EARLIER_SPLITS)
        assert list(table) == ["id", "split", "digest"]
        return dict(zip(table["id"], table["split"], strict=True))

    older = pd.DataFrame({"id": ["a", "b"], "split": ["test", "val"]})  # from before digests were kept
    older.to_parquet(layout.raw / EARLIER_SPLITS, index=False)
    keep(b="train", c="train")
    assert list(splits().items()) == [("a", "test"), ("b", "train"), ("c", "train")]
    keep(c="train", d="val")
    assert splits() == {"a": "test", "b": "train", "c": "train", "d": "val"}
    whole = keep(a="test", b="train", c="train", d="val")
    (layout.raw / EARLIER_SPLITS).unlink()
    assert keep(a="test", b="train", c="train", d="val") == whole
    (layout.manifest / "manifest.parquet").unlink()
    assert ingest.earlier_splits(layout) == whole


def test_whatever_keeps_from_looking_into_an_inbox_is_no_failed_run_every_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "get_run_logger", logging.getLogger)
    (tmp_path / "recipes").mkdir()
    for given, words in (
        ({"source": "file:t.csv", "inbox": "http://127.0.0.1:9/new"}, "the store did not give the file"),
        ({"source": "file:inbox"}, "the source holds the inbox"),
        ({"sauce": "file:t.csv"}, "the recipe has mistakes"),
    ):
        examples.write_recipe(
            tmp_path / "recipes/moods.yaml",
            ingest=given,
            validate=TABLE,
            fetch={"backbone": "transformers:bert", "source": "file:bert"},
        )
        assert watch._watch(tmp_path, "moods").startswith(f"moods: {words}")


def test_a_rejected_batch_is_told_of_though_a_later_one_ends_the_run(project: Project) -> None:
    layout = Layout(project.root, "moods")
    recipe = cached.recipe(ingest={"source": "file:elsewhere.csv", "settle": 0}, validate=TABLE)
    examples.write_texts(layout.raw / "t.csv")
    layout.inbox.mkdir(parents=True)
    (layout.inbox / "bad.csv").write_text("body,mood,shop\nfine,angry,a\n")
    inbox.look(recipe, layout)
    examples.write_texts(layout.inbox / "good.csv", 60, start=240)
    (project.root / "dvc.lock").write_text("stages:\n  validate@moods:\n")  # whose manifest nobody has
    told: dict[str, HeadstartError] = {}
    with pytest.raises(HeadstartError, match="the splits of the earlier rows are not here"):
        receive.take(recipe, layout, lambda line: None, told.__setitem__)
    assert told.keys() == {"bad"}
    assert told["bad"].what == "the batch bad is rejected: 1 failure"


def noted(project: Project, pid: int, command: str, write: str = "", read: str = "") -> None:
    """Leave a note as DVC does, of a process that may long be gone."""
    note = {"pid": pid, "cmd": command}
    notes = {
        "write": {str(project.root / write): note} if write else {},
        "read": {str(project.root / read): [note]} if read else {},
    }
    (project.root / ".dvc/tmp/rwlock").write_text(json.dumps(notes))


@contextlib.contextmanager
def reading(project: Project, path: str, write: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process that DVC takes for one whose stage reads this path."""
    with subprocess.Popen(["sleep", "300"]) as reader:
        noted(project, reader.pid, "dvc repro", read=path, write=write)
        try:
            yield reader
        finally:
            reader.kill()


def ending(stage: subprocess.Popen[bytes], told: list[str]) -> Callable[[str], None]:
    """A log that keeps what it is told, and ends the stage once somebody waits for it."""

    def log(line: str) -> None:
        told.append(line)
        if line.startswith("waiting"):
            stage.kill()
            stage.wait()

    return log


def test_data_that_a_stage_is_reading_change_only_when_it_has_ended(project: Project) -> None:
    layout = Layout(project.root, "moods")
    recipes = [cached.recipe(ingest={"source": f"file:{i}.csv", "settle": 0}, validate=TABLE) for i in (1, 2)]
    for i, recipe in enumerate(recipes, 1):
        recipe._name = "moods"
        examples.write_texts(project.root / f"{i}.csv", 240 + i)
    ingest.bring(recipes[0], layout, lambda line: None)

    def waits(work: Callable[[Callable[[str], None]], object]) -> None:
        before, told = sorted(layout.raw.rglob("*")), list[str]()
        with reading(project, "data/moods") as reader:

            def log(line: str) -> None:
                told.append(line)
                if line.startswith("waiting"):
                    assert sorted(layout.raw.rglob("*")) == before
                    reader.kill()
                    reader.wait()

            work(log)
        assert any(versioning.BLOCKED in line for line in told)
        assert sorted(layout.raw.rglob("*")) != before
        assert versioning.is_fresh(project.root, "data.dvc")
        assert not json.loads((project.root / ".dvc/tmp/rwlock").read_text())["write"]

    examples.write_texts(layout.inbox / "tuesday.csv", 60, start=300)
    inbox.look(recipes[0], layout)
    waits(lambda log: receive.take(recipes[0], layout, log, lambda name, reasons: None))
    assert (layout.batches / "tuesday").exists()
    waits(lambda log: ingest.bring(recipes[1], layout, log))


def test_data_that_a_stage_reads_for_hours_are_left_alone_and_it_is_named(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versioning, "STAGE_BUSY", 0.0)
    with (
        reading(project, "data/moods") as reader,
        pytest.raises(HeadstartError, match="another run is at what a change of data/moods needs") as caught,
        versioning.writing(project.root, "moods", lambda line: None),
    ):
        raise AssertionError("nobody may come here")
    assert f"(PID {reader.pid}): dvc repro" in str(caught.value)
    (project.root / ".dvc/tmp/rwlock").write_text("{")
    with (
        pytest.raises(HeadstartError, match=r"delete .dvc/tmp/rwlock"),
        versioning.writing(project.root, "moods", lambda line: None),
    ):
        raise AssertionError("nobody may come here")


def test_versioning_waits_for_a_stage_that_reads_the_data_and_says_so(project: Project) -> None:
    examples.write_texts(project.root / "data/moods/moods.csv")
    told: list[str] = []
    with reading(project, "data/moods") as reader:
        versioning.version_data(project.root, "moods", ending(reader, told))
    assert sum(versioning.BLOCKED in line for line in told) == 1
    assert told[-1] == "waiting for that run to end; if no run is under way, delete .dvc/tmp/rwlock"
    assert versioning.is_fresh(project.root, "data.dvc")


def test_a_push_that_fails_says_why_and_one_that_does_not_says_nothing(
    project: Project, tmp_path: Path
) -> None:
    examples.write_texts(project.root / "data/moods/moods.csv")
    told: list[str] = []
    versioning.version_data(project.root, "moods", told.append)
    project.ok("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    assert versioning.push(project.root, "moods", told.append)
    assert not told
    (tmp_path / "file").touch()
    project.ok("dvc", "remote", "modify", "store", "url", str(tmp_path / "file/store"))
    with pytest.raises(HeadstartError) as caught:
        versioning.push(project.root, "moods", told.append)
    assert "Not a directory" in str(caught.value)


def marked(then: str = "long ago", host: str = "", namespace: str = "") -> str:
    """The mark of a process, by default of one that was here before."""
    host, namespace = host or socket.gethostname(), namespace or runs._namespace()
    return f" [{host} {namespace} started {then}]"


ELSEWHERE = {"another machine": {"host": "elsewhere"}, "another container": {"namespace": "pid:[1]"}}


@pytest.mark.parametrize("mark", ["", marked()], ids=["by DVC", "by us"])
def test_a_killed_run_is_no_obstacle_to_the_next_that_has_its_number_and_its_command(
    project: Project, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    monkeypatch.setattr(versioning, "STAGE_BUSY", 0.0)  # nothing is waited for
    examples.write_texts(project.root / "data/moods/moods.csv")
    noted(project, os.getpid(), " ".join(sys.argv) + mark, write="data/moods", read="data")
    if not mark:
        os.utime(project.root / runs.RWLOCK, (0, 0))  # before this process began
    with versioning.writing(project.root, "moods", lambda line: None):
        pass
    versioning.version_data(project.root, "moods", lambda line: None)
    assert versioning.is_fresh(project.root, "data.dvc")


@pytest.mark.parametrize(
    "mark", ["", *(marked(**place) for place in ELSEWHERE.values())], ids=["by DVC", *ELSEWHERE]
)
def test_a_living_run_elsewhere_keeps_its_place_though_its_number_is_this_ones(
    project: Project, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    monkeypatch.setattr(versioning, "STAGE_BUSY", 0.0)
    noted(project, os.getpid(), f"prefect flow-run execute{mark}", write="data/moods", read="model/moods")
    before = (project.root / runs.RWLOCK).read_bytes()
    with (
        pytest.raises(HeadstartError, match=r"if no run is under way, delete .dvc/tmp/rwlock"),
        versioning.writing(project.root, "moods", lambda line: None),
    ):
        raise AssertionError("nobody may come here")
    assert json.loads((project.root / runs.RWLOCK).read_bytes()) == json.loads(before)


def test_a_container_that_was_killed_while_it_took_in_data_is_no_obstacle_to_the_next(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versioning, "STAGE_BUSY", 0.0)
    layout = Layout(project.root, "moods")
    now = runs.started(os.getpid()) or ""
    same_machine = marked(f"{now.split()[0]} 1", host="0a1b2c", namespace="pid:[1]")
    for i, mark in enumerate((marked(namespace="pid:[1]"), same_machine)):
        recipe = cached.recipe(ingest={"source": f"file:{i}.csv", "settle": 0}, validate=TABLE)
        recipe._name = "moods"
        examples.write_texts(project.root / f"{i}.csv", 240 + i)
        noted(project, os.getpid(), " ".join(sys.argv) + mark, write="data/moods")
        ingest.bring(recipe, layout, lambda line: None)
        noted(project, os.getpid(), " ".join(sys.argv) + mark, write="data/moods")
        assert ingest.bring(recipe, layout, lambda line: None) == "fresh"
    noted(project, os.getpid(), " ".join(sys.argv) + marked(host="elsewhere"), write="data/moods")
    with pytest.raises(HeadstartError, match=r"if no run is under way, delete .dvc/tmp/rwlock"):
        ingest.bring(recipe, layout, lambda line: None)  # of another machine nothing is known


def test_a_process_that_this_user_may_not_look_at_counts_as_living(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    def hidden(process: psutil.Process) -> str:
        raise psutil.NoSuchProcess(process.pid)

    def not_yours(process: int, sent: int) -> None:
        raise PermissionError

    run = runs.Run("1", "", socket.gethostname(), os.getpid(), "long ago")
    monkeypatch.setattr(os, "kill", not_yours)
    for look in (denied, hidden) if runs.BOOT.exists() else (denied,):
        monkeypatch.setattr(psutil.Process, "status", look)
        assert not run.dead()
        for mark in ("", marked()):
            assert runs.holds({"pid": os.getpid(), "cmd": f"dvc repro{mark}"}, 0.0)


def test_a_look_for_what_dead_runs_left_changes_nothing_if_they_left_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project.root / runs.RWLOCK
    with reading(project, "data/moods", write="model/moods"):
        for text in (file.read_text(), "", "{", "[]", '{"write": []}', '{"read": {"data": [{}]}}'):
            file.write_text(text)
            os.utime(file, (1, 2**31))
            versioning.forget_writers(project.root)
            assert (file.read_text(), file.stat().st_mtime) == (text, 2**31)
    monkeypatch.delattr("dvc.rwlock._edit_rwlock")  # DVC's own, which it may drop
    versioning.forget_writers(project.root)


def test_a_wait_ends_before_its_flow_does_and_says_what_for() -> None:
    for flow, patience in (
        (retrain.retrain, versioning.STAGE_BUSY),
        (retrain.retrain, versioning.ROWS_BUSY),
        (monitor.monitor, versioning.ROWS_BUSY),
    ):
        assert flow.timeout_seconds and flow.timeout_seconds > patience


@pytest.mark.parametrize("mark", ["", marked()], ids=["by DVC", "by us"])
def test_a_killed_run_is_no_obstacle_if_a_later_process_has_its_number(
    project: Project, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    monkeypatch.setattr(versioning, "STAGE_BUSY", 0.0)
    examples.write_texts(project.root / "data/moods/moods.csv")
    with subprocess.Popen(["sleep", "300"]) as later:
        try:
            noted(project, later.pid, f"dvc repro train@moods{mark}", write="data/moods")
            os.utime(project.root / ".dvc/tmp/rwlock", (0, 0))
            versioning.version_data(project.root, "moods", lambda line: None)
            noted(project, later.pid, f"dvc repro train@moods{mark}", write="data/moods")
            os.utime(project.root / ".dvc/tmp/rwlock", (0, 0))
            with versioning.writing(project.root, "moods", lambda line: None):
                pass
        finally:
            later.kill()


def test_a_run_that_is_under_way_keeps_its_place_though_the_clock_was_set(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versioning, "STAGE_BUSY", 0.0)
    with subprocess.Popen(["sleep", "300"]) as run:
        try:
            noted(project, run.pid, "/usr/bin/sleep 300", write="data/moods")
            os.utime(project.root / ".dvc/tmp/rwlock", (0, 0))  # long before it started, as it seems now
            with (
                pytest.raises(HeadstartError, match="another run is at"),
                versioning.writing(project.root, "moods", lambda line: None),
            ):
                raise AssertionError("nobody may come here")
        finally:
            run.kill()


def test_what_this_process_holds_is_its_own_while_it_asks_dvc_for_something_else(project: Project) -> None:
    with versioning.writing(project.root, "moods", lambda line: None):
        versioning.restore_stage(project.root, "validate@moods")
        notes = json.loads((project.root / ".dvc/tmp/rwlock").read_text())
        assert list(notes["write"]) == [str(project.root / "data/moods")]
    assert '"pid"' not in (project.root / ".dvc/tmp/rwlock").read_text()


def test_rows_that_validate_is_making_anew_are_waited_for_and_whoever_does_not_wait_is_told(
    project: Project,
) -> None:
    layout, told = Layout(project.root, "moods"), list[str]()
    with reading(project, "data/moods", write="manifest/moods") as stage:
        with pytest.raises(HeadstartError, match="validate@moods is running") as caught:
            trials.manifest(layout, "the test rows are missing")
        assert caught.value.transient
        versioning.await_manifest(project.root, "moods", ending(stage, told))
    assert sum(versioning.BLOCKED in line for line in told) == 1
    with pytest.raises(HeadstartError, match="dvc repro validate@moods") as caught:
        trials.manifest(layout, "the test rows are missing")
    assert not caught.value.transient


def test_a_run_that_waits_until_another_has_taken_in_data_says_so(tmp_path: Path) -> None:
    layout, told = Layout(tmp_path, "moods"), list[str]()
    with contextlib.ExitStack() as other:
        other.enter_context(ingest.alone(layout, told.append))
        assert not told

        def log(line: str) -> None:
            told.append(line)
            other.close()

        with ingest.alone(layout, log):
            assert told == ["another run is taking in data: waiting for it to end"]
