"""What every stage's task has in common: it runs the stage through DVC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from headstart.errors import HeadstartError
from headstart.layout import Layout
from tasks import versioning

StageTask = Task[[Layout, bool], versioning.Outcome]


def stage_task(stage: str, **options: Any) -> StageTask:
    """A task that runs ``stage``: its log streamed into Prefect, its own error carried out."""

    def run(layout: Layout, force: bool) -> versioning.Outcome:
        return versioning.reproduce(layout.root, stage, layout.recipe, get_run_logger().info, force)

    run.__name__ = stage
    decorate: Callable[[Callable[[Layout, bool], versioning.Outcome]], StageTask] = task(
        name=stage, task_run_name=stage, **(UNCACHED | options)
    )
    return decorate(run)


async def is_transient(task: object, run: TaskRun, state: State[Any]) -> bool:
    """Whether a retry makes sense: the network may come back, a wrong key stays wrong."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, HeadstartError) and error.transient


# Of every task. The keys of Prefect's cache know a task's arguments, never its output files. DVC knows.
UNCACHED: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
# For a task that asks a network: twice more, if the error says that this may help.
PATIENT: dict[str, Any] = UNCACHED | {
    "retries": 2,
    "retry_delay_seconds": [5, 30],
    "retry_condition_fn": is_transient,
}
