from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from headstart import promotion, registry, stages
from headstart.recipe import Recipe
from tests import cached, examples

LONG = "a very long name of a site " * 9
SITES = ["https://example.com", "a//b", LONG, f"{LONG}2", "a:b", "a?b", "a_b", "plain site"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MlflowClient]:
    """A database of its own."""
    import mlflow

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


@pytest.mark.slow
def test_a_model_of_a_thousand_batches_is_registered_and_its_version_names_them_all(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    examples.write_text_project(tmp_path)
    csv = tmp_path / "start/moods.csv"
    csv.write_text(csv.read_text().replace(",a\n", ",https://example.com\n"))
    recipe, layout = examples.prepared(tmp_path, "moods")
    for stage in ("train", "evaluate"):
        stages.run(stage, recipe, layout)
    names = [f"2026-01-01-batch-{i:04}" for i in range(1000)]
    for name in names:
        (layout.batches / name).mkdir(parents=True)
    done = registry.register(recipe, layout)
    version = store.get_model_version(done.name, done.version)
    assert sorted(json.loads(version.tags[promotion.BATCHES])) == names
    run = store.get_run(version.run_id)
    assert max(map(len, run.data.tags.values())) < 8000
    assert run.data.tags["headstart.digest"] == version.tags["headstart.digest"]
