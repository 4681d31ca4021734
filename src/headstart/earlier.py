"""Earlier: what the last pass of a backbone found, so that the next one looks at new rows alone.

Goes in: the arrays of a whole pass, and the digest of what each row holds. Comes out: which rows of the next
pass stand in them, and where. Never decides whether they still hold: that is for ``made``, which names all
that a row's part of the arrays depends on beside the row.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.errors import HeadstartError
from headstart.layout import written_whole
from headstart.packs import Rows

Digests = NDArray[np.bytes_]  # [rows]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Earlier:
    """Rows of the pass at hand that the last one has seen."""

    here: Rows  # positions among the rows of the pass at hand
    there: Rows  # positions of the same rows in ``arrays``
    arrays: dict[str, NDArray[Any]]  # by name, [rows of the last pass, ...], memory maps

    def copy(self, targets: dict[str, Any], most: int) -> None:
        """Copy these rows into arrays of the same names, at most so many at a time."""
        for start in range(0, len(self.here), most):
            part = slice(start, start + most)
            for name, array in self.arrays.items():
                targets[name][self.here[part]] = array[self.there[part]]


def read(folder: Path, made: str, digests: Digests, names: Sequence[str]) -> Earlier:
    """What ``keep`` has kept of these rows; none if it was made in another way, or is damaged."""
    none = Earlier(np.empty(0, np.int64), np.empty(0, np.int64), {})
    try:
        if (folder / "made").read_text(encoding="ascii") != made:
            return none
        known = np.load(folder / "digests.npy", allow_pickle=False)
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except (OSError, ValueError, EOFError):  # the last of an empty file
        return none
    if not len(known) or any(len(array) != len(known) for array in arrays.values()):
        return none
    sought, first = np.unique(known, return_index=True)
    places = np.searchsorted(sought, digests).clip(max=len(sought) - 1)
    here = np.flatnonzero(sought[places] == digests)
    return Earlier(here, first[places[here]], arrays)


def keep(folder: Path, made: str, digests: Digests, arrays: Sequence[Path]) -> None:
    """Keep the arrays of a pass, as hard links: they take no room of their own until others replace them.

    DVC replaces them with a copy from its cache, unless its ``cache.type`` is a link. Where a disk knows no
    hard links nothing is kept, and the next pass looks at every row.
    """
    try:
        with written_whole(folder) as partial:
            for path in arrays:
                os.link(path, partial / path.name)
            np.save(partial / "digests.npy", digests)
            (partial / "made").write_text(made, encoding="ascii")
    except (OSError, HeadstartError) as error:
        log.info("the features are not kept for the next pass: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
