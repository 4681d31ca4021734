"""The report: one HTML file that says how good a model is, where it errs and what it was made from.

Goes in: the outputs of all stages, and what the gate said. Comes out: ``reports/R/``, a page that opens
without a network, and the model card. Never decides anything, and never changes what it reports on.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headstart import backbones, card, environment, evaluation, images, models, registry, sources
from headstart.calibration import Decision, tempered
from headstart.charts import MINUS, SHARE, Axis, Chart, Series, inline, number, points, template
from headstart.drift_report import DRIFT
from headstart.errors import HeadstartError
from headstart.layout import HIDDEN, Layout, written_whole
from headstart.metrics import (
    LOWER_IS_BETTER,
    METRICS,
    Floats,
    Ints,
    calibration_bins,
    confusions,
    curve,
    scores,
)
from headstart.recipe import Recipe
from headstart.stages import SECONDS

if TYPE_CHECKING:
    from headstart.attributions import Attribution

MISTAKES = 12
THUMBNAIL = 256  # pixels a side
MOST_CURVES = 8  # more than a reader can tell apart
MOST_CLASSES = 30  # in a confusion matrix; of more, the commonest confusions are listed
MOST_ROWS = 20  # shown of a table that only gives examples
MOST_LINES = 300  # of a table that counts rows; of more, the totals, and the largest of these
SPLITS = ["train", "val", "test"]
METHODS = {
    "feature_extraction": "a new head on frozen features",
    "fine_tune": "fine-tuned together with its head",
    "domain_adaptation": "adapted to another domain",
    "source_free": "a registered model, gone on without the rows it came from",
    "not yet": "of the source domains, as there was nothing to adapt to yet",
}
SHIFT = {
    "separability": "how well a linear classifier tells the domains apart, as AUROC: 0.5 is not at all",
    "mmd": "squared maximum mean discrepancy: 0 is none, 2 is no overlap",
    "mmd_p": "p-value of its test that there is no difference",
    "location": "share of the distance that is location and scale",
    "ordered": "AUROC between the two clumps that the answers on the target form: 0.5 is one clump",
}
DECIDED = {
    "recipe": "The recipe names the way; none of these figures decided.",
    "labels": "The labelled rows of the target decided, and of equals what the shift asks for. Only "
    "information_maximisation, consensus, source_only and what the shift asks for could be chosen.",
    "shift": "The kind of the shift decided, with how much source_only names besides one class. None of "
    "these figures decided alone, and only information_maximisation, consensus and source_only could be "
    "chosen.",
}
ACTIONS = {
    "promoted": ("yes", "✓", "Promoted"),
    "refused": ("no", "✕", "Refused"),
    "forced": ("yes", "✓", "Promoted by force"),
    "rolled back": ("no", "✕", "Rolled back"),
}
RULES = {
    "floor": "good enough at all",
    "min_gain": "shown to be better",
    "mcnemar": "McNemar's test agrees",
    "max_latency_ratio": "fast enough",
    "no_domain_worse_than": "no domain falls behind",
    "max_size": "small enough",
}


def write(recipe: Recipe, layout: Layout, verdict: dict[str, Any] | None = None) -> Path:
    """Write ``reports/R/report.html`` and ``model-card.md``; returns the former.

    Takes the time of loading the model and explaining ``MISTAKES`` rows: up to a minute on two cores.

    Args:
        recipe: of the model.
        layout: where its outputs lie.
        verdict: what ``trials.Decided.evidence`` says: ``gate.Verdict.to_dict()`` with ``version`` and
            ``against``, the champion's version or None, and of the latest decision ``action``, ``because``
            (reasons), ``before`` (the champion then) and ``champion`` (now); None before the gate.

    Raises:
        HeadstartError: a stage's output is missing, or the data are.
    """
    said = _Said.of(recipe, layout)
    page = {
        "recipe": recipe,
        "said": said,
        "metrics": METRICS,
        "lower_is_better": LOWER_IS_BETTER,
        "titles": evaluation.TITLES,
        "method": METHODS[_method(said, recipe)],
        "better": evaluation.beats_the_commonest(said.metrics["test"], recipe.evaluate.confidence),
        "tiles": _tiles(said),
        "verdict": None if verdict is None else _decision(verdict, recipe),
        "confusion": _confusion(said),
        "curves": _curves(said),
        "reliability": _reliability(said),
        "domains": _domains(said, verdict),
        "classes": _classes(said),
        "adaptation": _adaptation(said, layout) if "shift" in said.model else None,
        "training": _training(layout, said.model),
        "mistakes": _mistakes(said, recipe, layout),
        "data": _data(layout),
        "lineage": _lineage(recipe, layout, said.model),
    }
    html = template("report.html.jinja").render(page)
    described = card.card(recipe, layout, said.metrics)
    with written_whole(layout.report) as folder:
        if (drift := layout.report / DRIFT).exists():  # about the champion: what monitors it, replaces it
            shutil.copy2(drift, folder)
        (folder / "report.html").write_text(html, encoding="utf-8")
        (folder / "model-card.md").write_text(described, encoding="utf-8")
    return layout.report / "report.html"


@dataclass(frozen=True)
class _Said:
    """What the model says of the test rows, and what was measured of it."""

    model: dict[str, Any]  # model.json
    metrics: dict[str, Any]  # metrics.json
    blind: bool  # no label of the target domain is known
    classes: list[str]
    rows: pd.DataFrame  # the test rows that were measured, with their true labels
    probabilities: Floats  # float64 [n, k]
    truth: Ints
    named: Ints
    sure: NDArray[np.bool_]  # where it does not abstain
    abstain: float | None

    @classmethod
    def of(cls, recipe: Recipe, layout: Layout) -> _Said:
        rows, model, blind = evaluation.predictions(layout.model, layout.truth)
        try:
            metrics = json.loads((layout.evidence / "metrics.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise HeadstartError(
                "there is nothing to report yet",
                where=str(error.filename),
                do=f"run `headstart run recipes/{recipe.name}.yaml`",
            ) from None
        rows = rows[rows["split"] == "test"].reset_index(drop=True)
        classes, decision = model["classes"], Decision.of(model)
        probabilities = rows[[f"p:{name}" for name in classes]].to_numpy(np.float64)
        return cls(
            model,
            metrics,
            blind,
            classes,
            rows,
            probabilities,
            evaluation.positions(rows["label"].tolist(), classes),
            decision.named(probabilities),
            decision.sure(probabilities),
            decision.abstain,
        )

    @property
    def test(self) -> dict[str, Any]:
        """Metrics of the test rows."""
        found: dict[str, Any] = self.metrics["test"]
        return found

    @property
    def counts(self) -> Ints:
        """int64 [k, k]: rows by true class and by the class named."""
        return confusions(self.truth, self.named, len(self.classes))

    @property
    def shown(self) -> list[int]:
        """Classes to draw a curve of: of two the second; of many, those with the most rows."""
        if len(self.classes) == 2:
            return [1]
        rows = np.bincount(self.truth, minlength=len(self.classes))
        return sorted(np.argsort(-rows, kind="stable")[:MOST_CURVES].tolist())


# Sections, in the order of the page.


def _tiles(said: _Said) -> list[dict[str, Any]]:
    """The four figures at the top, each with what to hold it against."""
    guessing = 1 / len(said.classes)
    told = {
        "accuracy": (said.test["majority"], "always naming the commonest class"),
        "balanced_accuracy": (guessing, "guessing"),
        "auroc": (0.5, "guessing"),
        "ece": (None, "the distance of stated probabilities from what comes true; lower is better"),
    }
    tiles = []
    for metric, (mark, words) in told.items():
        measured = said.test[metric]
        lowest = min(v for v in (mark, measured["low"], measured["value"], 0.9) if v is not None)
        tiles.append(
            {
                "title": evaluation.TITLES[metric],
                "measured": measured,
                "mark": mark,
                "words": words,
                "axis": None if mark is None else Axis("", np.floor(lowest * 10) / 10, 1.0),
            }
        )
    return tiles


def _decision(verdict: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What the gate said, in a reader's words, with an axis for the gain."""
    figures = verdict["figures"]
    low, high = figures.get("gain_low"), figures.get("gain_high")
    axis = None
    if low is not None and high is not None:
        axis = Axis.around("gain", [low, high, 0.0, recipe.promote.min_gain])
    checks = [each | {"title": RULES.get(each["rule"], each["rule"])} for each in verdict["checks"]]
    metric = evaluation.TITLES[recipe.promote.metric]
    said = {"look": ACTIONS[verdict["action"]], "told": _told(verdict)}
    return verdict | said | {"checks": checks, "axis": axis, "metric": metric, "low": low, "high": high}


