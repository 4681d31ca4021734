"""Runs in progress: which process does the work of each flow run, written down while it lasts.

Goes in: a flow run's id, or a note of DVC's. Comes out: a file for each run in progress, and, after a crash,
the runs and the notes whose process is gone. Never asks a server, nor decides what becomes of a dead run.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

POOL = "headstart"  # the work pool that runs are started from
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one each time a Linux machine starts
RWLOCK = Path(".dvc/tmp/rwlock")  # where DVC writes down which process reads and writes which path
MARKED = re.compile(r" \[started (.+)\]$")  # at the end of a note of ours there


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
        return self.host == socket.gethostname() and started(self.process) != self.started


def folder(root: Path) -> Path:
    """Where a project's runs in progress are written down."""
    return root / ".headstart" / "runs"


@contextmanager
def in_progress(root: Path, run: str, server: str = "") -> Iterator[None]:
    """Write down that this process works on a run.

    The note goes when the block ends, well or with an error. It stays when the process is ended from
    outside, by a signal that can be caught or by one that cannot.
    """
    this = Run(run, server, socket.gethostname(), os.getpid(), started(os.getpid()) or "")
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


def mark() -> str:
    """What this process adds to its notes in DVC's file, so that they are not taken for another's."""
    return f" [started {started(os.getpid())}]"


def holds(note: Mapping[str, Any], written: float) -> bool:
    """Whether the process that wrote a note in DVC's file may still be there.

    DVC asks whether its number is taken. But numbers are given out again, and in a container each start gives
    the same ones. A note of ours says when its process started. The writer of any other is gone if its number
    is this process's own, which has nothing there without a mark; or if the process that has it started after
    the file was last written, and runs another command. Its start alone would not do: seconds since 1970 are
    others once the clock is set.

    Args:
        note: ``pid`` and ``cmd``, the arguments of its process.
        written: when the file was written last, in seconds since 1970.
    """
    import psutil

    process, command = int(note["pid"]), str(note["cmd"])
    since = started(process)
    if since is None:
        return False
    if marked := MARKED.search(command):
        return marked[1] == since
    if process == os.getpid():
        return False
    try:
        found = psutil.Process(process)
        return found.create_time() <= written or command.endswith("".join(found.cmdline()[-1:]))
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def written_now(root: Path, folder: Path) -> bool:
    """Whether a stage that DVC runs is at work on ``folder``, which DVC deletes before."""
    with suppress(OSError, ValueError):
        file = root / RWLOCK
        at = file.stat().st_mtime
        note = json.loads(file.read_text(encoding="utf-8")).get("write", {}).get(str(folder.resolve()))
        return bool(note) and holds(note, at)
    return False


def started(process: int) -> str | None:
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
