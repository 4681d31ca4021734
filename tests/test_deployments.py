"""Deployments on a real Prefect server: made once, started by events, told to people, rid of the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from headstart import runs, stack
from headstart.errors import HeadstartError
from tasks import deployments
from tests import stacks
from tests.conftest import ROOT, Project, clone, isolated
from tests.servers import free_port
from tests.stacks import Server

pytestmark = pytest.mark.xdist_group("deployments")
PATIENCE = 120


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, webhook: tuple[str, list[dict[str, Any]]]
) -> Iterator[tuple[Project, Server]]:
    """A project whose deployments are on a server of its own, without a worker; a webhook is told."""
    folder = tmp_path_factory.mktemp("deployed")
    port = free_port()
    surroundings = isolated(folder)
    surroundings |= {
        name: value
        for name, value in stack.settings(folder / "project", port, port, {}).items()
        if name.startswith(("PREFECT_", "DO_NOT")) or name == "PYTHONUNBUFFERED"
    }
    project = clone(folder / "project", surroundings)
    stacks.write_project(project.root)
    server = Server(f"http://127.0.0.1:{port}/api")
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=surroundings,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        soon(lambda: server.ask("health"), "server")
        project.ok("headstart", "deploy", "--notify", f"json://{webhook[0]}")  # Apprise's own form
        yield project, server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def soon(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if result := found():
                return result
        except OSError:
            pass
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address that takes JSON, and what came."""
    came: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}/told", came
    server.shutdown()
    thread.join()
    server.server_close()


def deployment(server: Server) -> dict[str, Any]:
    (found,) = server.ask("deployments/filter", {"deployments": {"name": {"any_": ["moods"]}}})
    return dict(found)


def automations(server: Server) -> list[dict[str, Any]]:
    found = server.ask("automations/filter", {})
    for each in found:
        each["trigger"]["expect"].sort()  # a set, which each answer lists in an order of its own
    return sorted(
        ({key: each[key] for key in ("name", "enabled", "trigger", "actions")} for each in found),
        key=lambda each: each["name"],
    )


