"""Processes: what becomes of a child when its parent is gone.

Goes in: a process, or this one. Comes out: the promise, which Linux keeps and other systems do not know, that
none outlives the process that looks after it. Never starts one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask for a signal when this process's parent is gone, however that came about.

    Safe between fork and exec: it calls nothing but the kernel.
    """
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, number)


def end_after_parent(grace: float) -> None:
    """End this process so many seconds after its parent is gone, whatever it is doing then.

    The signal above asks it to end in its own way, and with that it may wait for a server that is gone too.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def adopt_orphans() -> None:
    """Ask to become the parent of whatever this process's descendants leave behind."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


def end(process: psutil.Process, number: int = signal.SIGKILL) -> None:
    """Signal a process and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)


def end_orphans(own: set[int]) -> None:
    """End every child of this process but its own, and take note of its end, or it would stay as a zombie."""
    for child in psutil.Process().children():
        if child.pid not in own:
            end(child)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
