"""Stands in for the flow that is being written."""

from __future__ import annotations

from prefect import flow


@flow(name="monitor", flow_run_name="monitor {recipe}", persist_result=False, retries=0)
def monitor(recipe: str) -> str:
    """Do nothing yet."""
    return recipe
