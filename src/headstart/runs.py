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
MARKED = re.compile(r" \[(.+) (\S+) started (.+)\]$")  # at the end of a note of ours there: see mark


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
        return self.host == socket.gethostname() and started(self.process) not in ("", self.started)


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
    """What this process adds to its notes in DVC's file: where its number counts, and when it started."""
    return f" [{socket.gethostname()} {_namespace()} started {started(os.getpid())}]"


def holds(note: Mapping[str, Any], written: float, alone: bool = False) -> bool:
    """Whether the process that wrote a note in DVC's file may still be there.

    DVC asks whether its number is taken. But numbers are given out again, in a container each start gives the
    same ones, and in another container or on another machine they count others. To take back the note of a
    living process would end it with an error when it is done; so where nothing is known, the note stays, and
    whoever it keeps away waits.

    A note of ours (``mark``) is judged by when its process started, if its host and its namespace are this
    one's. Host names tell machines apart, as in ``Run``. A note of ours from elsewhere stays, unless whoever
    asks is alone and it is of this machine, in a container that was killed, say: then its process is gone.

    A note of others, such as ``dvc repro``, does not say where its number counts. It stays unless the process
    that has the number here started after the file was last written, and is this one or runs another command.
    The start alone would not do: seconds since 1970 are others once the clock is set. What a living process
    of another container wrote before can still be taken back so: two at once are not for one folder.

    Args:
        note: ``pid`` and ``cmd``, the arguments of its process.
        written: when the file was written last, in seconds since 1970.
        alone: no other process of ours on this machine can be at what such a note is about, as the one that
            asks has a lock of the kernel's for it, which goes with its process.
    """
    import psutil

    process, command = int(note["pid"]), str(note["cmd"])
    since = started(process)
    if marked := MARKED.search(command):
        return _ours_holds(*marked.groups(), since=since, alone=alone)
    if not since:
        return since == ""
    try:
        found = psutil.Process(process)
        if found.create_time() <= written:
            return True
        return process != os.getpid() and command.endswith("".join(found.cmdline()[-1:]))
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _ours_holds(host: str, namespace: str, then: str, *, since: str | None, alone: bool) -> bool:
    """The same of a note of ours; ``since``: when the process began that has the number here."""
    here = host == socket.gethostname()
    if here and namespace == _namespace():
        return since in ("", then)
    return not (alone and (here or _boot(then) == _boot(started(os.getpid()) or "")))


def _namespace() -> str:
    """Where this process's number counts: each container has a PID namespace of its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        return "-"


def _boot(started: str) -> str:
    """What all processes have in common that one kernel runs, in whatever container."""
    return started.partition(" ")[0]


def written_now(root: Path, folder: Path) -> bool:
    """Whether a stage that DVC runs is at work on ``folder``, which DVC deletes before."""
    with suppress(OSError, ValueError):
        file = root / RWLOCK
        at = file.stat().st_mtime
        note = json.loads(file.read_text(encoding="utf-8")).get("write", {}).get(str(folder.resolve()))
        return bool(note) and holds(note, at)
    return False


def started(process: int) -> str | None:
    """When a process started; "" if that is not for this user to know, None if there is no such process.

    On Linux in ticks since this start of the machine. Seconds since 1970 would be others once the clock is
    set, and every living process would look like another.
    """
    import psutil

    try:
        found = psutil.Process(process)
        if found.status() == psutil.STATUS_ZOMBIE:
            return None
        if BOOT.exists():
            # Behind the name, which may hold anything, in brackets: field 22 of proc(5).
            ticks = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
            return f"{BOOT.read_text(encoding='utf-8').strip()} {ticks.rpartition(')')[2].split()[19]}"
        return str(found.create_time())
    except (psutil.AccessDenied, PermissionError):
        return ""
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return "" if _hidden(process) else None


def _hidden(process: int) -> bool:
    """Whether it is another user's, whom /proc does not show: mounted with hidepid=2."""
    if BOOT.exists():  # elsewhere signal 0 may be one that ends a process
        with suppress(ProcessLookupError):
            try:
                os.kill(process, 0)
            except PermissionError:
                return True
    return False
