"""Launching: several processes train as one would, and fail with one error."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from headstart import environment, launching
from tests import examples
from tests.conftest import Project, Ran

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launching")]

TRAIN: dict[str, Any] = {
    "method": "fine_tune",
    "epochs": 1,
    "batch": 8,
    "frozen_below": 0,
    "dropout": 0.0,  # each process drops out others
    "precision": "float32",
}
TWO = {"HEADSTART_PROCESSES": "2"}


def write_recipe(project: Project, **train: Any) -> None:
    examples.write_recipe(
        project.root / "recipes/photos.yaml",
        ingest={"source": "file:start/photos"},
        validate={"adapter": "image_folder"},
        fetch={"backbone": "timm:test_efficientnet", "source": "file:start/efficientnet.safetensors"},
        features={"image_size": 64, "packed": True},
        train=TRAIN | train,
    )


@pytest.fixture(scope="module")
def trained(photos: Ran, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose model for images two processes have trained."""
    project = photos.project.copy(tmp_path_factory.mktemp("launched") / "project")
    write_recipe(project)
    project.ok("dvc", "repro", "train@photos", extra=TWO)
    return project


def test_two_processes_write_one_model_with_the_losses_of_one_process(
    trained: Project, tmp_path: Path
) -> None:
    model = trained.root / "model/photos"
    assert {"backbone", "head.safetensors", "predictions.parquet", "steps.csv"} <= {
        file.name for file in model.iterdir()
    }
    alone = trained.copy(tmp_path / "project")
    (alone.root / "model/photos/steps.csv").unlink()
    alone.ok("headstart", "stage", "train", "recipes/photos.yaml", extra={"HEADSTART_PROCESSES": "1"})
    found, expected = (pd.read_csv(p.root / "model/photos/steps.csv") for p in (trained, alone))
    assert len(found) == len(expected) > 3
    assert found["loss"].tolist() == pytest.approx(expected["loss"].tolist(), abs=1e-3)
    assert found["accuracy"].tolist() == expected["accuracy"].tolist()


def test_an_error_inside_the_processes_comes_out_once_and_as_itself(trained: Project, tmp_path: Path) -> None:
    project = trained.copy(tmp_path / "project")
    write_recipe(project, learning_rate=1e30, optimizer="sgd", clip=None, warmup=0.0)
    before = (project.root / "model/photos/model.json").read_bytes()
    done = project("headstart", "stage", "train", "recipes/photos.yaml", extra=TWO)
    assert done.returncode == 1
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1
    message = done.stderr[done.stderr.index("error: ") :]
    assert message.startswith("error: training has diverged")
    assert "lower train.learning_rate" in message
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 40
    assert (project.root / "model/photos/model.json").read_bytes() == before


def test_a_process_that_dies_without_a_word_is_named(trained: Project, tmp_path: Path) -> None:
    project = trained.copy(tmp_path / "project")
    pixels = project.root / "features/photos/pixels.npy"
    pixels.write_bytes(pixels.read_bytes()[:200])  # no reader expects that
    done = project("headstart", "stage", "train", "recipes/photos.yaml", extra=TWO)
    assert done.returncode == 1
    assert "error: training in 2 processes ended with 1" in done.stderr
    assert "where: process" in done.stderr


def test_a_learning_rate_is_suggested_and_plotted(trained: Project, tmp_path: Path) -> None:
    project = trained.copy(tmp_path / "project")
    printed = project.ok("headstart", "find-learning-rate", "recipes/photos.yaml", "--steps", "10")
    last = printed.strip().splitlines()[-1]
    assert re.fullmatch(r"train\.learning_rate: \d\.\de-\d\d, see \S+\.png", last)
    assert (project.root / last.split("see ")[1]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((project.root / "model/photos/model.json").read_text())["method"] == "fine_tune"


def test_who_is_launched_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (environment.LAUNCHED, "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not environment.launched()
    assert environment.first()
    monkeypatch.setenv(environment.LAUNCHED, "1")
    monkeypatch.setenv("RANK", "1")
    assert environment.launched()
    assert not environment.first()


def test_the_ranks_that_a_platform_gives_its_own_processes_are_not_taken_for_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(environment.LAUNCHED, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not environment.launched()
    assert environment.first()
    monkeypatch.delenv("HEADSTART_QUIET", raising=False)
    assert not environment.quiet()


def test_a_quota_of_threads_is_shared_out_and_a_wish_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []

    def launch(config: Any, program: str) -> Any:
        return lambda *command: started.append(os.environ["OMP_NUM_THREADS"])

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launch)
    monkeypatch.setattr(environment, "cores", lambda: 4)
    for given in ("4", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        launching.train(Path("recipes/photos.yaml"), 2)
    assert started == ["2", "3"]
