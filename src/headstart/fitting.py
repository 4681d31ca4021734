"""Fitting: a model from labelled rows, by feature extraction or by fine-tuning.

Goes in: examples, the positions of those to learn from and of those that choose. Comes out: a head on frozen
features, or a backbone and a head that were trained together. Never looks at test rows.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from headstart import environment
from headstart.calibration import tempered
from headstart.errors import HeadstartError
from headstart.examples import Examples, check, finite, labels
from headstart.heads import Features, Head, select
from headstart.layout import Layout
from headstart.metrics import Floats
from headstart.packs import Rows
from headstart.recipe import Recipe, Train

if TYPE_CHECKING:
    from torch import Tensor

    from headstart.finetuning import Tuning

log = logging.getLogger(__name__)


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


def source_of(
    recipe: Recipe, layout: Layout, examples: Examples, train: Rows, val: Rows, *, key: str | None = None
) -> Frozen | Tuned | None:
    """The model of labelled rows, before any adaptation; None in all but the first of several processes.

    With ``tune``, the features of its examples are those of the trained backbone.
    """
    if not recipe.train.trains_backbone:
        return frozen_of(recipe, examples, train, val)
    fewest = int(np.bincount(examples.truth[train], minlength=len(examples.classes)).min())
    if fewest < recipe.frozen_below:
        log.info("%d training rows of a class are too few to tune the backbone: it stays frozen", fewest)
        kept = frozen_of(recipe, examples, train, val)
        return kept if environment.first() else None
    tuning, frozen = begin(recipe, layout, examples, train, val, key=key)
    if recipe.train.target_statistics and not tuning.classifier.normalises():
        raise HeadstartError(
            f"{tuning.classifier.spec.architecture} has no BatchNorm to give the target's statistics",
            where="train.target_statistics",
            do="leave it out",
        )
    tuning.run()
    tuned = Tuned(recipe, examples, tuning, frozen, clock_of(layout, key), tuning.probabilities(val))
    if recipe.train.tune:
        tuned = tuned.with_features()  # while all processes are at hand
    return tuned if tuning.accelerator.is_main_process else None


def frozen_of(recipe: Recipe, examples: Examples, train: Rows, val: Rows) -> Frozen:
    """The head that fits the frozen features of the rows ``train`` best, as the rows ``val`` judge."""
    head, penalty, table = fit_rows(examples, recipe.train, train, val)
    return Frozen(examples, head, penalty, table, head.probabilities(examples.features[val]))


def fit_rows(
    examples: Examples, choices: Train, train: Rows, val: Rows
) -> tuple[Head, float, list[dict[str, float]]]:
    """The head fitted on the rows ``train`` with the penalty that the rows ``val`` choose; see ``select``.

    Memory: the float16 features of these rows, and at most 1 GiB for working copies, however many classes.

    Raises:
        HeadstartError: a class has no rows to learn from, no row to choose by, or features not finite.
    """
    check(examples, train, val)
    targets, weights = labels(examples, choices, train)
    parts = [(finite(examples, rows), targets.of(rows), weights[rows]) for rows in (train, val)]
    return select(parts[0], parts[1], choices.l2)


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
        check(examples, train, val)
    return tuning_of(recipe, layout, examples, train, val, frozen.head if frozen else None, key=key), frozen


def tuning_of(  # noqa: PLR0917  # as ``begin``, and the head
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
            targets[:],
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


def clock_of(layout: Layout, key: str | None) -> Path | None:
    """Where the seconds of a training's epochs are kept."""
    return layout.work / "train" / f"{key}.csv" if key is not None else None


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

        from headstart import features, normalisation, precision

        pack, device = self.tuning.pack, self.tuning.device

        def batches(rows: Rows) -> Iterator[tuple[Tensor, ...]]:
            dealt = np.random.default_rng(self.recipe.train.seed).permutation(rows)
            # Nearly equal: a small last batch would be normalised by the statistics of a few rows.
            for part in np.array_split(dealt, max(1, round(len(dealt) / normalisation.BATCH))):
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
