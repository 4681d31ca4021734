"""Register: the trained model and its evidence become a version in the MLflow registry."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from headstart import registry
from headstart.layout import Layout
from headstart.recipe import Recipe
from tasks.stage import PATIENT


@task(
    name="register",
    task_run_name="register",
    cache_policy=NO_CACHE,
    persist_result=False,
    **PATIENT,
)
def register(recipe: Recipe, layout: Layout, reason: str) -> registry.Registered:
    """Register under alias ``candidate``; the same model a second time is the same version."""
    registered = registry.register(recipe, layout, reason)
    get_run_logger().info(str(registered))
    return registered
