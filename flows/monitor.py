"""Monitor one recipe: are recent rows still like those that its champion knows?

Goes in: a recipe's name, and what to look at if not the batches that came since. Comes out: a line that says
what was found; a page, MLflow metrics over time, and an event if there is drift. Trains nothing.
"""

from __future__ import annotations

from prefect import flow

from flows.logs import in_words
from headstart.layout import Layout
from headstart.recipe import load
from tasks.monitor import monitor as compare
from tasks.recovery import recoverable

in_words()


@flow(
    name="monitor",
    flow_run_name="monitor {recipe}",
    persist_result=False,
    retries=0,
    timeout_seconds=6 * 3600,
)
def monitor(recipe: str, inputs: list[str] | None = None) -> str:
    """Test recent rows for drift.

    Args:
        recipe: the stem of a file in ``recipes/``.
        inputs: files, folders, patterns or tables, relative to the project; by default the batches that came
            since the champion's data.

    Raises:
        HeadstartError: as of ``monitoring.monitor``.
    """
    with recoverable() as root:
        found = compare(load(root / "recipes" / f"{recipe}.yaml"), Layout(root, recipe), inputs)
    return found.reason if found else f"{recipe}: nothing to compare"
