"""A PostgreSQL server on loopback for as long as a test needs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.debian import missing
from tests.servers import free_port


@contextmanager
def postgres() -> Iterator[str]:
    """The URI of an empty database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        missing("postgresql")
    # The server refuses to run as root, and its user cannot look into pytest's folders.
    as_user = (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    )
    folder, port = Path(tempfile.mkdtemp(prefix="headstart-pg-")), free_port()
    try:
        if as_user:
            shutil.chown(folder, "postgres", "postgres")

        def call(tool: str, *arguments: str) -> None:
            command = [*as_user, str(found[-1] / tool), *arguments]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

        call("initdb", "--auth=trust", "--username=postgres", "--no-sync", str(folder / "db"))
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        call("pg_ctl", "-D", str(folder / "db"), "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", str(folder / "db"), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
