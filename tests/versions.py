"""Small versions such as the registry holds, made on the spot without a registry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headstart.fetching import fetch
from headstart.heads import Head
from headstart.layout import Layout
from headstart.models import Model, Version
from headstart.precision import Arithmetic
from headstart.recipe import Features, Recipe
from tests import cached, examples

SIDE = 32
TEXTS = [f"the {thing} was {word} next to the number {i}" for i, (thing, word) in enumerate(
    zip(examples.THINGS * 2, (examples.GOOD + examples.BAD) * 2, strict=False)
)]  # fmt: skip


def write_texts_version(root: Path, **options: Any) -> Path:
    """The files of a version that reads texts."""
    examples.write_bert(root / "inbox/bert")
    recipe = cached.recipe(
        fetch={"backbone": "transformers:bert", "source": f"file:{root / 'inbox/bert'}"},
        features={"precision": "float32"} | options,
    )
    return _write(root, recipe, TEXTS)


def write_images_version(root: Path, **options: Any) -> Path:
    """The files of a version that reads images; the images are in ``root/images``."""
    examples.write_efficientnet(root / "inbox/efficientnet.safetensors")
    examples.write_images(root / "images", per_class=6, side=40)
    recipe = cached.recipe(
        validate={"adapter": "image_folder"},
        fetch={
            "backbone": "timm:test_efficientnet",
            "source": f"file:{root / 'inbox/efficientnet.safetensors'}",
        },
        features={"image_size": SIDE, "precision": "float32"} | options,
    )
    return _write(root, recipe, sorted((root / "images").rglob("*.png")))


def read(folder: Path, name: str = "small") -> Version:
    """What ``models.load`` makes of such files."""
    return Version(name, "1", "run", {"headstart.digest": "d"}, folder, Model.read(_parts(folder)))


def _parts(folder: Path) -> dict[str, Path]:
    artifacts = folder / "artifacts"
    return {
        "backbone": artifacts / "backbone",
        "head": artifacts / "head.safetensors",
        "model": artifacts / "model.json",
        "features": artifacts / "features.json",
        "arithmetic": artifacts / "arithmetic.safetensors",
    }


def _write(root: Path, recipe: Recipe, items: Sequence[Any]) -> Path:
    """A random head, standardised for the items, so that they are not all named alike."""
    from headstart.features import Extractor

    layout, folder = Layout(root, "case"), root / "version"
    fetch(recipe, layout)
    parts = _parts(folder)
    parts["head"].parent.mkdir(parents=True)
    layout.weights.rename(parts["backbone"])
    options = Features.model_validate(recipe.features)
    vectors = Extractor(parts["backbone"], options, Arithmetic())(items)
    chance = np.random.default_rng(0)
    weight = chance.normal(0, 0.2, (2, vectors.shape[1])).astype(np.float32)
    Head(weight, np.zeros(2, np.float32), vectors.mean(axis=0), vectors.std(axis=0) + 1e-3).save(
        parts["head"]
    )
    parts["model"].write_text(json.dumps({"classes": ["good", "bad"]}))
    parts["features"].write_text(recipe.features.model_dump_json())
    Arithmetic().save(parts["arithmetic"])
    return folder
