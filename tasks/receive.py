"""Receive: settled batches of the inbox go through quarantine into ``data/<recipe>/`` and its version.

Idempotent, and safe to kill: see ``headstart.inbox``. A bad batch stays in quarantine with its reasons, and
what is versioned stays as it is to the byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
from prefect import get_run_logger, task

from headstart import inbox
from headstart.errors import HeadstartError
from headstart.layout import EARLIER_SPLITS, Layout
from headstart.recipe import Recipe
from headstart.validation import shown
from tasks import versioning
from tasks.events import emit
from tasks.ingest import alone, brought, earlier_splits, unmonitored, unpushed, version
from tasks.stage import PATIENT


@dataclass
class Received:
    """What came of the batches in the inbox."""

    recipe: str
    accepted: list[str] = field(default_factory=list)  # in the order they came
    rejected: dict[str, HeadstartError] = field(default_factory=dict)
    pushed: bool = False

    def __str__(self) -> str:
        parts = [f"{len(self.accepted)} accepted ({', '.join(self.accepted)})"] if self.accepted else []
        if self.rejected:
            parts.append(f"{len(self.rejected)} rejected ({', '.join(self.rejected)})")
        return f"{self.recipe}: batches: {', '.join(parts) or 'none'}{', pushed' if self.pushed else ''}"


@task(task_run_name="receive", **PATIENT)
def receive(recipe: Recipe, layout: Layout, wait: bool = False) -> Received:
    """Take in every settled batch; a rejected one is an event, never a failure.

    Args:
        recipe: says where the inbox is, and what a good row is.
        layout: where its data lie.
        wait: for batches that are still settling.
    """
    log = get_run_logger()

    def rejected(name: str, reasons: HeadstartError) -> None:
        log.warning(str(reasons))
        emit("headstart.data.rejected", recipe.name, batch=name, reason=reasons.what, table=reasons.table)

    return take(recipe, layout, log.info, rejected, wait)


def take(
    recipe: Recipe,
    layout: Layout,
    log: Callable[[str], None],
    rejected: Callable[[str, HeadstartError], None],
    wait: bool = False,
) -> Received:
    """The task's body, for callers without Prefect.

    Args:
        recipe: as of the task.
        layout: as of the task.
        log: told what is done.
        rejected: told of each rejected batch and its reasons at once, as the next run passes over it even if
            this one fails.
        wait: as of the task.

    Raises:
        HeadstartError: the source or the store of the inbox cannot be reached, the disk is full, or a stage
            has been reading the data for almost a day.
    """
    if wait:
        inbox.settle(recipe, layout)
    received = Received(recipe.name)
    with alone(layout, log):
        inbox.bring(recipe, layout)
        names = inbox.pending(layout)
        if names and not layout.raw.exists():
            brought(recipe, layout, log)
        for name in names:
            reasons = inbox.check(recipe, layout, name)
            if reasons.empty:
                with versioning.writing(layout.root, recipe.name, log):
                    _keep_splits(layout)
                    for mark in (unpushed(layout), unmonitored(layout)):  # before: a kill may come after
                        mark.touch()
                    inbox.accept(layout, name)
                received.accepted.append(name)
                log(f"batch {name} is accepted")
            else:
                inbox.reject(layout, name, reasons)
                received.rejected[name] = _told(reasons, layout, name)
                rejected(name, received.rejected[name])
        if unpushed(layout).exists():
            received.pushed = version(recipe, layout, log)
    return received


def _keep_splits(layout: Layout) -> None:
    """Write down beside the data the splits that rows have, so that newcomers never move them."""
    if (earlier := earlier_splits(layout)) is not None:
        partial = layout.raw / f"{EARLIER_SPLITS}.partial"  # hidden, and ignored by DVC
        partial.write_bytes(earlier)
        partial.replace(layout.raw / EARLIER_SPLITS)


def _told(reasons: pd.DataFrame, layout: Layout, name: str) -> HeadstartError:
    path = (layout.quarantine / name / inbox.REASONS).relative_to(layout.root)
    return HeadstartError(
        f"the batch {name} is rejected: {len(reasons)} failure{'s' if len(reasons) > 1 else ''}",
        where=str(path),
        table=shown(reasons),
        do=f"mend it and put it into the inbox again; or delete {path.name}, and it is looked at once more",
    )
