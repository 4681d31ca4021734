"""The closed loop: rows of another kind arrive without labels, and one run does what is to be done."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pandas as pd
import pytest

from tests import examples
from tests.conftest import ROOT, Project

pytestmark = pytest.mark.slow


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def prepared(project: Project) -> list[dict[str, str]]:
    """A recipe that knows shop a and waits for shop b, whose texts are longer; returns those of b."""
    examples.write_text_project(project.root, rows=480)
    source = project.root / "start/moods.csv"
    with source.open(encoding="utf-8") as file:
        rows = [{"id": f"row-{i}"} | line for i, line in enumerate(csv.DictReader(file))]
    known, others = ([row for row in rows if row["shop"] == shop] for shop in "ab")
    for i, row in enumerate(others):
        row["body"] += " next to " + " ".join(random.Random(i).choices(examples.THINGS, k=8))
    write(source, known)
    columns = {"id": "id", "text": "body", "label": "mood", "domain": "shop"}
    examples.write_recipe(
        project.root / "recipes/moods.yaml",
        ingest={"source": "file:start/moods.csv", "settle": 0},
        validate={"adapter": "table", "columns": columns, "source_domains": ["a"], "target_domain": "b"},
        fetch={"backbone": "transformers:bert", "source": "file:start/bert"},
        train={"method": "domain_adaptation"},
        monitor={"permutations": 200},
    )
    return others


def last(printed: str) -> str:
    return printed.strip().splitlines()[-1]


def test_drift_without_labels_adapts_the_champion_and_labels_that_only_the_gate_saw_decide(
    project: Project, served: dict[str, str]
) -> None:
    project.environment = served
    others = prepared(project)
    first = last(project.ok("headstart", "run", "recipes/moods.yaml"))
    assert "moods version 1 promoted to champion" in first
    model = project.root / "model/moods/model.json"
    assert json.loads(model.read_text())["adaptation"] is None  # nobody to adapt to yet

    write(project.root / "inbox/moods/monday.csv", [row | {"mood": ""} for row in others])
    second = last(project.ok("headstart", "run", "recipes/moods.yaml"))
    assert "receive ran, monitor ran, validate ran" in second
    assert "drift between 240 recent rows and" in second
    assert "no label of b is known, so nothing can be shown" in second
    assert "version 1 stays champion" in second
    assert json.loads(model.read_text())["adaptation"]
    assert "monday" in (project.root / "reports/moods/drift.html").read_text()
    manifest = pd.read_parquet(project.root / "manifest/moods/manifest.parquet")
    assert set(manifest.loc[manifest["domain"] == "b", "label"]) == {""}
    before = model.read_bytes()

    write(
        project.root / "inbox/moods/judged.csv",
        [{"id": row["id"], "label": row["mood"]} for row in others],
    )
    third = last(project.ok("headstart", "run", "recipes/moods.yaml"))
    assert "receive ran" in third
    assert "train ran" not in third
    assert model.read_bytes() == before  # the labels went to the gate, and nowhere else
    assert "of the champion" in third  # that was asked about the same rows
    reason = project.ok(
        "python",
        "-c",
        "import mlflow\n"
        "print(mlflow.MlflowClient().get_model_version('moods', '2').tags['headstart.reason'])",
        extra={"MLFLOW_TRACKING_URI": f"sqlite:///{project.root}/mlflow.db"},
    )
    assert "drift between" in reason


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / "manifest/sentiment").is_dir(), reason="needs `make demo` first")
def test_the_loop_closes_on_real_cells_and_texts(project: Project) -> None:
    printed = project.ok("python", str(ROOT / "benchmarks/closed_loop.py"))
    assert printed.count("drift between") >= 2
