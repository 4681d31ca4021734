"""A small case of fine-tuning, which tests run here or in processes of its own.

``python -m tests.tuning WEIGHTS OUT CHOICES`` trains it and writes losses and weights to the folder OUT;
a run that was killed there is continued.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from headstart import finetuning, packs
from headstart.checkpoints import Checkpoints
from headstart.classifiers import Classifier
from headstart.examples import soft_targets
from headstart.finetuning import Labels, Tuning
from headstart.heads import Head
from headstart.recipe import Features, Train

SIDE, ROWS = 32, 72
TRAIN, VAL = np.arange(0, 56), np.arange(56, ROWS)


def write_weights(folder: Path, library: str = "torchvision", architecture: str = "resnet18") -> Path:
    """A backbone with random weights, as ``fetch`` would leave it."""
    from headstart import backbones
    from headstart.layout import sha256_of

    torch.manual_seed(0)
    network = backbones.without_classifier(library, backbones.build(library, architecture)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "weights.safetensors")
    spec = {
        "library": library,
        "architecture": architecture,
        "modality": "image",
        "dim": network(torch.zeros(1, 3, SIDE, SIDE)).shape[1],
        "preprocessing": {
            "image_size": SIDE,
            "interpolation": "bilinear",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "source": "made up",
        "source_sha256": None,
        "sha256": sha256_of(folder / "weights.safetensors"),
        "licence": None,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


def pictures(brighter: float = 0) -> tuple[packs.Pixels, np.ndarray[Any, np.dtype[np.int64]]]:
    """Noise, darker and lighter by class."""
    chance = np.random.default_rng(0)
    truth = np.arange(ROWS) % 2
    levels = brighter + np.array([100, 150])[truth][:, None, None, None]
    array = chance.normal(levels, 60, (ROWS, SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    return packs.Pixels(array), truth.astype(np.int64)


def case(
    weights: Path,
    choices: Train,
    *,
    head: Head | None = None,
    work: Path | None = None,
    layers: list[str] | None = None,
    views: Literal[1, 2, 8] = 1,
) -> Tuning:
    """A run that has not begun.

    If it aligns, then with the last training rows, whose labels it lacks; without a source it knows no label.
    """
    pack, truth = pictures()
    val, shares = VAL, None
    torch.manual_seed(0)
    classifier = Classifier(weights, Features(packed=True, layers=layers, views=views), choices, 2, head)
    train, target = (TRAIN, None) if choices.alignment is None else (TRAIN[:40], TRAIN[40:])
    targets = soft_targets(truth, np.ones(ROWS), 2)
    if target is not None:
        truth[target], targets[target] = -1, np.nan
    if choices.source_free:
        val, truth[:] = VAL[:0], 0
        targets = soft_targets(truth, np.ones(ROWS), 2)
        shares = np.array([0.5, 0.5]) if choices.source_free == "hypothesis_transfer" else None
    labels = Labels(
        truth,
        targets,
        np.ones(ROWS),
        [f"row-{i}" for i in range(ROWS)],
        [f"group-{i // 2}" for i in range(ROWS)],
    )
    return Tuning(
        classifier,
        pack,
        labels,
        train,
        val,
        target=target,
        shares=shares,
        checkpoints=Checkpoints(work / "kept") if work else None,
        work=work,
    )


def text_case(root: Path) -> tuple[Path, packs.Sentences, np.ndarray[Any, np.dtype[np.int64]]]:
    """Weights, packed sentences and true classes of ``examples.write_text_project``."""
    from headstart import fetching, recipe, texts
    from headstart.layout import Layout

    layout = Layout(root, "moods")
    fetching.fetch(recipe.load(root / "recipes/moods.yaml"), layout)
    table = pd.read_csv(root / "start/moods.csv")
    tokens = texts.tokenise(table["body"].tolist(), layout.weights / "tokenizer.json", 64)
    return layout.weights, packs.Sentences(tokens, 0), (table["mood"] == "happy").to_numpy(np.int64)


def main(weights: Path, out: Path, choices: Train) -> None:
    """Train, saving after every step, and write what came out."""
    finetuning.SECONDS_BETWEEN = 0.0
    finetuning.SHARE_OF_TIME = float("inf")
    tuning = case(weights, choices, work=out)
    history = tuning.run()
    if tuning.accelerator.is_main_process:
        told = {
            "steps": history.steps,
            "epochs": history.epochs,
            "processes": tuning.accelerator.num_processes,
        }
        (out / "history.json").write_text(json.dumps(told))
        weights_now = {name: value.contiguous() for name, value in tuning.classifier.state_dict().items()}
        save_file(weights_now, out / "done.partial")
        (out / "done.partial").rename(out / "done.safetensors")
    tuning.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Train.model_validate_json(sys.argv[3]))
