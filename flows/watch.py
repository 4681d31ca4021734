"""Watch an inbox: whoever waits for ``headstart.data.changed`` hears of each new batch once.

Goes in: a recipe's name. Comes out: a line that says what lies in its inbox, and an event if there is
something new and complete. Takes nothing: that is receiving's.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger

from flows.logs import in_words
from headstart import inbox
from headstart.errors import HeadstartError
from headstart.layout import Layout
from headstart.recipe import load
from tasks.events import emit
from tasks.recovery import recoverable

in_words()


@flow(
    name="watch",
    flow_run_name="watch {recipe}",
    persist_result=False,
    retries=0,
    timeout_seconds=3600,
)
def watch(recipe: str) -> str:
    """Look at one recipe's inbox once.

    Args:
        recipe: the stem of a file in ``recipes/``.

    Whatever keeps it from looking, such as a store that cannot be reached or a recipe with mistakes, is only
    said: this comes again in a minute, and people would be told of a failed run each time. The retraining
    that takes batches in fails by it.
    """
    with recoverable() as root:
        return _watch(root, recipe)


def _watch(root: Path, recipe: str) -> str:
    layout = Layout(root, recipe)
    try:
        arrivals = inbox.look(load(root / "recipes" / f"{recipe}.yaml"), layout)
    except HeadstartError as error:
        get_run_logger().warning(str(error))
        return f"{recipe}: {error.what}"
    ready = [arrival.name for arrival in arrivals if not arrival.waits]
    news = [arrival.name for arrival in arrivals if not arrival.waits and not arrival.told]
    parts = [f"{len(ready)} to take in ({', '.join(ready)})"] if ready else []
    parts += [f"{arrival.name} waits: {arrival.waits}" for arrival in arrivals if arrival.waits]
    said = f"{recipe}: {'; '.join(parts) or 'nothing in the inbox'}"
    if news:
        reason = f"new in the inbox: {', '.join(news)}"
        emit("headstart.data.changed", recipe, batches=news, reason=reason)
        inbox.tell(layout, news)
    get_run_logger().info(said)
    return said
