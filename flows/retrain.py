"""Retrain one recipe: take in what is new, run what is stale, register, promote what is better, report.

Goes in: a recipe's name, and why. Comes out: a line that says what happened, how good the model is and
where to look. New batches are compared with what the champion knows before anything is learned from them.
The order of the stages is read from ``dvc.yaml``; a fresh stage costs nothing, not even a task run, and a
run that finds nothing to do ends as Skipped.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.logs import in_words
from headstart.errors import HeadstartError
from headstart.layout import Layout
from headstart.recipe import Recipe, load
from tasks import versioning
from tasks.ingest import ingest, unmonitored
from tasks.promote import promote
from tasks.receive import receive
from tasks.recovery import recoverable
from tasks.register import register
from tasks.report import report
from tasks.stage import StageTask

if TYPE_CHECKING:
    from headstart.registry import Registered
    from headstart.trials import Decided

ASKED = "asked for"  # the reason of a run that somebody started


@dataclass(frozen=True)
class Outcome:
    """What a retraining did; as text, the last line that a run prints."""

    recipe: str
    reason: str
    steps: dict[str, str]
    quality: str
    registered: Registered
    decided: Decided
    page: Path

    @property
    def skipped(self) -> bool:
        """Whether there was nothing to do."""
        return set(self.steps.values()) == {"fresh"}

    def __str__(self) -> str:
        done = [f"{name} {state}" for name, state in self.steps.items() if state != "fresh"]
        why = "" if self.reason == ASKED else f" ({self.reason})"
        return (
            f"{self.recipe}{why}: {', '.join(done) or 'nothing changed, nothing done'}; {self.quality}; "
            f"{self.registered}; {self.decided}; see {self.page}"
        )


@dataclass
class Step:
    """One step of a run: what became of it, and the seconds that took."""

    name: str
    outcome: str = "fresh"
    seconds: float = 0.0


@contextmanager
def timed(steps: list[Step], name: str) -> Iterator[Step]:
    """One more step, which ends with the block."""
    steps.append(step := Step(name))
    start = time.monotonic()
    yield step
    step.seconds = time.monotonic() - start


in_words()


@flow(
    name="retrain",
    flow_run_name="retrain {recipe}",
    persist_result=False,
    retries=0,  # a task is patient with the network; what else fails would fail again
    timeout_seconds=24 * 3600,  # a run that hangs would keep every later one away
)
def retrain(recipe: str, reason: str = ASKED, force: bool = False) -> State[Outcome]:
    """Bring one recipe up to date, from its source and its inbox to the model registry.

    Args:
        recipe: the stem of a file in ``recipes/``.
        reason: why it runs now; kept with the version that comes of it.
        force: run every stage, stale or not.

    Returns:
        Completed, or Skipped if there was nothing to do; with the outcome.

    Raises:
        HeadstartError: the error of the step that failed; what ran before it is kept.
    """
    with recoverable() as root:
        return _retrain(root, recipe, reason, force)


def _retrain(root: Path, recipe: str, reason: str, force: bool) -> State[Outcome]:
    chosen, layout = load(root / "recipes" / f"{recipe}.yaml"), Layout(root, recipe)
    steps: list[Step] = []
    unreported = layout.work / "unreported"  # a mark that the page may be of an earlier model
    behind = unreported.exists()

    with timed(steps, "ingest") as step:
        step.outcome = ingest(chosen, layout)
    with timed(steps, "receive") as step:
        received = receive(chosen, layout, wait=reason == ASKED)  # a person would only have to come again
        step.outcome = "ran" if received.accepted else "rejected" if received.rejected else "fresh"
    if unmonitored(layout).exists():  # batches of this run, or of one that was killed
        with timed(steps, "monitor") as step:
            reason = _compared(chosen, layout, step, reason)
    for stage in versioning.order(root, recipe):
        with timed(steps, stage) as step:
            if not force and versioning.is_fresh(root, f"{stage}@{recipe}"):
                get_run_logger().info(f"{stage} is up to date")
            else:
                run: StageTask = getattr(importlib.import_module(f"tasks.{stage}"), stage)
                unreported.touch()
                step.outcome = run(layout, force)
    unreported.touch()
    with timed(steps, "register") as step:
        registered = register(chosen, layout, reason)
        step.outcome = "ran" if registered.new else "fresh"
    with timed(steps, "promote") as step:
        decided = promote(chosen, layout, registered.version)
        step.outcome = "ran" if decided.new else "fresh"
    page = layout.report / "report.html"
    with timed(steps, "report") as step:
        if behind or not page.exists() or any(step.outcome != "fresh" for step in steps):
            report(chosen, layout, decided)
            step.outcome = "ran"
    unreported.unlink(missing_ok=True)

    from headstart.evaluation import headline

    metrics = json.loads((layout.evidence / "metrics.json").read_text(encoding="utf-8"))
    done = {step.name: step.outcome for step in steps}
    outcome = Outcome(recipe, reason, done, headline(metrics), registered, decided, page)
    create_table_artifact(
        key=f"retrain-{recipe}",
        table=[
            {"step": step.name, "outcome": step.outcome, "seconds": f"{step.seconds:.1f}"} for step in steps
        ],
        description=str(outcome),
    )
    return Completed(name="Skipped" if outcome.skipped else None, message=str(outcome), data=outcome)


def _compared(chosen: Recipe, layout: Layout, step: Step, reason: str) -> str:
    """Compare the new rows with what the champion knows; return the reason of the run, with any drift."""
    from tasks.monitor import monitor  # with all of scipy, which most runs can do without

    mark = unmonitored(layout)
    came = mark.stat().st_mtime_ns
    drift = None
    try:
        drift = monitor(chosen, layout)
        step.outcome = "ran" if drift else "fresh"
    except HeadstartError as error:
        if error.transient:
            raise
        # As in a fresh clone, without the champion's rows: no reason to learn nothing any more.
        get_run_logger().warning(f"new rows could not be compared: {error}")
        step.outcome = "failed"
    with suppress(FileNotFoundError):
        if mark.stat().st_mtime_ns == came:  # another batch may have come meanwhile
            mark.unlink()
    return f"{reason}; {drift.reason}" if drift and drift.alarm else reason
