"""The running stack: Prefect's server, MLflow's server and a worker, in the foreground, as one command.

Goes in: a project and two ports of this machine. Comes out: everything that scheduled and triggered runs
need, until it is told to stop; its words also in ``.headstart/logs``. A part that dies is started again.
Never runs a flow itself, and leaves no process behind.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from headstart import environment, processes, runs
from headstart.errors import HeadstartError
from headstart.runs import POOL

HOST = "127.0.0.1"
TICK = 0.5  # seconds between two looks at the parts
LONGEST_PAUSE = 30.0  # seconds before a part that keeps dying is started again
STEADY = 60.0  # a part that lived so long is started again at once
PATIENCE = 180.0  # seconds for a server to answer
GRACE = 15.0  # seconds to end in
SETTLED = 15.0  # seconds in which a worker tells Prefect itself that a run of its own has died
LOG_BYTES = 5_000_000

# With Prefect's default, which lives in its server's memory, a restart of the server would end every run
# whose deployment limits how many run at once.
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
# By default Prefect deletes old events and no run, and a recipe's inbox is looked into every minute.
KEPT = 30 * 24 * 3600  # seconds


@dataclass
class Part:
    """One process of the stack, and what is known of it.

    Args:
        name: what it is called in the log.
        command: how it is started.
        health: the address that answers once it is up, or "" if it serves nothing.
    """

    name: str
    command: list[str]
    health: str = ""
    process: subprocess.Popen[str] | None = field(default=None, repr=False)
    since: float = 0.0
    pause: float = 1.0
    due: float = 0.0


def up(root: Path, port: int, mlflow_port: int, say: Callable[[str], None]) -> None:
    """Run the stack until SIGINT or SIGTERM.

    Raises:
        HeadstartError: a port is taken, the stack of this project runs already, or a part does not come up.
    """
    state = root / ".headstart"
    state.mkdir(exist_ok=True)
    lock = FileLock(state / "stack.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise HeadstartError(
            "the stack of this project is running already", where=str(root), do="stop it first, with Ctrl-C"
        ) from None
    try:
        for number, option in ((port, "--port"), (mlflow_port, "--mlflow-port")):
            _free(number, option)
        Stack(root, port, mlflow_port, say).run()
    finally:
        lock.release()


class Stack:
    """The parts of a running stack."""

    def __init__(self, root: Path, port: int, mlflow_port: int, say: Callable[[str], None]) -> None:
        self.root, self.say = root, say
        self.environment = settings(root, port, mlflow_port, os.environ)
        prefect = [sys.executable, "-m", "prefect"]
        self.prefect = Part(
            "prefect",
            [*prefect, "server", "start", "--host", HOST, "--port", str(port)],
            f"http://{HOST}:{port}/api/health",
        )
        self.mlflow = Part(
            "mlflow",
            [
                *[sys.executable, "-m", "mlflow", "server", "--workers", "1"],
                *["--host", HOST, "--port", str(mlflow_port), "--uvicorn-opts", "--log-level=warning"],
            ],
            f"http://{HOST}:{mlflow_port}/health",
        )
        self.worker = Part(
            "worker", [*prefect, "worker", "start", "--pool", POOL, "--type", "process", "--name", POOL]
        )
        self.logs: dict[str, logging.Logger] = {}
        self.dead: dict[str, float] = {}  # runs whose process is gone, and when to look after them

    def run(self) -> None:
        """Start everything in its order, then watch over it; ends with ``SystemExit``."""
        processes.adopt_orphans()
        before = {each: signal.signal(each, _stop) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.start(self.prefect)
            self.start(self.mlflow)
            for part in (self.prefect, self.mlflow):
                self.await_health(part)
            if self.once("deploy", ["-m", "headstart.cli", "deploy"]):
                raise HeadstartError(
                    "the deployments could not be made",
                    where="prefect.yaml",
                    table=self.last_words("deploy"),
                    do="mend what the lines above name",
                )
            self.start_worker()
            self.say(f"Prefect: {self.prefect.health.removesuffix('/api/health')}")
            self.say(f"MLflow:  {self.mlflow.health.removesuffix('/health')}")
            self.say("everything runs; Ctrl-C stops it")
            while True:
                self.watch()
                time.sleep(TICK)
        finally:
            for each in before:
                signal.signal(each, signal.SIG_IGN)
            self.stop()
            for each, handler in before.items():
                signal.signal(each, handler)

    def watch(self) -> None:
        """One look at every part: what died is started again when its time has come."""
        now = time.monotonic()
        for part in (self.prefect, self.mlflow, self.worker):
            if part.process is not None and part.process.poll() is not None:
                self.bury(part, now)
            if part.process is None and now >= part.due:
                if part is self.worker:
                    self.start_worker()
                else:
                    self.start(part)
        self.end_orphans()
        self.settle(now)

    def bury(self, part: Part, now: float) -> None:
        """Note that a part died; what it leaves running is ended with it."""
        assert part.process is not None
        part.pause = 1.0 if now - part.since > STEADY else min(2 * part.pause, LONGEST_PAUSE)
        part.due = now + part.pause
        self.say(f"{part.name} ended with {part.process.returncode}; starts again in {part.pause:.0f} s")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.process.pid, signal.SIGKILL)  # MLflow's own child would keep the port
        part.process = None
        self.end_orphans()

    def start(self, part: Part) -> None:
        """Start a part, its lines read in a thread."""
        part.process = self.popen(part.name, part.command)
        threading.Thread(target=self.listen, args=(part.name, part.process), daemon=True).start()
        part.since = time.monotonic()

    def start_worker(self) -> None:
        """Start the worker, once it is settled what becomes of the runs that an earlier one left."""
        self.worker.since = time.monotonic()
        if self.once("recovery", ["-m", "tasks.recovery", "--alone"]):
            self.worker.due = self.worker.since + self.worker.pause  # as while Prefect's server is away
            return
        self.start(self.worker)

    def settle(self, now: float) -> None:
        """Look after runs whose process died under a living worker, which has told Prefect by then."""
        dead = {run.id for run in runs.known(self.root) if run.dead()}
        self.dead = {run: self.dead.get(run, now + SETTLED) for run in dead}
        if any(due <= now for due in self.dead.values()):
            failed = self.once("recovery", ["-m", "tasks.recovery"])
            # What another server knows stays written down, and is not asked about again.
            self.dead = dict.fromkeys(dead, now + SETTLED if failed else math.inf)

    def once(self, name: str, arguments: list[str]) -> int:
        """Run a command to its end, and hear it out."""
        process = self.popen(name, [sys.executable, *arguments])
        self.listen(name, process)
        return process.wait()

    def popen(self, name: str, command: list[str]) -> subprocess.Popen[str]:
        """Start a process that ends with this one."""
        # Servers end what they have started. A worker would wait for a server that is gone; its runs, which
        # look after themselves, need none of it.
        end = signal.SIGKILL if name == self.worker.name else signal.SIGTERM
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others in their order
            preexec_fn=partial(processes.die_with_parent, end),  # noqa: PLW1509  # calls nothing but the kernel
        )
        return process

    def listen(self, name: str, process: subprocess.Popen[str]) -> None:
        """Pass on what a process says, each line with its name, and keep it."""
        log = self.log(name)
        assert process.stdout is not None
        for line in process.stdout:
            if text := line.rstrip():
                log.info(text)
                with contextlib.suppress(OSError):  # nobody listens; the process must not wait
                    self.say(f"{name:<8} | {text}")

    def log(self, name: str) -> logging.Logger:
        """The file that keeps a part's lines: the latest, and as many again."""
        if name not in self.logs:
            path = self.root / ".headstart" / "logs" / f"{name}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            logger = logging.Logger(name)  # in no tree: nobody else hears it
            logger.addHandler(handler)
            self.logs[name] = logger
        return self.logs[name]

    def last_words(self, name: str) -> list[str]:
        """The last lines that a part said."""
        path = self.root / ".headstart" / "logs" / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]

    def await_health(self, part: Part) -> None:
        """Wait until a part answers.

        Raises:
            HeadstartError: it ended, or does not answer in time.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(part.health, timeout=5):  # noqa: S310
                return
            ended = part.process is None or part.process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise HeadstartError(
                    f"{part.name} {'ended at its start' if ended else 'does not answer'}",
                    where=part.health,
                    table=self.last_words(part.name),
                    do=f"see .headstart/logs/{part.name}.log",
                )
            time.sleep(TICK)

    def end_orphans(self) -> None:
        """End what a dead part or a dead run left: this process has become its parent."""
        parts = (self.prefect, self.mlflow, self.worker)
        processes.end_orphans({part.process.pid for part in parts if part.process})

    def stop(self) -> None:
        """End the worker first, which ends its runs, then the servers, then whatever is left."""
        self.say("stopping")
        for parts in ((self.worker,), (self.prefect, self.mlflow)):
            living = [part.process for part in parts if part.process]
            for process in living:
                process.terminate()
            for process in living:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        processes.end_orphans(set())
        for logger in self.logs.values():
            for handler in logger.handlers:
                handler.close()


def settings(root: Path, port: int, mlflow_port: int, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of every part: where the others are, and quiet.

    What is set wins, other than the two addresses. MLflow keeps its store where runs without the stack keep
    theirs, and new artifacts as plain files, so that both find each other's models.
    """
    store = given.get("MLFLOW_TRACKING_URI", "")
    if "://" not in store or store.startswith("http"):
        store = f"sqlite:///{root / 'mlflow.db'}"
    artifacts = {}
    if "MLFLOW_ARTIFACTS_DESTINATION" not in given:
        place = root / "mlartifacts"
        artifacts = {
            "MLFLOW_ARTIFACTS_DESTINATION": str(place),
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": place.as_uri(),
        }
    defaults = {
        **environment.QUIET,
        **artifacts,
        "MLFLOW_BACKEND_STORE_URI": store,
        # By default MLflow takes a name like 10.example.com for an address of its own network.
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(
            f"{name}{port}" for name in environment.THIS_MACHINE for port in ("", ":*")
        ),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 GB, for what nothing here uses
        # By default any page that a browser here shows could make a deployment, and the worker would run it.
        # Prefect's own page and its clients fetch the token that changes need by themselves.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(
            f"http://{name}" + (f":{port}" if port != 80 else "")  # which browsers leave out
            for name in environment.THIS_MACHINE
        ),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(KEPT),
        "PYTHONUNBUFFERED": "1",
    }
    here = {
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{mlflow_port}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), given.get("PATH", "")]),
    }
    return defaults | dict(given) | here


def _free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise HeadstartError(
                f"port {port} cannot be had: {error.strerror}",
                where=f"{HOST}:{port}",
                do=f"stop what listens there, or choose another with {option}",
            ) from None


def _stop(number: int, frame: object) -> None:
    raise SystemExit(0)
