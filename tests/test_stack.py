"""The running stack: one command starts it all, one signal ends it all, and nobody need look after it."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header
from prefect.settings.models.server.services import ServerServicesDBVacuumSettings

from headstart import stack
from headstart.errors import HeadstartError
from tests import stacks
from tests.conftest import ROOT, Project, isolated
from tests.stacks import Stack

COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def own(project: Project, tmp_path: Path) -> Project:
    """The project with a Prefect database of its own: other tests' runs do not count."""
    return Project(project.root, isolated(tmp_path))


def test_a_port_that_is_taken_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HeadstartError, match=f"port {port} cannot be had") as caught:
            stack.up(tmp_path, port, 0, print)
    assert "--port" in caught.value.do
    assert not (tmp_path / ".headstart/logs").exists()


def test_what_is_set_wins_but_the_parts_find_each_other(tmp_path: Path) -> None:
    given = {"MLFLOW_TRACKING_URI": "postgresql://db/mlflow", "PREFECT_API_URL": "http://elsewhere/api"}
    made = stack.settings(tmp_path, 1, 2, given | {"MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket"})
    assert made["MLFLOW_BACKEND_STORE_URI"] == "postgresql://db/mlflow"
    assert made["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://bucket"
    assert "MLFLOW_DEFAULT_ARTIFACT_ROOT" not in made
    assert made["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:2"
    assert made["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    plain = stack.settings(tmp_path, 1, 2, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"})
    assert plain["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert plain["MLFLOW_DEFAULT_ARTIFACT_ROOT"] == f"file://{tmp_path}/mlartifacts"


def test_the_servers_heed_their_own_pages_alone_unless_told_otherwise(tmp_path: Path) -> None:
    made = stack.settings(tmp_path, 1, 2, {})
    assert made["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:1,http://localhost:1"
    wanted = {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "*", "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "false"}
    assert wanted.items() <= stack.settings(tmp_path, 1, 2, wanted).items()
    composed = COMPOSE["services"]["prefect"]["environment"]
    for name, value in stack.settings(tmp_path, 4200, 5000, {}).items():
        if name in wanted:
            assert composed[name] == value
    hosts = made["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    for host in ("127.0.0.1:2", "localhost:2", "127.0.0.1:9999"):
        assert is_allowed_host_header(hosts, host)
    for host in ("elsewhere.example:2", "10.elsewhere.example:2", "localhost.elsewhere.example:2"):
        assert not is_allowed_host_header(hosts, host)


def test_prefect_deletes_old_runs(tmp_path: Path) -> None:
    for given in (stack.settings(tmp_path, 1, 2, {}), COMPOSE["services"]["prefect"]["environment"]):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in given.items():
                patch.setenv(name, str(value))
            vacuum = ServerServicesDBVacuumSettings()
        assert {"events", "flow_runs"} <= vacuum.enabled_vacuum_types
        assert vacuum.retention_period.days == 30


@pytest.mark.long
def test_a_schedule_trains_once_then_finds_nothing_to_do_and_the_stack_ends_without_a_trace(
    own: Project, tmp_path: Path
) -> None:
    stacks.write_project(own.root, cron="* * * * *")
    with stacks.running(own, tmp_path) as running:
        done = running.wait(lambda: running.finished(2), "second run")
        names = [run["state_name"] for run in done if run["state_name"] != "Cancelled"]
        assert names[:2] == ["Completed", "Skipped"]
        assert running.versions() == [1, 1]
        log = running.log.read_text()
        trained = [line for line in log.splitlines() if "Running stage 'train@moods'" in line]
        assert len(trained) == 1
        again = own("headstart", "up", "--port", "0", "--mlflow-port", "0")
        assert again.returncode == 1
        assert "is running already" in again.stderr
    # What was registered under the stack is there without it.
    (own.root / "rows.csv").write_text("text\na lovely film\n")
    assert "p:happy" in own.ok("headstart", "predict", "moods", "rows.csv", "--version", "candidate")


def start(running: Stack) -> None:
    """Ask for a retraining, once, however often a busy server has to be asked."""
    moods = {"deployments": {"name": {"any_": ["moods"]}}}
    (found,) = running.wait(lambda: running.ask("deployments/filter", moods), "deployment")
    asked = {"parameters": {"reason": "a test"}, "idempotency_key": "once"}
    running.wait(lambda: running.ask(f"deployments/{found['id']}/create_flow_run", asked), "run")


def completes(running: Stack) -> None:
    """The work is done, by a first or a second try; no run and no version is left half done."""
    done = running.wait(running.finished, "run that completes")
    assert {run["state_name"] for run in done} <= {"Completed", "Crashed"}, running.log.read_text()[-6000:]
    assert running.versions() == [1, 1]
    limits = running.ask("v2/concurrency_limits/filter", {})
    assert [limit["active_slots"] for limit in limits] == [0]


@pytest.mark.long
def test_the_worker_is_killed_in_train(own: Project, tmp_path: Path) -> None:
    stacks.write_project(own.root)
    with stacks.running(own, tmp_path) as running:
        start(running)
        running.wait(lambda: running.doing("stage", "train"), "training")
        running.doing("worker", "--pool").kill()  # type: ignore[union-attr]
        completes(running)
        assert "worker ended with -9; starts again" in running.log.read_text()
        assert [run["state_name"] for run in running.runs()] == ["Crashed", "Completed"]


@pytest.mark.long
@pytest.mark.parametrize("part", [("prefect", "server"), ("mlflow", "server")], ids=["prefect", "mlflow"])
def test_a_server_is_killed_in_train(own: Project, tmp_path: Path, part: tuple[str, ...]) -> None:
    stacks.write_project(own.root)
    with stacks.running(own, tmp_path) as running:
        start(running)
        running.wait(lambda: running.doing("stage", "train"), "training")
        running.doing(*part).kill()  # type: ignore[union-attr]
        completes(running)
        assert f"{part[0]} ended with -9; starts again" in running.log.read_text()


@pytest.mark.long
def test_the_process_of_a_run_is_killed_under_a_living_worker(own: Project, tmp_path: Path) -> None:
    stacks.write_project(own.root)
    with stacks.running(own, tmp_path) as running:
        start(running)
        stage = running.wait(lambda: running.doing("stage", "train"), "training")
        running.doing("prefect.engine").kill()  # type: ignore[union-attr]
        psutil.wait_procs([stage], 30)
        assert not stage.is_running()
        completes(running)
        assert [run["state_name"] for run in running.runs()] == ["Crashed", "Completed"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_stack_is_stopped_in_train_and_the_next_one_finishes_the_work(
    own: Project, tmp_path: Path, number: int
) -> None:
    stacks.write_project(own.root)
    with stacks.running(own, tmp_path) as running:
        start(running)
        running.wait(lambda: running.doing("stage", "train"), "training")
        seen = running.descendants()
        running.process.send_signal(number)
        running.process.wait(90)
        _, alive = psutil.wait_procs(seen, 30)
        assert not alive, alive
    with stacks.running(own, tmp_path) as running:
        completes(running)
        assert [run["state_name"] for run in running.runs()] == ["Crashed", "Completed"]


@pytest.mark.long
def test_a_run_killed_without_a_stack_is_marked_by_the_next_one(own: Project, tmp_path: Path) -> None:
    stacks.write_project(own.root)
    process = subprocess.Popen(
        ["headstart", "run", "recipes/moods.yaml"], cwd=own.root, env=own.environment, start_new_session=True
    )
    notes, deadline = own.root / ".headstart/runs", time.monotonic() + 120
    while not list(notes.glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.wait()
    with stacks.running(own, tmp_path) as running:
        states = [run["state_name"] for run in running.runs()]
    assert states == ["Crashed"]
    assert not list(notes.glob("*.json"))
