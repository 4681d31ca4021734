"""Trials: a candidate and the champion answer the same test rows, and the better one stays.

Goes in: the current test rows of a recipe, and two versions of the registry. Comes out: a verdict, and what
was done about it. Both are asked anew: numbers stored with a model were measured on the data of its day.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from headstart import evaluation, gate, models, promotion, runs, stores
from headstart.errors import HeadstartError, unmade
from headstart.gate import Judged, Verdict
from headstart.layout import HIDDEN, Layout, sha256_of
from headstart.metrics import Floats
from headstart.models import Version
from headstart.promotion import CANDIDATE, CHAMPION, Entry
from headstart.recipe import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from headstart.features import Item

TIMED, TURNS = 256, 3  # rows that are timed, and how often
TRIES = 5  # judgements, if another champion is crowned during each
STANDS = "its promotion stands, and no version was champion"


@dataclass(frozen=True)
class Decided:
    """What was decided about a version."""

    name: str
    version: str
    entry: Entry | None  # None of a champion that nobody has decided about: someone set the alias by hand
    verdict: Verdict | None  # None if there was nothing to judge by
    champion: str | None  # now
    new: bool  # whether it was decided just now
    judged: Entry | None = None  # the gate's own latest decision, which a person may have overruled

    @property
    def evidence(self) -> dict[str, Any] | None:
        """The verdict as ``report`` reads it, with the latest decision."""
        if self.verdict is None or self.entry is None or self.judged is None:
            return None
        return self.verdict.to_dict() | {
            "version": self.version,
            "against": self.judged.champion,
            "action": self.entry.action,
            "because": self.entry.reasons,
            "before": self.entry.champion,
            "champion": self.champion,
        }

    def __str__(self) -> str:
        if self.champion == self.version:
            verb = "promoted to champion" if self.new else "is champion"
        else:
            stays = f"version {self.champion} stays champion" if self.champion else "there is no champion"
            verb = f"{'is' if self.new else 'was'} not promoted, {stays}"
        # Where there is no champion, somebody has to do something about it.
        open_still = self.entry and self.entry.action == "refused" and self.champion is None
        why = self.entry.reasons if self.entry and (self.new or open_still) else []
        if self.new and self.verdict and self.verdict.promoted:  # of all that holds, what it gains says most
            why = [check.words for check in self.verdict.checks if check.rule == "min_gain"]
        return f"{self.name} version {self.version} {verb}{': ' if why else ''}{'; '.join(why)}"


def decide(recipe: Recipe, layout: Layout, version: str | None = None) -> Decided:
    """Judge a version by the recipe's rules, and promote it if it has shown what they ask for.

    What has been judged once, against the same champion, by the same rules and on the same rows, is not
    judged again. A version that was rolled back from stays where it is.

    A champion may be gone: deleted, or its alias taken away. A candidate whose promotion stands is then
    crowned again; any other version has to beat the champion before. If there is none, a person chooses.

    Args:
        recipe: its block ``promote`` has the rules.
        layout: where its test rows lie.
        version: by default the candidate.

    Raises:
        HeadstartError: no such version, or the test rows or the registry cannot be reached.
    """
    client, name = promotion.opened(), recipe.model_name
    asking = partial(stores.asked, "the model registry stopped answering")
    with asking():
        promotion.newest(client, name)  # or there is no such model
    for _ in range(TRIES):
        with asking():
            now = _situation(client, name, version)
        key = _key(recipe, layout, now.tags, now.rival)
        way = course(now, key)
        if way == "known":
            last, verdict = now.decided[-1] if now.decided else None, verdict_of(now.tags)
            judged = _judged(now.decided)
            return Decided(name, now.version, last, verdict, now.champion, new=False, judged=judged)
        ruling = _ruling(recipe, layout, now, way)  # what fails here has words of its own
        with asking():
            entry = _written(client, name, now, ruling, key)
        if entry:  # or somebody else has decided meanwhile
            champion = now.version if ruling.promoted else now.champion
            judged = _judged([*now.decided, entry])
            return Decided(name, now.version, entry, ruling.verdict, champion, new=True, judged=judged)
    raise HeadstartError(
        f"the champion of {name} changed {TRIES} times while this was being judged",
        do="run the same command again",
        transient=True,
    )


@dataclass(frozen=True)
class Situation:
    """What the registry says, at one moment, of a version and of those it is compared with."""

    version: str
    tags: dict[str, str]
    candidate: str | None
    champion: str | None
    rival: str | None  # what it has to beat: the champion, or if that is gone the one before it
    gone: bool  # whether there is no champion any more

    @property
    def decided(self) -> list[Entry]:
        """The decisions about the version, oldest first."""
        return promotion.entries(self.tags)


def _situation(client: MlflowClient, name: str, version: str | None) -> Situation:
    """How things stand with a version, by default the candidate, once nothing is half done."""
    promotion.carry_through(client, name)
    aliases = promotion.aliases(client, name)
    chosen = version or aliases.get(CANDIDATE)
    if chosen is None:
        raise HeadstartError(f"{name} has no candidate", do=f"name a version of `headstart models {name}`")
    tags = promotion.tags(client, name, chosen)
    champion, rival = aliases.get(CHAMPION), promotion.rival_of(aliases)
    gone = champion is None and (rival is not None or promotion.had_champion(client, name))
    return Situation(chosen, tags, aliases.get(CANDIDATE), champion, rival, gone)


Course = Literal["known", "crown again", "leave open", "judge"]


def course(now: Situation, key: str) -> Course:
    """What is to be done about a version, where ``key`` is a digest of all that a verdict depends on.

    Returns:
        ``known``: nothing, as it is champion, was judged by all this before or rolled back from;
        ``crown again``: its promotion stands, and the champion is gone; ``leave open``: the champion is gone,
        and nothing is there to beat; ``judge``.
    """
    last = now.decided[-1] if now.decided else None
    if now.version == now.champion:
        return "known"
    if now.gone and now.version == now.candidate and last and last.action == "promoted":
        return "crown again"
    if last and (last.judged == key or promotion.rolled_back(now.decided)):
        return "known"
    return "leave open" if now.gone and now.rival in {None, now.version} else "judge"


@dataclass(frozen=True)
class _Ruling:
    """What is to be written down about a version."""

    promoted: bool
    reasons: list[str]
    verdict: Verdict | None = None
    fit: bool = False  # for use, be it better or not


def _ruling(recipe: Recipe, layout: Layout, now: Situation, way: Course) -> _Ruling:
    """The outcome of a course that is not ``known``."""
    if way == "crown again":
        return _Ruling(True, [STANDS], verdict_of(now.tags))
    ruling = _Ruling(False, [])
    if way == "judge":
        ruling = _judge(recipe, layout, now.version, now.rival, reigns=now.rival == now.champion)
    if now.gone and not ruling.promoted:
        command = f"headstart promote {recipe.model_name} VERSION --force --because REASON"
        open_still = f"the champion is gone: `{command}` makes a version champion"
        ruling = replace(ruling, reasons=[*ruling.reasons, open_still])
    return ruling


def _written(client: MlflowClient, name: str, now: Situation, ruling: _Ruling, key: str) -> Entry | None:
    """The decision as the registry keeps it; None if the rival is another one by now."""
    if ruling.verdict is not None:
        said = json.dumps(ruling.verdict.to_dict())
        client.set_model_version_tag(name, now.version, promotion.VERDICT, said)
    if ruling.promoted:
        return promotion.crown(client, name, now.version, ruling.reasons, judged=key, against=now.rival)
    return promotion.refuse(
        client, name, now.version, ruling.reasons, judged=key, against=now.rival, fit=ruling.fit
    )


def _judge(recipe: Recipe, layout: Layout, version: str, rival: str | None, *, reigns: bool) -> _Ruling:
    """What the gate says, if any label is known."""
    verdict = compare(recipe, layout, version, rival, reigns=reigns)
    if verdict is None:
        where = recipe.validate_.target_domain
        return _Ruling(False, [f"no label of {where} is known, so nothing can be shown"])
    others = (check for check in verdict.checks if check.rule not in {"min_gain", "mcnemar"})
    return _Ruling(verdict.promoted, verdict.reasons, verdict, all(check.passed for check in others))


def decided_about(recipe: Recipe, digest: str) -> Decided | None:
    """What has been decided about the version with this digest, if it is registered and was judged."""
    client, name = promotion.opened(), recipe.model_name
    for version in promotion.versions(client, name, digest):
        if decided := promotion.entries(version.tags):
            champion = promotion.champion_of(client, name)
            verdict, judged = verdict_of(version.tags), _judged(decided)
            number = str(version.version)
            return Decided(name, number, decided[-1], verdict, champion, new=False, judged=judged)
    return None


def compare(
    recipe: Recipe, layout: Layout, version: str, other: str | None, *, reigns: bool = False
) -> Verdict | None:
    """The verdict about a version against another, or against the commonest class; None without labels.

    ``reigns``: the other one is the champion, and called so.

    Raises:
        HeadstartError: a version or the rows are missing, or it cannot read them.
    """
    rows, items = _rows(recipe, layout)
    if not len(rows):
        return None
    asked = [models.load(recipe.model_name, number) for number in (version, other) if number is not None]
    classes = list(dict.fromkeys([*(c for each in asked for c in each.model.classes), *rows["label"]]))
    answers = [_answers(each, items, classes) for each in asked]
    if recipe.promote.max_latency_ratio is not None:
        clock = _seconds(asked, items)
        answers = [replace(said, seconds=taken) for said, taken in zip(answers, clock, strict=True)]
    judged = Judged(
        evaluation.positions(rows["label"].tolist(), classes),
        rows["group"].factorize()[0],
        rows["domain"].to_numpy(str),
        classes,
    )
    against = answers[1] if other is not None else None
    named = "the champion" if reigns else f"version {other}"
    return gate.judge(judged, answers[0], against, recipe.promote, named=named)


def _judged(decided: list[Entry]) -> Entry | None:
    """The latest decision of the gate among these."""
    return next((entry for entry in reversed(decided) if entry.action in {"promoted", "refused"}), None)


def verdict_of(tags: dict[str, str]) -> Verdict | None:
    """The latest verdict about a version, from its tags."""
    said = tags.get(promotion.VERDICT)
    return Verdict.from_dict(json.loads(said)) if said else None


def _answers(version: Version, items: Sequence[Item], classes: list[str]) -> gate.Answers:
    """What a version says of the rows, in columns for all classes."""
    _, said = version.model(items)
    place = evaluation.positions(version.model.classes, classes)
    named = place[version.model.decision.named(said)]
    return gate.Answers(in_columns(said, version.model.classes, classes), named, size=version.size)


def in_columns(said: Floats, own: Sequence[str], classes: Sequence[str]) -> Floats:
    """Probabilities of a model's ``own`` classes in columns for all, float64 [n, k]; zeros for the others."""
    probabilities = np.zeros((len(said), len(classes)))
    probabilities[:, evaluation.positions(own, classes)] = said
    return probabilities


