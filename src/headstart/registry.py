"""The MLflow registry: a trained model and its evidence become a version that anyone can load.

Goes in: the outputs of ``train`` and ``evaluate``. Comes out: a pickle-free pyfunc under the alias
``candidate``. Never decides which model is champion.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from headstart import backbones, models, promotion, sources, stamps, stores
from headstart.errors import HeadstartError
from headstart.layout import Layout, sha256_of
from headstart.promotion import CANDIDATE
from headstart.recipe import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

BATCHES = "batches.json"  # in a run's files: the batches that its model was trained on
BATCHES_TAG = "headstart.batches"  # where older versions have them; a tag holds only so many
BATCH = 1000  # metrics per request: the most that MLflow takes
LONGEST = 100  # characters of a part of a metric's or parameter's name: MLflow takes 250 of the whole
# What the served model imports, besides what its backbone needs.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "safetensors", "torch", "tqdm")


@dataclass(frozen=True)
class Registered:
    """A version in the registry, and whether this call made it."""

    name: str
    version: str
    uri: str
    new: bool

    def __str__(self) -> str:
        verb = "registered as" if self.new else "already registered as"
        return f"{verb} {self.name} version {self.version} ({CANDIDATE}) in {self.uri}"


def register(recipe: Recipe, layout: Layout, reason: str = "") -> Registered:
    """Log the run and register its model under ``candidate``; the same model twice is one version.

    Args:
        recipe: how the model was made.
        layout: where it lies.
        reason: why it was made, kept with a new version.

    Raises:
        HeadstartError: the model's stamps do not match the tree, or the store cannot be reached.
    """
    model = json.loads((layout.model / "model.json").read_text(encoding="utf-8"))
    if changed := stamps.differences(model["stamps"], recipe, layout):
        raise HeadstartError(
            "the model was not made from what is in the tree now",
            where=str(layout.model),
            table=changed,
            do=f"run `headstart run recipes/{layout.recipe}.yaml`",
        )
    digest, name = digest_of(layout), recipe.model_name
    with stores.asked("the MLflow store refused"):
        client = stores.opened(layout, layout.recipe)
        with promotion.locked(name):
            existing = _find(client, name, digest)
            _clear(client, layout, digest, existing.run_id if existing else None)
            number = str(existing.version) if existing else _log_run(recipe, layout, model, digest, reason)
            if promotion.aliases(client, name).get(CANDIDATE) != number:
                client.set_registered_model_alias(name, CANDIDATE, number)
        return Registered(name, number, stores.address(), new=existing is None)


def digest_of(layout: Layout) -> str:
    """Hex sha256 over every file of the model and its evidence: what makes two versions the same."""
    whole = hashlib.sha256()
    files = [*layout.model.rglob("*"), *layout.evidence.rglob("*")]
    for file in sorted(file for file in files if file.is_file()):
        whole.update(f"{file.relative_to(layout.root).as_posix()}\0{sha256_of(file)}\n".encode())
    return whole.hexdigest()


def attach(name: str, version: str, file: Path) -> str:
    """Log a report, its whole folder, with the run of the version that it is about; where to read it.

    Raises:
        HeadstartError: the store cannot be reached.
    """
    client = promotion.opened()
    with stores.asked("the MLflow store did not take the report"):
        run = client.get_model_version(name, version).run_id
        shown = None
        if run:
            client.log_artifacts(run, str(file.parent), "report")
            shown = stores.page(client.get_run(run).info.experiment_id, run, f"report/{file.name}")
    return shown or file.as_uri()


def batches_of(version: ModelVersion) -> list[str]:
    """Batches of which a version was trained on any row; of one older than batches, none.

    Raises:
        HeadstartError: the store cannot be reached.
    """
    import mlflow

    if said := version.tags.get(BATCHES_TAG):
        older: list[str] = json.loads(said)
        return older
    with stores.asked("the MLflow store did not give the names of the batches"):
        files = mlflow.MlflowClient().list_artifacts(version.run_id) if version.run_id else []
        if not any(file.path == BATCHES for file in files):
            return []
        names: list[str] = json.loads(mlflow.artifacts.load_text(f"runs:/{version.run_id}/{BATCHES}"))
        return names


def _find(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    """The newest version that carries ``digest``, if it is complete."""
    return next(iter(promotion.versions(client, name, digest)), None)


def _clear(client: MlflowClient, layout: Layout, digest: str, kept: str | None) -> None:
    """Settle what a killed registration of the same model has left open.

    The run ``kept``, of which a version came, has all it needs and is ended; any other is deleted.
    """
    experiment = client.get_experiment_by_name(layout.recipe)
    wanted = f"tags.`headstart.digest` = '{digest}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment.experiment_id], wanted):
        if run.info.run_id == kept:
            client.set_terminated(kept)
        else:
            client.delete_run(run.info.run_id)


def _log_run(recipe: Recipe, layout: Layout, model: dict[str, Any], digest: str, reason: str) -> str:
    import mlflow

    mlflow.set_experiment(layout.recipe)
    metrics = json.loads((layout.evidence / "metrics.json").read_text(encoding="utf-8"))
    tags = lineage(layout, model) | {"headstart.digest": digest, "headstart.reason": reason}
    # The tags come with the run and with the version: what lacks them was cut short before it was anything.
    with mlflow.start_run(run_name=f"{recipe.train.method} {digest[:8]}", tags=tags) as run:
        choices = _flat(recipe.model_dump(mode="json", by_alias=True))
        mlflow.log_params({key: sources.redacted(str(value)) for key, value in choices.items()})
        mlflow.log_metrics({name: value for name, value in _flat(metrics).items() if value is not None})
        _log_history(run.info.run_id, layout, model["stamps"])
        _log_data(layout, recipe)
        _log_batches(layout)
        mlflow.log_artifacts(str(layout.evidence), "evidence")
        text = (layout.root / "recipes" / f"{layout.recipe}.yaml").read_text(encoding="utf-8")
        mlflow.log_text(sources.redacted(text), f"{layout.recipe}.yaml")
        info = _log_model(recipe, layout)
        registered = mlflow.register_model(info.model_uri, recipe.model_name, tags=tags)
    return str(registered.version)


def _log_history(run: str, layout: Layout, stamped: dict[str, Any]) -> None:
    """What fine-tuning wrote down by step and by epoch, in a few requests instead of thousands."""
    import mlflow
    import pandas as pd
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    for path, kind in (
        (layout.model / "steps.csv", "step"),
        (layout.model / "epochs.csv", "epoch"),
        (layout.work / "train" / f"{stamps.key(stamped)}.csv", "epoch"),
    ):
        if not path.exists():
            continue
        table = pd.read_csv(path)
        metrics = [
            Metric(f"train.{kind}.{name}", float(value), now, int(line[kind]))
            for line in table.to_dict("records")
            for name, value in line.items()
            if name != kind and np.isfinite(value)
        ]
        for start in range(0, len(metrics), BATCH):
            mlflow.MlflowClient().log_batch(run, metrics=metrics[start : start + BATCH])


def _log_model(recipe: Recipe, layout: Layout) -> Any:
    """The pyfunc: code as files, weights as safetensors, nothing pickled."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    if recipe.modality == "text":
        inputs = Schema([ColSpec(DataType.string, "text")])
        example: dict[str, Any] = {"text": ["what a start"]}
    else:
        inputs = Schema(
            [
                ColSpec(DataType.binary, "image", required=False),
                ColSpec(DataType.string, "path", required=False),
            ]
        )
        example = {"image": [_example_image()]}
    classes = json.loads((layout.model / "model.json").read_text(encoding="utf-8"))["classes"]
    outputs = Schema(
        [ColSpec(DataType.string, "label"), *(ColSpec(DataType.double, f"p:{name}") for name in classes)]
    )
    names = {*REQUIREMENTS, *backbones.PACKAGES[recipe.fetch.library]}
    package = Path(__file__).parent
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        import pandas as pd

        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "pyfunc.py"),
            code_paths=[str(package)],
            artifacts={
                name: path.as_posix() for name, path in models.parts_of(recipe, layout, Path(folder)).items()
            },
            signature=ModelSignature(inputs=inputs, outputs=outputs),
            input_example=pd.DataFrame(example),
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in sorted(names)],
        )


