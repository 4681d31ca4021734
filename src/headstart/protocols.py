"""Protocols: cross-validation of a recipe on all its rows, for numbers that one split cannot give.

Goes in: the manifest and the cached features. Comes out: a table of scores per fold, and its mean with
an interval. Never writes a file and never touches the model: it measures the way a model is built.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pandas as pd

from headstart import domains, splits
from headstart.calibration import decision
from headstart.errors import HeadstartError
from headstart.examples import Examples, load
from headstart.fitting import source_of
from headstart.layout import Layout
from headstart.metrics import METRICS, scores
from headstart.packs import Rows
from headstart.progress import bar
from headstart.recipe import Recipe
from headstart.training import fit

# A quarter of the training folds chooses the penalty: 60/20/20 with five folds, as in a recipe.
INNER_FOLDS = 4
EXPECTED = ("expected", "low", "high")


def cross_validate(
    recipe: Recipe, layout: Layout, folds: int = 5, seeds: int = 1, random_folds: bool = False
) -> pd.DataFrame:
    """Build the recipe's model once per fold, as the stage ``train`` would, and score the fold it never saw.

    The folds keep groups whole and are balanced over label and domain; so is the part of the training
    folds that chooses the penalty and the rule of ``train.decide``. The manifest's own splits play no part.

    Args:
        recipe: its ``train`` block says how to build the model.
        layout: where manifest and features lie.
        folds: number of folds, at least 2.
        seeds: repetitions, each with folds of its own where the groups leave a choice: the largest are dealt
            first, and the seed decides between groups of one size only.
        random_folds: let folds cut through groups. Near-copies of test rows are then trained on, and the
            scores are too high: for comparison with the literature only.

    Returns:
        One line per seed and fold: ``seed``, ``fold``, ``folds`` (their number), ``kind`` (``group-safe`` or
        ``random``), ``held_out`` (a number of its own for each set of held-out rows: lines with the same one
        repeat a fold), ``rows``, ``groups``, ``chosen`` (what the inner validation rows chose), then every
        metric of ``headstart.metrics``.

    Raises:
        HeadstartError: fewer groups (or rows) of a class than folds, or so few that none is left to learn
            from, or whatever ``train`` raises.
    """
    if recipe.train.method == "domain_adaptation":
        raise HeadstartError(
            "cross-validation needs the label of every row, and those of the target domain are put aside",
            where="validate.target_domain",
            do="see `headstart run`'s own evidence, or measure the recipe without a target domain",
        )
    examples = load(recipe, layout)
    _enough(examples, folds, random_folds)
    everything = np.arange(len(examples.truth))
    dealt = {
        (seed, fold): (*_split(examples, training, INNER_FOLDS, seed, random_folds)[0], held_out)
        for seed in range(seeds)
        for fold, (training, held_out) in enumerate(_split(examples, everything, folds, seed, random_folds))
    }
    for fitted, _, _ in dealt.values():  # of all folds, before hours go into the first
        _learnable(examples, fitted, folds, random_folds)
    numbers: dict[bytes, int] = {}  # of the different folds, whichever seed has dealt them
    lines = []
    for (seed, fold), (fitted, choosing, held_out) in bar(
        dealt.items(), desc="cross-validating", unit=" folds"
    ):
        model = fit(recipe.training(seed=recipe.train.seed + seed), layout, examples, fitted, choosing)
        assert model is not None  # no command measures in several processes
        rule = decision(
            examples.truth[choosing], model.probabilities(choosing), examples.classes, recipe.train.decide
        )
        probabilities = model.probabilities(held_out)
        found = scores(examples.truth[held_out], probabilities, named=rule.named(probabilities))
        lines.append(
            {
                "seed": seed,
                "fold": fold,
                "folds": folds,
                "kind": "random" if random_folds else "group-safe",
                "held_out": numbers.setdefault(held_out.tobytes(), len(numbers)),
                "rows": len(held_out),
                "groups": examples.manifest["group"].iloc[held_out].nunique(),
                "chosen": model.chosen,
                **found,
            }
        )
    return pd.DataFrame(lines)


def adapt_each_pair(recipe: Recipe, layout: Layout, folds: int = 2, seeds: int = 1) -> pd.DataFrame:
    """Adapt the recipe's model from every domain to every other, as if the other had no labels.

    The target is dealt into folds, groups whole and without a look at its labels. For each fold the model is
    adapted with the rows of the others, and says what the rows of the fold are; the answers of all folds are
    scored together, so every row of the target is a test row once. Its labels score, and do nothing else.

    Args:
        recipe: one that has all labels. ``fine_tune`` tunes the backbone on each source first.
        layout: where manifest and features lie.
        folds: of each target, at least 2.
        seeds: repetitions, each with training of its own, and other folds where groups allow.

    Returns:
        One line per seed and pair: ``seed``, ``source``, ``target``, ``rows``, ``chosen`` (the way to adapt,
        or several if the folds differ), ``source_only`` and ``adapted`` (balanced accuracies), ``gain``,
        ``auroc``, ``accuracy``, and what was ``expected`` of the latter with ``low`` and ``high``.

    Raises:
        HeadstartError: fewer than two domains, too few rows of a class in one, fewer groups than folds, or
            whatever ``train`` raises.
    """
    tune = recipe.train.method == "fine_tune" or recipe.train.tune
    examples = load(recipe, layout)
    of = examples.manifest["domain"].to_numpy()
    names = sorted(set(of))
    if len(names) < 2 or (examples.truth < 0).any():
        raise HeadstartError(
            "pairs of domains need at least two, with labels to score by",
            where=str(layout.manifest),
            do="name a recipe without `validate: target_domain`, of data that say which domain a row is of",
        )
    dealt = {
        (seed, name): _split(examples, np.flatnonzero(of == name), 1 + INNER_FOLDS, seed, False)[0]
        for seed in range(seeds)
        for name in names
    }
    for train, val in dealt.values():  # of all sources, before hours go into the first
        domains.check(examples, train, val)
    lines = []
    for (seed, name), (train, val) in bar(dealt.items(), desc="adapting", unit=" sources"):
        choices = {"seed": recipe.train.seed + seed, "method": "domain_adaptation", "tune": tune}
        chosen = recipe.training(**choices)
        source = source_of(chosen, layout, examples, train, val)
        assert source is not None  # no command measures in several processes
        for other in sorted(set(names) - {name}):
            there = np.flatnonzero(of == other)
            fold = splits.folds(examples.manifest.iloc[there].assign(label=""), folds, seed)
            found = np.empty((len(there), len(examples.classes)))
            models = []
            for held in range(folds):
                held_out = there[fold == held]
                blind = replace(source, examples=source.examples.blind(there, held_out))
                models.append(domains.adapted(chosen.train, blind, train, val))
                found[fold == held] = models[-1].probabilities(held_out)
            truth = examples.truth[there]
            before = scores(truth, source.head.probabilities(source.examples.features[there]))
            after = scores(truth, found)
            lines.append(
                {
                    "seed": seed,
                    "source": name,
                    "target": other,
                    "rows": len(there),
                    "chosen": " / ".join(sorted({model.chosen for model in models})),
                    "source_only": before["balanced_accuracy"],
                    "adapted": after["balanced_accuracy"],
                    "gain": after["balanced_accuracy"] - before["balanced_accuracy"],
                    "auroc": after["auroc"],
                    "accuracy": after["accuracy"],
                    **dict(zip(EXPECTED, np.mean([model.expected for model in models], axis=0), strict=True)),
                }
            )
    return pd.DataFrame(lines)


def format_pairs(rows: pd.DataFrame) -> str:
    """What ``adapt_each_pair`` returned, for a terminal: the mean over the seeds, per pair and of all."""
    numbers = ["source_only", "adapted", "gain", "auroc", "accuracy", *EXPECTED]
    pairs = rows.groupby(["source", "target"])
    table = pairs[numbers].mean().assign(chosen=pairs["chosen"].agg(lambda c: " / ".join(sorted(set(c)))))
    text = table.reset_index().to_string(index=False, formatters=dict.fromkeys(numbers, "{:.3f}".format))
    off = (rows["expected"] - rows["accuracy"]).abs().mean()
    held = ((rows["low"] <= rows["accuracy"]) & (rows["accuracy"] <= rows["high"])).mean()
    return "\n".join(
        [
            f"{len(table)} pairs, {rows['seed'].nunique()} seeds; balanced accuracy on held-out target rows",
            "",
            text,
            "",
            f"mean gain {rows['gain'].mean():+.3f}, worst pair {table['gain'].min():+.3f}",
            f"accuracy expected without labels: off by {off:.3f} on average, interval right in {held:.0%}",
        ]
    )


def summarise(rows: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Per metric: ``mean``, ``std`` over folds, and ``low`` and ``high`` of the corrected t interval.

    Folds share training rows, so their scores vary less than the mean does. The variance of the mean is
    therefore (1/J + test/train) s^2 over J fold scores, not s^2 / J (Nadeau & Bengio 2003; for repeated
    cross-validation: Bouckaert & Frank 2004). More seeds steady the mean; they cannot make the data more.

    A fold that several seeds have dealt says nothing new: it counts once, with the mean of its scores.
    """
    from scipy.special import stdtrit

    values = rows.groupby("held_out")[list(METRICS)].mean()
    ratio = 1 / (int(rows["folds"].iloc[0]) - 1)
    reach = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * sqrt(1 / len(values) + ratio)
    mean, std = values.mean(), values.std(ddof=1)
    return pd.DataFrame({"mean": mean, "std": std, "low": mean - reach * std, "high": mean + reach * std})


