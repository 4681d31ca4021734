"""The process's surroundings: the project root, quiet and offline settings, default stores.

Goes in: nothing but the working directory and the environment. Comes out: environment
variables that are not set yet, so that anything a user sets wins. Imports nothing heavy,
because it must run before prefect, mlflow and dvc are imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from headstart.errors import HeadstartError

# No telemetry, no update checks. MLflow ignores DO_NOT_TRACK, so each tool is told in its own words.
QUIET = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "true",
}
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time, and in how many
# By torchrun, ours or a person's. Not WORLD_SIZE, which platforms set for processes of their own.
LAUNCHED = "TORCHELASTIC_RUN_ID"
THIS_MACHINE = ("127.0.0.1", "localhost")
# Files of a project that Prefect reads its settings from, and what stands in those that have any.
PREFECTS_FILES = {"prefect.toml": "", ".env": "prefect_", "pyproject.toml": "[tool.prefect"}


def quiet() -> bool:
    """Whether this process shows no progress and no chatter.

    It was told so, or it is one of several that train together, of which the first speaks for all.
    """
    return os.environ.get("HEADSTART_QUIET") == "1" or not first()


def launched() -> bool:
    """Whether this process is one of several that were started to train together."""
    return LAUNCHED in os.environ


def first() -> bool:
    """Whether this process is the one that publishes: the first of several, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def cores() -> int:
    """Processor cores that this process may use; its container may have been given fewer than there are."""
    may = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container of Linux's, or one without a limit: `max`
        quota, period = map(int, CPU_LIMIT.read_text(encoding="ascii").split())
        may = max(1, min(may, round(quota / period)))
    return may


def keep_to_quota() -> None:
    """Let libraries that are loaded later, torch among them, compute in no more threads than are given cores.

    Of their own accord they count the cores of the host, and a container of 4 among 64 would run 64 threads.
    """
    if cores() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above ``start`` (by default the working directory) with a dvc.yaml.

    Raises:
        HeadstartError: there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise HeadstartError(
        "this is not a headstart project",
        where=str(start),
        do="change into the folder that holds dvc.yaml",
    )


def prefect_configured(folder: Path) -> bool:
    """Whether anything but ``PREFECT_API_URL`` may say which server, or what kind, Prefect should use here.

    Profiles do, and the files in ``folder`` that Prefect looks into. What may not be read says nothing.
    """
    if "PREFECT_PROFILE" in os.environ:
        return True
    home = os.environ.get("PREFECT_HOME") or "~/.prefect"
    profiles = os.environ.get("PREFECT_PROFILES_PATH") or f"{home}/profiles.toml"
    with contextlib.suppress(OSError, RuntimeError):  # a home that may not be entered, or none at all
        if Path(profiles).expanduser().exists():
            return True
    for name, word in PREFECTS_FILES.items():
        with contextlib.suppress(OSError):
            if word in (folder / name).read_text(encoding="utf-8", errors="replace").lower():
                return True
    return False


def prepare(root: Path) -> None:
    """Set what is unset: quiet tools, and the stores of Prefect and MLflow in the project root.

    The project root goes first on the import path, so that its flows, its tasks and a recipe's
    own adapters are found.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    _spare_this_machine()
    keep_to_quota()
    if quiet():
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    # In one database two projects would share a work pool and the names of deployments: the worker of one
    # would run what the other is asked for.
    if not prefect_configured(root):
        os.environ.setdefault("PREFECT_HOME", str(root / ".prefect"))
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))


def _spare_this_machine() -> None:
    """Send nothing to a proxy that is meant for a server on this machine.

    Most libraries would: a company's proxy cannot reach what runs here, and a run waits for its own server
    until it gives up.
    """
    if not any(name.lower() in {"http_proxy", "https_proxy", "all_proxy"} for name in os.environ):
        return
    told = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    spared = [name.strip() for name in told.split(",") if name.strip()]
    if "*" not in spared:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*spared, *THIS_MACHINE]))
