"""Evaluate: from predictions to evidence that a person and a program can read.

Goes in: ``predictions.parquet`` and the class order of ``model.json``. Comes out: ``metrics.json``, the
series behind the plots, and ``summary.md``. Never opens the model, the features or the data, and
never decides whether the numbers are good enough.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headstart.calibration import Decision
from headstart.errors import HeadstartError, unmade
from headstart.layout import HIDDEN, Layout, written_whole
from headstart.metrics import (
    METRICS,
    MOST_RANKED,
    Floats,
    Ints,
    calibration_bins,
    confusions,
    curve,
    fewest_groups,
    intervals,
)
from headstart.recipe import Evaluate, Recipe

DIGITS = 6  # more would differ between processors
ROC_POINTS = 200  # per class: as smooth as a screen can show
FEW_GROUPS = 20
UNKNOWN = (
    "**Too few labels of the target domain, {}, are known, some in val and some in test: what follows is "
    "measured on the source domains, before adaptation, and says nothing about the target.**"
)
TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "log_loss": "log-loss",
    "ece": "calibration error",
}


def evaluate(recipe: Recipe, layout: Layout) -> None:
    """Write ``evidence/R/`` from ``model/R/``.

    Memory: a few times the predictions. Time: about 20 s per million rows and thousand resamples with
    two classes, and that again for each further class up to ``MOST_RANKED``; of more, AUROC has no interval.

    Raises:
        HeadstartError: there are no predictions, or they are not of the model beside them.
    """
    rows, model, blind = predictions(layout.model, layout.truth)
    classes: list[str] = model["classes"]
    probabilities = rows[[f"p:{name}" for name in classes]].to_numpy(np.float64)
    rule = Decision.of(model)
    test = (rows["split"] == "test").to_numpy()
    measured = {
        name: _measure(rows[chosen], probabilities[chosen], rule, classes, recipe.evaluate)
        for name, chosen in (("val", ~test), ("test", test))
    }
    domains = sorted(set(rows.loc[test, "domain"]))
    metrics: dict[str, Any] = measured | {"test_by_domain": {domains[0]: measured["test"]}}
    if len(domains) > 1:
        for domain in domains:
            chosen = test & (rows["domain"] == domain).to_numpy()
            measured_there = _measure(rows[chosen], probabilities[chosen], rule, classes, recipe.evaluate)
            metrics["test_by_domain"][domain] = measured_there
    actual = rows.loc[test, "label"].to_numpy()
    named = rule.named(probabilities[test])
    predicted = np.array(classes, dtype=object)[named]
    with written_whole(layout.evidence) as folder:
        (folder / "metrics.json").write_text(
            json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        plots = folder / "plots"
        plots.mkdir()
        _write(plots / "confusion.csv", pd.DataFrame({"actual": actual, "predicted": predicted}))
        _write(plots / "roc.csv", _roc(actual, probabilities[test], classes))
        _write(plots / "calibration.csv", _calibration(actual, probabilities[test], classes))
        counts = confusions(positions(actual.tolist(), classes), named, len(classes))
        measured_accuracy = None if blind else metrics["test"]["accuracy"]["value"]
        summary = _summary(recipe, metrics, classes, counts, blind) + _adaptation(model, measured_accuracy)
        (folder / "summary.md").write_text(summary, encoding="utf-8")


def beats_the_commonest(measured: dict[str, Any], confidence: float) -> bool:
    """Whether the accuracy is shown to be above that of always naming the commonest class.

    Args:
        measured: metrics of some rows, such as ``test`` in ``metrics.json``.
        confidence: that of the intervals. Of fewer groups than ``fewest_to_show`` they are no proof, wherever
            they lie.
    """
    low = measured["accuracy"]["low"]
    enough = measured["groups"] >= fewest_to_show(confidence)
    return enough and low is not None and low > measured["majority"]


def fewest_to_show(confidence: float) -> int:
    """Groups without which no low end of an interval of this confidence shows anything."""
    return fewest_groups((1 + confidence) / 2)


def headline(metrics: dict[str, Any]) -> str:
    """The content of ``metrics.json`` in one line, for a log or a terminal."""
    test = metrics["test"]
    return (
        f"test accuracy {_interval(test['accuracy'])}, balanced {_number(test['balanced_accuracy'], 2)}, "
        f"AUROC {_number(test['auroc'], 2)} on {test['rows']:,} rows; majority class {test['majority']:.2f}"
    )


def predictions(model: Path, truth: Path) -> tuple[pd.DataFrame, dict[str, Any], bool]:
    """Rows of ``predictions.parquet`` to measure, ``model.json``, and what is not known.

    Where the model is made for a target domain, its rows are measured, by the labels that were put aside. If
    there are no such labels of val or none of test, the rows of the source domains are, and the last value is
    True.
    """
    try:
        rows = pd.read_parquet(model / "predictions.parquet")
        described: dict[str, Any] = json.loads((model / "model.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise unmade("there is nothing to evaluate yet", error, model.name, "train") from None
    target = rows["label"] == HIDDEN
    blind = described.get("adaptation", "") is None  # nothing was there to adapt to
    if target.any():
        known = rows[target].drop(columns="label").merge(pd.read_parquet(truth / "labels.parquet"), on="id")
        blind = not {"val", "test"} <= set(known["split"])
        if target.all() and blind:
            raise HeadstartError(
                "too few rows have a label to measure the model by",
                where=str(truth / "labels.parquet"),
                do="label some rows, of val and of test: training will not see the labels",
            )
        rows = (rows[~target] if blind else known).reset_index(drop=True)
    faults, classes = [], described["classes"]
    if [name for name in map(str, rows.columns) if name.startswith("p:")] != [
        f"p:{name}" for name in classes
    ]:
        faults.append(f"model.json names the classes {', '.join(classes)}, predictions.parquet others")
    if unknown := sorted(set(rows["label"]) - set(classes)):
        faults.append(f"labels that are no class: {', '.join(unknown)}")
    faults += [f"no {split} rows" for split in ("val", "test") if split not in set(rows["split"])]
    if faults:
        raise HeadstartError(
            "the predictions do not fit the model beside them",
            where=str(model),
            table=faults,
            do=f"run `dvc repro --force train@{model.name}`",
        )
    return rows, described, blind


def _measure(
    rows: pd.DataFrame, probabilities: Floats, rule: Decision, classes: list[str], choices: Evaluate
) -> dict[str, Any]:
    """Metrics with intervals, and what they rest on: rows, groups, and the majority's accuracy.

    Of a model that may abstain also the share of rows that it answers, and the share of those that is right;
    all other metrics are those of a model that has to answer.
    """
    truth, named = positions(rows["label"].tolist(), classes), rule.named(probabilities)
    # The seed is fixed: an interval that moves between two runs of the same predictions helps nobody.
    found = intervals(
        truth,
        probabilities,
        rows["group"].factorize()[0],
        named=named,
        resamples=choices.resamples,
        confidence=choices.confidence,
        seed=0,
    )
    rounded = {
        metric: {part: None if value is None else round(value, DIGITS) for part, value in interval.items()}
        for metric, interval in found.items()
    }
    majority = round(float(np.bincount(truth).max() / len(truth)), DIGITS)
    found_on: dict[str, Any] = {
        "rows": len(rows),
        "groups": int(rows["group"].nunique()),
        "majority": majority,
    }
    if rule.abstain is not None:
        sure = rule.sure(probabilities)
        right = float((named == truth)[sure].mean()) if sure.any() else None
        found_on |= {
            "answered": round(float(sure.mean()), DIGITS),
            "accuracy_where_answered": None if right is None else round(right, DIGITS),
        }
    return rounded | found_on


def positions(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each label stands among the classes, int64 [n]; -1 where it is none of them."""
    return pd.Index(classes).get_indexer(pd.Index(labels)).astype(np.int64)


