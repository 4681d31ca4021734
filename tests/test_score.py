"""The flow that scores: what the command does, recorded by Prefect."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import yaml

from tests import examples
from tests.conftest import Project

pytestmark = pytest.mark.slow

FLOW = """
import json, sys
from flows.score import score
print(score(**json.loads(sys.argv[1])))
"""
ARTIFACT = """
import json
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    (found,) = client.read_artifacts()
    print(json.dumps({"key": found.key, "rows": json.loads(found.data), "words": found.description}))
"""


@pytest.mark.long
def test_the_flow_writes_the_commands_file_counts_it_and_leaves_nothing_half_written(
    project: Project, tmp_path: object
) -> None:
    examples.write_text_project(project.root)
    project.ok("headstart", "run", "recipes/moods.yaml")
    texts = [*examples.GOOD, "", *examples.BAD]
    pd.DataFrame({"body": texts}).to_csv(project.root / "rows.csv", index=False)
    home = {"PREFECT_HOME": str(project.root / "prefect")}  # whose artifacts are this flow's alone
    given = {"model": "moods", "inputs": ["rows.csv"], "output": "answers.csv", "version": "candidate"}
    printed = project.ok("python", "-c", FLOW, json.dumps(given | {"column": "body"}), extra=home)
    assert printed.splitlines()[-1].startswith(f"moods version 1: {len(texts)} rows in ")
    project.ok(
        "headstart", "predict", "moods", "rows.csv", "--version", "1", "--column", "body",
        "--output", "same.csv",
    )  # fmt: skip
    assert (project.root / "answers.csv").read_bytes() == (project.root / "same.csv").read_bytes()

    artifact = json.loads(project.ok("python", "-c", ARTIFACT, extra=home).splitlines()[-1])
    counts = {row["what"]: row["count"] for row in artifact["rows"]}
    answers = pd.read_csv(project.root / "answers.csv")
    assert artifact["key"] == "score-moods"
    assert counts["rows"] == len(texts)
    assert counts["failed"] == 1
    named = answers.loc[answers["error"].isna(), "label"].value_counts()
    assert {label: counts[label] for label in named.index} == named.to_dict()


def test_the_shipped_deployment_calls_the_flow_by_its_own_names(project: Project) -> None:
    deployments = yaml.safe_load((project.root / "prefect.yaml").read_text())["deployments"]
    (shipped,) = [each for each in deployments if each["entrypoint"] == "flows/score.py:score"]
    assert not shipped.get("schedules")
    names = project.ok(
        "python",
        "-c",
        "import inspect; from flows.score import score; print(*inspect.signature(score).parameters)",
    )
    assert set(shipped["parameters"]) <= set(names.split())