def _told(verdict: dict[str, Any]) -> str:
    """The latest decision in a sentence, and who is champion now where that does not say it."""
    action, before, champion = (verdict[key] for key in ("action", "before", "champion"))
    version, because = f"Version {verdict['version']}", verdict["because"]
    reigns = champion == verdict["version"]
    now = "There is no champion." if champion is None else f"Version {champion} is champion now."
    if action == "refused":
        if champion is None or champion != before:
            return f"{version} was not promoted. {now}"
        return f"{version} was not promoted: version {champion} stays champion."
    if action == "rolled back":
        return f"{version} was rolled back from: {because[0]}. {now}"
    place = "the first" if before is None else f"in place of version {before}"
    forced = f", by force: {'; '.join(because)}" if action == "forced" else ""
    if reigns:
        return f"{version} is champion now, {place}{forced}."
    return f"{version} became champion, {place}{forced}. {now}"


def _confusion(said: _Said) -> dict[str, Any]:
    """The matrix with each row's shares; of many classes, the commonest confusions."""
    counts = said.counts
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_ROWS]
    places = [divmod(int(place), len(counts)) for place in order]
    return {
        "matrix": len(said.classes) <= MOST_CLASSES,
        "counts": counts.tolist(),
        "shares": shares.tolist(),
        "pairs": [
            (said.classes[i], said.classes[j], int(wrong[i, j]), float(shares[i, j]))
            for i, j in places
            if wrong[i, j]
        ],
    }


