"""DVC, as the tasks see it: the stage graph, what is fresh, how to reproduce and to version.

The graph is only ever read from ``dvc.yaml``. Questions are answered in process, because a
``dvc`` command takes a quarter of a second to start; changes go through the command, because
that is what a user runs, and the files must come out the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from headstart import processes, runs
from headstart.errors import HeadstartError
from headstart.progress import TERMINAL
from headstart.stages import ERROR_FILE

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo

Outcome = Literal["ran", "restored"]
# Seconds to wait for a path that another run is using. What a stage reads and writes is in use until it ends,
# which may take as long as the flow allows, and with any recipe's part of data/ all of it. An hour less than
# flows/retrain.py allows, for rows than flows/monitor.py: its timeout would not say which run is in the way.
BUSY, STAGE_BUSY, ROWS_BUSY = 60.0, 23 * 3600.0, 5 * 3600.0
BLOCKED = "is busy, it is being blocked by"  # so DVC says it; that something is busy, a stage may say as well
ABANDONED = f"if no run is under way, delete {runs.RWLOCK}"  # as after a container was killed
# What DVC tells a person at a terminal after each stage, and nobody needs five times in a log.
HINTS = ("To track the changes", "To enable auto staging", "Updating lock file", "Use `dvc push`", "\t")


def order(root: Path, recipe: str) -> list[str]:
    """Names of the recipe's stages in the order in which they depend on each other.

    Raises:
        HeadstartError: params.yaml does not list the recipe.
    """
    import networkx as nx
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        graph = repo.index.graph  # edges lead from a stage to what it depends on
        place = {stage.addressing: i for i, stage in enumerate(repo.index.stages)}
        # Of stages that do not depend on each other the one that stands first in dvc.yaml goes first.
        sorted_stages = nx.lexicographical_topological_sort(
            graph.reverse(copy=False), key=lambda stage: place[stage.addressing]
        )
        sequence = [stage.addressing for stage in sorted_stages]
    mine = [address.split("@")[0] for address in sequence if address.endswith(f"@{recipe}")]
    if not mine:
        raise HeadstartError(
            f"dvc.yaml builds no recipe {recipe!r}",
            where="params.yaml, recipes",
            do=f"add `- {recipe}` to the list",
        )
    return mine


def is_fresh(root: Path, target: str) -> bool:
    """Whether a stage (``train@sentiment``) or a ``.dvc`` file has nothing to do.

    What another run is writing is not fresh: whoever then reproduces it waits for that run.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo

    _forget_the_dead(root)
    with Repo(str(root), _wait_for_lock=True) as repo:  # whoever pushes holds it as long
        try:
            return not repo.status(targets=[target])
        except LockError:
            return False


def reproduce(
    root: Path, stage: str, recipe: str, log: Callable[[str], None], force: bool = False
) -> Outcome:
    """Run one stage as ``dvc repro --single-item``, its output passed on to ``log`` line by line.

    With ``force`` it runs even if DVC knows what comes out of it. While another run is in a stage that
    this one needs, it waits.

    Progress bars go straight to the terminal. Returns whether the stage ran or its result was
    restored from DVC's cache.

    Raises:
        HeadstartError: the stage's own error; if it died without one, DVC's last words; or another run
            has held it for almost a day.
    """
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        error_file = Path(folder) / "error.json"
        command = ["repro", "--single-item", *(["--force"] if force else []), f"{stage}@{recipe}"]
        lines = _dvc(root, command, log, error_file, patience=STAGE_BUSY)
    restored = any("is cached - skipping run" in line for line in lines)
    return "restored" if restored else "ran"


@contextlib.contextmanager
def writing(root: Path, recipe: str, log: Callable[[str], None]) -> Iterator[None]:
    """The right to change ``data/<recipe>``, which nobody has while a stage reads it: waits for its end.

    DVC takes the digest of what a stage has read after the stage: what came meanwhile would count as read.
    What asks DVC for the same path, such as ``dvc add``, must wait until this has ended.

    Raises:
        HeadstartError: another run has held it for almost a day, or DVC cannot tell who does.
    """
    with _held(root, f"a change of data/{recipe}", log, STAGE_BUSY, write=[f"data/{recipe}"]):
        yield


def forget_writers(root: Path) -> None:
    """Take back the notes of ``writing`` of runs that are gone, for whoever alone may change ``data/``.

    A container that was killed and started anew cannot tell by numbers that the last one is gone.
    """
    _forget_the_dead(root, alone=True)


def await_manifest(root: Path, recipe: str, log: Callable[[str], None]) -> None:
    """Wait while a run is at ``validate``, before which DVC deletes what it made last time.

    Raises:
        HeadstartError: as of ``writing``, but after hours.
    """
    outputs = [f"{folder}/{recipe}" for folder in ("manifest", "truth")]
    with _held(root, f"a look at manifest/{recipe}", log, ROWS_BUSY, read=outputs):
        pass


