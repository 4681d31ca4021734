"""Monitor: recent rows beside those that the champion knows; drift is told to Prefect."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact

from headstart import drift_report, monitoring
from headstart.drift import Drift
from headstart.layout import Layout
from headstart.recipe import Recipe
from tasks import versioning
from tasks.events import emit
from tasks.stage import PATIENT


@task(task_run_name="monitor", **PATIENT)
def monitor(recipe: Recipe, layout: Layout, inputs: Sequence[str] | None = None) -> Drift | None:
    """Test recent rows for drift, write the page, log the figures; None if nothing is to test.

    Drift is emitted as ``headstart.drift.detected``, with its reason, the champion's version, what the recent
    rows are, how many there are and how many of them have labels.
    """
    log = get_run_logger().info
    versioning.await_manifest(layout.root, layout.recipe, log)
    found = monitoring.monitor(recipe, layout, inputs)
    if isinstance(found, str):
        log(found)
        return None
    page = drift_report.write(recipe, layout, found)
    monitoring.log(recipe, layout, found, page)
    log(f"{found}\nsee {page}")
    create_table_artifact(
        key=f"monitor-{layout.recipe}",
        table=[
            {
                "test": test.name,
                "measure": test.measure,
                "value": f"{test.value:.3f}",
                "corrected p": f"{test.adjusted:.3f}",
                "drift": "yes" if test in found.drift.shown else "no",
            }
            for test in found.drift.tests
        ],
        description=found.drift.reason,
    )
    if found.drift.alarm:
        emit(
            "headstart.drift.detected",
            layout.recipe,
            reason=found.drift.reason,
            version=found.version,
            where=found.where,
            rows=found.drift.recent,
            labelled=found.drift.labelled,
        )
    return found.drift