def _curves(said: _Said) -> list[Chart]:
    """Receiver operating characteristic, and precision over recall, of each class against the rest."""
    roc, trade, bases = [], [], []
    for place, position in enumerate(said.shown):
        positive = said.truth == position
        found = curve(positive, said.probabilities[:, position])
        if found is None:
            continue
        false, recall, precision = found
        name, look = said.classes[position], f"s{place}"
        roc.append(Series(name, points(np.append(0, false), np.append(0, recall)), look))
        trade.append(Series(name, points(recall, precision), look))
        bases.append(float(positive.mean()))
    if not roc:
        return []
    area = said.test["auroc"]["value"]
    whose = roc[0].name if len(roc) == 1 else "each class against the rest"
    words = f"ROC of {whose}" + ("" if area is None else f"; area under the curve {area:.3f}") + "."
    guess = Series("guessing", [(0, 0), (1, 1)], "guide")
    charts = [
        Chart(
            "roc",
            "Receiver operating characteristic",
            words,
            Axis("false positive rate", *SHARE),
            Axis("true positive rate", *SHARE),
            [guess, *roc],
        )
    ]
    if len(roc) == 1:  # each class has a level of its own
        trade.insert(0, Series("guessing", [(0, bases[0]), (1, bases[0])], "guide"))
    return [
        *charts,
        Chart(
            "precision",
            "Precision over recall",
            f"How much of what is called {whose} is right, for each share of it that is found.",
            Axis("recall", *SHARE),
            Axis("precision", *SHARE),
            trade,
        ),
    ]


def _reliability(said: _Said) -> dict[str, Any]:
    """The diagram before and after the temperature, and what it did to the error and the log-loss."""
    heat = said.model.get("temperature", 1.0)
    sides = {"after": said.probabilities}
    if heat != 1:
        sides = {"before": tempered(said.probabilities, 1 / heat)} | sides
    series = [Series("as good as its word", [(0, 0), (1, 1)], "guide")]
    for side, probabilities in sides.items():
        top = probabilities.max(axis=1)
        table = pd.DataFrame({"top": top, "right": probabilities.argmax(axis=1) == said.truth})
        means = table.groupby(calibration_bins(top)).agg(
            top=("top", "mean"), right=("right", "mean"), rows=("top", "size")
        )
        dots = (2 + 9 * np.sqrt(means["rows"] / len(table))).round(1).tolist()
        name = {"before": "before calibration", "after": "after calibration"}[side] if heat != 1 else "model"
        look = "ink" if side == "before" else "s0"
        series.append(Series(name, points(means["top"].to_numpy(), means["right"].to_numpy()), look, dots))
    lowest = min(1 / len(said.classes), *(y for s in series[1:] for _, y in s.points))
    low = float(np.floor(lowest * 10) / 10)
    series[0] = Series(series[0].name, [(low, low), (1, 1)], "guide")
    measured = {side: scores(said.truth, p) for side, p in sides.items()}
    chart = Chart(
        "reliability",
        "Reliability",
        "How often the likeliest class is right, over the probability that the model states. A larger dot "
        "stands for more rows; below the dashed line the model is too sure of itself.",
        Axis("stated probability", low, 1.0),
        Axis("share that is right", low, 1.0),
        series,
    )
    return {"chart": chart, "heat": heat, "measured": measured}


