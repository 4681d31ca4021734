"""How many labels it takes: frozen features, fine-tuning, training from scratch, 5 to 250 rows per class.

Run it with `make bench-few-labels`, after both `-tuned` recipes have run. Rows are drawn from the training
split, as many again from the validation split to choose by, and all are judged on the same rows of the test
split. Choices are those of the recipes; from scratch means the same network with random weights, ten epochs.
The default is what the recipe does: it leaves the backbone frozen below so many rows of a class.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from results import keep
from safetensors.torch import load_file, save_file

from headstart import backbones, environment, recipe, training
from headstart.examples import Examples, load
from headstart.layout import Layout
from headstart.metrics import scores
from headstart.packs import Rows

ROOT = environment.project_root(Path(__file__).parent)
SIZES, SEEDS, JUDGED = (5, 10, 25, 50, 100, 250), 3, 500
OF_FEWEST = 12  # seeds at the smallest size: ten rows or others are ten points
SCRATCH = {
    "frozen_below": 0,
    "head_first": False,
    "freeze": None,
    "layer_decay": 1.0,
    "batch_norm": "updated",
    "epochs": 10,
}


def drawn(examples: Examples, split: str, per_class: int, seed: int) -> Rows:
    """So many rows of each class, more of them being a superset of fewer."""
    chance = np.random.default_rng([seed, len(split)])
    rows = chance.permutation(examples.rows(split))
    return np.sort(np.concatenate([rows[examples.truth[rows] == c][:per_class] for c in (0, 1)]))


def random_weights(layout: Layout, folder: Path) -> Path:
    """The same architecture, knowing nothing."""
    shutil.copytree(layout.weights, folder)
    torch.manual_seed(0)
    spec = backbones.Spec.read(folder)
    if spec.library == "transformers":
        network = backbones.transformer(folder)
    else:
        network = backbones.without_classifier(spec.library, backbones.build(spec.library, spec.architecture))
    wanted = set(load_file(folder / "weights.safetensors"))
    state = {k: v.contiguous() for k, v in network.state_dict().items() if k in wanted}
    save_file(state, folder / "weights.safetensors")
    return folder


def main(name: str) -> None:
    """Measure one recipe, and write its lines."""
    chosen, layout = recipe.load(ROOT / "recipes" / f"{name}.yaml"), Layout(ROOT, name)
    examples = load(chosen, layout)
    test = np.sort(np.random.default_rng(0).permutation(examples.rows("test"))[:JUDGED])
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        blank = type("Blank", (Layout,), {"weights": random_weights(layout, Path(folder) / "blank")})
        ways = {
            "frozen": (chosen.training(method="feature_extraction"), layout),
            "fine-tuned": (chosen.training(frozen_below=0), layout),
            "from scratch": (chosen.training(**SCRATCH), blank(ROOT, name)),
        }
        rounds = [
            (seed, size) for size in SIZES for seed in range(OF_FEWEST if size == min(SIZES) else SEEDS)
        ]
        quick = [(way, *each) for each in rounds for way in ways if way != "from scratch"]
        for way, seed, size in [*quick, *(("from scratch", *each) for each in rounds)]:
            train, val = (drawn(examples, split, size, seed) for split in ("train", "val"))
            how, where = ways[way]
            fitted = training.fit(how.training(seed=seed), where, examples, train, val)
            found = scores(examples.truth[test], fitted.probabilities(test))
            line = {"seed": seed, "rows_per_class": size, "chosen": fitted.chosen, **found}
            lines.append({"way": way, **line})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in lines[-1].items()}, flush=True)
            if way == ("frozen" if size < chosen.frozen_below else "fine-tuned"):
                lines.append({"way": "default", **line})
            write(name, pd.DataFrame(lines))


def write(name: str, lines: pd.DataFrame) -> None:
    """The mean of the seeds as figures and as a picture."""
    from matplotlib.figure import Figure

    means = lines.groupby(["way", "rows_per_class"])[["balanced_accuracy", "auroc"]].agg(
        ["mean", "min", "max"]
    )
    figures = {
        f"{way}, {size} rows per class, {metric}": round(float(row[metric, "mean"]), 4)
        for (way, size), row in means.iterrows()
        for metric in ("balanced_accuracy", "auroc")
    }
    keep(f"few-labels-{name}", figures)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for way, part in means["balanced_accuracy"].groupby(level=0):
        sizes = part.index.get_level_values(1)
        look = {"linestyle": "--", "color": "black"} if way == "default" else {}
        axes.plot(sizes, part["mean"], marker="o", label=way, **look)
        axes.fill_between(sizes, part["min"], part["max"], alpha=0.15)
    axes.set(xscale="log", xticks=SIZES, xticklabels=SIZES, title=name)
    axes.set(xlabel="labelled rows per class", ylabel="balanced accuracy on test rows")
    axes.minorticks_off()
    axes.legend()
    figure.savefig(ROOT / "docs/explanation" / f"few-labels-{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    for each in sys.argv[1:] or ("solar-cells-tuned", "sentiment-tuned"):
        main(each)