def format_table(rows: pd.DataFrame, confidence: float = 0.95) -> str:
    """What ``cross_validate`` returned, for a terminal: a line per fold, then the means."""
    folds, seeds, kind = int(rows["folds"].iloc[0]), rows["seed"].nunique(), rows["kind"].iloc[0]
    title = (
        f"{folds} {kind} folds, {seeds} seed{'s' if seeds > 1 else ''}, {rows['rows'].sum() // seeds:,} rows"
    )
    shown = rows.drop(columns=["folds", "kind", "held_out"])
    each = shown.to_string(index=False, formatters=dict.fromkeys(METRICS, "{:.3f}".format))
    means = summarise(rows, confidence).to_string(float_format="{:.3f}".format)
    notes = [
        f"low, high: {confidence:.0%} interval of the mean, corrected for folds that share training rows"
    ]
    if (different := rows["held_out"].nunique()) < len(rows):
        notes.append(
            f"only {different} of {len(rows)} folds differ and a repeated one counts once: "
            "groups of different sizes leave little choice"
        )
    if kind == "random":
        notes.append("random folds leak between rows of one group: for comparison with the literature only")
    return "\n".join([title, "", each, "", means, "", *notes])


def _held(examples: Examples, random_folds: bool) -> pd.Series:
    """Number of groups (or rows) that each class has, by its name."""
    held = examples.manifest.groupby("label")["id" if random_folds else "group"].nunique()
    return held.reindex(examples.classes, fill_value=0)


