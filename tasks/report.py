"""Report: one page that says how good the model is and why it was promoted, kept beside its run in MLflow."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact

from headstart import registry, trials
from headstart import report as page
from headstart.layout import Layout
from headstart.recipe import Recipe
from tasks.stage import PATIENT


@task(task_run_name="report", **PATIENT)
def report(recipe: Recipe, layout: Layout, decided: trials.Decided) -> Path:
    """Write ``reports/R/``, log it with the version that it is about, and link it."""
    path = page.write(recipe, layout, decided.evidence)
    link = registry.attach(decided.name, decided.version, path)
    create_link_artifact(key=f"report-{layout.recipe}", link=link, description=str(decided))
    get_run_logger().info(f"report: {path}")
    return path
