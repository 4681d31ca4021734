"""Events: what happened, told to Prefect, where automations wait for it."""

from __future__ import annotations

from typing import Any, Literal

Happening = Literal[
    "headstart.data.changed",
    "headstart.data.rejected",
    "headstart.drift.detected",
    "headstart.model.promoted",
    "headstart.gate.refused",
]


def emit(event: Happening, recipe: str, **payload: Any) -> None:
    """Tell Prefect that something happened to a recipe.

    Args:
        event: what happened.
        recipe: its name; automations match the resource ``headstart.recipe.<recipe>``.
        payload: JSON values that an automation may pass on, such as ``reason``, one line for people.
    """
    from prefect.events import emit_event

    emit_event(
        event=event,
        resource={"prefect.resource.id": f"headstart.recipe.{recipe}", "headstart.recipe": recipe},
        payload=payload,
    )