def _example_image() -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(sink, format="PNG")
    return sink.getvalue()


def _log_data(layout: Layout, recipe: Recipe) -> None:
    """Link the run to the exact data: the manifest's digest, and where the bytes come from."""
    import mlflow
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    digest = sha256_of(layout.manifest / "manifest.parquet")
    source = CodeDatasetSource({"headstart.source": sources.redacted(recipe.ingest.source)})
    mlflow.log_input(MetaDataset(source, name=layout.recipe, digest=digest[:36]), context="training")


def _log_batches(layout: Layout) -> None:
    """Those in the manifest: what came during training lies in ``data/`` as well."""
    import mlflow
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    manifest = pq.read_table(layout.manifest / "manifest.parquet", columns=["batch"])
    names = sorted(name for name in pc.unique(manifest["batch"]).to_pylist() if name)
    mlflow.log_text(json.dumps(names), BATCHES)


def lineage(layout: Layout, model: dict[str, Any]) -> dict[str, str]:
    """Where the model comes from, as tags: git commit, DVC's digest of the data, stamps, versions."""
    stamped = {key: value for key, value in model["stamps"].items() if isinstance(value, str)}
    tags = {f"headstart.{key}": value for key, value in stamped.items()}
    tags["headstart.git_commit"] = _git(layout.root, "rev-parse", "HEAD")
    tags["headstart.git_dirty"] = str(bool(_git(layout.root, "status", "--porcelain"))).lower()
    if validated := _validated(layout):
        tags["headstart.dvc_data"] = validated
    return tags


def _validated(layout: Layout) -> str | None:
    """DVC's digest of ``data/<recipe>`` as validate read it; data.dvc may have what came since."""
    path = layout.root / "dvc.lock"
    stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
    deps = stages.get(f"validate@{layout.recipe}", {}).get("deps", [])
    return next((dep.get("md5") for dep in deps if dep["path"] == f"data/{layout.recipe}"), None)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False, env=os.environ
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``, with names that MLflow accepts.

    A key that is too long, or that would fall on the name of another, carries a digest of itself.
    """
    plain = {key: re.sub(r"[^\w\-. ]", "_", key) for key in tree}
    times = Counter(plain.values())
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = plain[key]
        if len(name) > LONGEST or (name != key and times[name] > 1):
            name = f"{name[: LONGEST - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
