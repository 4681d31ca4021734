"""Drift report: one HTML page that says whether recent rows have drifted, in what, and which rows the most.

Goes in: what ``monitoring`` found. Comes out: ``reports/R/drift.html``, which opens without a network.
Decides nothing.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from headstart import evaluation, images
from headstart.charts import Axis, Chart, Series, inline, template
from headstart.drift import TITLES
from headstart.layout import Layout, unwritable_named
from headstart.metrics import Floats
from headstart.monitoring import Monitored
from headstart.recipe import Recipe

DRIFT = "drift.html"  # beside the report
SHOWN = 12  # rows
THUMBNAIL = 256  # pixels a side
BINS = 20  # of a histogram
MOST_DOTS = 500  # of a side: more would only cover each other
MOST_CLASSES = 6  # to draw a histogram of: those whose probabilities have moved the most
LONGEST = 600  # characters of a text


def write(recipe: Recipe, layout: Layout, found: Monitored) -> Path:
    """Write ``reports/R/drift.html``, and return it."""
    page = {
        "recipe": recipe,
        "found": found,
        "drift": found.drift,
        "titles": TITLES,
        "metrics": evaluation.TITLES,
        "now": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "projection": _projection(found),
        "histograms": _histograms(found),
        "rows": _rows(found),
    }
    html = template("drift.html.jinja").render(page)
    path = layout.report / DRIFT
    partial = path.with_name(f".{DRIFT}.{os.getpid()}.partial")
    with unwritable_named(layout.report):
        layout.report.mkdir(parents=True, exist_ok=True)
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)
    return path


def _projection(found: Monitored) -> Chart:
    """Both sides along the two directions in which all of these rows differ the most."""
    x = np.concatenate([found.known.vectors, found.recent.vectors]).astype(np.float64)
    x -= x.mean(axis=0)
    spread = x.std(axis=0)
    x /= np.where(spread > 1e-6 * max(float(spread.max()), 1e-12), spread, np.inf)
    directions = np.linalg.svd(x.T @ x)[0][:, :2]
    places = x @ directions
    share = np.square(places).sum() / max(np.square(x).sum(), 1e-12)
    if places.shape[1] == 1:
        places = np.pad(places, ((0, 0), (0, 1)))
    sides = places[: len(found.known)], places[len(found.known) :]
    series = []
    for name, look, radius, side in (("known", "ink", 2.2, sides[0]), ("recent", "s0", 3.0, sides[1])):
        dots = _dots(side)
        series.append(Series(name, dots, look, [radius] * len(dots), line=False))
    return Chart(
        "projection",
        "What the backbone sees",
        "Each dot is a row. The two directions in which the rows differ the most hold "
        f"{share:.0%} of their variance; drift may show in others.",
        Axis.around("first direction", places[:, 0]),
        Axis.around("second direction", places[:, 1]),
        series,
    )


def _dots(places: Floats) -> list[tuple[float, float]]:
    kept = np.random.default_rng(0).permutation(len(places))[:MOST_DOTS]
    return [(round(float(x), 3), round(float(y), 3)) for x, y in places[np.sort(kept)]]


def _histograms(found: Monitored) -> list[Chart]:
    """Of the probability of each class, or of those that have moved the most; and of each input's measure."""
    mine, theirs = found.known.probabilities, found.recent.probabilities
    levels = np.linspace(0, 1, 101)
    moved = np.abs(np.quantile(mine, levels, axis=0) - np.quantile(theirs, levels, axis=0)).mean(axis=0)
    shown = [1] if len(found.classes) == 2 else np.argsort(-moved, kind="stable")[:MOST_CLASSES].tolist()
    charts = [
        _histogram(
            f"class-{place}", f"probability of {found.classes[place]}", mine[:, place], theirs[:, place]
        )
        for place in shown
    ]
    for number, (name, values) in enumerate(found.known.inputs.items()):
        if name in {test.name for test in found.drift.tests}:  # the others do not vary
            charts.append(_histogram(f"input-{number}", name, values, found.recent.inputs[name]))
    return charts


def _histogram(key: str, title: str, known: Floats, recent: Floats) -> Chart:
    """Both sides' shares in the same bins, as steps."""
    low, high = (float(np.quantile(np.concatenate([known, recent]), q)) for q in (0.005, 0.995))
    if title.startswith("probability"):
        axis = Axis(title, 0.0, 1.0)
    else:
        axis = Axis.around(title, [low, high if high > low else low + 1])
    edges = np.linspace(axis.low, axis.high, BINS + 1)
    series, tallest = [], 0.0
    for name, look, values in (("known", "ink", known), ("recent", "s0", recent)):
        shares = np.histogram(np.clip(values, axis.low, axis.high), edges)[0] / len(values)
        tallest = max(tallest, float(shares.max()))
        steps = np.repeat(edges, 2)[1:-1].tolist()
        points = list(zip(steps, np.repeat(shares, 2).tolist(), strict=True))
        series.append(Series(name, [(float(edges[0]), 0.0), *points, (float(edges[-1]), 0.0)], look))
    return Chart(
        key,
        title[0].upper() + title[1:],
        f"Share of the rows; the median goes from {np.median(known):.3g} to {np.median(recent):.3g}.",
        axis,
        Axis.around("share of the rows", [0.0, tallest]),
        series,
    )


def _rows(found: Monitored) -> list[dict[str, Any]]:
    """The recent rows that a domain classifier takes for recent the most surely."""
    shown = []
    for place in found.drift.drifted[:SHOWN]:
        item, named = found.rows.items[place], int(found.recent.named[place])
        probabilities = found.recent.probabilities[place]
        row: dict[str, Any] = {
            "name": found.rows.names[place],
            "label": found.rows.labels[place],
            "named": found.classes[named] if named >= 0 else "undecided",
            "stated": float(probabilities[named] if named >= 0 else probabilities.max()),
        }
        if isinstance(item, str):
            row["text"] = item if len(item) <= LONGEST else f"{item[: LONGEST - 1]}…"
        else:
            pixels = np.empty((THUMBNAIL, THUMBNAIL, 3), np.uint8)
            images.read(item, THUMBNAIL, "bicubic", pixels)
            row["picture"] = inline(pixels)
        shown.append(row)
    return shown
