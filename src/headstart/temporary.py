"""Temporary: a Prefect server of one command's own, where none is configured.

Prefect would start one too, but only once a flow begins, and after it has imported in the command itself all
that the server imports: 7 s one after the other. Here it starts at once, and the command imports what it
needs meanwhile. It ends with the command, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import MutableMapping
from pathlib import Path

from headstart import environment, processes
from headstart.errors import HeadstartError

PATIENCE = 120.0  # seconds to answer in
GRACE = 5.0  # seconds to end in
TICK = 0.05
# As Prefect starts it, and without what looks after schedules, workers and other people's runs.
SETTINGS = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    **{
        f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "0"
        for service in (
            "CANCELLATION_CLEANUP",
            "FOREMAN",
            "LATE_RUNS",
            "PAUSE_EXPIRATIONS",
            "REPOSSESSOR",
            "SCHEDULER",
            "TRIGGERS",
        )
    },
}


def configured(folder: Path) -> bool:
    """Whether anything may say which server, or what kind, Prefect should use: then that is left to it."""
    return bool(os.environ.get("PREFECT_API_URL")) or environment.prefect_configured(folder)


class Server:
    """A server that is starting; from now on this process's Prefect knows it.

    To be made before Prefect is imported, which reads its settings once.

    Args:
        variables: the environment that it starts with, and in which whoever asks it finds its address and
            password.
    """

    def __init__(self, variables: MutableMapping[str, str] = os.environ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{port}/api"
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
        # It writes where a later worker reads what to run: nobody else, such as a page in a browser, may ask.
        variables["PREFECT_API_AUTH_STRING"] = secret = f"headstart:{secrets.token_urlsafe()}"
        self.home = variables.get("PREFECT_HOME", "~/.prefect")
        self.log, self.read = tempfile.TemporaryFile(), 0  # noqa: SIM115  # as long as the server
        self.process = subprocess.Popen(
            [*command, *options],
            env={**environment.QUIET, **SETTINGS, **variables, "PREFECT_SERVER_API_AUTH_STRING": secret},
            stdin=subprocess.DEVNULL,
            stderr=self.log,
            start_new_session=True,  # Ctrl-C reaches the command, whose last words it still has to hear
            preexec_fn=processes.die_with_parent,  # noqa: PLW1509  # calls nothing but the kernel
        )
        variables["PREFECT_API_URL"] = self.api
        atexit.register(self.stop)  # by then Prefect's own threads have told it everything

    def wait(self) -> None:
        """Return when it answers.

        Raises:
            HeadstartError: it ended, or does not answer.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.api}/health", timeout=5):  # noqa: S310
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise HeadstartError(
                    f"the Prefect server for this command does not start: {self._reason()}",
                    where=f"PREFECT_HOME {self.home}",
                    do="see that this folder can be written and prefect.db in it is of no newer Prefect, "
                    "or name a running server: PREFECT_API_URL",
                )
            time.sleep(TICK)

    def _reason(self) -> str:
        """The last error that it named, of a hundred lines and more that lead to it."""
        said = self._said()
        named = re.findall(r"^[\w.]+(?:Error|Exception): .*$", said, re.MULTILINE)
        return (named or said.strip().split("\n"))[-1] or f"no answer at {self.api}"

    def _said(self) -> str:
        """What it has said on stderr since this was last asked."""
        file = self.log.fileno()
        new = os.pread(file, os.fstat(file).st_size - self.read, self.read)  # leaves alone where it writes on
        self.read += len(new)
        return new.decode(errors="replace")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        sys.stderr.write(self._said())