def _domains(said: _Said, verdict: dict[str, Any] | None) -> dict[str, Any]:
    """Metrics of each domain, on one scale, and its gain over the champion."""
    measured = said.metrics["test_by_domain"]
    accuracies = [m["accuracy"] for m in measured.values()]
    ends = [v for m in accuracies for v in (m["low"], m["value"]) if v is not None]
    lowest = min([*ends, *(m["majority"] for m in measured.values())])
    gains = (verdict or {}).get("by_domain", {})
    axis = Axis("", float(np.floor(lowest * 10) / 10), 1.0)
    return {"measured": measured, "gains": gains, "axis": axis}


def _classes(said: _Said) -> list[dict[str, Any]]:
    """Recall, precision and F1 of each class, and what it is taken for."""
    counts, lines = said.counts, []
    for place, name in enumerate(said.classes):
        actual, called, right = counts[place].sum(), counts[:, place].sum(), counts[place, place]
        wrong = np.where(np.arange(len(counts)) == place, 0, counts[place])
        lines.append(
            {
                "name": name,
                "rows": int(actual),
                "recall": float(right / actual) if actual else None,
                "precision": float(right / called) if called else None,
                "f1": float(2 * right / (actual + called)) if actual + called else None,
                "taken_for": said.classes[int(wrong.argmax())] if wrong.any() else "",
                "times": int(wrong.max()),
            }
        )
    return lines


def _method(said: _Said, recipe: Recipe) -> str:
    if said.model.get("adaptation", "") is None:
        return "not yet"
    return "source_free" if recipe.train.source_free else recipe.train.method


def _adaptation(said: _Said, layout: Layout) -> dict[str, Any]:
    """The shift in figures and in a plane, and the ways of adapting with what was known of each."""
    from headstart import adaptation, selection

    shift, candidates = said.model["shift"], said.model.get("candidates", {})
    found = layout.model / "projection.parquet"
    charts = _projections(pd.read_parquet(found)) if found.exists() else []
    right: dict[str, dict[str, float]] = {}
    if candidates and not said.blind:
        called = pd.read_parquet(layout.model / "candidates.parquet").set_index("id").loc[said.rows["id"]]
        # Scores of what is named need no more than a certainty in each class named.
        certain = np.eye(len(said.classes))
        right = {method: scores(said.truth, certain[called[method]]) for method in candidates}
    return {
        "figures": [
            (words, number(shift[name]).replace("-", MINUS)) for name, words in SHIFT.items() if name in shift
        ],
        "compared": selection.COMPARED,
        "left_out": [method for method in adaptation.METHODS if method not in candidates],
        "charts": charts,
        "moved": len(charts) > 1,
        "candidates": candidates,
        "right": right,
        "labelled": any("right" in line for line in candidates.values()),
        "decided": DECIDED.get(said.model.get("decided_by", ""), ""),
    }


def _projections(rows: pd.DataFrame) -> list[Chart]:
    """The domains in a plane, one chart for each view."""
    charts = []
    for view, there in rows.groupby("view", sort=False):
        sides = {side: at[["x", "y"]].to_numpy() for side, at in there.groupby("side")}
        source, target = sides["source"], sides["target"]
        spread = float(np.sqrt(np.square(source - source.mean(axis=0)).sum(axis=1).mean())) or 1.0
        apart = float(np.linalg.norm(target.mean(axis=0) - source.mean(axis=0))) / spread
        charts.append(
            Chart(
                f"plane-{view}",
                f"{str(view).capitalize()} adapting",
                f"{len(source)} rows of the source and {len(target)} of the target, on the two principal "
                f"components of the source's rows. The target's centre is {apart:.2f} of the source's spread "
                "away from the source's.",
                Axis.around("first component", there["x"]),
                Axis.around("second component", there["y"]),
                [
                    Series(side, [(float(x), float(y)) for x, y in at], look, [2.5] * len(at), line=False)
                    for side, at, look in (("source", source, "ink"), ("target", target, "s0"))
                ],
            )
        )
    return charts


