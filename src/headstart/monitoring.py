"""Monitoring: the champion's recent rows beside those that it knows.

Goes in: a recipe, the rows that its champion was not trained on, and the rows that came since. Comes out: a
``Monitored``: the tests of ``drift``, and where labels are known how good the champion still is. Changes
neither the data nor the registry's models.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from headstart import (
    adapters,
    batches,
    drift,
    mojibake,
    promotion,
    registry,
    scoring,
    stores,
    trials,
    validation,
)
from headstart.drift import Drift, Side
from headstart.errors import HeadstartError
from headstart.evaluation import positions
from headstart.inputs import opened
from headstart.layout import HIDDEN, Layout, unwritable_named
from headstart.metrics import LOWER_IS_BETTER, METRICS, intervals
from headstart.recipe import Recipe

if TYPE_CHECKING:
    from headstart.features import Item
    from headstart.models import Model, Version


@dataclass(frozen=True)
class Rows:
    """Rows to look at."""

    names: list[str]
    items: list[Item]
    labels: list[str]  # HIDDEN where none is known
    groups: list[str] | None = None

    def chosen(self, places: Sequence[int]) -> Rows:
        """Some of them."""
        return Rows(
            [self.names[place] for place in places],
            [self.items[place] for place in places],
            [self.labels[place] for place in places],
            None if self.groups is None else [self.groups[place] for place in places],
        )


@dataclass(frozen=True)
class Monitored:
    """What was found; as text, a table for a terminal."""

    model: str
    version: str
    where: str  # what the recent rows are
    classes: list[str]
    drift: Drift
    known: Side
    recent: Side
    rows: Rows  # the recent ones, that could be read
    unread: int  # recent rows that could not be
    promised: dict[str, dict[str, float | None]]  # the champion's test figures
    measured: dict[str, dict[str, float | None]]  # the same of the recent rows; empty without labels

    @property
    def fallen(self) -> list[str]:
        """Metrics that are shown to be worse on the recent rows than on the test rows.

        Neither figure is known exactly. The errors of two independent ones add up as squares, each of them
        the distance to that end of its interval which lies towards the other figure (Zou & Donner 2008,
        Construction of confidence limits about effect measures). Without both intervals nothing is shown.
        """
        found = []
        for metric, recent in self.measured.items():
            lower = metric in LOWER_IS_BETTER
            towards_recent, towards_test = ("high", "low") if lower else ("low", "high")
            test = self.promised.get(metric, {})
            before, before_end = test.get("value"), test.get(towards_recent)
            after, after_end = recent["value"], recent[towards_test]
            if before is None or before_end is None or after is None or after_end is None:
                continue
            fall = after - before if lower else before - after
            if fall > hypot(before - before_end, after - after_end):
                found.append(metric)
        return found

    def __str__(self) -> str:
        lines = [("test", "measure", "value", "known", "recent", "p", "corrected", "")]
        for test in self.drift.tests:
            lines.append(
                (
                    test.name,
                    test.measure,
                    f"{test.value:.3f}",
                    "" if test.known is None else f"{test.known:.3g}",
                    "" if test.recent is None else f"{test.recent:.3g}",
                    f"{test.p:.3f}",
                    f"{test.adjusted:.3f}",
                    "drift" if test.adjusted <= self.drift.level else "",
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        told = [f"{self.model} version {self.version}, {self.where}: {self.drift.reason}", table]
        if self.measured:
            figures = ", ".join(
                f"{metric} {recent['value']:.3f} (test {self.promised[metric]['value']:.3f})"
                for metric, recent in self.measured.items()
                if recent["value"] is not None and self.promised.get(metric, {}).get("value") is not None
            )
            told.append(f"{self.drift.labelled:,} recent rows have labels: {figures}")
        if self.unread:
            told.append(f"{self.unread:,} rows could not be read")
        return "\n".join(told)


def monitor(recipe: Recipe, layout: Layout, inputs: Sequence[str] | None = None) -> Monitored | str:
    """Compare recent rows with those that the champion knows.

    The known rows are the manifest's in val and test, of the batches that the champion's data had (of the
    target domain, if the recipe adapts to one). A backbone that was tuned knows its training rows too well to
    stand for others. The recent rows are those of the batches that came since, or what ``inputs`` name.
    At most ``monitor.rows`` of either are looked at, chosen by a hash of their names.

    Cost: a forward pass over these rows; that over the known ones is kept in ``.headstart/R/``.

    Args:
        recipe: whose champion it is.
        layout: where its manifest and batches lie.
        inputs: files, folders, patterns or tables, as of ``scoring.score``.

    Returns:
        What was found; or why there is nothing to find: no champion, nothing recent, too few rows.

    Raises:
        HeadstartError: the manifest, the inputs or the registry cannot be read.
    """
    client, name = promotion.opened(), recipe.model_name
    champion = promotion.champion_of(client, name)
    if champion is None:
        return f"{name} has no champion yet, so there is nothing to compare with"
    # Looked up before the model is loaded, which takes seconds.
    seen = registry.batches_of(client.get_model_version(name, champion))
    news = [each for each in batches.names(layout) if each not in seen]
    if not inputs and not news:
        return f"no batch has come since the data of {name} version {champion}"
    from headstart import models

    version, options = models.load(name, champion), recipe.monitor
    if inputs:
        where = ", ".join(inputs)
        recent = _given(recipe, version, inputs, options.rows)
    else:
        where = f"batch{'es' if len(news) > 1 else ''} {', '.join(news)}"
        recent = _arrived(recipe, layout, news, options.rows)
    mine = _remembered(layout, version, *_known(recipe, layout, seen, options.rows))
    theirs, read = _looked_at(version.model, recent)
    if (few := min(len(mine), len(theirs))) < drift.FEWEST:
        whose = where if few == len(theirs) else "what the champion knows"
        return f"{few} rows of {whose} are too few to tell drift from chance: {drift.FEWEST} are the fewest"
    found = drift.detect(
        mine,
        theirs,
        version.model.classes,
        level=options.level,
        permutations=options.permutations,
        seed=recipe.train.seed,
    )
    return Monitored(
        model=version.name,
        version=version.version,
        where=where,
        classes=version.model.classes,
        drift=found,
        known=mine,
        recent=theirs,
        rows=read,
        unread=len(recent.names) - len(read.names),
        promised=_promised(version),
        measured=_measured(recipe, version, theirs, read),
    )


def log(recipe: Recipe, layout: Layout, found: Monitored, page: Path) -> None:
    """Add the figures to the recipe's run in the MLflow experiment ``monitor/R``, at this time.

    One run for each recipe; a step is a second since 1970. The page beside it is the latest.

    Raises:
        HeadstartError: the store cannot be reached.
    """
    from mlflow.entities import Metric

    now = time.time()
    figures = {"alarm": float(found.drift.alarm), "recent.rows": float(found.drift.recent)}
    for test in found.drift.tests:
        key = re.sub(r"[^\w\-. /]", "_", f"{test.family}.{test.name}")
        figures |= {f"{key}.{re.sub('²', '2', test.measure)}": test.value, f"{key}.p": test.adjusted}
    for metric, measured in found.measured.items():
        figures |= {f"recent.{metric}.{key}": value for key, value in measured.items() if value is not None}
    name = f"monitor/{recipe.name}"
    with stores.asked("the MLflow store refused"):
        client = stores.opened(layout, name)
        experiment = client.get_experiment_by_name(name).experiment_id
        runs = client.search_runs([experiment], max_results=1)
        run = (runs[0] if runs else client.create_run(experiment, run_name="monitor")).info.run_id
        client.log_batch(
            run, metrics=[Metric(key, value, int(now * 1000), int(now)) for key, value in figures.items()]
        )
        client.set_tag(run, "headstart.drift", found.drift.reason)
        client.set_tag(run, "headstart.version", found.version)
        client.log_artifact(run, str(page))
        client.set_terminated(run)


def _known(recipe: Recipe, layout: Layout, seen: Sequence[str], most: int) -> tuple[Rows, list[str]]:
    """Held-out rows of the data that the champion had, and a digest of what is in each."""
    rows, aside = trials.manifest(layout, "the rows that the champion knows are missing")
    rows = rows[rows["split"].isin(["val", "test"])]
    if "batch" in rows:
        rows = rows[rows["batch"].isin(["", *seen])]
    if recipe.validate_.target_domain is not None:
        of_target = rows["domain"] == recipe.validate_.target_domain
        rows = rows[of_target] if of_target.any() else rows  # before the target came, its sources were all
    rows = rows.iloc[_sampled(rows["id"], most)]
    true = dict(zip(aside["id"], aside["label"], strict=True))
    labels = [label or true.get(row, HIDDEN) for row, label in zip(rows["id"], rows["label"], strict=True)]
    known = Rows(rows["id"].tolist(), trials.items(recipe, layout, rows), labels, rows["group"].tolist())
    return known, rows["digest"].tolist()


def _arrived(recipe: Recipe, layout: Layout, names: Sequence[str], most: int) -> Rows:
    """Rows of batches, with the labels that have come for them since."""
    everything = validation.completed(batches.everything(layout, recipe.validate_))
    frame = validation.labelled_late(everything, batches.late_labels(layout))
    # What has no label is no worse for it; what is left out for another reason is so in training, too.
    usable = frame["left_out"].isna() | (frame["left_out"] == adapters.NO_LABEL)
    rows = frame[usable & frame["batch"].isin(names)]
    rows = rows.assign(label=rows["label"].fillna(HIDDEN))
    rows = rows.iloc[_sampled(rows["id"], most)]
    return Rows(
        rows["id"].tolist(),
        trials.items(recipe, layout, rows),
        rows["label"].tolist(),
        rows["group"].tolist(),
    )


def _given(recipe: Recipe, version: Version, inputs: Sequence[str], most: int) -> Rows:
    """Rows that files, folders or tables hold; a table may have labels, in the recipe's own column."""
    modality, columns = version.model.modality, recipe.validate_.columns
    column = columns.text if recipe.validate_.adapter == "table" else None
    sources = opened(inputs, version.name, modality, column if modality == "text" else None)

    def rows() -> Iterable[tuple[str, Item, str]]:
        for source in sources:
            passed = 0
            for chunk in source.chunks(scoring.CHUNK[modality]):
                items, _ = scoring.items_of(source, chunk, modality)
                has = columns.label in chunk.rows.schema.names
                labels = chunk.rows.column(columns.label).to_pylist() if has else None
                for place, item in items.items():
                    row = f"{source.where}, row {passed + place + 1}"
                    name = mojibake.escaped(str(item)) if isinstance(item, Path) else row
                    yield name, item, adapters.as_text(labels[place]) or HIDDEN if labels else HIDDEN
                passed += chunk.rows.num_rows

    kept = heapq.nsmallest(most, rows(), key=lambda row: _hash(row[0]))
    if not kept:
        raise HeadstartError("there is no row to look at", where=", ".join(inputs), do="name other inputs")
    labels = {label for *_, label in kept} - {HIDDEN}
    if labels and labels.isdisjoint(version.model.classes):  # another spelling, or else all would be mistakes
        raise HeadstartError(
            f"no label in the column {columns.label} is a class that {version.name} knows",
            where=", ".join(inputs),
            table=[
                f"labels: {', '.join(sorted(labels)):.100}",
                f"classes: {', '.join(version.model.classes):.100}",
            ],
            do="spell the labels as the recipe's classes, or leave the column out",
        )
    kept.sort(key=lambda row: row[0])
    return Rows([row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept])


