"""Train: from features to a model, its predictions, and stamps of what it was made from.

Goes in: the manifest, the cached features of a frozen backbone and, for fine-tuning, the packed rows. Comes
out: ``head.safetensors``, ``model.json``, ``predictions.parquet``, and the backbone if it was trained. Never
measures itself on the test rows, which take no part in any choice: they are only predicted.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headstart import launching, source_free, stamps
from headstart.calibration import Decision, decision, temperature, tempered
from headstart.errors import HeadstartError
from headstart.heads import Features, Head, select
from headstart.layout import HIDDEN, Layout, sha256_of, written_whole
from headstart.metrics import Floats, Ints
from headstart.recipe import Recipe, Train

if TYPE_CHECKING:
    from torch import Tensor

    from headstart.adaptation import Source
    from headstart.finetuning import Tuning
    from headstart.shifts import Diagnosis

Rows = NDArray[np.int64]
log = logging.getLogger(__name__)
POINTS = 300  # of a side, in a projection
PUT_ASIDE: dict[str, Any] = {"label": HIDDEN, "confidence": 1.0, "weight": 1.0, "split": "train"}


@dataclass(frozen=True)
class Examples:
    """Every row of a manifest with its features, in the manifest's order."""

    manifest: pd.DataFrame
    features: Features  # float16 [n, d], a memory map
    classes: list[str]
    truth: Ints  # [n], position of the label in classes; -1 where it is put aside

    def rows(self, *splits: str) -> Rows:
        """Positions of the labelled rows in these splits."""
        return np.flatnonzero(self.manifest["split"].isin(splits) & (self.truth >= 0))

    def blind(self, target: Rows, held_out: Rows) -> Examples:
        """The same, as if these rows were of a target domain without labels, and some of them for testing.

        As ``validate`` puts them aside: the doubt and the weight of a row tell of its label.
        """
        truth = self.truth.copy()
        truth[target] = -1
        columns = {name: self.manifest[name].to_numpy(copy=True) for name in PUT_ASIDE}
        for name, blank in PUT_ASIDE.items():
            columns[name][target] = blank
        columns["split"][held_out] = "test"
        return replace(self, truth=truth, manifest=self.manifest.assign(**columns))

    def named(self, rows: Rows, probabilities: Floats) -> Examples:
        """The same, with the likeliest classes for labels of these rows, and their doubt."""
        truth, confidence = self.truth.copy(), self.manifest["confidence"].to_numpy(copy=True)
        truth[rows], confidence[rows] = probabilities.argmax(axis=1), probabilities.max(axis=1)
        return replace(self, truth=truth, manifest=self.manifest.assign(confidence=confidence))

    def unlabelled(self, *splits: str) -> Rows:
        """Positions of the target domain's rows in these splits."""
        return np.flatnonzero(self.manifest["split"].isin(splits) & (self.truth < 0))


class Fitted(Protocol):
    """A model that a method has built."""

    @property
    def said(self) -> dict[str, Any]:
        """What model.json tells of how it was chosen."""
        ...

    @property
    def chosen(self) -> str:
        """The same in a word."""
        ...

    def probabilities(self, rows: Rows) -> Floats:
        """float64 [rows, classes]."""
        ...

    def publish(self, folder: Path, rows: Rows) -> Floats:
        """Write the model's own files, and return what they say of the rows: float64 [rows, classes]."""
        ...


