"""A project of its own for each test: the tracked files in a temporary folder, and nothing outside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock

from headstart import temporary
from tests import examples

ROOT = Path(__file__).parents[1]
# Set on purpose: two workers with two threads each would fight over two cores. And a sum of two halves has
# other bits than one: what a test goes on with in another process must have as many.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests come first, and those of whole runs before other slow ones: what ends last should be short.

    But the very first is one of the project that takes minutes to make: one worker makes it while another has
    something to do. Later, both would wait for it.
    """
    names = {item: getattr(item, "fixturenames", ()) for item in items}
    slow = {item for item in items if item.get_closest_marker("slow")}
    first = next((item for item in items if "photos" in names[item]), None)
    items.sort(key=lambda item: (item is not first, item in slow, "served" not in names[item]))


def isolated(folder: Path) -> dict[str, str]:
    """The environment of a process that writes nothing outside ``folder``."""
    # A hook of git runs with GIT_DIR set, and what a test commits would land in that repository.
    foreign = ("AWS_", "MLFLOW_", "PREFECT_", "DVC_", "GIT_", "HEADSTART_", "HF_", "PIP_INDEX", "XDG_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(foreign) or name.lower().endswith("_proxy"))
    }
    return kept | {
        "HOME": str(folder / "home"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
        "HEADSTART_CACHE": str(folder / "cache"),
        "DVC_SITE_CACHE_DIR": str(folder / "dvc-site"),
        "DVC_GLOBAL_CONFIG_DIR": str(folder / "dvc-global"),
        "DVC_SYSTEM_CONFIG_DIR": str(folder / "dvc-system"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GIT_CONFIG_GLOBAL": str(folder / "gitconfig"),
        "GIT_AUTHOR_NAME": "A User",
        "GIT_AUTHOR_EMAIL": "user@example.com",
        "GIT_COMMITTER_NAME": "A User",
        "GIT_COMMITTER_EMAIL": "user@example.com",
    }


@dataclass
class Project:
    """A clone of this project, and the environment its commands run in."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(
        self, *command: str, extra: Mapping[str, str] | None = None, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the project; stdout and stderr are captured apart."""
        return subprocess.run(
            command,
            cwd=self.root,
            env=self.environment | dict(extra or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def ok(self, *command: str, extra: Mapping[str, str] | None = None) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self(*command, extra=extra)
        assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def copy(self, folder: Path) -> Project:
        """The same project elsewhere, with everything it has done so far."""
        shutil.copytree(self.root, folder, symlinks=True)
        return Project(folder, self.environment)


def clone(folder: Path, environment: dict[str, str]) -> Project:
    """The tracked files as they are in the working tree, in a fresh git repository, listing no recipe."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and name not in {"data.dvc", "dvc.lock"}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "params.yaml").write_text("recipes: []\n")
    project = Project(folder, environment)
    project.ok("git", "init", "--quiet")
    project.ok("git", "add", "--all")
    project.ok("git", "commit", "--quiet", "--message", "start")
    return project


@pytest.fixture(scope="session")
def session_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One Prefect database and one cache for all projects of this worker."""
    yield isolated(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="session")
def served(session_environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same with a Prefect server, which each command would else have to start for itself."""
    environment = session_environment.copy()
    server = temporary.Server(environment)
    server.wait()
    yield environment
    server.stop()


@dataclass(frozen=True)
class Ran:
    """A project after its first run, and what that printed.

    Other workers copy it at any moment, so nothing may run in it: a file that vanishes fails their copy.
    """

    project: Project
    printed: str


def once(
    factory: pytest.TempPathFactory,
    environment: dict[str, str],
    name: str,
    start: Callable[[Path], Project],
) -> Ran:
    """The project that ``start`` makes in a folder, after a run of recipe ``name``: one for all workers."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"ran-{name}"
    said = folder / "printed"
    with FileLock(f"{folder}.lock"):
        if not said.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            printed = start(folder / "project").ok("headstart", "run", f"recipes/{name}.yaml")
            said.write_text(printed, encoding="utf-8")
    return Ran(Project(folder / "project", environment), said.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def moods(tmp_path_factory: pytest.TempPathFactory, served: dict[str, str]) -> Ran:
    """A project that has registered a model for texts, ``moods``."""

    def start(folder: Path) -> Project:
        project = clone(folder, served)
        examples.write_text_project(project.root, rows=360)
        return project

    return once(tmp_path_factory, served, "moods", start)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, served: dict[str, str], moods: Ran) -> Ran:
    """The same with a model for images besides, ``photos``, from the README's recipe."""

    def start(folder: Path) -> Project:
        project = moods.project.copy(folder)
        examples.write_images(project.root / "start/photos")
        examples.write_efficientnet(project.root / "start/efficientnet.safetensors")
        recipe = examples.recipe_of_the_readme(
            "photos", "timm:test_efficientnet", "file:start/efficientnet.safetensors"
        )
        there = recipe.replace("file:~/photos", "file:start/photos")
        (project.root / "recipes/photos.yaml").write_text(there, encoding="utf-8")
        return project

    return once(tmp_path_factory, served, "photos", start)


@pytest.fixture
def project(tmp_path: Path, session_environment: dict[str, str]) -> Project:
    """A fresh clone without data."""
    return clone(tmp_path / "project", session_environment)
