"""Packs: what the backbone is given for each row, decoded once and kept.

Goes in: ``features/R/`` of a recipe that packs its rows. Comes out: batches of pixels or of tokens, in orders
fit for training or for measuring. Never decodes a picture, never tokenises a text.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headstart import texts
from headstart.errors import HeadstartError
from headstart.layout import Layout

Rows = NDArray[np.int64]  # positions in a manifest
POOL = 50  # batches whose rows are sorted by length together: more would make the order less random


class Pack(Protocol):
    """The inputs of every row of a manifest."""

    def batch(self, rows: Rows) -> tuple[NDArray[Any], ...]:
        """Arrays [rows, ...], as a network takes them."""
        ...

    def order(self, rows: Rows, batch: int, chance: np.random.Generator, least: int = 1) -> list[Rows]:
        """All rows in random batches of ``batch``, of which one may be another size; see ``cut``."""
        ...

    def sweep(self, rows: Rows, batch: int) -> list[Rows]:
        """All rows in batches of at most ``batch``, in the order that is fastest to compute."""
        ...


@dataclass(frozen=True)
class Pixels:
    """Pictures."""

    array: NDArray[np.uint8]  # [n, side, side, 1 or 3], a memory map

    def batch(self, rows: Rows) -> tuple[NDArray[np.uint8]]:
        """uint8 [rows, side, side, 1 or 3]."""
        ascending = np.argsort(rows)  # a disk is read in one direction
        found = np.empty((len(rows), *self.array.shape[1:]), np.uint8)
        found[ascending] = self.array[rows[ascending]]
        let_go(self.array)
        return (found,)

    def order(self, rows: Rows, batch: int, chance: np.random.Generator, least: int = 1) -> list[Rows]:
        """All rows in random batches."""
        return cut(chance.permutation(rows), batch, least)

    def sweep(self, rows: Rows, batch: int) -> list[Rows]:
        """All rows, in ascending order."""
        return cut(np.sort(rows), batch)


@dataclass(frozen=True)
class Sentences:
    """Texts."""

    tokens: texts.Tokens
    padding: int

    def batch(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask, int64 [rows, longest of them]."""
        return self.tokens.padded(rows, self.padding)

    def order(self, rows: Rows, batch: int, chance: np.random.Generator, least: int = 1) -> list[Rows]:
        """All rows in random batches, each of texts of nearly one length: hardly any place is padding."""
        batches: list[Rows] = []
        lengths = self.tokens.lengths
        for pool in cut(chance.permutation(rows), POOL * batch, least):
            batches += cut(pool[np.argsort(lengths[pool], kind="stable")], batch, least)
        return [batches[place] for place in chance.permutation(len(batches))]

    def sweep(self, rows: Rows, batch: int) -> list[Rows]:
        """All rows, the longest first."""
        return cut(rows[np.argsort(-self.tokens.lengths[rows], kind="stable")], batch)


def load(layout: Layout, modality: str, padding: int) -> Pack:
    """The packed rows of a recipe.

    Args:
        layout: where they lie.
        modality: ``image`` or ``text``.
        padding: id of the token that fills short texts up.

    Raises:
        HeadstartError: they were not packed.
    """
    try:
        if modality == "image":
            return Pixels(np.load(layout.features / "pixels.npy", mmap_mode="r", allow_pickle=False))
        arrays = (
            np.load(layout.features / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "bounds")
        )
        return Sentences(texts.Tokens(*arrays), padding)
    except FileNotFoundError as error:
        raise HeadstartError(
            "the rows are not packed",
            where=str(error.filename),
            do=f"write `packed: true` under `features:`, then run `dvc repro features@{layout.recipe}`",
        ) from None


def let_go(array: NDArray[Any]) -> None:
    """Give back the pages of a memory map: they count as this process's memory once they are read.

    The system still has them at hand.
    """
    if isinstance(array, np.memmap):
        mapping: mmap.mmap = array._mmap  # type: ignore[attr-defined]
        mapping.madvise(mmap.MADV_DONTNEED)


def cut(rows: Rows, batch: int, least: int = 1) -> list[Rows]:
    """Rows in batches of ``batch``, in their order; the last may be smaller.

    Where fewer than ``least`` rows are left over, they join the batch before, if there is one.
    """
    found = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    if len(found) > 1 and len(found[-1]) < least:
        found[-2:] = [rows[(len(found) - 2) * batch :]]
    return found
