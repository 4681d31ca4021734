"""Domains: a model of source domains made fit for a target domain whose labels nobody has.

Goes in: a model of the source, or one that is registered, and the target's rows. Comes out: a model for the
target, with the reason for the way that was taken. Never sees a label of the target but the few that a recipe
may keep, and its test rows take no part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from headstart import adaptation, selection, shifts, source_free
from headstart.adaptation import Source
from headstart.errors import HeadstartError
from headstart.examples import Examples, SoftTargets, finite, labels
from headstart.fitting import Frozen, Tuned, clock_of, source_of, tuning_of
from headstart.heads import Features, Head
from headstart.layout import Layout
from headstart.metrics import Floats
from headstart.packs import Rows
from headstart.recipe import Recipe, Train
from headstart.shifts import Diagnosis

POINTS = 300  # of a side, in a projection


def check(examples: Examples, train: Rows, val: Rows) -> None:
    """Raise HeadstartError unless the rows of the source domains have all classes, in both parts.

    Those of val tell how each class is named, without which no shift between domains can be told.
    """
    for use, rows in (("training", train), ("validation", val)):
        if absent := examples.absent(rows):
            where = examples.manifest["domain"].iloc[np.concatenate([train, val])].unique()
            raise HeadstartError(
                f"no {use} rows of {', '.join(absent)}",
                where=f"domain {', '.join(sorted(where))}",
                do="add rows of that class there, in groups of their own, or leave out class or domain",
            )


def adapted(
    choices: Train, source: Frozen | Tuned, train: Rows, val: Rows, known: Rows | None = None
) -> Adapted:
    """A head for the target domain, from labelled rows ``train`` and ``val`` of the source domains.

    Of the target domain the rows of its test split take no part. ``known`` are the few rows of its training
    split that have a label.

    Raises:
        HeadstartError: as for ``train``.
    """
    known = np.empty(0, np.int64) if known is None else known
    examples = source.examples
    sides = Sides(train, val, np.sort(np.concatenate([examples.unlabelled("train", "val"), known])), known)
    if len(sides.target) < 2:
        raise HeadstartError("the target domain has no rows to adapt to", do="add rows of the target domain")
    shift = _shift(source, sides, choices.seed)
    if choices.target_statistics and isinstance(source, Tuned):
        # After the diagnosis: statistics of its own hide a shift rather than mend it.
        of_target = np.union1d(np.flatnonzero(examples.truth < 0), known)
        source = source.reading(sides.target, train, of_target)
    targets, weights = labels(examples, choices, train)
    labelled = _labelled(examples, train, targets, weights)
    target = finite(source.examples, sides.target)
    way = _way(choices, source, sides, labelled, target, shift)
    head = source.head
    if way.method != "source_only" or len(known):
        given = np.searchsorted(sides.target, known), targets[known]
        head = adaptation.adapt(
            way.method,
            labelled,
            target,
            adaptation.penalty_of(way.method, _least(source)),
            seed=choices.seed,
            known=given,
        )
    held_out = source.examples.features[val], examples.truth[val]
    moved = way.method in adaptation.MOVING
    expected = selection.expected_accuracy(head, held_out, labelled.features, target, moved)
    return Adapted(choices, source, sides, head, way, shift, expected)


def _labelled(examples: Examples, train: Rows, targets: SoftTargets, weights: Floats) -> Source:
    """The rows ``train`` as an adaptation learns from them."""
    return Source(finite(examples, train), targets[train], weights[train])


def _shift(source: Frozen | Tuned, sides: Sides, seed: int) -> Diagnosis:
    """How the target's rows differ from those of the source that no head was fitted to."""
    examples, head = source.examples, source.head
    groups = examples.manifest["group"].to_numpy()
    here, there = examples.features[sides.val], finite(examples, sides.target)
    return shifts.diagnose(
        here,
        examples.truth[sides.val],
        groups[sides.val],
        head.probabilities(here),
        there,
        groups[sides.target],
        head.probabilities(there),
        examples.classes,
        seed=seed,
    )


