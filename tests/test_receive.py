"""Receiving through DVC: what is good is versioned and pushed, what is bad leaves the version as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests import examples
from tests.conftest import Project, clone
from tests.test_inbox import digest, files

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("receive")]


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, served: dict[str, str]) -> Project:
    """A text project whose source is validated, with a remote."""
    project = clone(tmp_path_factory.mktemp("receive") / "project", served)
    examples.write_text_project(project.root)
    recipe = project.root / "recipes/moods.yaml"
    recipe.write_text(recipe.read_text().replace('moods.csv"}', 'moods.csv", "settle": 0.5}', 1))
    project.ok("headstart", "ingest", "recipes/moods.yaml")
    project.ok("dvc", "repro", "validate@moods")
    return project


@pytest.fixture
def project(validated: Project, tmp_path: Path) -> Project:
    copy = validated.copy(tmp_path / "project")
    copy.ok("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    return copy


def manifest(project: Project) -> pd.DataFrame:
    return pd.read_parquet(project.root / "manifest/moods/manifest.parquet")


def versioned(project: Project) -> str:
    return (project.root / "data.dvc").read_text() + digest(project.root / "data")


def test_a_good_batch_is_versioned_pushed_and_moves_no_row_and_outlives_a_changed_source(
    project: Project, tmp_path: Path
) -> None:
    before = manifest(project).set_index("id")["split"]
    examples.write_texts(project.root / "inbox/moods/monday.csv", 60, start=240)
    printed = project.ok("headstart", "receive", "recipes/moods.yaml")
    assert printed.splitlines()[-1] == "moods: batches: 1 accepted (monday), pushed"
    assert (project.root / ".headstart/moods/unmonitored").exists()  # for the next run to make up for
    assert project.ok("dvc", "status", "data.dvc", "--json").strip() == "{}"
    assert files(project.root / "inbox/moods") == []
    elsewhere = tmp_path / "elsewhere"  # a clone without the source
    shutil.copytree(project.root / ".dvc", elsewhere / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copytree(project.root / ".git", elsewhere / ".git")
    shutil.copy(project.root / "data.dvc", elsewhere / "data.dvc")
    Project(elsewhere, project.environment).ok("dvc", "pull", "data.dvc")
    assert digest(elsewhere / "data") == digest(project.root / "data")
    without_its_remote(project, tmp_path)
    project.ok("dvc", "repro", "validate@moods")
    rows = manifest(project).set_index("id")
    assert len(rows) == 300
    assert rows.loc[before.index, "split"].equals(before)

    examples.write_texts(project.root / "start/moods.csv", 280)  # of which 40 are those of the batch
    project.ok("headstart", "ingest", "recipes/moods.yaml")
    project.ok("dvc", "repro", "validate@moods")
    assert project.ok("dvc", "status", "--cloud", "data.dvc", "--json").strip() == "{}"
    after = manifest(project).set_index("id")
    assert after["batch"].value_counts().to_dict() == {"": 280, "monday": 60}
    assert after.loc[before.index, "split"].equals(before)


def test_a_batch_that_is_taken_back_leaves_the_other_rows_where_they_were(project: Project) -> None:
    source, pointer = manifest(project), (project.root / "data.dvc").read_text()
    examples.write_texts(project.root / "inbox/moods/monday.csv", 60, start=240)
    for _ in range(2):  # it may come once more
        shutil.copy(project.root / "inbox/moods/monday.csv", project.root / "monday.csv")
        project.ok("headstart", "receive", "recipes/moods.yaml")
        assert (project.root / "data.dvc").read_text() != pointer
        shutil.rmtree(project.root / "data/moods/.batches/monday")
        project.ok("headstart", "ingest", "recipes/moods.yaml")
        assert project.ok("dvc", "status", "data.dvc", "--json").strip() == "{}"
        project.ok("dvc", "repro", "validate@moods")
        rows = manifest(project)
        assert rows[["id", "split"]].equals(source[["id", "split"]])
        (project.root / "monday.csv").rename(project.root / "inbox/moods/monday.csv")


def without_its_remote(project: Project, tmp_path: Path) -> None:
    """Another machine whose remote is away does not go on with the source alone, and forget the batches."""
    other = project.copy(tmp_path / "other")
    shutil.rmtree(other.root / "data")
    shutil.rmtree(other.root / ".dvc/cache")
    pointer = (other.root / "data.dvc").read_text()
    store = tmp_path / "store"
    store.rename(tmp_path / "away")
    failed = other("headstart", "ingest", "recipes/moods.yaml")
    assert failed.returncode == 1
    assert "data/moods is versioned, and DVC's remote store does not give it" in failed.stderr
    assert (other.root / "data.dvc").read_text() == pointer
    (tmp_path / "away").rename(store)
    other.ok("headstart", "ingest", "recipes/moods.yaml")
    assert digest(other.root / "data") == digest(project.root / "data")
    assert (other.root / "data.dvc").read_text() == pointer


def test_a_bad_batch_leaves_the_versioned_data_as_they_are_to_the_byte(project: Project) -> None:
    before = versioned(project)
    bad = project.root / "inbox/moods/monday.csv"
    bad.parent.mkdir(parents=True)
    bad.write_text("body,mood,shop\n" + "fine,angry,a\n" * 30)
    done = project("headstart", "receive", "recipes/moods.yaml")
    assert done.returncode == 1
    assert "the batch monday is rejected: 30 failures" in done.stderr
    assert "... and 10 more" in done.stderr
    assert "quarantine/moods/monday/reasons.csv" in done.stderr
    assert versioned(project) == before
    assert len(pd.read_csv(project.root / "quarantine/moods/monday/reasons.csv")) == 30


ASKED = """
import json
from prefect import flow
from headstart.layout import Layout
from headstart.recipe import load
from flows.watch import watch
from tasks.receive import receive
from pathlib import Path

