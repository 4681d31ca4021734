"""The stages by name: what ``headstart stage NAME RECIPE`` runs.

The order in which they run is not here: ``dvc.yaml`` alone knows it.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from headstart import environment
from headstart.errors import HeadstartError

if TYPE_CHECKING:
    from headstart.layout import Layout
    from headstart.recipe import Recipe

STAGES = {
    "validate": "headstart.validation:validate",
    "fetch": "headstart.fetching:fetch",
    "features": "headstart.features:features",
    "train": "headstart.training:train",
    "evaluate": "headstart.evaluation:evaluate",
}

# Who runs a stage in a process of its own names a file here, and finds the stage's error in it.
ERROR_FILE = "HEADSTART_ERROR_FILE"
SECONDS = "seconds.json"  # in the working files of a recipe


def run(stage: str, recipe: Recipe, layout: Layout) -> None:
    """Run one stage in this process.

    Raises:
        HeadstartError: no such stage, or whatever the stage itself raises; written as JSON to
            the file that ``HEADSTART_ERROR_FILE`` names as well, if it is set.
    """
    try:
        if stage not in STAGES:
            raise HeadstartError(f"there is no stage {stage!r}", do=f"stages: {', '.join(STAGES)}")
        module, function = STAGES[stage].split(":")
        start = time.monotonic()
        turn: Callable[[Recipe, Layout], None] = getattr(importlib.import_module(module), function)
        turn(recipe, layout)
        _note(layout, stage, time.monotonic() - start)
    except HeadstartError as error:
        # Of several processes the first to fail is the cause; the others fail because it is gone.
        if path := os.environ.get(ERROR_FILE):
            with suppress(FileExistsError), Path(path).open("x", encoding="utf-8") as file:
                json.dump(error.to_dict(), file)
        raise


def _note(layout: Layout, stage: str, seconds: float) -> None:
    """Write down in ``.headstart/R/seconds.json`` how long a stage took, for the report."""
    if environment.launched():  # one of several that train together: who started them waits for all
        return
    path = layout.work / SECONDS
    partial = path.with_name(f".{SECONDS}.{os.getpid()}.partial")
    known = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    with suppress(OSError):  # a note is no reason for a stage to fail
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known | {stage: round(seconds, 1)}) + "\n", encoding="utf-8")
        partial.replace(path)