def train(recipe: Recipe, layout: Layout) -> None:
    """Write ``model/R/`` from ``manifest/R/``, ``features/R/`` and ``weights/R/``.

    The model that the validation rows chose is the one that is kept. It is not fitted again on train and
    validation together: the validation rows would stop being rows that the model has not seen, and
    whatever is chosen on them later (a threshold, a calibration) would be chosen on its own training data.

    Raises:
        HeadstartError: files are missing or of different runs, features are not finite, a class has no
            rows to learn from, or fine-tuning cannot go on.
    """
    if recipe.train.trains_backbone:
        from headstart import devices

        # Domains are compared, and rows read or labelled anew, within one process.
        choices = recipe.train
        alone = choices.alignment or choices.teach or choices.target_statistics or choices.source_free
        if not launching.launched() and (processes := devices.processes()) > 1 and not alone:
            launching.train(Path("recipes") / f"{layout.recipe}.yaml", processes)
            return
    stamped = stamps.take(recipe, layout)  # first: a choice edited from here on is not what was used
    examples = load(recipe, layout)
    key = stamps.key(stamped)
    fitted = fit(recipe, layout, examples, examples.rows("train"), examples.rows("val"), key=key)
    if fitted is None:
        return  # one of several processes; the first of them publishes
    held_out = np.flatnonzero(examples.manifest["split"].isin(["val", "test"]))
    with written_whole(layout.model) as folder:
        probabilities = fitted.publish(folder, held_out)
        rule = _rule(recipe.train, examples, held_out, probabilities)
        model = {
            "method": recipe.train.method,
            "classes": examples.classes,
            **fitted.said,
            **(_unadapted(recipe) if isinstance(fitted, Calibrated) else {}),
            **_shares(examples, held_out, probabilities),
            "decision": asdict(rule),
            "stamps": stamped,
        }
        (folder / "model.json").write_text(
            json.dumps(model, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        predictions = examples.manifest.iloc[held_out][["id", "split", "label", "domain", "group"]]
        columns = {f"p:{name}": probabilities[:, i] for i, name in enumerate(examples.classes)}
        predictions = predictions.reset_index(drop=True).assign(**columns)
        predictions.to_parquet(folder / "predictions.parquet", index=False)
    for folder in (layout.work / "train").glob(f"{key}*/"):
        shutil.rmtree(folder, ignore_errors=True)


def _rule(choices: Train, examples: Examples, held_out: Rows, probabilities: Floats) -> Decision:
    """The decision rule that the validation rows choose.

    Of a model made for a target domain they can choose none: they are of other domains.
    """
    val = _labelled_val(examples, held_out)
    if choices.method == "domain_adaptation":
        val[:] = False
    return decision(examples.truth[held_out[val]], probabilities[val], examples.classes, choices.decide)


def _shares(examples: Examples, held_out: Rows, probabilities: Floats) -> dict[str, list[float]]:
    """What model.json tells of the shares in which the source's validation rows are named.

    Where classes are weighed, or confused, they are not those of the labels.
    """
    val = _labelled_val(examples, held_out)
    if not val.any():
        return {}
    return {"shares": [round(float(share), 4) for share in probabilities[val].mean(axis=0)]}


def _labelled_val(examples: Examples, held_out: Rows) -> NDArray[np.bool_]:
    """Which of these rows are validation rows with a label."""
    mask: NDArray[np.bool_] = np.isin(held_out, examples.rows("val"))
    return mask


def _unadapted(recipe: Recipe) -> dict[str, Any]:
    """What model.json tells of a model that should be adapted, and could not be yet."""
    if recipe.train.method != "domain_adaptation":
        return {}
    reason = f"no row of {recipe.validate_.target_domain} has come yet, so there was nothing to adapt to"
    return {"adaptation": None, "reason": reason}


def fit(
    recipe: Recipe, layout: Layout, examples: Examples, train: Rows, val: Rows, *, key: str | None = None
) -> Fitted | None:
    """The model that the recipe's method builds from the rows ``train``, with what the rows ``val`` choose.

    Domain adaptation without any row of its target is the source's model.

    Args:
        recipe: its ``train`` block says how.
        layout: where the backbone and the packed rows lie.
        examples: every row.
        train: positions of the rows to learn from.
        val: positions of the rows that choose.
        key: a name for the run; a killed run of the same name is continued.

    Returns:
        The model; None in all but the first of several processes.

    Raises:
        HeadstartError: as for ``train``.
    """
    if recipe.train.source_free:
        return freed(recipe, layout, examples, key=key)
    of_target = (examples.manifest["domain"] == recipe.validate_.target_domain).to_numpy()
    train, known = train[~of_target[train]], train[of_target[train]]
    source = source_of(recipe, layout, examples, train, val, key=key)
    if source is None:
        return None
    if not of_target.any():
        return Calibrated(source, temperature(examples.truth[val], source.of_val))
    model = adapted(recipe.train, source, train, val, known)
    if not recipe.train.teach:
        return model
    return taught(recipe, layout, examples, model, np.concatenate([train, known]), val, key=key)


def source_of(
    recipe: Recipe, layout: Layout, examples: Examples, train: Rows, val: Rows, *, key: str | None = None
) -> Frozen | Tuned | None:
    """The same as ``fit``, before any adaptation of the head.

    With ``tune``, the features of its examples are those of the trained backbone.
    """
    if not recipe.train.trains_backbone:
        return frozen_of(recipe, examples, train, val)
    fewest = int(np.bincount(examples.truth[train], minlength=len(examples.classes)).min())
    if fewest < recipe.frozen_below:
        log.info("%d training rows of a class are too few to tune the backbone: it stays frozen", fewest)
        kept = frozen_of(recipe, examples, train, val)
        return kept if launching.first() else None
    tuning, frozen = begin(recipe, layout, examples, train, val, key=key)
    if recipe.train.target_statistics and not tuning.classifier.normalises():
        raise HeadstartError(
            f"{tuning.classifier.spec.architecture} has no BatchNorm to give the target's statistics",
            where="train.target_statistics",
            do="leave it out",
        )
    tuning.run()
    tuned = Tuned(recipe, examples, tuning, frozen, _clock(layout, key), tuning.probabilities(val))
    if recipe.train.tune:
        tuned = tuned.with_features()  # while all processes are at hand
    return tuned if tuning.accelerator.is_main_process else None


def frozen_of(recipe: Recipe, examples: Examples, train: Rows, val: Rows) -> Frozen:
    """The head that fits the frozen features of the rows ``train`` best, as the rows ``val`` judge."""
    head, penalty, table = fit_rows(examples, recipe.train, train, val)
    return Frozen(examples, head, penalty, table, head.probabilities(examples.features[val]))


@dataclass(frozen=True)
class Frozen:
    """Feature extraction: a head on the features of a backbone that stays as it is."""

    examples: Examples
    head: Head
    penalty: float
    table: list[dict[str, float]]
    of_val: Floats  # what it says of the validation rows

    @property
    def said(self) -> dict[str, Any]:
        """The penalty, and all that were tried."""
        tried = [{name: round(value, 6) for name, value in line.items()} for line in self.table]
        return {"l2": self.penalty, "l2_tried": tried}

    @property
    def chosen(self) -> str:
        """The penalty."""
        return f"l2 {self.penalty:g}"

    def probabilities(self, rows: Rows) -> Floats:
        """float64 [rows, classes]."""
        return self.head.probabilities(self.examples.features[rows])

    def write(self, folder: Path, rows: Rows) -> Features:
        """Write nothing, as the backbone is that of ``fetch``; return its features [rows, d]."""
        features: Features = self.examples.features[rows]
        return features

    def publish(self, folder: Path, rows: Rows) -> Floats:
        """Write ``head.safetensors``."""
        self.head.save(folder / "head.safetensors")
        return self.probabilities(rows)


@dataclass(frozen=True)
class Tuned:
    """Fine-tuning: a backbone and a head that were trained together."""

    recipe: Recipe
    examples: Examples  # the features are those of the backbone before it was trained
    tuning: Tuning
    frozen: Frozen | None
    clock: Path | None
    of_val: Floats  # what it says of the validation rows, found while all processes were at hand
    normalised: dict[str, Tensor] | None = None  # BatchNorm for the target domain, if it has its own

    @property
    def head(self) -> Head:
        """The head, for features of the trained backbone."""
        return self.tuning.classifier.head()

    @property
    def said(self) -> dict[str, Any]:
        """The epoch that is kept, and how the head that training started from was chosen."""
        history = self.tuning.history
        last = history.epochs[-1]["epoch"]
        return {"epoch": history.chosen, "epochs": last} | (self.frozen.said if self.frozen else {})

    @property
    def chosen(self) -> str:
        """The epoch."""
        return f"epoch {self.tuning.history.chosen}"

    def with_features(self) -> Tuned:
        """The same, with the trained backbone's features of all rows for examples."""
        everything = np.arange(len(self.examples.truth))
        return replace(self, examples=replace(self.examples, features=self.tuning.vectors(everything)))

    def reading(self, target: Rows, train: Rows, everything: Rows) -> Tuned:
        """The same, but rows of the target domain are read with BatchNorm statistics of their own.

        Args:
            target: rows to take statistics of.
            train: rows that it learned from.
            everything: all rows of the target domain, to be read so.
        """
        import torch

        from headstart import features, normalisation, packs, precision

        pack, device = self.tuning.pack, self.tuning.device

        def batches(rows: Rows) -> Iterator[tuple[Tensor, ...]]:
            dealt = np.random.default_rng(self.recipe.train.seed).permutation(rows)
            for part in packs.cut(dealt, normalisation.BATCH):
                yield tuple(torch.from_numpy(array) for array in pack.batch(part))

        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            self.tuning.classifier.save(Path(folder))
            weights, options = Path(folder) / "backbone", self.recipe.features
            found = normalisation.adapted(weights, options, batches(train), batches(target), device)
            normalisation.write(weights, found)
            extractor = features.Extractor(weights, options, precision.Arithmetic())
            vectors = np.array(self.examples.features)
            vectors[everything] = extractor.read(features.Packed(pack, everything, device.type))
        return replace(self, examples=replace(self.examples, features=vectors), normalised=found)

    def probabilities(self, rows: Rows) -> Floats:
        """float64 [rows, classes]."""
        return self.tuning.probabilities(rows)

    def write(self, folder: Path, rows: Rows) -> Features:
        """Write ``backbone/``, ``arithmetic.safetensors`` and the history.

        Returns:
            Features [rows, d] by the files, computed as a served model computes them.
        """
        from headstart import features, normalisation

        history = self.tuning.history
        pd.DataFrame(history.steps).to_csv(folder / "steps.csv", index=False, lineterminator="\n")
        pd.DataFrame(history.epochs).to_csv(folder / "epochs.csv", index=False, lineterminator="\n")
        if self.clock is not None:  # beside the model: no two runs take the same time
            pd.DataFrame(history.clock).to_csv(self.clock, index=False, lineterminator="\n")
        self.tuning.classifier.save(folder)
        if self.normalised:
            normalisation.write(folder / "backbone", self.normalised)
        pack = self.tuning.pack
        arithmetic = features.arithmetic_for(
            folder / "backbone",
            self.recipe.features,
            lambda extractor, places: features.Packed(pack, rows[places], extractor.device.type),
            len(rows),
        )
        arithmetic.save(folder / "arithmetic.safetensors")
        extractor = features.Extractor(folder / "backbone", self.recipe.features, arithmetic)
        return extractor.read(features.Packed(pack, rows, extractor.device.type))

    def publish(self, folder: Path, rows: Rows) -> Floats:
        """Write ``head.safetensors`` beside what ``write`` writes."""
        vectors = self.write(folder, rows)
        self.head.save(folder / "head.safetensors")
        return self.head.probabilities(vectors)


@dataclass(frozen=True)
class Calibrated:
    """A model whose probabilities mean what they say, by what the validation rows showed."""

    model: Frozen | Tuned
    heat: float

    @property
    def said(self) -> dict[str, Any]:
        """What the model tells, and the temperature."""
        return self.model.said | {"temperature": self.heat}

    @property
    def chosen(self) -> str:
        """What the model tells."""
        return self.model.chosen

    def probabilities(self, rows: Rows) -> Floats:
        """float64 [rows, classes]."""
        return tempered(self.model.probabilities(rows), self.heat)

    def publish(self, folder: Path, rows: Rows) -> Floats:
        """Write what the model writes, the temperature within its head."""
        found = self.model.publish(folder, rows)
        path = folder / "head.safetensors"
        Head.load(path).tempered(self.heat).save(path)
        return tempered(found, self.heat)


@dataclass(frozen=True)
class Freed:
    """A registered model that went on learning from the target's rows alone."""

    model: Tuned
    way: str
    reason: str

    @property
    def said(self) -> dict[str, Any]:
        """The way, where it began, and what the model tells."""
        reason = f"named in the recipe; {self.reason}"
        return {"adaptation": self.way, "reason": reason} | self.model.said

    @property
    def chosen(self) -> str:
        """The way."""
        return self.way

    def probabilities(self, rows: Rows) -> Floats:
        """float64 [rows, classes]."""
        return self.model.probabilities(rows)

    def publish(self, folder: Path, rows: Rows) -> Floats:
        """Write what the model writes."""
        return self.model.publish(folder, rows)


@dataclass(frozen=True)
class Sides:
    """The rows that an adaptation saw."""

    train: Rows  # labelled, of the source domains
    val: Rows  # likewise; no head was fitted to them
    target: Rows  # of the target domain
    known: Rows  # those of them with a label


@dataclass(frozen=True)
class Adapted:
    """Domain adaptation: a head for the target domain, beside the model of the source domains."""

    choices: Train
    source: Frozen | Tuned
    sides: Sides
    head: Head
    method: str
    reason: str
    shift: Diagnosis
    expected: tuple[float, float, float]  # accuracy on the target, and an 80 % interval
    taught: Tuned | None = None  # by this model: one for all domains

    @property
    def said(self) -> dict[str, Any]:
        """How it was adapted and why, from what, and how the domains differ."""
        shift = self.shift
        numbers = {
            "separability": shift.separability.value,
            "mmd": shift.mmd,
            "mmd_p": shift.mmd_p,
            "location": shift.location,
            "ordered": shift.ordered,
        }
        told = {name: round(value, 4) if np.isfinite(value) else None for name, value in numbers.items()}
        shares = {"source": shift.label_shift.source_prior, "target": shift.label_shift.prior}
        return {
            "adaptation": self.method,
            "reason": self.reason,
            "taught": self.taught is not None,
            "target_statistics": self.normalised,
            "expected_accuracy": dict(
                zip(("value", "low", "high"), (round(e, 4) for e in self.expected), strict=True)
            ),
            "shift": told
            | {f"{side}_shares": [round(float(s), 4) for s in of] for side, of in shares.items()}
            | {"kind": shift.kind, "words": shift.words},
            "decided_by": self._decided_by,
            "candidates": self._judged,
        } | (self.taught or self.source).said

    @property
    def normalised(self) -> bool:
        """Whether the source's backbone reads the target with BatchNorm statistics of its own."""
        return isinstance(self.source, Tuned) and self.source.normalised is not None

    @property
    def _decided_by(self) -> str:
        """What the choice among the candidates rests on."""
        from headstart import adaptation

        if self.choices.adaptation:
            return "recipe"
        return "labels" if len(self.sides.known) >= adaptation.KNOWN_ENOUGH else "shift"

    @cached_property
    def _candidates(self) -> dict[str, Head]:
        """A head by each way of adapting, none of which has seen the few labels of the target."""
        from headstart import adaptation

        features = self.source.examples.features
        labelled = _labelled(self.source.examples, self.choices, self.sides.train)
        return adaptation.candidates(
            self.source.head, labelled, features[self.sides.target], self.method, seed=self.choices.seed
        )

    @cached_property
    def _judged(self) -> dict[str, dict[str, float]]:
        """What was known of each candidate without the target's labels, or by the few that there are."""
        from headstart import adaptation

        examples, sides = self.source.examples, self.sides
        features = examples.features
        found = adaptation.judged(
            self._candidates,
            (features[sides.val], examples.truth[sides.val]),
            features[sides.train],
            features[sides.target],
        )
        for method, head in self._candidates.items() if len(sides.known) else ():
            named = head.logits(features[sides.known]).argmax(axis=1)
            found[method]["right"] = float((named == examples.truth[sides.known]).mean())
        return {
            method: {name: round(value, 4) for name, value in line.items()} for method, line in found.items()
        }

    @property
    def chosen(self) -> str:
        """The way of adapting."""
        return self.method

    def probabilities(self, rows: Rows) -> Floats:
        """float64 [rows, classes]: rows of the target domain by the adapted head, others by the source's."""
        if self.taught:
            return self.taught.probabilities(rows)
        return self._told(self.source.examples.features[rows], rows)

    def publish(self, folder: Path, rows: Rows) -> Floats:
        """Write the source's files, ``head.safetensors``, and the head before as ``source.safetensors``.

        Of a model that was taught, what it writes itself. For the report also ``projection.parquet`` and
        ``candidates.parquet``: what each way of adapting calls the target's test rows.
        """
        examples = self.source.examples
        test = rows[(examples.truth[rows] < 0) & (examples.manifest["split"].to_numpy()[rows] == "test")]
        called = {
            method: head.logits(examples.features[test]).argmax(axis=1).astype(np.int16)
            for method, head in self._candidates.items()
        }
        ids = examples.manifest["id"].to_numpy()[test]
        pd.DataFrame({"id": ids} | called).to_parquet(folder / "candidates.parquet", index=False)
        self._projected().to_parquet(folder / "projection.parquet", index=False)
        if self.taught:
            return self.taught.publish(folder, rows)
        vectors = self.source.write(folder, rows)
        self.head.save(folder / "head.safetensors")
        if self.normalised:  # what is published reads the target alone
            of_source = examples.truth[rows] >= 0
            vectors[of_source] = examples.features[rows[of_source]]
        else:
            self.source.head.save(folder / "source.safetensors")
        return self._told(vectors, rows)

    def _projected(self) -> pd.DataFrame:
        """Some rows of both sides in a plane, before and after: ``view``, ``side``, ``x``, ``y``.

        What is there after is missing where adapting moves no row, but the head alone.
        """
        from headstart import adaptation

        chance = np.random.default_rng(self.choices.seed)
        features = self.source.examples.features
        sides = self.sides.train, self.sides.target
        shown = [np.sort(chance.permutation(len(side))[:POINTS]) for side in sides]
        mine, theirs = (features[side] for side in sides)
        views = {"before": adaptation.projection("source_only", mine, theirs, (shown[0], shown[1]))}
        if isinstance(self.source, Tuned) and self.normalised:
            few = self.source.tuning.vectors(sides[1][shown[1]])
            views["before"] = adaptation.projection("source_only", mine, few, (shown[0], np.arange(len(few))))
        if self.taught:  # by another backbone
            seen = [self.taught.tuning.vectors(side[few]) for side, few in zip(sides, shown, strict=True)]
            everything = np.arange(len(seen[0])), np.arange(len(seen[1]))
            views["after"] = adaptation.projection("source_only", seen[0], seen[1], everything)
        elif self.method in adaptation.MOVING or self.normalised:
            views["after"] = adaptation.projection(self.method, mine, theirs, (shown[0], shown[1]))
        lines = [
            pd.DataFrame({"view": view, "side": side, "x": at[:, 0], "y": at[:, 1]})
            for view, both in views.items()
            for side, at in zip(("source", "target"), both, strict=True)
        ]
        return pd.concat(lines, ignore_index=True).round(3)

    def _told(self, vectors: Features, rows: Rows) -> Floats:
        target = self.source.examples.truth[rows] < 0
        found = self.source.head.probabilities(vectors)
        found[target] = self.head.probabilities(vectors[target])
        return found


def adapted(
    choices: Train, source: Frozen | Tuned, train: Rows, val: Rows, known: Rows | None = None
) -> Adapted:
    """A head for the target domain, from labelled rows ``train`` and ``val`` of the source domains.

    Of the target domain the rows of its test split take no part. ``known`` are the few rows of its training
    split that have a label.

    Raises:
        HeadstartError: as for ``train``.
    """
    from headstart import adaptation, shifts

    known = np.empty(0, np.int64) if known is None else known
    examples = source.examples
    there = np.sort(np.concatenate([examples.unlabelled("train", "val"), known]))
    labelled = _labelled(examples, choices, train)
    target = _finite(examples, there)
    given = np.searchsorted(there, known), labels(examples, choices, train)[0][known]
    if len(target) < 2:
        raise HeadstartError("the target domain has no rows to adapt to", do="add rows of the target domain")
    groups = examples.manifest["group"].to_numpy()
    shift = shifts.diagnose(
        examples.features[val],
        examples.truth[val],
        groups[val],
        source.head.probabilities(examples.features[val]),
        target,
        groups[there],
        source.head.probabilities(target),
        examples.classes,
        seed=choices.seed,
    )
    if choices.target_statistics and isinstance(source, Tuned):
        # After the diagnosis: statistics of its own hide a shift rather than mend it.
        source = source.reading(there, train, np.union1d(np.flatnonzero(examples.truth < 0), known))
        examples = source.examples
        target = _finite(examples, there)
    method, reason = (
        (str(choices.adaptation), "named in the recipe")
        if choices.adaptation
        else adaptation.choose(source.head, examples.features[val], target, shift.kind)
    )
    if not choices.adaptation and len(known) >= adaptation.KNOWN_ENOUGH:
        method, reason = adaptation.best_on(
            examples.features[known], examples.truth[known], source.head, labelled, target, (method, reason)
        )
    head = source.head
    if method != "source_only" or len(known):
        head = adaptation.adapt(method, labelled, target, adaptation.PENALTY, seed=choices.seed, known=given)
    expected = adaptation.expected_accuracy(
        head,
        (examples.features[val], examples.truth[val]),
        labelled.features,
        target,
        method in adaptation.MOVING,
    )
    sides = Sides(train, val, there, known)
    return Adapted(choices, source, sides, head, method, reason, shift, expected)


def _labelled(examples: Examples, choices: Train, train: Rows) -> Source:
    """The rows ``train`` as an adaptation learns from them."""
    from headstart import adaptation

    targets, weights = labels(examples, choices, train)
    return adaptation.Source(_finite(examples, train), targets[train], weights[train])


def taught(  # noqa: PLR0917  # as ``fit``, and the teacher
    recipe: Recipe,
    layout: Layout,
    examples: Examples,
    model: Adapted,
    train: Rows,
    val: Rows,
    *,
    key: str | None = None,
) -> Adapted:
    """A backbone and a head that were fine-tuned anew, on the target's rows as an adapted model names them.

    Self-training by a new network (Xie et al. 2020, "Noisy student", arXiv:1911.04252, without the noise):
    starting from the backbone of ``fetch`` it does not inherit what the first one made up. The source's rows
    stay among those it learns from.

    Raises:
        HeadstartError: as for ``train``.
    """
    there = examples.unlabelled("train", "val")
    guessed = examples.named(there, model.probabilities(there))
    again = source_of(
        recipe.training(
            method="fine_tune",
            tune=False,
            alignment=None,
            teach=False,
            target_statistics=False,
            frozen_below=0,
        ),
        layout,
        guessed,
        np.sort(np.concatenate([train, there])),
        val,
        key=None if key is None else f"{key}-taught",
    )
    # In one process, with a backbone that is trained.
    assert isinstance(again, Tuned) and isinstance(model.source, Tuned)
    again = replace(again, clock=model.source.clock)  # under the name by which the registry knows the run
    return replace(model, head=again.head, taught=again)


def freed(recipe: Recipe, layout: Layout, examples: Examples, *, key: str | None = None) -> Freed:
    """The registered model in ``weights/R``, tuned to the unlabelled rows of train and val.

    Raises:
        HeadstartError: as for ``train``.
    """
    from headstart import adaptation

    inherited = source_free.Inherited.read(layout.weights)
    inherited.check(recipe.features, recipe.validate_.classes)
    there = examples.unlabelled("train", "val")
    if not len(there):
        raise HeadstartError("the target domain has no rows to adapt to", do="add rows of the target domain")
    target = _finite(examples, there)
    head, reason = adaptation.found_again(inherited.head, target, inherited.shares)
    guessed = examples.named(there, head.probabilities(target))
    shares = inherited.shares if recipe.train.source_free == "hypothesis_transfer" else None
    unweighed = recipe.training(class_weight=None)  # nobody knows how rare a class is
    tuning = _tuning(unweighed, layout, guessed, there, there[:0], head, key=key, shares=shares)
    tuning.run()
    nothing = np.empty((0, len(examples.classes)))
    tuned = Tuned(recipe, examples, tuning, None, _clock(layout, key), nothing)
    return Freed(tuned, str(recipe.train.source_free), reason)


def begin(
    recipe: Recipe, layout: Layout, examples: Examples, train: Rows, val: Rows, *, key: str | None = None
) -> tuple[Tuning, Frozen | None]:
    """A fine-tuning that has not run yet, and the model of frozen features that it starts from, if any.

    Head first, then the whole: from a random head the first steps would spoil what the backbone knows
    (LP-FT, Kumar et al. 2022, arXiv:2202.10054).

    Raises:
        HeadstartError: as for ``train``.
    """
    frozen = None
    if recipe.train.head_first:
        frozen = frozen_of(recipe, examples, train, val)
    else:
        _checked(examples, train, val)
    return _tuning(recipe, layout, examples, train, val, frozen.head if frozen else None, key=key), frozen


def _tuning(  # noqa: PLR0917  # as ``begin``, and the head
    recipe: Recipe,
    layout: Layout,
    examples: Examples,
    train: Rows,
    val: Rows,
    head: Head | None,
    *,
    key: str | None = None,
    shares: Floats | None = None,
) -> Tuning:
    """A fine-tuning that has not run yet, from this head or else a random one."""
    import torch

    from headstart import packs
    from headstart.checkpoints import Checkpoints
    from headstart.classifiers import Classifier
    from headstart.finetuning import Labels, Tuning

    torch.manual_seed(recipe.train.seed)  # a random head is one that comes again
    classifier = Classifier(layout.weights, recipe.features, recipe.train, len(examples.classes), head)
    targets, weights = labels(examples, recipe.train, train)
    work = layout.work / "train"
    if key is not None:
        for other in work.glob("*/"):
            # The run at hand, what it goes on from, and what went on from it before a kill.
            if not (key.startswith(other.name) or other.name.startswith(key)):
                shutil.rmtree(other, ignore_errors=True)
    return Tuning(
        classifier,
        packs.load(layout, recipe.modality, classifier.padding),
        Labels(
            examples.truth,
            targets,
            weights,
            examples.manifest["id"].tolist(),
            examples.manifest["group"].tolist(),
        ),
        train,
        val,
        target=examples.unlabelled("train", "val") if recipe.train.alignment else None,
        shares=shares,
        checkpoints=Checkpoints(work / key) if key is not None else None,
        work=work,
    )


def _clock(layout: Layout, key: str | None) -> Path | None:
    """Where the seconds of a training's epochs are kept."""
    return layout.work / "train" / f"{key}.csv" if key is not None else None


def load(recipe: Recipe, layout: Layout) -> Examples:
    """The manifest and the features of one recipe, checked against each other.

    Raises:
        HeadstartError: files are missing, or the features are not of this manifest.
    """
    again = f"run `dvc repro features@{layout.recipe}`"
    path = layout.manifest / "manifest.parquet"
    try:
        manifest = pd.read_parquet(path)
        ids = pd.read_parquet(layout.features / "ids.parquet")["id"]
        described: dict[str, Any] = json.loads(
            (layout.features / "features.json").read_text(encoding="utf-8")
        )
        features: Features = np.load(layout.features / "features.npy", mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise HeadstartError("what training reads is missing", where=str(error.filename), do=again) from None
    if described["manifest_sha256"] != sha256_of(path) or not ids.equals(manifest["id"]):
        raise HeadstartError(
            "the features were made from another manifest", where=str(layout.features), do=again
        )
    if features.ndim != 2 or len(features) != len(manifest):
        raise HeadstartError(
            f"features of shape {features.shape} for a manifest of {len(manifest)} rows",
            where=str(layout.features / "features.npy"),
            do=again,
        )
    classes = recipe.validate_.classes or sorted(set(manifest["label"]) - {HIDDEN})
    if recipe.train.source_free:
        classes = source_free.Inherited.read(layout.weights).classes
    truth = pd.Index(classes).get_indexer(pd.Index(manifest["label"])).astype(np.int64)
    if unknown := sorted(set(manifest["label"][truth < 0]) - {HIDDEN}):
        raise HeadstartError(
            f"the manifest has labels that the recipe does not name: {', '.join(unknown)}",
            where=str(path),
            do=f"run `dvc repro validate@{layout.recipe}`",
        )
    return Examples(manifest, features, classes, truth)


def fit_rows(
    examples: Examples, choices: Train, train: Rows, val: Rows
) -> tuple[Head, float, list[dict[str, float]]]:
    """The head fitted on the rows ``train`` with the penalty that the rows ``val`` choose; see ``select``.

    Memory: the float16 features of these rows, and at most 1 GiB for working copies.

    Raises:
        HeadstartError: a class has no rows to learn from, no row to choose by, or features not finite.
    """
    _checked(examples, train, val)
    targets, weights = labels(examples, choices, train)
    parts = [(_finite(examples, rows), targets[rows], weights[rows]) for rows in (train, val)]
    return select(parts[0], parts[1], choices.l2)


def labels(examples: Examples, choices: Train, train: Rows) -> tuple[Floats, Floats]:
    """Targets float64 [n, k] and weights float64 [n] of every row."""
    k = len(examples.classes)
    confidence = examples.manifest["confidence"].to_numpy(np.float64)
    weights = examples.manifest["weight"].to_numpy(np.float64)
    if choices.class_weight == "balanced":
        # Factors of the training rows for all, so that validation judges by what training minimises.
        weights = weights * class_factors(examples.truth[train], weights[train], k)[examples.truth]
    return soft_targets(examples.truth, confidence, k), weights


def _checked(examples: Examples, train: Rows, val: Rows) -> None:
    """Raise HeadstartError unless there is something to learn from and to choose by."""
    absent = sorted(set(range(len(examples.classes))) - set(examples.truth[train].tolist()))
    if absent:
        raise HeadstartError(
            f"no training rows of {', '.join(examples.classes[c] for c in absent)}",
            do="add rows of that class, or name the classes wanted in the recipe: `validate: classes:`",
        )
    if not len(val):
        raise HeadstartError(
            "no validation rows to choose by", do="raise `validate: splits: val:` in the recipe"
        )


def _finite(examples: Examples, rows: Rows) -> Features:
    """The features of these rows, unless float16 could not hold one of them."""
    features = examples.features[rows]
    # A maximum and a minimum pass on what is not finite, without a table of booleans half as large again.
    bad = ~(np.isfinite(features.max(axis=1)) & np.isfinite(features.min(axis=1)))
    if bad.any():
        raise HeadstartError(
            f"the features of {np.count_nonzero(bad)} rows are not finite numbers",
            where=f"first: {examples.manifest['id'].iloc[rows[bad][0]]}",
            do="look at these rows, or take other `features: layers:` in the recipe",
        )
    return features


def soft_targets(truth: Ints, confidence: Floats, classes: int) -> Floats:
    """float64[n, k]: ``confidence`` [n] for the label, the rest spread evenly over the other classes."""
    others = (1 - confidence) / (classes - 1)
    targets = np.repeat(others[:, None], classes, axis=1)
    targets[np.arange(len(truth)), truth] = confidence
    return targets


def class_factors(truth: Ints, weights: Floats, classes: int) -> Floats:
    """float64[k]: n / (k n_c), with weights for counts, so that every class weighs the same in total."""
    factors: Floats = weights.sum() / (classes * np.bincount(truth, weights, classes))
    return factors