def _way(  # noqa: PLR0917  # two domains
    choices: Train,
    source: Frozen | Tuned,
    sides: Sides,
    labelled: Source,
    target: Features,
    shift: Diagnosis,
) -> Way:
    """The recipe's way of adapting, or else what the shift asks for, unless enough labels know better."""
    if choices.adaptation:
        return Way(choices.adaptation, "named in the recipe", "recipe")
    features, known = source.examples.features, sides.known
    first = selection.choose(source.head, features[sides.val], target, shift.kind)
    if len(known) < selection.KNOWN_ENOUGH:
        return Way(*first, "shift")
    truth = source.examples.truth[known]
    best = selection.best_on(features[known], truth, source.head, labelled, target, first, _least(source))
    return Way(*best, "labels")


def _least(source: Frozen | Tuned) -> float:
    """The penalty that the source's own rows ask for; that of a tuned backbone's first head says nothing."""
    return source.penalty if isinstance(source, Frozen) else adaptation.PENALTY


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
    inherited = source_free.Inherited.read(layout.weights)
    inherited.check(recipe.features, recipe.validate_.classes)
    there = examples.unlabelled("train", "val")
    if not len(there):
        raise HeadstartError("the target domain has no rows to adapt to", do="add rows of the target domain")
    target = finite(examples, there)
    head, reason = selection.found_again(inherited.head, target, inherited.shares)
    guessed = examples.named(there, head.probabilities(target))
    shares = inherited.shares if recipe.train.source_free == "hypothesis_transfer" else None
    unweighed = recipe.training(class_weight=None)  # nobody knows how rare a class is
    tuning = tuning_of(unweighed, layout, guessed, there, there[:0], head, key=key, shares=shares)
    tuning.run()
    nothing = np.empty((0, len(examples.classes)))
    tuned = Tuned(recipe, examples, tuning, None, clock_of(layout, key), nothing)
    return Freed(tuned, str(recipe.train.source_free), reason, inherited.shares)


@dataclass(frozen=True)
class Sides:
    """The rows that an adaptation saw."""

    train: Rows  # labelled, of the source domains
    val: Rows  # likewise; no head was fitted to them
    target: Rows  # of the target domain
    known: Rows  # those of them with a label


@dataclass(frozen=True)
class Way:
    """A way of adapting."""

    method: str
    reason: str
    decided_by: Literal["recipe", "shift", "labels"]


@dataclass(frozen=True)
class Adapted:
    """Domain adaptation: a head for the target domain, beside the model of the source domains."""

    choices: Train
    source: Frozen | Tuned
    sides: Sides
    head: Head
    way: Way
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
            "adaptation": self.way.method,
            "reason": self.way.reason,
            "taught": self.taught is not None,
            "target_statistics": self.normalised,
            "expected_accuracy": dict(
                zip(("value", "low", "high"), (round(e, 4) for e in self.expected), strict=True)
            ),
            "shift": told
            | {f"{side}_shares": [round(float(s), 4) for s in of] for side, of in shares.items()}
            | {"kind": shift.kind, "words": shift.words},
            "decided_by": self.way.decided_by,
            "candidates": _judged(self._candidates, self.source.examples, self.sides),
        } | (self.taught or self.source).said

    @property
    def normalised(self) -> bool:
        """Whether the source's backbone reads the target with BatchNorm statistics of its own."""
        return isinstance(self.source, Tuned) and self.source.normalised is not None

    @cached_property
    def _candidates(self) -> dict[str, Head]:
        """A head by each way of adapting, none of which has seen the few labels of the target."""
        examples, sides = self.source.examples, self.sides
        labelled = _labelled(examples, sides.train, *labels(examples, self.choices, sides.train))
        target = examples.features[sides.target]
        return selection.candidates(
            self.source.head,
            labelled,
            target,
            self.way.method,
            least=_least(self.source),
            seed=self.choices.seed,
        )

    @property
    def chosen(self) -> str:
        """The way of adapting."""
        return self.way.method

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
        _called(self._candidates, examples, test).to_parquet(folder / "candidates.parquet", index=False)
        _projected(self).to_parquet(folder / "projection.parquet", index=False)
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

    def _told(self, vectors: Features, rows: Rows) -> Floats:
        target = self.source.examples.truth[rows] < 0
        found = self.source.head.probabilities(vectors)
        found[target] = self.head.probabilities(vectors[target])
        return found