def _shown(classes: list[str]) -> list[int]:
    """Positions of the classes to plot: of two the second says it all, as the first mirrors it."""
    return [1] if len(classes) == 2 else list(range(len(classes)))


def _roc(actual: np.ndarray[Any, Any], probabilities: Floats, classes: list[str]) -> pd.DataFrame:
    """Each class against the rest: ``class``, ``fpr``, ``tpr``, thinned to ``ROC_POINTS``."""
    parts = []
    for position in _shown(classes):
        found = curve(actual == classes[position], probabilities[:, position])
        if found is None:
            continue
        fpr, tpr = (np.append(0, rates) for rates in found[:2])
        kept = np.unique(np.linspace(0, len(tpr) - 1, min(len(tpr), ROC_POINTS)).round().astype(int))
        parts.append(pd.DataFrame({"class": classes[position], "fpr": fpr[kept], "tpr": tpr[kept]}))
    return pd.concat(parts) if parts else pd.DataFrame(columns=["class", "fpr", "tpr"])


def _calibration(actual: np.ndarray[Any, Any], probabilities: Floats, classes: list[str]) -> pd.DataFrame:
    """Mean prediction and observed share in each bin that has rows, per class."""
    parts = []
    for position in _shown(classes):
        table = pd.DataFrame(
            {
                "bin": calibration_bins(probabilities[:, position]),
                "predicted": probabilities[:, position],
                "observed": (actual == classes[position]).astype(np.float64),
            }
        )
        means = table.groupby("bin")[["predicted", "observed"]].mean()
        parts.append(means.assign(rows=table["bin"].value_counts()))
        parts[-1].insert(0, "class", classes[position])
    return pd.concat(parts)