@flow
def both():
    received = receive(load("recipes/moods.yaml"), Layout(Path.cwd(), "moods"), wait=True)
    return received.accepted, list(received.rejected)

said = [watch("moods") for _ in range(2)]
print(json.dumps(said + [both(), watch("moods")]))
"""


def test_watching_tells_of_a_batch_once_and_a_rejected_one_stops_no_flow(project: Project) -> None:
    recipe = project.root / "recipes/moods.yaml"
    recipe.write_text(recipe.read_text().replace("0.5", "0"))
    examples.write_texts(project.root / "inbox/moods/good.csv", 60, start=240)
    (project.root / "inbox/moods/bad.csv").write_text("body,mood,shop\nfine,angry,a\n")
    (project.root / "inbox/moods/late.csv.part").write_text("body,mood,shop\n")
    told = project.root / "told.jsonl"
    # Whatever is sent to Prefect's server is written down on its way.
    tap = (
        "import prefect.events, json\n"
        "sent = prefect.events.emit_event\n"
        "def emit_event(**event):\n"
        "    if event['event'].startswith('headstart.'):\n"
        f"        print(json.dumps(event), file=open({str(told)!r}, 'a'))\n"
        "    return sent(**event)\n"
        "prefect.events.emit_event = emit_event\n"
    )
    printed = project.ok("python", "-c", tap + ASKED)
    first, second, received, last = json.loads(printed.strip().splitlines()[-1])
    assert first == second == "moods: 2 to take in (bad.csv, good.csv)"
    assert received == [["good"], ["bad"]]
    assert last == "moods: nothing in the inbox"
    events = [json.loads(line) for line in told.read_text().splitlines()]
    assert [event["event"] for event in events] == ["headstart.data.changed", "headstart.data.rejected"]
    assert events[0]["payload"]["batches"] == ["bad.csv", "good.csv"]
    assert events[1]["payload"]["batch"] == "bad"
    assert all(event["resource"]["prefect.resource.id"] == "headstart.recipe.moods" for event in events)