def _sampled(names: pd.Series, most: int) -> list[int]:
    """Positions of at most so many rows, in order: the same ones each time."""
    order = np.argsort([_hash(name) for name in names], kind="stable")
    return sorted(order[:most].tolist())


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _looked_at(model: Model, rows: Rows) -> tuple[Side, Rows]:
    """What the model and the gauges say of rows, and those of the rows that could be read."""
    vectors, good = _vectors(model, rows.items)
    rows = rows.chosen(good)
    return _side(model, rows, vectors, _gauged(model, rows.items)), rows


def _vectors(model: Model, items: list[Item]) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Vectors, float32 [good, dim], of the items that can be read, and their positions."""
    from headstart.progress import bar

    parts, good = [], []
    size = scoring.CHUNK[model.modality]
    with bar(total=len(items), desc="looking at rows", unit=" rows") as progress:
        for start in range(0, len(items), size):
            some = items[start : start + size]
            vectors, faults = scoring.vectors_of(model, some)
            fine = [place for place in range(len(some)) if place not in faults]
            parts.append(vectors[fine])
            good += [start + place for place in fine]
            progress.update(len(some))
    return np.concatenate(parts) if parts else np.empty((0, model.extractor.dim), np.float32), good


def _gauged(model: Model, items: list[Item]) -> dict[str, np.ndarray[Any, Any]]:
    from headstart import quality

    if model.modality == "text":
        return quality.of_texts(items, model.extractor.weights / "tokenizer.json")  # type: ignore[arg-type]
    return quality.of_images(items)  # type: ignore[arg-type]


def _side(
    model: Model, rows: Rows, vectors: np.ndarray[Any, Any], inputs: dict[str, np.ndarray[Any, Any]]
) -> Side:
    probabilities = model.head.probabilities(vectors)
    named = model.decision.named(probabilities)
    hidden = np.array([label == HIDDEN for label in rows.labels], bool)
    # A class that the model does not know stands at -1, where it names nothing: each such row is a mistake.
    right = np.where(hidden, np.nan, named == positions(rows.labels, model.classes))
    return Side(
        vectors=vectors,
        probabilities=probabilities,
        named=np.where(model.decision.sure(probabilities), named, -1),
        inputs=inputs,
        right=right,
        groups=None if rows.groups is None else np.array(rows.groups),
    )


def _remembered(layout: Layout, version: Version, rows: Rows, digests: list[str]) -> Side:
    """The known rows' side, whose vectors are kept from one call to the next."""
    told = [version.run_id, version.tags.get("headstart.digest"), rows.names, digests]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    path = layout.work / f"reference-{version.version}.npz"
    kept = _kept(path, key)
    if kept is None:
        vectors, good = _vectors(version.model, rows.items)
        inputs = _gauged(version.model, [rows.items[place] for place in good])
        kept = {"vectors": vectors, "good": np.array(good, np.int64)}
        kept |= {f"input:{name}": values for name, values in inputs.items()}
        if len(good) == len(rows.items):  # else files are missing, and may come back
            _keep(path, key, kept)
    inputs = {name[6:]: values for name, values in kept.items() if name.startswith("input:")}
    return _side(version.model, rows.chosen(kept["good"].tolist()), kept["vectors"], inputs)