def _training(layout: Layout, model: dict[str, Any]) -> list[Chart]:
    """Loss and validation scores of each epoch; of frozen features, the penalties tried."""
    steps, epochs = layout.model / "steps.csv", layout.model / "epochs.csv"
    if steps.exists() and epochs.exists():
        return _learning(pd.read_csv(steps), pd.read_csv(epochs), model)
    tried = pd.DataFrame(model.get("l2_tried", []))
    if tried.empty:
        return []
    tried = tried.sort_values("l2")
    looks = {"val_log_loss": ("validation", "s0"), "train_log_loss": ("training", "ink")}
    series = [
        Series(name, points(tried["l2"].to_numpy(), tried[key].to_numpy()), look)
        for key, (name, look) in looks.items()
    ]
    best = tried[tried["l2"] == model["l2"]]
    series.append(Series("chosen", points(best["l2"].to_numpy(), best["val_log_loss"].to_numpy()), "s0", [5]))
    return [
        Chart(
            "penalties",
            "The penalties tried",
            f"Log-loss over the L2 penalty; {model['l2']:g} was chosen, where validation rows lose least.",
            Axis.around("L2 penalty", tried["l2"], log=True),
            Axis.around("log-loss", [y for s in series for _, y in s.points]),
            series,
        )
    ]


def _learning(steps: pd.DataFrame, epochs: pd.DataFrame, model: dict[str, Any]) -> list[Chart]:
    """Loss over steps, and validation scores over epochs, with the epoch that was kept.

    Where there was nothing to validate by, the loss alone.
    """
    pieces = np.array_split(steps[["step", "loss"]].to_numpy(), min(len(steps), 60))
    train = [(float(piece[:, 0].mean()), float(np.nanmean(piece[:, 1]))) for piece in pieces]
    small: list[float] = [3.0] * len(epochs)
    series, judged = [Series("training", train, "ink")], "log_loss" in epochs
    if judged:
        at = points(epochs["step"].to_numpy(), epochs["log_loss"].to_numpy())
        series.append(Series("validation", at, "s0", small))
    kept = epochs[epochs["epoch"] == model.get("epoch")]
    which = f" Epoch {model['epoch']} of {model['epochs']} was kept." if len(kept) else ""
    loss = Chart(
        "loss",
        "Loss",
        "Loss of training, each point the mean of some steps"
        + (", and of validation rows after each epoch." if judged else ".")
        + which,
        Axis("step", 0.0, float(steps["step"].max()), whole=True),
        Axis.around("log-loss", [y for s in series for _, y in s.points if np.isfinite(y)]),
        series,
    )
    if not judged:
        return [loss]
    lines = [
        Series(
            evaluation.TITLES[key], points(epochs["epoch"].to_numpy(), epochs[key].to_numpy()), look, small
        )
        for key, look in (("accuracy", "s0"), ("auroc", "ink"))
        if epochs[key].notna().all()
    ]
    if len(kept):
        place = float(kept["accuracy"].iloc[0])
        lines.append(Series("kept", [(float(model["epoch"]), place)], "ring", [7]))
    scored = Chart(
        "scores",
        "Validation scores",
        "Scores of the validation rows after each epoch; epoch 0 is before the first step." + which,
        Axis("epoch", 0.0, float(epochs["epoch"].max()), whole=True),
        Axis.around("score", [y for s in lines for _, y in s.points]),
        lines,
    )
    return [loss, scored]


def _mistakes(said: _Said, recipe: Recipe, layout: Layout) -> list[dict[str, Any]]:
    """The test rows that were named wrongly with the highest probability, and what spoke for that."""
    stated = said.probabilities[np.arange(len(said.named)), said.named]
    wrong = np.flatnonzero((said.named != said.truth) & said.sure)
    chosen = wrong[np.argsort(-stated[wrong], kind="stable")][:MISTAKES]
    if not len(chosen):
        return []
    column = "text" if recipe.modality == "text" else "path"
    contents = pd.read_parquet(layout.manifest / "manifest.parquet", columns=["id", column]).set_index("id")
    content = [str(contents.loc[name, column]) for name in said.rows.loc[chosen, "id"]]
    labels = [said.classes[place] for place in said.named[chosen]]
    items = content if column == "text" else [layout.raw / name for name in content]
    explained = _explained(said, recipe, layout, items, labels)
    return [
        {
            "id": said.rows.loc[row, "id"],
            "domain": said.rows.loc[row, "domain"],
            "actual": said.classes[said.truth[row]],
            "named": label,
            "stated": float(stated[row]),
            **(_of_image(item, found) if isinstance(item, Path) else _of_text(found)),
        }
        for row, label, item, found in zip(chosen, labels, items, explained, strict=True)
    ]


