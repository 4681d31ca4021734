"""Splits: which group of rows trains, which chooses settings, which judges.

Goes in: rows with ``id``, ``label``, ``domain`` and ``group``. Comes out: ``train``, ``val`` or ``test`` for
each, or its fold of a cross-validation. Depends on the seed and on what the rows are, never on their
order. Rows that had a split keep it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from headstart import progress

SPLITS = ("train", "val", "test")
PROTECTED = {"train": 0, "val": 1, "test": 2}


def assign(
    frame: pd.DataFrame, shares: Mapping[str, float], seed: int, earlier: Mapping[str, str] | None = None
) -> pd.Series:
    """A split for every row: whole groups, balanced over label and domain.

    A group with an earlier row keeps that row's split; where earlier rows disagree, as when a
    near-duplicate ties two groups together, the most protected split wins, so that no row ever moves
    from test to train.

    Args:
        frame: columns ``id``, ``label``, ``domain``, ``group``; at least one row.
        shares: wanted share of the rows per split; splits that are not named get no new group.
        seed: decides between equals.
        earlier: split by id, of rows that have one already.

    Returns:
        A series of split names, on the frame's index.
    """
    group, names = pd.factorize(frame["group"], sort=True)
    kept = _earlier_by_group(frame, group, len(names), earlier or {})
    choice = _deal(frame, [shares.get(split, 0) for split in SPLITS], seed, kept)
    return pd.Series(np.array(SPLITS)[choice[group]], index=frame.index, name="split")


def folds(frame: pd.DataFrame, count: int, seed: int) -> np.ndarray:
    """The fold, 0 to ``count`` - 1, of every row: whole groups, dealt like splits; int64 [rows]."""
    group, names = pd.factorize(frame["group"], sort=True)
    return _deal(frame, [1 / count] * count, seed, np.full(len(names), -1))[group]


def _deal(frame: pd.DataFrame, shares: Sequence[float], seed: int, kept: np.ndarray) -> np.ndarray:
    """The part of each group, in sorted order: where it is ``kept`` (-1: nowhere yet), or is dealt to.

    Groups are dealt one by one, the largest first and equals in the order of a hash; each goes to the
    part that is furthest behind its share of what the group is made of (iterative stratification,
    Sechidis et al. 2011, with groups for rows). The share counts within the label and domain together,
    within each alone and over all: strata of two or three rows would all start with the first part
    otherwise.
    """
    group, names = pd.factorize(frame["group"], sort=True)
    column, count, bounds, width = _counts(frame, group, len(names))
    choice = kept.copy()
    open_parts = [part for part, share in enumerate(shares) if share]
    wanted = np.array([shares[part] for part in open_parts])
    fixed = np.repeat(choice, np.diff(bounds))
    have = np.zeros((width, len(open_parts)))
    for i, part in enumerate(open_parts):
        np.add.at(have[:, i], column[fixed == part], count[fixed == part])

    hashed = np.array([_order(f"{seed}\0{name}") for name in names])
    deal = np.lexsort((hashed, -np.bincount(group)))
    for g in progress.bar(deal[choice[deal] < 0], desc="dealing groups", unit="groups"):
        mine = slice(bounds[g], bounds[g + 1])
        held, new = have[column[mine]], count[mine]
        behind = new @ (wanted - held / (held.sum(axis=1) + new)[:, None])
        best = int(np.argmax(behind.round(9)))  # equals stay equal on every machine
        have[column[mine], best] += new
        choice[g] = open_parts[best]
    return choice


def _counts(
    frame: pd.DataFrame, group: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Rows of each group per stratum, sparse: strata, counts, where each group's begin, number of strata.

    A row counts in four strata: its label with its domain, its label, its domain, everything.
    """
    keys, width = [], 0
    for values in (frame["label"] + "\0" + frame["domain"], frame["label"], frame["domain"], None):
        code = np.zeros(len(frame), np.int64) if values is None else pd.factorize(values, sort=True)[0]
        keys.append(code + width)
        width += int(code.max()) + 1
    key, count = np.unique(np.concatenate([group * 10**9 + k for k in keys]), return_counts=True)
    owner, column = np.divmod(key, 10**9)
    return column, count, np.searchsorted(owner, np.arange(groups + 1)), width


def _order(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1  # fits int64


def _earlier_by_group(
    frame: pd.DataFrame, group: np.ndarray, groups: int, earlier: Mapping[str, str]
) -> np.ndarray:
    """The most protected earlier split of each group, as a rank; -1 where there is none."""
    ranks = np.array([PROTECTED.get(earlier.get(row, ""), -1) for row in frame["id"]])
    most = np.full(groups, -1)
    np.maximum.at(most, group, ranks)
    return most
