"""A manifest and cached features made on the spot: what the stages after ``features`` start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headstart.layout import Layout, sha256_of
from headstart.recipe import Recipe

CLASSES = ["no", "yes"]


def recipe(**blocks: Any) -> Recipe:
    """A recipe named ``case`` with these blocks over the defaults."""
    defaults: dict[str, Any] = {
        "ingest": {"source": "file:anything"},
        "validate": {"adapter": "table"},
        "fetch": {"backbone": "transformers:bert", "source": "file:anything"},
        "features": {},
        "train": {},
        "evaluate": {"resamples": 100},
    }
    made = Recipe.model_validate(defaults | blocks)
    made._name = "case"
    return made


def manifest(rows: int = 240, seed: int = 0, per_group: int = 4) -> pd.DataFrame:
    """Rows in groups, two domains, splits 60/20/20 by group, and doubtful labels here and there."""
    chance = np.random.default_rng(seed)
    group = np.arange(rows) // per_group
    return pd.DataFrame(
        {
            "id": [f"row-{i:05}" for i in range(rows)],
            "text": [f"text {i}" for i in range(rows)],
            "label": np.array(CLASSES)[chance.integers(0, 2, rows)],
            "confidence": chance.choice([1.0, 0.7], rows).astype(np.float32),
            "weight": np.ones(rows, np.float32),
            "domain": np.where(group % 2, "east", "west"),
            "group": [f"group-{g}" for g in group],
            "split": np.array(["train", "train", "train", "val", "test"])[group // 2 % 5],
            "digest": "0" * 64,
            "batch": "",
        }
    )


def shifted(root: Path) -> tuple[Layout, pd.DataFrame]:
    """The same with ``west`` moved far along the signal and its labels put aside; and those labels."""
    table = manifest()
    layout = write(root, table)
    west = (table["domain"] == "west").to_numpy()
    features = np.load(layout.features / "features.npy")
    features[west] = 1.5 * features[west] + 4
    np.save(layout.features / "features.npy", features)
    truth = table.loc[west, ["id", "label"]].reset_index(drop=True)
    table.loc[west, ["label", "confidence", "weight"]] = "", 1.0, 1.0
    table.to_parquet(layout.manifest / "manifest.parquet", index=False)
    described = json.loads((layout.features / "features.json").read_text())
    described["manifest_sha256"] = sha256_of(layout.manifest / "manifest.parquet")
    (layout.features / "features.json").write_text(json.dumps(described))
    layout.truth.mkdir(parents=True)
    truth.to_parquet(layout.truth / "labels.parquet", index=False)
    return layout, truth


def adapting(**train: Any) -> Recipe:
    """A recipe that adapts to ``west``."""
    return recipe(
        validate={"adapter": "table", "target_domain": "west"},
        train={"method": "domain_adaptation"} | train,
    )


def write(root: Path, table: pd.DataFrame | None = None, dim: int = 8, group_noise: float = 0) -> Layout:
    """Manifest, features with a plain signal, and the backbone's description, as the stages write them."""
    layout = Layout(root, "case")
    table = manifest() if table is None else table
    chance = np.random.default_rng(1)
    features = chance.normal(size=(len(table), dim))
    features[:, 0] += np.where(table["label"] == CLASSES[1], 1.0, -1.0)
    features[:, -1] = 3  # as MiniLM has it: a dimension that never varies
    places = table["group"].astype("category").cat.codes.to_numpy()
    features[:, 1:3] += group_noise * chance.normal(size=(places.max() + 1, 2))[places]
    for folder in (layout.manifest, layout.features, layout.weights):
        folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(layout.manifest / "manifest.parquet", index=False)
    np.save(layout.features / "features.npy", features.astype(np.float16))
    table[["id"]].to_parquet(layout.features / "ids.parquet", index=False)
    described = {
        "rows": len(table),
        "dim": dim,
        "layers": None,
        "precision": "float32",
        "backbone_sha256": "b" * 64,
        "manifest_sha256": sha256_of(layout.manifest / "manifest.parquet"),
    }
    (layout.features / "features.json").write_text(json.dumps(described))
    (layout.weights / "spec.json").write_text(json.dumps({"sha256": "b" * 64}))
    return layout
