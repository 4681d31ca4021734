"""How often the monitor alarms: on batches that have not drifted, and on batches that have.

Run it with `make bench-drift`, after `make demo`. Known rows and batches are drawn anew each time, without a
row in common, from one domain: cells of one crystal, or film reviews. A batch that has drifted is of another:
cells of many crystals, or tweets. Features are the frozen ones that the recipes' heads read. Batches of whole
modules show what it means that cells of one module resemble each other. With names of recipes, only these are
measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from results import keep, known

from headstart import environment, quality
from headstart.drift import Side, detect
from headstart.heads import Head
from headstart.layout import Layout
from headstart.metrics import Ints

ROOT = environment.project_root(Path(__file__).parent)
CASES = (("solar-cells", "mono", "poly"), ("sentiment", "movies", "tweets"))
KNOWN, BATCH = 462, 100  # as many as the manifest's val and test have of mono
KNOWN_MODULES = 8  # likewise
SHOWN, MORE = 100, 400  # batches that the promise is about, and how many are drawn in all
Draw = Callable[[], tuple[Ints, Ints]]


class Case:
    """All rows of a recipe, measured once."""

    def __init__(self, recipe: str, *domains: str) -> None:
        self.domains = domains
        layout = Layout(ROOT, recipe)
        rows = pd.read_parquet(layout.manifest / "manifest.parquet")
        vectors = np.load(layout.features / "features.npy").astype(np.float32)
        head = Head.load(layout.model / "head.safetensors")
        classes = json.loads((layout.model / "model.json").read_text(encoding="utf-8"))["classes"]
        self.probabilities = head.probabilities(vectors)
        self.named = self.probabilities.argmax(axis=1)
        self.vectors, self.classes = vectors, classes
        self.domain, self.group = rows["domain"].to_numpy(), rows["group"].to_numpy()
        if "path" in rows:
            self.inputs = quality.of_images([layout.raw / path for path in rows["path"]])
        else:
            self.inputs = quality.of_texts(rows["text"].tolist(), layout.weights / "tokenizer.json")

    def side(self, rows: Ints, grouped: bool) -> Side:
        """These rows. Their labels are left out: the model has learned some of them."""
        return Side(
            self.vectors[rows],
            self.probabilities[rows],
            self.named[rows],
            {name: values[rows] for name, values in self.inputs.items()},
            np.full(len(rows), np.nan),
            self.group[rows] if grouped else None,
        )

    def alarms(self, draw: Draw, count: int, grouped: bool = False) -> list[bool]:
        """Whether each of so many draws alarms."""
        found = []
        for seed in range(count):
            known, batch = (self.side(rows, grouped) for rows in draw())
            found.append(detect(known, batch, self.classes, seed=seed).alarm)
        return found


def main(recipes: list[str]) -> None:
    """Print the table; write the figures of these recipes, or of all, beside those of the others."""
    share = float(os.environ.get("BENCH_SHARE", "1"))  # of the draws, for a quick look
    shown, more = (max(2, int(share * count)) for count in (SHOWN, MORE))
    figures: dict[str, float] = known("drift")
    print("| batches of 100 rows | dealt | batches | alarms | share |\n|---|---|---|---|---|")

    def tell(words: str, dealt: str, found: list[bool]) -> None:
        key = f"{words}, {dealt}, {len(found)} batches"
        figures[key] = round(float(np.mean(found)), 4)
        print(f"| {words} | {dealt} | {len(found)} | {sum(found)} | {np.mean(found):.1%} |", flush=True)

    for recipe, here, there in CASES:
        if recipes and recipe not in recipes:
            continue
        case, chance = Case(recipe, here, there), np.random.default_rng(0)

        def rows(part: float, case: Case = case, chance: np.random.Generator = chance) -> tuple[Ints, Ints]:
            mine, theirs = (chance.permutation(np.flatnonzero(case.domain == d)) for d in case.domains)
            alien = int(part * BATCH)
            return mine[:KNOWN], np.concatenate([mine[KNOWN : KNOWN + BATCH - alien], theirs[:alien]])

        found = case.alarms(partial(rows, 0.0), more)
        tell(f"{here}, nothing has drifted", "rows", found[:shown])
        tell(f"{here}, nothing has drifted", "rows", found)
        for part in (1.0, 0.3, 0.1):
            tell(f"{part:.0%} {there} among {here}", "rows", case.alarms(partial(rows, part), shown))
        if recipe != "solar-cells":
            continue

        def modules(
            domain: str, count: int, case: Case = case, chance: np.random.Generator = chance
        ) -> tuple[Ints, Ints]:
            names = {d: chance.permutation(np.unique(case.group[case.domain == d])) for d in case.domains}
            known, new = names[case.domains[0]][:KNOWN_MODULES], names[domain][-count:]
            batch = chance.permutation(np.flatnonzero(np.isin(case.group, new)))[:BATCH]
            return np.flatnonzero(np.isin(case.group, known)), batch

        for domain, count in ((here, 2), (here, 4), (here, 8), (there, 8)):
            for grouped, dealt in ((False, "rows"), (True, "modules if enough, or else rows")):
                words = f"of {count} new modules of {domain}, beside {KNOWN_MODULES} of {here}"
                tell(words, dealt, case.alarms(partial(modules, domain, count), shown, grouped))
    if share == 1:
        keep("drift", figures)


if __name__ == "__main__":
    main(sys.argv[1:])
