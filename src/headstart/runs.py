"""Runs in progress: which process does the work of each flow run, written down while it lasts.

Goes in: a flow run's id. Comes out: a file for each run in progress, and, after a crash, the runs whose
process is gone. Never asks a server, and never decides what becomes of a dead run.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

POOL = "headstart"  # the work pool that runs are started from
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one each time a Linux machine starts


@dataclass(frozen=True)
class Run:
    """A flow run and the process that does its work.

    Args:
        id: the flow run's.
        server: the API it is recorded on, "" for a server of the run's own.
        host: the machine's name.
        process: the process's number.
        started: when the process started, in a form of its own, because numbers are given out again.
    """

    id: str
    server: str
    host: str
    process: int
    started: str

    def dead(self) -> bool:
        """Whether its process is gone; of another machine's nothing is known."""
        return self.host == socket.gethostname() and _started(self.process) != self.started


def folder(root: Path) -> Path:
    """Where a project's runs in progress are written down."""
    return root / ".headstart" / "runs"


@contextmanager
def in_progress(root: Path, run: str, server: str = "") -> Iterator[None]:
    """Write down that this process works on a run.

    The note goes when the block ends, well or with an error. It stays when the process is ended from
    outside, by a signal that can be caught or by one that cannot.
    """
    this = Run(run, server, socket.gethostname(), os.getpid(), _started(os.getpid()) or "")
    note = folder(root) / f"{run}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(this)) + "\n", encoding="utf-8")
    partial.replace(note)
    try:
        yield
    except Exception:
        note.unlink(missing_ok=True)
        raise
    note.unlink(missing_ok=True)


def known(root: Path) -> list[Run]:
    """Every run that is written down, dead or alive."""
    found = []
    for note in sorted(folder(root).glob("*.json")):
        try:
            found.append(Run(**json.loads(note.read_text(encoding="utf-8"))))
        except FileNotFoundError:  # it ended meanwhile
            continue
        except (ValueError, TypeError):  # cut short by a power failure, or of another version
            note.unlink(missing_ok=True)
    return found


def forget(root: Path, run: Run) -> None:
    """Take back a note, once it is settled what becomes of the run."""
    (folder(root) / f"{run.id}.json").unlink(missing_ok=True)


def _started(process: int) -> str | None:
    """When a process started, or None if there is none.

    On Linux in ticks since this start of the machine. Seconds since 1970 would be others once the clock is
    set, and every living process would look like another.
    """
    import psutil

    with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        found = psutil.Process(process)
        if found.status() == psutil.STATUS_ZOMBIE:
            return None
        if BOOT.exists():
            # Behind the name, which may hold anything, in brackets: field 22 of proc(5).
            ticks = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
            return f"{BOOT.read_text(encoding='utf-8').strip()} {ticks.rpartition(')')[2].split()[19]}"
        return str(found.create_time())
    return None
