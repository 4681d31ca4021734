"""Progress bars: on a terminal, for work longer than two seconds, silent otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: float | None = None,
    desc: str = "",
    unit: str = "it",
    unit_scale: bool = False,
    initial: float = 0,
) -> tqdm[Any]:
    """A tqdm bar on stderr, quiet under ``--quiet`` (``HEADSTART_QUIET=1``) and off a terminal.

    Args:
        iterable: what to walk over, or None to call ``update(n)`` by hand.
        total: how many units there are, if known.
        desc: what is being done, as a gerund ("extracting features").
        unit: name of one unit; "B" with ``unit_scale`` for bytes.
        initial: units already done, for resumed work.
    """
    from tqdm import tqdm

    quiet = os.environ.get("HEADSTART_QUIET") == "1" or not sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit_scale,
        initial=initial,
        disable=quiet,
        delay=2,
        leave=False,
    )
