"""Retrain one recipe: ingest, every stage that DVC finds stale, register, promote what is better, report.

Goes in: a recipe's name. Comes out: a line that says what happened, how good the model is and
where to look. The order of the stages is read from ``dvc.yaml``; a fresh stage costs nothing,
not even a task run.
"""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from flows.logs import in_words
from headstart import environment
from headstart.evaluation import headline
from headstart.layout import Layout
from headstart.recipe import load
from headstart.registry import Registered
from headstart.trials import Decided
from tasks import versioning
from tasks.ingest import ingest
from tasks.promote import promote
from tasks.recovery import recoverable
from tasks.register import register
from tasks.report import report
from tasks.stage import StageTask


@dataclass(frozen=True)
class Outcome:
    """What a retraining did; as text, the last line that a run prints."""

    recipe: str
    steps: dict[str, str]
    quality: str
    registered: Registered
    decided: Decided
    page: Path

    def __str__(self) -> str:
        done = [f"{name} {state}" for name, state in self.steps.items() if state != "fresh"]
        return (
            f"{self.recipe}: {', '.join(done) or 'nothing changed, nothing done'}; {self.quality}; "
            f"{self.registered}; {self.decided}; see {self.page}"
        )


in_words()


@flow(
    name="retrain",
    flow_run_name="retrain {recipe}",
    persist_result=False,
    retries=0,  # a task is patient with the network; what else fails would fail again
    timeout_seconds=24 * 3600,  # a run that hangs would keep every later one away
)
def retrain(recipe: str, reason: str = "asked for") -> Outcome:
    """Bring one recipe up to date, from its source to the model registry.

    Args:
        recipe: the stem of a file in ``recipes/``.
        reason: why, for the log.

    Raises:
        HeadstartError: the error of the step that failed; what ran before it is kept.
    """
    root = environment.project_root()
    environment.prepare(root)
    with recoverable(root):
        return _retrain(root, recipe, reason)


def _retrain(root: Path, recipe: str, reason: str) -> Outcome:
    log = get_run_logger().info
    log(f"why: {reason}")
    chosen, layout = load(root / "recipes" / f"{recipe}.yaml"), Layout(root, recipe)

    steps, seconds = {}, {}
    start = time.monotonic()
    steps["ingest"] = ingest(chosen, layout)
    seconds["ingest"] = time.monotonic() - start
    for stage in versioning.order(root, recipe):
        start = time.monotonic()
        if versioning.is_fresh(root, f"{stage}@{recipe}"):
            log(f"{stage} is up to date")
            steps[stage] = "fresh"
        else:
            step: StageTask = getattr(importlib.import_module(f"tasks.{stage}"), stage)
            steps[stage] = step(layout)
        seconds[stage] = time.monotonic() - start
    start = time.monotonic()
    registered = register(chosen, layout)
    steps["register"] = "ran" if registered.new else "fresh"
    seconds["register"] = time.monotonic() - start
    start = time.monotonic()
    decided = promote(chosen, layout, registered.version)
    steps["promote"] = "ran" if decided.new else "fresh"
    seconds["promote"] = time.monotonic() - start
    start = time.monotonic()
    page = layout.report / "report.html"
    steps["report"] = "fresh"
    if not page.exists() or set(steps.values()) != {"fresh"}:
        report(chosen, layout, decided)
        steps["report"] = "ran"
    seconds["report"] = time.monotonic() - start

    metrics = json.loads((layout.evidence / "metrics.json").read_text(encoding="utf-8"))
    outcome = Outcome(recipe, steps, headline(metrics), registered, decided, page)
    create_table_artifact(
        key=f"retrain-{recipe}",
        table=[
            {"step": name, "outcome": state, "seconds": f"{seconds[name]:.1f}"}
            for name, state in steps.items()
        ],
        description=str(outcome),
    )
    return outcome
