"""Stands in for the flow that is being written."""

from __future__ import annotations

from prefect import flow


@flow(name="watch", flow_run_name="watch {recipe}", persist_result=False, retries=0)
def watch(recipe: str) -> str:
    """Do nothing yet."""
    return recipe
