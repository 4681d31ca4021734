"""Promote: the candidate becomes champion if it has shown that it is better, or the reasons why not."""

from __future__ import annotations

from prefect import get_run_logger, task

from headstart import trials
from headstart.layout import Layout
from headstart.recipe import Recipe
from tasks import versioning
from tasks.events import emit
from tasks.stage import PATIENT


@task(task_run_name="promote", **PATIENT)
def promote(recipe: Recipe, layout: Layout, version: str) -> trials.Decided:
    """Judge a version against the champion; what has been judged before is not judged again."""
    log = get_run_logger().info
    versioning.await_manifest(layout.root, layout.recipe, log)
    decided = trials.decide(recipe, layout, version)
    log(str(decided))
    if decided.new:
        promoted = decided.champion == decided.version
        emit(
            "headstart.model.promoted" if promoted else "headstart.gate.refused",
            recipe.name,
            reason=str(decided),
            model=decided.name,
            version=decided.version,
        )
    return decided
