"""Progress bars: on a terminal, for work longer than two seconds, silent otherwise."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.environment import quiet

if TYPE_CHECKING:
    from tqdm import tqdm

# A stage's own output is piped into a log; its parent names the terminal here, for the bars alone.
TERMINAL = "HEADSTART_TERMINAL"


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: float | None = None,
    desc: str = "",
    unit: str = "it",
    unit_scale: bool = False,
    initial: float = 0,
) -> tqdm[Any]:
    """A tqdm bar on the terminal, quiet under ``--quiet`` (``HEADSTART_QUIET=1``) and off a terminal.

    Args:
        iterable: what to walk over, or None to call ``update(n)`` by hand.
        total: how many units there are, if known.
        desc: what is being done, as a gerund ("extracting features").
        unit: name of one unit, such as "B".
        unit_scale: count in thousands and millions, as for bytes.
        initial: units already done, for resumed work.
    """
    from tqdm import tqdm

    terminal = None
    if sys.stderr.isatty():
        terminal = sys.stderr
    elif name := os.environ.get(TERMINAL):
        with contextlib.suppress(OSError):
            terminal = Path(name).open("w", encoding="utf-8")  # noqa: SIM115  # as long as the bar lives
    return tqdm(
        iterable,
        file=terminal,
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit_scale,
        initial=initial,
        disable=terminal is None or quiet(),
        delay=2,
        leave=False,
    )