def _seconds(asked: Sequence[Version], items: Sequence[Item]) -> list[float]:
    """Seconds per row that each version takes at best, asked in turns once all files have been read."""
    sample, best = items[:TIMED], [inf] * len(asked)
    for _ in range(TURNS):
        for place, version in enumerate(asked):
            start = time.perf_counter()
            version.model(sample)
            best[place] = min(best[place], (time.perf_counter() - start) / len(sample))
    return best


def _rows(recipe: Recipe, layout: Layout) -> tuple[pd.DataFrame, list[Item]]:
    """Test rows with a known label, and what a model reads of each.

    They are of the target domain, if the recipe names one and any row of it has come.
    """
    rows, aside = manifest(layout, "the test rows are missing")
    adapting = (rows["domain"] == recipe.validate_.target_domain).any()
    rows = rows[rows["split"] == "test"]
    if adapting:
        rows = rows[rows["label"] == HIDDEN].drop(columns="label").merge(aside[["id", "label"]], on="id")
    rows = rows[rows["label"] != HIDDEN].reset_index(drop=True)
    return rows, items(recipe, layout, rows)


def manifest(layout: Layout, missing: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every row of the manifest, and the labels that were put aside: ``id``, ``label``.

    Raises:
        HeadstartError: ``missing``, if they are not here (transient, while ``validate`` is at work on them).
    """
    try:
        rows = pd.read_parquet(layout.manifest / "manifest.parquet")
        return rows, pd.read_parquet(layout.truth / "labels.parquet")
    except FileNotFoundError as error:
        if runs.written_now(layout.root, layout.manifest):
            where, do = f"validate@{layout.recipe} is running", "try again when it has ended"
            raise HeadstartError(missing, where, do, transient=True) from None
        raise unmade(missing, error, layout.recipe, "validate") from None


def items(recipe: Recipe, layout: Layout, rows: pd.DataFrame) -> list[Item]:
    """What a model reads of each row: its text, or where its picture lies."""
    if recipe.modality == "text":
        return list(rows["text"])
    return [layout.raw / path for path in rows["path"]]


def _key(recipe: Recipe, layout: Layout, tags: dict[str, str], champion: str | None) -> str:
    """A digest of all that a verdict depends on."""
    files = [layout.manifest / "manifest.parquet", layout.truth / "labels.parquet"]
    parts = [
        tags.get("headstart.digest"),
        champion,
        [sha256_of(file) if file.exists() else None for file in files],
        recipe.promote.model_dump_json(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
