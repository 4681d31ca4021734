"""Register: the trained model and its evidence become a version in the MLflow registry."""

from __future__ import annotations

from prefect import get_run_logger, task

from headstart import registry
from headstart.layout import Layout
from headstart.recipe import Recipe
from tasks.stage import PATIENT


@task(task_run_name="register", **PATIENT)
def register(recipe: Recipe, layout: Layout, reason: str) -> registry.Registered:
    """Register under alias ``candidate``; the same model a second time is the same version."""
    registered = registry.register(recipe, layout, reason)
    get_run_logger().info(str(registered))
    return registered
