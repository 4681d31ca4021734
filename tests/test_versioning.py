"""What tasks and flows ask of DVC, of a source and of an inbox, and what becomes of it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

import psutil
import pytest

from flows import watch
from headstart.errors import HeadstartError
from headstart.layout import Layout
from tasks import ingest, versioning
from tests.conftest import Project, isolated

GRAPH = """
stages:
  train:
    matrix:
      recipe: [moods]
    cmd: echo at work && sleep 300
"""


def test_a_stage_ends_when_a_timeout_or_a_stop_ends_the_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    root.mkdir()
    project = Project(root, isolated(tmp_path))
    project.ok("git", "init", "--quiet")
    project.ok("dvc", "init", "--quiet")
    (root / "dvc.yaml").write_text(GRAPH)
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    asleep: list[psutil.Process] = []

    def stop(line: str) -> None:
        if line == "at work":
            deadline = time.monotonic() + 20
            while not asleep and time.monotonic() < deadline:  # the line comes before what follows it
                for each in psutil.Process(os.getpid()).children(recursive=True):
                    with contextlib.suppress(psutil.Error):  # it ended meanwhile
                        asleep.extend([each] if "sleep 300" in " ".join(each.cmdline()) else [])
            raise TimeoutError

    with pytest.raises(TimeoutError):
        versioning.reproduce(root, "train", "moods", stop)
    assert asleep
    _, alive = psutil.wait_procs(asleep, 20)
    assert not alive


def test_a_source_is_known_by_its_content_whatever_bytes_its_names_are(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/photos/caf\xe9.jpg"))
    odd.parent.mkdir()
    odd.write_bytes(b"1")
    layout = Layout(tmp_path, "photos")
    first = ingest._digest(odd.parent, layout)
    odd.write_bytes(b"22")
    assert ingest._digest(odd.parent, layout) != first


def test_an_inbox_out_of_reach_is_no_failed_run_every_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(transient: bool) -> None:
        raise HeadstartError("the store did not give the file", transient=transient)

    monkeypatch.setattr(watch, "load", lambda path: None)
    monkeypatch.setattr(watch, "get_run_logger", logging.getLogger)
    monkeypatch.setattr(watch.inbox, "look", lambda recipe, layout: away(transient=True))
    assert watch._watch(tmp_path, "moods") == "moods: the store did not give the file"
    monkeypatch.setattr(watch.inbox, "look", lambda recipe, layout: away(transient=False))
    with pytest.raises(HeadstartError):
        watch._watch(tmp_path, "moods")
