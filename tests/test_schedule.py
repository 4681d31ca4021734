"""Retraining on a schedule: a cron deployment on a real server fires, and a real worker process runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests import examples
from tests.conftest import Project, isolated
from tests.servers import free_port

pytestmark = pytest.mark.slow

PATIENCE = 180  # seconds: a cron of every minute, a cold start, and a slow machine


@contextmanager
def running(project: Project, *command: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """A process and all its children, gone at the end."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=project.root,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_server(api: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"{api}/health", timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.5)


def test_a_cron_schedule_fires_and_the_scheduled_run_registers_a_model(
    project: Project, tmp_path: Path
) -> None:
    examples.write_text_project(project.root)
    deployments = yaml.safe_load((project.root / "prefect.yaml").read_text())
    shipped = deployments["deployments"][0]
    shipped |= {"name": "moods", "parameters": {"recipe": "moods"}}
    shipped["schedules"][0]["cron"] = "* * * * *"
    deployments["deployments"] = [shipped]
    (project.root / "prefect.yaml").write_text(yaml.safe_dump(deployments))

    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    # A database of its own: whatever other tests do to theirs does not count here.
    environment = isolated(tmp_path) | {"PREFECT_API_URL": api, "DO_NOT_TRACK": "true"}
    server = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    worker = ("prefect", "worker", "start", "--pool", "headstart", "--type", "process")
    with running(project, *server, environment=environment, log=tmp_path / "server.log"):
        wait_for_server(api)
        here = Project(project.root, environment)
        here.ok("prefect", "work-pool", "create", "headstart", "--type", "process")
        here.ok("prefect", "--no-prompt", "deploy", "--all")
        with running(project, *worker, environment=environment, log=tmp_path / "worker.log"):
            deadline = time.monotonic() + PATIENCE
            while not (states := scheduled_runs(here)).get("Completed"):
                assert "Failed" not in states and "Crashed" not in states, (
                    tmp_path / "worker.log"
                ).read_text()
                assert time.monotonic() < deadline, (states, (tmp_path / "worker.log").read_text())
                time.sleep(2)
    assert (project.root / "evidence/moods/summary.md").exists()
    assert (project.root / "mlflow.db").exists()


def scheduled_runs(project: Project) -> dict[str, int]:
    """How many runs the server's scheduler made, by the name of their state; late or future ones left out."""
    import json

    request = urllib.request.Request(
        f"{project.environment['PREFECT_API_URL']}/flow_runs/filter",
        data=json.dumps({"flow_runs": {"tags": {"all_": ["auto-scheduled"]}}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        runs = json.load(answer)
    names = [run["state_name"] for run in runs]
    return {name: names.count(name) for name in set(names) - {"Scheduled", "Late"}}