def _explained(
    said: _Said, recipe: Recipe, layout: Layout, items: Sequence[str | Path], labels: list[str]
) -> list[Attribution]:
    from headstart import attributions

    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        parts = models.parts_of(recipe, layout, Path(folder))
        source = layout.model / "source.safetensors"
        if said.blind and source.exists():  # the head that the rows measured were named by
            parts["head"] = source
        return attributions.attribute(models.Model.read(parts), items, labels)


def _of_text(found: Attribution) -> dict[str, Any]:
    strongest = sorted(found.words, key=lambda word: -abs(word[1]))[:5]
    return {"words": found.words, "strongest": [(word.strip(), score) for word, score in strongest]}


def _of_image(path: Path, found: Attribution) -> dict[str, Any]:
    """The picture as the network sees it, and with the map over it, as data: URIs."""
    from matplotlib import colormaps
    from PIL import Image

    pixels = np.empty((THUMBNAIL, THUMBNAIL, 3), np.uint8)
    images.read(path, THUMBNAIL, "bicubic", pixels)
    assert found.map is not None
    place = Image.fromarray(found.map.astype(np.float32)).resize(
        (THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC
    )
    heat = np.asarray(place).clip(0, 1)
    share = 0.7 * heat[..., None]
    grey = pixels.mean(axis=2, keepdims=True) * 0.8
    over = grey * (1 - share) + 255 * colormaps["inferno"](heat)[..., :3] * share
    return {"picture": inline(pixels), "over": inline(over.round().astype(np.uint8))}


def _data(layout: Layout) -> dict[str, Any]:
    """Rows by class, domain and split, and what validation left out, mended or noticed."""
    rows = pd.read_parquet(layout.manifest / "manifest.parquet", columns=["id", "label", "domain", "split"])
    aside = pd.read_parquet(layout.truth / "labels.parquet")
    known = dict(zip(aside["id"], aside["label"], strict=True))
    hidden = rows["label"] == HIDDEN
    rows.loc[hidden, "label"] = [known.get(name, "not known") for name in rows.loc[hidden, "id"]]
    mended = pd.read_parquet(layout.manifest / "repaired.parquet")
    return {
        "splits": SPLITS,
        "counted": _counted(rows.rename(columns={"label": "class"})),
        "total": [int((rows["split"] == split).sum()) for split in SPLITS],
        "report": json.loads((layout.manifest / "report.json").read_text(encoding="utf-8")),
        "repaired": mended[["id", "before", "after"]].head(MOST_ROWS).values.tolist(),
    }


def _counted(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows by class, domain and split; by class and by domain alone where that is too long to read."""
    many = len(rows[["class", "domain"]].drop_duplicates()) > MOST_LINES
    tables = []
    for by in [["class"], ["domain"]] if many else [["class", "domain"]]:
        counts = rows.groupby([*by, "split"]).size().unstack(fill_value=0)
        counts = counts.reindex(columns=SPLITS, fill_value=0)
        largest = counts.sum(axis=1).nlargest(MOST_LINES).index
        lines = counts[counts.index.isin(largest)].reset_index()
        of_all = f", of the {len(lines)} largest of {len(counts):,}" if len(lines) < len(counts) else ""
        title = f"Rows per {', '.join(by)} and split"
        tables.append({"by": by, "title": title, "of_all": of_all, "lines": lines.to_numpy().tolist()})
    return tables


def _lineage(recipe: Recipe, layout: Layout, model: dict[str, Any]) -> dict[str, Any]:
    """What the model was made from, with what, on what, and how long it took."""
    from headstart import devices

    spec = json.loads((layout.weights / "spec.json").read_text(encoding="utf-8"))
    tags = {name.removeprefix("headstart."): said for name, said in registry.lineage(layout, model).items()}
    text = (layout.root / "recipes" / f"{layout.recipe}.yaml").read_text(encoding="utf-8")
    library = recipe.fetch.library
    packages = [
        "headstart",
        "torch",
        *backbones.PACKAGES[library],
        "numpy",
        "mlflow",
        "dvc",
        "prefect",
    ]
    clock = layout.work / SECONDS
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "recipe": sources.redacted(text),
        "spec": spec | {"source": sources.redacted(spec["source"])},
        "source": sources.redacted(recipe.ingest.source),
        "tags": tags,
        "seed": model["stamps"]["seed"],
        "packages": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": {
            "cores": environment.cores(),
            "memory": f"{gibibytes:.0f} GiB",
            "device": str(devices.device()),
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        },
        "seconds": json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else {},
    }
