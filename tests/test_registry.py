from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from headstart import registry, stages
from headstart.layout import Layout
from headstart.recipe import Recipe
from tests import cached, examples

LONG = "a very long name of a site " * 9
SITES = ["https://example.com", "a//b", LONG, f"{LONG}2", "a:b", "a?b", "a_b", "plain site"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """A database of its own, and files beside it."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    yield MlflowClient()
    mlflow.set_tracking_uri(before)


def test_whatever_domains_and_classes_are_called_mlflow_takes_their_figures_and_keeps_them_apart(
    store: MlflowClient,
) -> None:
    costs = {site: {other: 2.0 for other in SITES if other != site} for site in SITES}
    recipe = cached.recipe(train={"decide": {"costs": costs}})
    metrics = {"test_by_domain": {site: {"accuracy": {"value": i}} for i, site in enumerate(SITES)}}
    metrics_named, params = logged(store, metrics, recipe)
    assert sorted(metrics_named.values()) == list(range(len(SITES)))
    assert metrics_named["test_by_domain.plain site.accuracy.value"] == SITES.index("plain site")
    assert metrics_named["test_by_domain.a_b.accuracy.value"] == SITES.index("a_b")
    assert metrics_named["test_by_domain.https___example.com.accuracy.value"] == 0
    pairs = [name for name in params if name.startswith("train.decide.costs.")]
    assert len(pairs) == len(SITES) * (len(SITES) - 1)


def logged(
    store: MlflowClient, metrics: dict[str, Any], recipe: Recipe
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and parameters of a run, as they come back from the store."""
    import mlflow

    with mlflow.start_run() as run:
        mlflow.log_metrics(registry._flat(metrics))
        mlflow.log_params(registry._flat(recipe.model_dump(mode="json", by_alias=True)))
    data = store.get_run(run.info.run_id).data
    return data.metrics, data.params


def test_however_many_batches_a_model_was_trained_on_its_version_names_them_and_none_that_came_since(
    store: MlflowClient, tmp_path: Path
) -> None:
    names = [f"2026-01-01-a-batch-of-the-hour-{i:05}" for i in range(5000)]  # more than a tag holds
    table = cached.manifest(len(names) + 40).assign(batch=[""] * 40 + names)
    layout = cached.write(tmp_path, table)
    (layout.batches / "of-today").mkdir(parents=True)
    version = registered(store, lambda: registry._log_batches(layout))
    assert registry.batches_of(version) == names


def test_the_batches_of_older_versions_are_known_by_their_tag_and_those_from_before_had_none(
    store: MlflowClient,
) -> None:
    older = registered(store, lambda: None, {"headstart.batches": '["monday", "tuesday"]'})
    assert registry.batches_of(older) == ["monday", "tuesday"]
    assert registry.batches_of(registered(store, lambda: None)) == []


def registered(
    store: MlflowClient, log: Callable[[], None], tags: dict[str, str] | None = None
) -> ModelVersion:
    """A version without a model, of a run in which something is logged."""
    import mlflow

    with contextlib.suppress(MlflowException):
        store.create_registered_model("moods")
    with mlflow.start_run() as run:
        log()
    return store.create_model_version("moods", "file:///nowhere", run.info.run_id, tags)


def test_the_data_of_a_model_are_those_that_were_validated_and_not_those_of_today(tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text("outs:\n- md5: today.dir\n  path: data\n")
    deps = [{"path": "data/case", "md5": "then.dir"}, {"path": "src/headstart/splits.py", "md5": "code"}]
    lock = {"schema": "2.0", "stages": {"validate@case": {"deps": deps}, "validate@other": {"cmd": "true"}}}
    (tmp_path / "dvc.lock").write_text(json.dumps(lock))
    lineage = registry.lineage(Layout(tmp_path, "case"), {"stamps": {}})
    assert lineage["headstart.dvc_data"] == "then.dir"
    assert "headstart.dvc_data" not in registry.lineage(Layout(tmp_path, "other"), {"stamps": {}})


@pytest.mark.slow
def test_a_version_names_the_batches_that_its_model_was_trained_on(
    store: MlflowClient, tmp_path: Path
) -> None:
    (tmp_path / "recipes").mkdir()
    examples.write_text_project(tmp_path)
    csv = tmp_path / "start/moods.csv"
    csv.write_text(csv.read_text().replace(",a\n", ",https://example.com\n"))
    recipe, layout = examples.prepared(tmp_path, "moods")
    examples.write_texts(layout.batches / "monday/rows.csv", 60, start=240)
    for stage in ("validate", "features", "train", "evaluate"):
        stages.run(stage, recipe, layout)
    examples.write_texts(layout.batches / "tuesday/rows.csv", 60, start=300)  # while it was trained
    done = registry.register(recipe, layout)
    version = store.get_model_version(done.name, done.version)
    assert registry.batches_of(version) == ["monday"]
    run = store.get_run(version.run_id)
    assert max(map(len, run.data.tags.values())) < 8000
    assert run.data.tags["headstart.digest"] == version.tags["headstart.digest"]
