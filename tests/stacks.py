"""A project whose deployments fire as often as a test likes, and the stack that runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests import examples
from tests.conftest import Project
from tests.servers import free_port

PATIENCE = 300  # seconds: cold starts, a cron of every minute, and a slow machine


def write_project(root: Path, cron: str = "", flows: tuple[str, ...] = ("retrain",)) -> None:
    """The small text project, and the shipped deployments of one recipe, made its own."""
    examples.write_text_project(root)
    described = yaml.safe_load((root / "prefect.yaml").read_text())
    del described["definitions"]
    kept = []
    for each in described["deployments"]:
        if each["parameters"].get("recipe") == "sentiment" and each["entrypoint"].split(":")[1] in flows:
            each |= {"name": "moods", "parameters": {"recipe": "moods"}}
            for schedule in each["schedules"]:
                schedule["cron"] = cron
            if not cron:
                del each["schedules"]
            for trigger in each.get("triggers", []):
                trigger["match"] = {"prefect.resource.id": "headstart.recipe.moods"}
            kept.append(each)
    described["deployments"] = kept
    (root / "prefect.yaml").write_text(yaml.safe_dump(described))


@dataclass
class Server:
    """A Prefect server, asked as any program can ask it."""

    api: str

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if body is not None:
            token = self.ask("csrf-token?client=tests")["token"]
            headers |= {"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": token}
        request = urllib.request.Request(
            f"{self.api}/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers=headers,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def runs(self, flow: str = "retrain") -> list[dict[str, Any]]:
        """Runs of a flow that had begun or been refused, oldest first."""
        found = self.ask("flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_ASC"})
        return [run for run in found if run["state_type"] != "SCHEDULED"]


@dataclass
class Stack(Server):
    """A running stack, seen from outside."""

    process: subprocess.Popen[bytes]
    project: Project
    log: Path
    tracking: str

    def wait(self, until: Callable[[], Any], what: str) -> Any:
        """What ``until`` gives, once it gives something."""
        deadline = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if found := until():
                    return found
            except OSError:  # a server that was killed
                pass
            assert time.monotonic() < deadline, f"no {what}:\n{self.log.read_text()[-6000:]}"
            time.sleep(0.1)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def doing(self, *words: str) -> psutil.Process | None:
        """The first process below the stack whose command has all the words."""
        for process in self.descendants():
            try:
                if set(words) <= set(process.cmdline()):
                    return process
            except psutil.Error:
                pass
        return None

    def finished(self, runs: int = 1) -> list[dict[str, Any]]:
        """All runs, once so many are complete and none is under way."""
        found = self.runs()
        names = [run["state_type"] for run in found]
        done = names.count("COMPLETED") >= runs and not {"RUNNING", "PENDING", "CANCELLING"} & set(names)
        return found if done else []

    def versions(self, alias: str = "candidate") -> list[int]:
        """Numbers of the versions of the model, and which has the alias, the latter first."""
        printed = self.project.ok(
            "python",
            "-c",
            "import mlflow; client = mlflow.MlflowClient()\n"
            f"print(client.get_model_version_by_alias('moods', '{alias}').version, end=' ')\n"
            "print(*sorted(int(each.version) for each in client.search_model_versions(\"name='moods'\")))",
            extra={"MLFLOW_TRACKING_URI": self.tracking},
        )
        return [int(each) for each in printed.split()]


@contextmanager
def running(project: Project, folder: Path) -> Iterator[Stack]:
    """``headstart up``, ready; afterwards stopped, and nothing of it left."""
    port, mlflow = free_port(), free_port()
    log = folder / "up.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            ["headstart", "up", "--port", str(port), "--mlflow-port", str(mlflow)],
            cwd=project.root,
            env=project.environment | {"PREFECT_WORKER_QUERY_SECONDS": "2"},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stack = Stack(f"http://127.0.0.1:{port}/api", process, project, log, f"http://127.0.0.1:{mlflow}")
    seen: list[psutil.Process] = []
    try:
        stack.wait(lambda: "Worker 'headstart' started!" in log.read_text(), "worker")
        yield stack
        if process.poll() is None:
            seen = stack.descendants()
            process.send_signal(signal.SIGTERM)
            assert process.wait(90) == 0, log.read_text()
    finally:
        if process.poll() is None:
            seen = stack.descendants()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _, alive = psutil.wait_procs(seen, 60)
        for each in alive:
            each.kill()
    assert not alive, (alive, log.read_text())
