"""Monitoring on a real registry: what the command and the flow find, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from headstart import monitoring
from headstart.calibration import Decision
from headstart.drift import Side, detect
from headstart.metrics import METRICS, intervals
from headstart.models import Model, Version
from headstart.monitoring import Monitored, Rows
from tests import cached, examples
from tests.conftest import Project, Ran

pytestmark = pytest.mark.slow

FLOW = """
import json, time
from datetime import UTC, datetime
from prefect.client.orchestration import get_client
from flows.monitor import monitor
began = datetime.now(UTC).isoformat()
print(monitor("moods"))
events, patience = [], time.monotonic() + 60  # the server writes events down some seconds later
with get_client(sync_client=True) as client:
    kept = {found.key: found.description for found in client.read_latest_artifacts()}
    wanted = {"event": {"name": ["headstart.drift.detected"]}, "occurred": {"since": began}}
    while not events and time.monotonic() < patience:
        time.sleep(1)
        events = client._client.post("/events/filter", json={"filter": wanted}).json()["events"]
print(json.dumps({"artifacts": kept, "events": [each["payload"] for each in events]}))
"""
LOGGED = """
import json, mlflow
client = mlflow.MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("monitor/moods").experiment_id])
print(json.dumps({
    "alarms": [each.value for each in client.get_metric_history(run.info.run_id, "alarm")],
    "tests": sorted(run.data.metrics), "status": run.info.status,
    "page": [each.path for each in client.list_artifacts(run.info.run_id)],
    "versions": len(client.search_model_versions("")), "runs": len(client.search_runs(
        [client.get_experiment_by_name("moods").experiment_id])),
    "aliases": client.get_registered_model("moods").aliases,
}))
"""


@pytest.fixture
def project(moods: Ran, tmp_path: Path) -> Project:
    """A project with a champion, free to be changed."""
    return moods.project.copy(tmp_path / "project")


def arrive(project: Project, name: str, table: pd.DataFrame, number: int) -> None:
    """A batch that was taken in."""
    folder = project.root / "data/moods/.batches" / name
    folder.mkdir(parents=True)
    table.to_csv(folder / "rows.csv", index=False)
    (folder / ".batch.json").write_text(json.dumps({"number": number, "kind": "rows"}))


def test_without_batches_there_is_nothing_to_do_and_the_command_says_so(project: Project) -> None:
    said = project.ok("headstart", "monitor", "recipes/moods.yaml")
    assert said.strip() == "no batch has come since the data of moods version 1"
    assert not (project.root / "reports/moods/drift.html").exists()


def test_files_are_compared_and_rows_like_the_known_ones_are_no_drift(project: Project) -> None:
    examples.write_texts(project.root / "alike.csv", rows=120, start=400)
    said = project.ok("headstart", "monitor", "recipes/moods.yaml", "alike.csv")
    assert "no drift is shown between 120 recent rows" in said
    assert "right answers" in said
    assert "120 recent rows have labels: accuracy" in said
    lost = project("headstart", "monitor", "recipes/moods.yaml", "gone.csv")
    assert lost.returncode == 1
    assert "no file matches" in lost.stderr
    pd.read_csv(project.root / "alike.csv").assign(mood="1").to_csv(project.root / "coded.csv", index=False)
    coded = project("headstart", "monitor", "recipes/moods.yaml", "coded.csv")
    assert coded.returncode == 1
    assert "no label in the column mood is a class that moods knows" in coded.stderr


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 0], ["0", "1", "0"]),
        ([0.0, 1.0, None], ["0", "1", ""]),
        ([False, True, False], ["False", "True", "False"]),
        (["a ", "b", None], ["a", "b", ""]),
    ],
    ids=["numbers", "numbers with a gap", "truth values", "words"],
)
def test_labels_of_files_get_the_names_that_training_gives_them(
    labels: list[Any], names: list[str], suffix: str, tmp_path: Path
) -> None:
    table, file = pd.DataFrame({"text": ["x", "y", "z"], "label": labels}), tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        table.to_parquet(file)
    else:
        table.to_json(file, orient="records", lines=True)
    model = cast(Model, SimpleNamespace(modality="text", classes=names))
    version = Version("small", "1", "run", {}, tmp_path, model)
    assert monitoring._given(cached.recipe(), version, [str(file)], 10).labels == names


def sides(labels: list[str], tmp_path: Path) -> tuple[Version, Side, Rows]:
    """A champion of two classes, which names the label where it knows it and else ``a``; and what it says."""
    named = np.array([label == "b" for label in labels])
    vectors = np.where(named[:, None], [0.2, 0.8], [0.8, 0.2])
    head = SimpleNamespace(probabilities=lambda rows: rows)
    model = cast(Model, SimpleNamespace(head=head, decision=Decision.likeliest(2), classes=["a", "b"]))
    rows = Rows([f"row {i}" for i in range(len(labels))], list(labels), labels)
    return Version("small", "1", "run", {}, tmp_path, model), monitoring._side(model, rows, vectors, {}), rows


def test_rows_of_a_class_that_the_champion_does_not_know_are_its_mistakes(tmp_path: Path) -> None:
    version, recent, rows = sides(["a", "b"] * 40 + ["c"] * 60 + [""] * 10, tmp_path)
    assert np.isfinite(recent.right).sum() == 140  # no label is no mistake
    measured = monitoring._measured(cached.recipe(), version, recent, rows)
    assert measured["accuracy"]["value"] == pytest.approx(80 / 140)
    assert measured["balanced_accuracy"]["value"] == pytest.approx(2 / 3)

    known = sides(["a", "b"] * 40 + ["a"] * 60 + [""] * 10, tmp_path)[1]  # it says the same of these
    (labels,) = (test for test in detect(known, recent, ["a", "b"]).shown)
    assert (labels.name, labels.known) == ("right answers", 1)


def fallen(promised: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """Of these figures."""
    unused = cast(Any, None)
    return Monitored("small", "1", "here", [], unused, unused, unused, unused, 0, promised, measured).fallen


def grouped(groups: int, chance: np.random.Generator, shift: float = 0.0) -> dict[str, Any]:
    """Figures of a model of two classes on rows in groups, some of which are harder than others."""
    of = np.repeat(np.arange(groups), 10)
    truth = chance.integers(0, 2, len(of))
    sure = 1.5 - shift + chance.normal(size=groups)[of] + chance.normal(size=len(of))
    p = 1 / (1 + np.exp(-np.where(truth == 1, sure, -sure)))
    return intervals(truth, np.stack([1 - p, p], axis=1), of, resamples=200)


def test_luck_of_a_few_test_groups_is_rarely_taken_for_a_fall() -> None:
    """Nothing has changed. Taken as exact, figures of nine groups told of a fall every fourth time."""
    chance = np.random.default_rng(0)
    found = [fallen(grouped(9, chance), grouped(40, chance)) for _ in range(200)]
    assert max(sum(metric in each for each in found) for metric in METRICS) <= 25


def test_a_champion_that_has_become_worse_is_called_so() -> None:
    chance = np.random.default_rng(0)
    found = [fallen(grouped(40, chance), grouped(40, chance, shift=1.0)) for _ in range(20)]
    assert sum({"accuracy", "log_loss"} <= set(each) for each in found) >= 18


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("auroc", 1), ("log_loss", -1), ("ece", -1)])
def test_a_fall_has_to_surpass_what_both_figures_leave_open(metric: str, sign: int) -> None:
    def figure(value: float, worse: float, better: float) -> dict[str, Any]:
        """With an interval that reaches so far to either side."""
        low, high = (worse, better) if sign > 0 else (better, worse)
        return {metric: {"value": value, "low": value - low, "high": value + high}}

    test = figure(0.5, worse=0.03, better=9)  # what lies away from the other figure says nothing
    for fall, shown in ((0.049, []), (0.051, [metric]), (-0.2, [])):  # sides of 0.03 and 0.04, and so 0.05
        assert fallen(test, figure(0.5 - sign * fall, worse=9, better=0.04)) == shown
    recent = figure(0.3 if sign > 0 else 0.7, worse=9, better=0.04)
    assert fallen(test, recent) == [metric]
    none = {"low": None, "high": None}  # as of a single group
    assert fallen({metric: test[metric] | none}, recent) == []
    assert fallen(test, {metric: recent[metric] | none}) == []
    assert fallen({}, recent) == []


def test_a_batch_that_has_drifted_is_reported_logged_and_told_to_prefect(project: Project) -> None:
    texts = [f"zq {word} xk {i} yyy" for i, word in enumerate(examples.GOOD * 10)]
    arrive(project, "monday", pd.DataFrame({"body": texts, "mood": None, "shop": "a"}), 1)
    report = project.root / "reports/moods/report.html"
    before = report.read_bytes()
    printed = project.ok("python", "-c", FLOW).splitlines()
    assert any(line.startswith("drift between 60 recent rows and") for line in printed)
    told = json.loads(printed[-1])
    assert told["artifacts"]["monitor-moods"].startswith("drift between")
    (payload,) = told["events"]
    assert payload["where"] == "batch monday"
    assert (payload["rows"], payload["labelled"], payload["version"]) == (60, 0, "1")
    assert "What the backbone sees" in payload["reason"]
    page = (project.root / "reports/moods/drift.html").read_text()
    assert "batch monday" in page
    assert report.read_bytes() == before

    again = project.ok("headstart", "monitor", "recipes/moods.yaml")
    assert "monday" in again
    logged = json.loads(project.ok("python", "-c", LOGGED, extra=store(project)).splitlines()[-1])
    assert logged["alarms"] == [1, 1]
    assert "features.domain classifier.AUROC" in logged["tests"]
    assert logged["status"] == "FINISHED"
    assert logged["page"] == ["drift.html"]
    assert (logged["versions"], logged["runs"]) == (1, 1)
    assert str(logged["aliases"]["champion"]) == "1"


def store(project: Project) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{project.root / 'mlflow.db'}"}