def version_data(root: Path, recipe: str, log: Callable[[str], None]) -> None:
    """Version ``data/<recipe>`` in the top-level ``data.dvc``; a no-op if nothing changed.

    Other recipes' data that this machine does not have stay listed, as long as DVC knows their
    names (from its cache, or from a remote).
    """
    pointer = root / "data.dvc"
    if pointer.exists() and is_fresh(root, "data.dvc"):
        return
    target = f"data/{recipe}" if _others_are_elsewhere(root, recipe) else "data"
    _dvc(root, ["add", target], log, patience=STAGE_BUSY)


def push(root: Path, recipe: str, log: Callable[[str], None]) -> bool:
    """Push ``data/<recipe>`` to the default remote; False if there is none.

    Raises:
        HeadstartError: the remote cannot be reached.
    """
    if not _remote(root):
        return False
    _dvc(root, ["push", f"data/{recipe}"], log)
    return True


def restore_data(root: Path, recipe: str, log: Callable[[str], None]) -> bool:
    """Bring back ``data/<recipe>`` as ``data.dvc`` names it, from the cache or the remote.

    Where DVC has no remote, as on a fresh clone of a project that never had one, it returns False, and the
    source is asked instead. A checkout that fails would delete what is in ``data/``, so it is only tried with
    everything at hand.

    Raises:
        HeadstartError: there is a remote, and it does not give the data: the batches among them can be had
            nowhere else (transient).
    """
    if not (root / "data.dvc").exists() or not _listed(root, recipe):
        return False
    target = f"data/{recipe}"
    if not _cached(root, recipe):
        if not (remote := _remote(root)):
            log("what data.dvc lists is neither in DVC's cache nor on a remote: asking the source")
            return False
        try:
            said: Sequence[str] = _dvc(root, ["fetch", target], log)
        except HeadstartError as error:  # it may also end well, and have brought nothing
            said = error.table
        if not _cached(root, recipe):
            raise HeadstartError(
                f"{target} is versioned, and DVC's remote {remote} does not give it",
                where=str(root / "data.dvc"),
                table=said[-5:],
                do="check the remote, or `dvc push` where the data are; "
                "without data.dvc a run begins again from the sources, without any batch",
                transient=True,
            )
    _dvc(root, ["checkout", target], log)
    return (root / target).is_dir()


def _remote(root: Path) -> str | None:
    """The name of the default remote."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        name: str | None = repo.config["core"].get("remote")
        return name


def _data(root: Path, repo: Repo) -> Output:
    """What ``data.dvc`` tracks."""
    return repo.stage.load_file(str(root / "data.dvc"))[0].outs[0]


def _cached(root: Path, recipe: str) -> bool:
    """Whether DVC's cache has every file of ``data/<recipe>``."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        out = _data(root, repo)
        mine = [digest.value for key, _, digest in out.get_obj() or () if key[0] == recipe]
        return bool(mine) and all(map(out.cache.exists, mine))


def restore_stage(root: Path, target: str) -> None:
    """Bring back the outputs of a stage as ``dvc.lock`` names them, if they are in the cache. Silent."""
    with contextlib.suppress(HeadstartError):
        _dvc(root, ["checkout", "--force", target], lambda line: None)


def _tree(root: Path) -> list[tuple[str, ...]] | None:
    """Keys of all files under ``data.dvc``, or None where DVC does not have the list at hand."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        tree = _data(root, repo).get_obj()
        return None if tree is None else [key for key, _, _ in tree]


def _listed(root: Path, recipe: str) -> bool:
    keys = _tree(root)
    return keys is None or any(key[0] == recipe for key in keys)


def _others_are_elsewhere(root: Path, recipe: str) -> bool:
    if not (root / "data.dvc").exists():
        return False
    others = {key[0] for key in _tree(root) or [] if not key[0].startswith(".")} - {recipe}
    return any(not (root / "data" / other).exists() for other in others)


@dataclass
class _Waiting:
    """Patience with another run: said once, then ever longer pauses, and an end.

    Args:
        whose: what has to wait.
        root: the project.
        log: told what keeps this one waiting.
        patience: seconds.
    """

    whose: str
    root: Path
    log: Callable[[str], None]
    patience: float
    pause: float = 1.0
    since: float = field(default_factory=time.monotonic)
    begun: bool = False

    def go_on(self, said: Sequence[str], told: bool = False) -> None:
        """Pause; ``said`` is DVC's account of who is at it, ``told`` whether the log has it.

        Raises:
            HeadstartError: this has taken too long.
        """
        said = [line for line in said if line]
        if time.monotonic() - self.since > self.patience:
            raise HeadstartError(
                f"another run is at what {self.whose} needs",
                where=str(self.root),
                table=said,
                do=f"wait for it, or stop it; {ABANDONED}",
            )
        if not self.begun:
            for line in (*([] if told else said), f"waiting for that run to end; {ABANDONED}"):
                self.log(line)
        self.begun = True
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, 10.0)


@contextlib.contextmanager
def _held(
    root: Path,
    whose: str,
    log: Callable[[str], None],
    patience: float,
    *,
    read: Sequence[str] = (),
    write: Sequence[str] = (),
) -> Iterator[None]:
    """Paths that DVC lets nobody write, or nobody read or write, until this has ended."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.rwlock import rwlock

    command = " ".join(sys.argv) + runs.mark()
    reads, writes = ([str(root.resolve() / path) for path in paths] for paths in (read, write))
    waiting = _Waiting(whose, root, log, patience)
    with Repo(str(root)) as repo, contextlib.ExitStack() as held:
        while True:
            _forget_the_dead(root)
            try:
                held.enter_context(rwlock(repo.tmp_dir, repo.fs, command, reads, writes, _hardlink(repo)))
                break
            except LockError as error:
                waiting.go_on(str(error).splitlines())
            except DvcException as error:
                raise HeadstartError(str(error), where=str(root), do=ABANDONED) from error
        yield