def _write(path: Path, table: pd.DataFrame) -> None:
    table.round(DIGITS).to_csv(path, index=False, lineterminator="\n")


def _summary(recipe: Recipe, metrics: dict[str, Any], classes: list[str], counts: Ints, blind: bool) -> str:
    """The page for a reader.

    ``counts`` is int[k, k]: rows of the test by true and predicted class. ``blind``: no target row is known.
    """
    test, val = metrics["test"], metrics["val"]
    share = f"{recipe.evaluate.confidence:.0%}"
    gap = test["accuracy"]["value"] - test["majority"]
    better = beats_the_commonest(test, recipe.evaluate.confidence)
    shown = "better" if better else "not shown to be better"
    lines = [
        f"# {recipe.name}: evidence",
        "",
        *([UNKNOWN.format(recipe.validate_.target_domain), ""] if blind else []),
        f"Test accuracy **{_interval(test['accuracy'])}** on {test['rows']:,} rows in {test['groups']:,} "
        f"groups: {shown} than always naming the commonest class, which scores {test['majority']:.3f} "
        f"({gap:+.3f}).",
        "",
        f"| metric | test ({share} interval) | validation |",
        "|---|---|---|",
        *(f"| {TITLES[m]} | {_interval(test[m])} | {_number(val[m])} |" for m in METRICS),
        f"| commonest class | {test['majority']:.3f} | {val['majority']:.3f} |",
        *_answered(test, val),
        f"| rows, groups | {test['rows']:,}, {test['groups']:,} | {val['rows']:,}, {val['groups']:,} |",
        "",
        "## Per domain",
        "",
        "| domain | rows | groups | accuracy | balanced accuracy | AUROC | commonest class |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {_cell(domain)} | {m['rows']:,} | {m['groups']:,} | {_interval(m['accuracy'])} "
            f"| {_interval(m['balanced_accuracy'])} | {_interval(m['auroc'])} | {m['majority']:.3f} |"
            for domain, m in metrics["test_by_domain"].items()
        ),
        "",
        "## Per class",
        "",
        "| class | test rows | recall | precision | most often mistaken for |",
        "|---|---|---|---|---|",
        *(_class_line(position, classes, counts) for position in range(len(classes))),
        "",
        "## How to read this",
        "",
        f"- Of intervals made this way {share} hold the number that endlessly many further groups from the "
        "same places would give. Whole groups are resampled, because rows of one group resemble each other; "
        "a dash means that the rows cannot tell.",
        "- Balanced accuracy and macro F1 give every class the same say; guessing scores "
        f"{1 / len(classes):.2f} in the former. AUROC is 0.5 for guessing. Log-loss and calibration error "
        "are better when lower; the latter is how far stated probabilities lie from what comes true.",
        "- Validation rows chose the regularisation, so their numbers flatter slightly. The test rows chose "
        "nothing.",
    ]
    if len(classes) > MOST_RANKED:
        lines.append(f"- AUROC of more than {MOST_RANKED} classes is given without an interval.")
    if test["groups"] < (fewest := fewest_to_show(recipe.evaluate.confidence)):
        lines.append(
            f"- Fewer than {fewest} groups of test rows cannot show that a model is better, wherever its "
            "interval lies."
        )
    if few := [name for name, m in _measured(metrics) if m["groups"] < FEW_GROUPS]:
        lines.append(
            f"- Fewer than {FEW_GROUPS} groups: {', '.join(few)}. Their intervals are rough; more groups, "
            "not more rows, would settle it."
        )
    return "\n".join(lines) + "\n"