def _enough(examples: Examples, folds: int, random_folds: bool) -> None:
    held = _held(examples, random_folds)
    most = int(held.min())
    if short := [f"{label}: {count}" for label, count in held.items() if count < folds]:
        raise HeadstartError(
            f"too few {'rows' if random_folds else 'groups'} for {folds} folds",
            table=short,
            # Of two, one is held out and the other may have to choose: none is left to learn from.
            do=f"use at most {most} folds, or add data" if most > 2 else "add data",
        )


def _learnable(examples: Examples, fitted: Rows, folds: int, random_folds: bool) -> None:
    """Raise HeadstartError if all training rows of a class have been dealt to the part that chooses."""
    if names := examples.absent(fitted):
        held, unit = _held(examples, random_folds), "rows" if random_folds else "groups"
        more = f"use more folds, up to {held.min()}, or add" if folds < held.min() else "add"
        raise HeadstartError(
            f"{folds} folds leave no {unit} of {', '.join(names)} to learn from",
            where="beside those that are held out and those that choose the penalty",
            table=[f"{name}: {held[name]}" for name in names],
            do=f"{more} {unit} of that class",
        )


def _split(
    examples: Examples, rows: Rows, folds: int, seed: int, random_folds: bool
) -> list[tuple[Rows, Rows]]:
    """``rows`` cut into folds balanced over label and domain: (the others, the fold), per fold."""
    table = examples.manifest.iloc[rows]
    if random_folds:
        table = table.assign(group=table["id"])
    fold = splits.folds(table, folds, seed)
    return [(rows[fold != number], rows[fold == number]) for number in range(folds)]