def all_runs(server: Server) -> list[dict[str, Any]]:
    return list(server.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"}))


def started(server: Server, **parameters: str) -> dict[str, Any]:
    """A run of the deployment, as anyone may ask for one."""
    path = f"deployments/{deployment(server)['id']}/create_flow_run"
    return dict(server.ask(path, {"parameters": parameters}))


def go(server: Server, run: dict[str, Any]) -> None:
    """What a worker does with it."""
    for kind in ("PENDING", "RUNNING"):
        state = {"type": kind, "name": kind.title()}
        server.ask(f"flow_runs/{run['id']}/set_state", {"state": state})


def emit(project: Project, event: str, reason: str) -> None:
    code = "import sys; from tasks.events import emit; emit(sys.argv[1], 'moods', reason=sys.argv[2])"
    project.ok("python", "-c", code, event, reason)


def held(server: Server) -> list[int]:
    """How many places of each limit are taken."""
    return [limit["active_slots"] for limit in server.ask("v2/concurrency_limits/filter", {})]


def test_the_shipped_file_names_flows_by_their_own_parameters_and_each_example_has_all_three(
    project: Project,
) -> None:
    described = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    code = (
        "import importlib, inspect, json\n"
        "flows = {name: getattr(importlib.import_module(f'flows.{name}'), name)"
        " for name in ('retrain', 'watch', 'monitor', 'score')}\n"
        "print(json.dumps({name: list(inspect.signature(flow).parameters) for name, flow in flows.items()}))"
    )
    taken = json.loads(project.ok("python", "-c", code).splitlines()[-1])
    seen = set()
    for each in described:
        flow = each["entrypoint"].split(":")[1]
        seen.add((flow, each["name"]))
        passed = [*each["parameters"]]
        for more in [*each.get("schedules", []), *each.get("triggers", [])]:
            passed += more.get("parameters", [])
        assert set(passed) <= set(taken[flow]), each
        assert all(schedule["timezone"] for schedule in each.get("schedules", []))
        for trigger in each.get("triggers", []):
            assert trigger["match"] == {"prefect.resource.id": f"headstart.recipe.{each['name']}"}
    for recipe in ("solar-cells", "sentiment"):  # or neither, in a project that grew from this one
        flows = {flow for flow, name in seen if name == recipe}
        assert not flows or {"retrain", "watch", "monitor"} <= flows


@pytest.mark.slow
def test_a_page_of_another_site_can_ask_a_server_for_nothing(deployed: tuple[Project, Server]) -> None:
    _, server = deployed
    elsewhere = {"Origin": "https://elsewhere.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "prefect-csrf-token"}
    for origin, allowed in ((elsewhere["Origin"], False), (server.api.removesuffix("/api"), True)):
        answer = httpx.options(f"{server.api}/deployments/", headers={"Origin": origin} | asked)
        assert answer.is_success is allowed
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    # What a browser sends without asking first, and the token, whose answer it keeps from the page.
    path = f"{server.api}/deployments/{deployment(server)['id']}/create_flow_run"
    simple = httpx.post(path, content="{}", headers=elsewhere | {"Content-Type": "text/plain"})
    assert (simple.status_code, simple.json()) == (403, {"detail": "Missing CSRF token."})
    token = httpx.get(f"{server.api}/csrf-token?client=page", headers=elsewhere)
    assert "access-control-allow-origin" not in token.headers


@pytest.mark.slow
def test_deploying_twice_leaves_one_of_each(
    deployed: tuple[Project, Server], webhook: tuple[str, list[dict[str, Any]]]
) -> None:
    project, server = deployed
    found = deployment(server)
    assert found["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert found["global_concurrency_limit"]["limit"] == 1
    once = automations(server)
    assert [each["name"] for each in once] == ["headstart-notify", "moods__automation_1"]
    printed = project.ok("headstart", "deploy", extra={"HEADSTART_NOTIFY": f"json://{webhook[0]}"})
    assert printed.splitlines() == ["notifications: json://...", "retrain/moods: when asked"]
    assert without_ids(automations(server)) == without_ids(once)
    assert deployment(server)["id"] == found["id"]
    assert len(server.ask("work_pools/filter", {})) == 1


def without_ids(tree: Any) -> Any:
    if isinstance(tree, dict):
        ids = ("id", "block_document_id")
        return {key: without_ids(value) for key, value in tree.items() if key not in ids}
    return [without_ids(each) for each in tree] if isinstance(tree, list) else tree


@pytest.mark.slow
def test_new_data_and_drift_start_a_retraining_that_knows_why(deployed: tuple[Project, Server]) -> None:
    project, server = deployed
    for event, reason in (
        ("headstart.data.changed", "2 new batches: monday, tuesday"),
        ("headstart.drift.detected", 'domain classifier says "0.93"'),
    ):
        before = {run["id"] for run in all_runs(server)}
        emit(project, event, reason)
        (made,) = soon(
            lambda before=before: [run for run in all_runs(server) if run["id"] not in before], "run"
        )
        assert made["deployment_id"] == deployment(server)["id"]
        assert made["parameters"] == {"recipe": "moods", "reason": reason}


@pytest.mark.slow
def test_people_are_told_of_decisions_and_of_failures_at_any_address(
    deployed: tuple[Project, Server], webhook: tuple[str, list[dict[str, Any]]]
) -> None:
    project, server = deployed
    address, came = webhook
    emit(project, "headstart.gate.refused", "accuracy 0.80, of the champion 0.90")
    told = soon(lambda: [each for each in came if "refused" in each["title"]], "notification")[0]
    assert told["title"] == "moods: headstart.gate.refused"
    lines = told["message"].splitlines()
    assert lines[0] == "accuracy 0.80, of the champion 0.90"
    assert {"event: headstart.gate.refused", "recipe: moods"} <= set(lines)

    project.ok("headstart", "deploy", "--notify", f"http://{address}")  # any webhook
    assert len(automations(server)) == 2
    run = started(server)
    go(server, run)
    state = {"type": "FAILED", "name": "Failed", "message": "the table is empty"}
    server.ask(f"flow_runs/{run['id']}/set_state", {"state": state})
    told = soon(lambda: [each for each in came if "Failed" in each["title"]], "notification")[0]
    assert told["title"] == f"{run['name']}: prefect.flow-run.Failed"
    assert told["text"].startswith("the table is empty\n")

    refused = project("headstart", "deploy", "--notify", "nonsense")
    assert refused.returncode == 1
    assert "nobody can be notified at this address" in refused.stderr


@pytest.mark.slow
def test_a_dead_run_is_marked_freed_and_tried_again_but_not_for_ever(
    deployed: tuple[Project, Server],
) -> None:
    project, server = deployed
    run = server.ask(
        f"deployments/{deployment(server)['id']}/create_flow_run", {"parameters": {"reason": "x"}}
    )
    for tries in (1, 2, 3):
        before = {each["id"] for each in all_runs(server)}
        go(server, run)
        assert held(server) == [1]
        died_at_work(project.root, run["id"], server.api)
        printed = project.ok("python", "-m", "tasks.recovery")
        assert server.ask(f"flow_runs/{run['id']}")["state_type"] == "CRASHED"
        assert held(server) == [0]
        assert not runs.known(project.root)
        again = [each for each in all_runs(server) if each["id"] not in before]
        assert len(again) == (tries < 3), printed
        if again:
            run = again[0]
            assert f"retry-{tries}" in run["tags"]
            assert run["parameters"] == {"recipe": "moods", "reason": "x"}
            assert run["state_type"] == "SCHEDULED"
    assert project.ok("python", "-m", "tasks.recovery") == ""


@pytest.mark.slow
def test_a_run_at_work_is_left_alone_and_one_that_left_no_note_is_found(
    deployed: tuple[Project, Server],
) -> None:
    project, server = deployed
    run = started(server)
    go(server, run)
    with runs.in_progress(project.root, run["id"], server.api):
        assert project.ok("python", "-m", "tasks.recovery", "--alone") == ""
    assert server.ask(f"flow_runs/{run['id']}")["state_type"] == "RUNNING"
    assert "marked as crashed" in project.ok("python", "-m", "tasks.recovery", "--alone")
    assert server.ask(f"flow_runs/{run['id']}")["state_type"] == "CRASHED"
    assert held(server) == [0]


def died_at_work(root: Path, run: str, api: str) -> None:
    """The note of a process that was killed."""
    code = (
        "import os, sys; from pathlib import Path; from headstart import runs\n"
        "with runs.in_progress(Path(sys.argv[1]), *sys.argv[2:]): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root), run, api], check=False)
    assert done.returncode == -9
    (note,) = runs.known(root)
    assert note.dead()


def test_without_a_server_deploying_says_which_to_name(project: Project) -> None:
    done = project("headstart", "deploy")
    assert done.returncode == 1
    assert "no Prefect server is configured" in done.stderr
    done = project("headstart", "deploy", extra={"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"})
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("code", "answer"), [(404, b"{}"), (401, b'{"detail": "Unauthorized"}'), (200, b"<!doctype html>")]
)
def test_an_address_that_is_not_prefects_api_or_wants_a_password_says_so(
    code: int, answer: bytes, tmp_path: Path
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(answer)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        with (
            temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_address[1]}"}),
            pytest.raises(HeadstartError, match="not Prefect's API") as caught,
        ):
            deployments.deploy(tmp_path, "", print)
        server.shutdown()
        thread.join()
    assert "check that it ends in /api, and PREFECT_API_AUTH_STRING" in str(caught.value)


def test_a_run_is_written_down_while_it_lasts_and_a_number_given_out_again_is_told_apart(
    tmp_path: Path,
) -> None:
    with runs.in_progress(tmp_path, "one"):
        (known,) = runs.known(tmp_path)
        assert not known.dead()
    assert not runs.known(tmp_path)
    with pytest.raises(ValueError, match="own"), runs.in_progress(tmp_path, "two"):
        raise ValueError("its own error")
    assert not runs.known(tmp_path)
    with pytest.raises(SystemExit), runs.in_progress(tmp_path, "three"):
        raise SystemExit
    (known,) = runs.known(tmp_path)
    other = runs.Run(known.id, "", known.host, known.process, f"{known.started}1")
    elsewhere = runs.Run(known.id, "", "elsewhere", 1, "")
    assert other.dead()
    assert not elsewhere.dead()
    runs.forget(tmp_path, known)
    assert not runs.known(tmp_path)
    damaged = runs.folder(tmp_path) / "four.json"  # by a power failure
    damaged.write_text("")
    assert not runs.known(tmp_path)
    assert not damaged.exists()