def _answered(test: dict[str, Any], val: dict[str, Any]) -> list[str]:
    """Lines of the table for a model that may abstain."""
    titles = {"answered": "share answered", "accuracy_where_answered": "accuracy where answered"}
    shown = {key: [part[key] for part in (test, val)] for key in titles if key in test}
    cells = {key: " | ".join("-" if v is None else f"{v:.3f}" for v in pair) for key, pair in shown.items()}
    return [f"| {titles[key]} | {cell} |" for key, cell in cells.items()]


def _adaptation(model: dict[str, Any], accuracy: float | None) -> str:
    """How the domains differ and what was done about it; empty of a model that was not adapted.

    ``accuracy`` is the target's, if any of its labels is known.
    """
    if "shift" not in model:
        done = f"Adapted by `{model['adaptation']}`" if model.get("adaptation") else "Not adapted"
        return f"\n## The shift\n\n{done}: {model['reason']}.\n" if "adaptation" in model else ""
    lines = ["", "## The shift", "", *(f"- {words}" for words in model["shift"]["words"]), ""]
    taught = " Then a new backbone was taught what the adapted model says." if model["taught"] else ""
    lines.append(f"Adapted by `{model['adaptation']}`: {model['reason']}.{taught}")
    expected = model["expected_accuracy"]
    measured = "nothing of it can be measured" if accuracy is None else f"measured is {accuracy:.2f}"
    lines += [
        "",
        f"Accuracy expected without the target's labels: {expected['value']:.2f} "
        f"({expected['low']:.2f}-{expected['high']:.2f}); {measured}.",
    ]
    return "\n".join(lines) + "\n"


def _measured(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    domains = metrics["test_by_domain"]
    return [("test", metrics["test"]), *(domains.items() if len(domains) > 1 else ())]


def _class_line(position: int, classes: list[str], counts: Ints) -> str:
    actual, called = counts[position].sum(), counts[:, position].sum()
    right = counts[position, position]
    wrong = np.where(np.arange(len(classes)) == position, 0, counts[position])
    mistaken = f"{_cell(classes[wrong.argmax()])} ({wrong.max():,})" if wrong.any() else "-"
    recall = f"{right / actual:.3f}" if actual else "-"
    precision = f"{right / called:.3f}" if called else "-"
    return f"| {_cell(classes[position])} | {actual:,} | {recall} | {precision} | {mistaken} |"


def _cell(name: str) -> str:
    return name.replace("|", "\\|").replace("\n", " ")


def _number(metric: dict[str, float | None], digits: int = 3) -> str:
    return "-" if metric["value"] is None else f"{metric['value']:.{digits}f}"


def _interval(metric: dict[str, float | None]) -> str:
    if metric["low"] is None or metric["high"] is None:
        return _number(metric)
    return f"{_number(metric)} ({metric['low']:.3f}-{metric['high']:.3f})"
