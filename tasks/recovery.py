"""Recovery: runs that died with their process are marked so, and those of a deployment run again.

Prefect learns from a worker that the process of a run is gone; nobody tells it if the worker went too, or if
there was none. Then the run would be `Running` for ever, and hold its deployment's only place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from headstart import environment, processes, runs

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

GRACE = 10.0  # seconds in which a run without its worker may end what it has started
TRIES = 3  # a run that ends its process each time is not tried for ever


@contextmanager
def recoverable() -> Iterator[Path]:
    """Around the work of a flow in a project: dead runs are settled first, and this one is written down."""
    from prefect import get_run_logger
    from prefect.runtime import deployment, flow_run

    root = environment.project_root()
    environment.prepare(root)
    if deployment.id:  # without its worker nobody could cancel it, and it would meet its own second try
        processes.die_with_parent()
        processes.end_after_parent(GRACE)
    log = get_run_logger()
    try:
        recover(root, log.warning)
    except Exception as error:  # an earlier run is no reason for this one to fail
        log.warning(f"earlier runs could not be looked after: {error}")
    with runs.in_progress(root, str(flow_run.id), _server()):
        yield root


def recover(root: Path, say: Callable[[str], None], alone: bool = False) -> None:
    """Mark the runs whose process is gone, and start those of a deployment again.

    Args:
        root: the project.
        say: told what was done.
        alone: no worker is running, and no process of one: whatever else the server takes for pending or
            running in the work pool is dead as well, such as a run whose process had not come that far.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    known = runs.known(root)
    dead = [run for run in known if run.dead()]
    if not dead and not alone:
        return
    with get_client(sync_client=True) as client:
        for run in dead:
            try:
                _settle(client, client.read_flow_run(UUID(run.id)), say)
            except ObjectNotFound:
                if run.server != _server():
                    continue  # another server knows it
            runs.forget(root, run)
        if alone:
            living = {run.id for run in known}
            for found in _unfinished(client):
                if str(found.id) not in living:
                    _settle(client, found, say)


def _settle(client: SyncPrefectClient, run: FlowRun, say: Callable[[str], None]) -> None:
    """A run without a process: crashed, and once more if it belongs to a deployment."""
    from prefect.states import Cancelled, Crashed

    state = run.state
    if state is None or state.is_scheduled() or state.is_paused():
        return
    if state.is_cancelling():
        client.set_flow_run_state(run.id, Cancelled(message="Its process had ended."), force=True)
        return
    if state.is_running() or state.is_pending():
        client.set_flow_run_state(run.id, Crashed(message="Its process ended without a word."), force=True)
    elif not state.is_crashed():
        return
    tries = 1 + sum(tag.startswith("retry-") for tag in run.tags)
    if run.deployment_id is None or tries >= TRIES:
        say(f"flow run {run.name}: its process is gone; marked as crashed")
        return
    again = client.create_flow_run_from_deployment(
        run.deployment_id,
        parameters=run.parameters,
        tags=[*(tag for tag in run.tags if tag != "auto-scheduled"), f"retry-{tries}"],
        idempotency_key=f"retry-{run.id}",  # however many find the dead run, it is started again once
    )
    say(f"flow run {run.name}: its process is gone; marked as crashed, and started again as {again.name}")


def _unfinished(client: SyncPrefectClient) -> list[FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter

    types = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"state": types}),
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [runs.POOL]}}),
    )


def _server() -> str:
    from prefect.settings import PREFECT_API_URL

    url: Any = PREFECT_API_URL.value()
    return str(url or "")


def main() -> None:
    """Look after dead runs once; a server that is away is no stack trace."""
    import httpx

    root = environment.project_root()
    environment.prepare(root)
    try:
        recover(root, print, alone="--alone" in sys.argv)
    except httpx.HTTPError as error:
        sys.exit(f"the Prefect server does not answer: {error}")


if __name__ == "__main__":
    main()
