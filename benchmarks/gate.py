"""The gate on real texts: what becomes of a worse, an equal and a better candidate.

Run it with `make bench-gate`, after `recipes/sentiment-tuned.yaml` has run. The first champion has frozen
features. Then come a candidate that learned from labels of which 30 % were shuffled, a fine-tuned one, and
the same with another seed. Each is trained, registered and judged as `headstart run` does it, in a project
and a registry of its own that are thrown away.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
from results import keep

from headstart import environment, evaluation, recipe, registry, training, trials
from headstart.layout import Layout, sha256_of

ROOT = environment.project_root(Path(__file__).parent)
NAME, SHUFFLED = "sentiment-tuned", 0.3


@contextmanager
def shuffled(layout: Layout) -> Iterator[None]:
    """While it lasts, labels of some training rows have changed places."""
    path, described = layout.manifest / "manifest.parquet", layout.features / "features.json"
    kept = {file: file.read_bytes() for file in (path, described)}
    table, chance = pd.read_parquet(path), np.random.default_rng(0)
    train = np.flatnonzero(table["split"] == "train")
    some = chance.choice(train, round(SHUFFLED * len(train)), replace=False)
    table.loc[some, "label"] = chance.permutation(table.loc[some, "label"].to_numpy())
    table.to_parquet(path, index=False)
    said = json.loads(described.read_text(encoding="utf-8")) | {"manifest_sha256": sha256_of(path)}
    described.write_text(json.dumps(said), encoding="utf-8")
    try:
        yield
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


def main() -> None:
    """Try the candidates in turn, and write what was decided."""
    tuned = recipe.load(ROOT / "recipes" / f"{NAME}.yaml")
    frozen = tuned.training(method="feature_extraction")
    cases = {
        "first: frozen features": (frozen, False),
        "worse: frozen, 30 % of the labels shuffled": (frozen, True),
        "better: fine-tuned": (tuned, False),
        "equal: fine-tuned with another seed": (tuned.training(seed=1), False),
    }
    figures: dict[str, float | bool | None] = {}
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        layout, built = Layout(Path(folder), NAME), Layout(ROOT, NAME)
        environment.prepare(layout.root)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{layout.root / 'mlflow.db'}"
        shutil.copytree(ROOT / "recipes", layout.root / "recipes")
        for part in ("manifest", "truth", "features", "weights"):
            shutil.copytree(getattr(built, part), getattr(layout, part))
        for case, (how, spoiled) in cases.items():
            with shuffled(layout) if spoiled else nullcontext():
                training.train(how, layout)
                evaluation.evaluate(how, layout)
                version = registry.register(how, layout).version
            decided = trials.decide(how, layout, version)
            print(f"{case}\n  {decided}\n", flush=True)
            figures[f"{case}, promoted"] = decided.champion == version
            assert decided.verdict is not None
            figures |= {f"{case}, {name}": value for name, value in decided.verdict.figures.items()}
    keep("gate", figures)


if __name__ == "__main__":
    main()