def _keep(path: Path, key: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write the arrays in place of those of other versions."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.npz")
    with unwritable_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("reference-*.npz"):
            old.unlink(missing_ok=True)
        np.savez(partial, allow_pickle=False, key=np.array(key), **arrays)
        partial.replace(path)


def _kept(path: Path, key: str) -> dict[str, np.ndarray[Any, Any]] | None:
    """The arrays of a file that was written for this key."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return dict(file) if str(file["key"]) == key else None


def _promised(version: Version) -> dict[str, dict[str, float | None]]:
    """The version's test figures with their intervals, as registering logged them."""
    logged = promotion.opened().get_run(version.run_id).data.metrics
    return {
        metric: {key: logged.get(f"test.{metric}.{key}") for key in ("value", "low", "high")}
        for metric in METRICS
        if f"test.{metric}.value" in logged
    }


def _measured(recipe: Recipe, version: Version, side: Side, rows: Rows) -> dict[str, dict[str, float | None]]:
    """The same figures of the recent rows whose labels are known; empty if those are too few."""
    some = np.flatnonzero(np.isfinite(side.right))
    if len(some) < drift.FEWEST:
        return {}
    model, labels = version.model, [rows.labels[place] for place in some]
    probabilities = side.probabilities[some]
    classes = list(dict.fromkeys([*model.classes, *labels]))  # new ones too, as the gate counts them
    return intervals(
        positions(labels, classes),
        trials.in_columns(probabilities, model.classes, classes),
        np.array([(rows.groups or rows.names)[place] for place in some]),
        named=model.decision.named(probabilities),
        resamples=recipe.evaluate.resamples,
        confidence=recipe.evaluate.confidence,
        seed=recipe.train.seed,
    )
