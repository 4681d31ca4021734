"""Going on without the source: what a registered model gains from a target's unlabelled rows alone.

Run it with `make bench-source-free`, after both `-tuned` recipes have run. For both pairs of cells and for
films and tweets, each way round, a model is fine-tuned on the source and written as the registry keeps it.
From there it is tuned to half of the target without a label, and scored on the other half, groups whole.
Beside it: that model as it is, and the head that is adapted with the source's rows at hand.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from adaptation import learned_from, some  # the script beside this one
from results import keep

from headstart import domains, environment, fitting, recipe, splits
from headstart.examples import load
from headstart.layout import REGISTERED, Layout
from headstart.metrics import scores

ROOT = environment.project_root(Path(__file__).parent)
FIRST_SEED, SEEDS = 500, 3
PAIRS = {"solar-cells-tuned": ("mono", "poly"), "sentiment-tuned": ("movies", "tweets")}
WAYS = ("hypothesis_transfer", "entropy")


def registered(source: fitting.Tuned, root: Path, layout: Layout, options: recipe.Features) -> Layout:
    """The same data beside a backbone as ``fetch`` takes it from a registered model."""
    made = Layout(root, layout.recipe)
    for shared, own in ((layout.manifest, made.manifest), (layout.features, made.features)):
        own.parent.mkdir(parents=True)
        own.symlink_to(shared)
    source.tuning.classifier.save(root)
    made.weights.parent.mkdir()
    shutil.move(root / "backbone", made.weights)
    (made.weights / REGISTERED).mkdir()
    shutil.move(root / "head.safetensors", made.weights / REGISTERED / "head.safetensors")
    said = {"classes": source.examples.classes, "shares": source.of_val.mean(axis=0).tolist()}
    (made.weights / REGISTERED / "model.json").write_text(json.dumps(said))
    (made.weights / REGISTERED / "features.json").write_text(options.model_dump_json())
    return made


def measure(name: str) -> pd.DataFrame:
    """A line per direction, seed and way: balanced accuracy and AUROC on the target's other half."""
    chosen, layout = recipe.load(ROOT / "recipes" / f"{name}.yaml"), Layout(ROOT, name)
    examples = load(chosen, layout)
    table, of_rows = examples.manifest, examples.manifest["domain"].to_numpy()
    lines = []
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        adapting = chosen.training(method="domain_adaptation", tune=True, seed=seed)
        for here, target in (PAIRS[name], PAIRS[name][::-1]):
            there = np.flatnonzero(of_rows == target)
            train, val = learned_from(examples, here, seed)
            source = fitting.source_of(adapting, layout, examples, train, val)
            assert isinstance(source, fitting.Tuned)
            half = splits.folds(table.iloc[there].assign(label=""), 2, seed)
            seen, test = some(there[half == 0], seed), there[half == 1]
            unseen = np.setdiff1d(there, seen)
            blind = source.examples.blind(there, unseen)
            with_source = domains.adapted(adapting.train, replace(source, examples=blind), train, val)
            said = {
                "as it is": source.head.probabilities(source.examples.features[test]),
                "with the source": with_source.probabilities(test),
            }
            with tempfile.TemporaryDirectory() as folder:
                made = registered(source, Path(folder), layout, chosen.features)
                for way in WAYS:
                    going = chosen.training(method="domain_adaptation", source_free=way, seed=seed)
                    model = domains.freed(going, made, examples.blind(there, unseen))
                    said[way] = model.probabilities(test)
            for way, probabilities in said.items():
                found = scores(examples.truth[test], probabilities)
                lines.append(
                    {"recipe": name, "seed": seed, "source": here, "target": target, "way": way}
                    | {metric: found[metric] for metric in ("balanced_accuracy", "auroc")}
                )
                print(lines[-1], flush=True)
    return pd.DataFrame(lines)


def main() -> None:
    """Print the means over the seeds, and write them."""
    found = pd.concat([measure(name) for name in PAIRS])
    means = found.groupby(["source", "target", "way"])[["balanced_accuracy", "auroc"]].mean()
    print(means.to_string(float_format="{:.3f}".format))
    figures = {
        f"{here} to {target}, {way}, {metric}": round(float(value), 4)
        for (here, target, way), line in means.iterrows()
        for metric, value in line.items()
    }
    keep("source_free", figures)


if __name__ == "__main__":
    main()
