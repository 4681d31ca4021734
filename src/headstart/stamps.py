"""Stamps: what a model was made from, and whether the tree still says so.

Goes in: a recipe and the files that training reads. Comes out: digests, or the differences in words.
Never decides what to do about a difference.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from headstart.errors import HeadstartError, unmade
from headstart.layout import REGISTERED, Layout, sha256_of
from headstart.recipe import Recipe

LIBRARY = Path(__file__).parent
# Exactly the modules that make the stage `train` stale in dvc.yaml (a test compares the two). Read from
# sys.modules, the list would depend on what else the process happens to have imported.
MODULES = (
    "activations",
    "adaptation",
    "alignment",
    "attention",
    "augmentation",
    "backbones",
    "calibration",
    "checkpoints",
    "class_shares",
    "classifiers",
    "clumps",
    "devices",
    "domains",
    "earlier",
    "examples",
    "features",
    "finetuning",
    "fitting",
    "heads",
    "images",
    "launching",
    "layout",
    "metrics",
    "mojibake",
    "normalisation",
    "packs",
    "precision",
    "recipe",
    "schedules",
    "selection",
    "shifts",
    "source_free",
    "splits",
    "stamps",
    "texts",
    "training",
)


def take(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """What a model trained now is made from.

    ``recipe`` covers the block ``train`` alone, as DVC's parameters of the stage do. The other blocks act
    through the manifest and the features, whose bytes are stamped: a changed ``evaluate`` or ``register``
    block, or a ``validate`` block that leaves the manifest as it was, makes no model stale. If the stamps
    covered more than DVC watches, registering would refuse models that DVC sees no reason to train again.

    Returns:
        ``recipe``, ``data`` (the manifest), ``features`` and ``backbone`` as hex sha256, ``code`` as hex
        sha256 per module, ``seed``, ``classes`` as the recipe orders them, and ``registered``, the head of a
        registered model to go on from. ``classes`` are there for ``key``: a finished model knows its own.

    Raises:
        HeadstartError: the manifest or the features are missing.
    """
    try:
        described = json.loads((layout.features / "features.json").read_text(encoding="utf-8"))
        brought = layout.weights / REGISTERED / "head.safetensors"
        return {
            "recipe": hashlib.sha256(recipe.train.model_dump_json().encode()).hexdigest(),
            "data": sha256_of(layout.manifest / "manifest.parquet"),
            "features": sha256_of(layout.features / "features.npy"),
            "backbone": described["backbone_sha256"],
            "code": {name: sha256_of(LIBRARY / f"{name}.py") for name in MODULES},
            "seed": recipe.train.seed,
            "classes": recipe.validate_.classes,
        } | ({"registered": sha256_of(brought)} if brought.exists() else {})
    except FileNotFoundError as error:
        raise unmade("what training reads is missing", error, layout.recipe, "features") from None


def key(stamps: dict[str, Any]) -> str:
    """A name for one training: all that its outcome depends on."""
    return hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()[:16]


def differences(stamps: dict[str, Any], recipe: Recipe, layout: Layout) -> list[str]:
    """In words, one line each, where the tree differs from ``stamps``; empty if it matches."""
    try:
        now = take(recipe, layout)
        weights = json.loads((layout.weights / "spec.json").read_text(encoding="utf-8"))["sha256"]
    except HeadstartError as error:
        return [f"{error.what}: {error.where}"]
    except FileNotFoundError as error:
        return [f"the backbone is missing: {error.filename}"]
    found = [
        sentence
        for key, sentence in {
            "recipe": "the recipe's train block has changed since training",
            "data": "manifest.parquet has changed since training",
            "features": "features.npy has changed since training",
            "seed": f"the seed was {stamps.get('seed')}, the recipe says {now['seed']}",
            "registered": "the registered model to go on from has changed since training",
        }.items()
        if stamps.get(key) != now.get(key)
    ]
    if {stamps.get("backbone")} != {now["backbone"], weights}:
        found.append("the backbone's weights are not those that the features were made with")
    was = stamps.get("code", {})
    found += [
        f"{name}.py has changed since training" for name in MODULES if was.get(name) != now["code"][name]
    ]
    return found