def _forget_the_dead(root: Path, alone: bool = False) -> None:
    """Take back DVC's notes of processes that are gone, whoever has their numbers now.

    Else such a note would keep everyone away from its paths; and if it looks like one of this process's own,
    DVC would leave it there, in the way of the commands that this process starts. A file without any is not
    written: when it was last says how old its notes are.

    Args:
        root: the project.
        alone: nobody else may change ``data/`` now.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        from dvc.rwlock import _edit_rwlock  # DVC's own guard of the file
    except ImportError:  # in a later version: then what is there stays until somebody deletes it
        return

    file = root / runs.RWLOCK
    # What is not as DVC writes it, it says itself; and while another process writes it, it is no JSON.
    with contextlib.suppress(
        FileNotFoundError, ValueError, TypeError, AttributeError, KeyError, DvcException
    ):
        written = file.stat().st_mtime
        notes = json.loads(file.read_text(encoding="utf-8"))
        if _living(notes, written, alone) == notes:
            return
        with Repo(str(root)) as repo, _edit_rwlock(repo.tmp_dir, repo.fs, _hardlink(repo)) as notes:
            notes.update(_living(notes, file.stat().st_mtime, alone))


def _living(notes: dict[str, Any], written: float, alone: bool) -> dict[str, Any]:
    """The notes whose processes may still be there; ``written`` last at that time, in seconds since 1970."""
    living: dict[str, Any] = {mode: {} for mode in notes}
    for path, note in notes.get("write", {}).items():
        if runs.holds(note, written, alone):
            living["write"][path] = note
    for path, several in notes.get("read", {}).items():
        if held := [note for note in several if runs.holds(note, written)]:
            living["read"][path] = held
    return living


def _hardlink(repo: Repo) -> bool:
    return bool(repo.config["core"].get("hardlink_lock", False))


def _dvc(
    root: Path,
    arguments: list[str],
    log: Callable[[str], None],
    error_file: Path | None = None,
    *,
    patience: float = BUSY,
) -> list[str]:
    """Run ``dvc`` with this interpreter's environment first on the path; return its output's lines.

    A path that another run is using makes DVC fail at once (``BLOCKED``), so that is tried again for
    ``patience`` seconds; ``--wait-for-lock`` covers the repository's own lock.

    Args:
        root: the project.
        arguments: the command.
        log: told what it waits for, and of a stage all that it says, as it says it.
        error_file: where a stage leaves its error; None of any other command.
        patience: seconds.

    Raises:
        HeadstartError: the error that a stage left, another run was at it all the time, or DVC's last words.
    """
    first = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join([first, os.environ.get("PATH", "")])}
    if error_file:
        environment[ERROR_FILE] = str(error_file)
    if sys.stderr.isatty():
        with contextlib.suppress(OSError):  # a container may have been lent one that it cannot name
            environment[TERMINAL] = os.ttyname(sys.stderr.fileno())
    # Never --quiet: then it would not say either why it fails.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    waiting = _Waiting(f"`dvc {' '.join(arguments)}`", root, log, patience)
    known: set[str] = set()  # said by an attempt before: once is enough
    while True:
        _forget_the_dead(root)
        lines = []
        with subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line.rstrip())
                    if error_file and lines[-1] and lines[-1] not in known and not line.startswith(HINTS):
                        log(lines[-1])
            except BaseException:  # a timeout or a stop: the stage would run on, and be waited for
                processes.end(psutil.Process(process.pid), signal.SIGTERM)
                raise
        if process.returncode == 0:
            return lines
        if error_file and error_file.exists():
            raise HeadstartError(**json.loads(error_file.read_text(encoding="utf-8")))
        if not any(BLOCKED in line for line in lines):
            break
        known.update(lines)
        waiting.go_on(lines, told=bool(error_file))
    raise HeadstartError(
        f"`dvc {' '.join(arguments)}` failed with exit code {process.returncode}",
        where=str(root),
        table=lines[-20:],
        do="the lines above are its own last words",
    )