@dataclass(frozen=True)
class Freed:
    """A registered model that went on learning from the target's rows alone."""

    model: Tuned
    way: str
    reason: str
    shares: Floats  # float64 [classes], as inherited: no row of the source is there to tell others

    @property
    def said(self) -> dict[str, Any]:
        """The way, where it began, the shares of the classes, for who goes on from it, and what it tells."""
        reason = f"named in the recipe; {self.reason}"
        shares = [round(float(share), 4) for share in self.shares]
        return {"adaptation": self.way, "reason": reason, "shares": shares} | self.model.said

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


def _judged(heads: dict[str, Head], examples: Examples, sides: Sides) -> dict[str, dict[str, float]]:
    """What was known of each candidate without the target's labels, or by the few that there are."""
    features, truth = examples.features, examples.truth
    found = selection.judged(
        heads, (features[sides.val], truth[sides.val]), features[sides.train], features[sides.target]
    )
    for method, head in heads.items() if len(sides.known) else ():
        named = head.logits(features[sides.known]).argmax(axis=1)
        found[method]["right"] = float((named == truth[sides.known]).mean())
    return {method: {name: round(value, 4) for name, value in line.items()} for method, line in found.items()}


def _called(heads: dict[str, Head], examples: Examples, rows: Rows) -> pd.DataFrame:
    """What each candidate calls these rows, by ``id``."""
    features, ids = examples.features[rows], examples.manifest["id"].to_numpy()[rows]
    called = {method: head.logits(features).argmax(axis=1).astype(np.int16) for method, head in heads.items()}
    return pd.DataFrame({"id": ids} | called)


def _projected(model: Adapted) -> pd.DataFrame:
    """Some rows of both sides in a plane, before and after: ``view``, ``side``, ``x``, ``y``.

    What is there after is missing where adapting moves no row, but the head alone.
    """
    chance = np.random.default_rng(model.choices.seed)
    features, method = model.source.examples.features, model.way.method
    sides = model.sides.train, model.sides.target
    shown = [np.sort(chance.permutation(len(side))[:POINTS]) for side in sides]
    mine, theirs = (features[side] for side in sides)
    views = {"before": adaptation.projection("source_only", mine, theirs, (shown[0], shown[1]))}
    if isinstance(model.source, Tuned) and model.normalised:
        few = model.source.tuning.vectors(sides[1][shown[1]])
        views["before"] = adaptation.projection("source_only", mine, few, (shown[0], np.arange(len(few))))
    if model.taught:  # by another backbone
        seen = [model.taught.tuning.vectors(side[few]) for side, few in zip(sides, shown, strict=True)]
        everything = np.arange(len(seen[0])), np.arange(len(seen[1]))
        views["after"] = adaptation.projection("source_only", seen[0], seen[1], everything)
    elif method in adaptation.MOVING or model.normalised:
        views["after"] = adaptation.projection(method, mine, theirs, (shown[0], shown[1]))
    lines = [
        pd.DataFrame({"view": view, "side": side, "x": at[:, 0], "y": at[:, 1]})
        for view, both in views.items()
        for side, at in zip(("source", "target"), both, strict=True)
    ]
    return pd.concat(lines, ignore_index=True).round(3)
