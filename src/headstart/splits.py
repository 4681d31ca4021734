"""Splits: which group of rows trains, which chooses settings, which judges.

Goes in: rows with ``id``, ``label``, ``domain`` and ``group``. Comes out: ``train``, ``val`` or ``test`` for
each. Depends on the seed and on what the rows are, never on their order. Rows that had a split
keep it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

SPLITS = ("train", "val", "test")
PROTECTED = {"train": 0, "val": 1, "test": 2}


def assign(
    frame: pd.DataFrame, shares: Mapping[str, float], seed: int, earlier: Mapping[str, str] | None = None
) -> pd.Series:
    """A split for every row: whole groups, balanced over label and domain.

    Groups are dealt one by one, the largest first and equals in the order of a hash; each goes to the
    split that is furthest behind its share of the group's own mix of label and domain (iterative
    stratification, Sechidis et al. 2011, with groups for rows). A group with an earlier row keeps that
    row's split; where earlier rows disagree, as when a near-duplicate ties two groups together, the
    most protected split wins, so that no row ever moves from test to train.

    Args:
        frame: columns ``id``, ``label``, ``domain``, ``group``.
        shares: wanted share of the rows per split; splits that are not named get no new group.
        seed: decides between equals.
        earlier: split by id, of rows that have one already.

    Returns:
        A series of split names, on the frame's index.
    """
    stratum = pd.factorize(frame["label"] + "\0" + frame["domain"], sort=True)[0]
    group, names = pd.factorize(frame["group"], sort=True)
    strata = int(stratum.max()) + 1
    order = np.lexsort((stratum, group))
    counts, columns = _counts(group[order], stratum[order], len(names), strata)

    fixed = _earlier_by_group(frame, group, len(names), earlier or {})
    open_splits = [split for split in SPLITS if shares.get(split)]
    wanted = np.array([shares[split] for split in open_splits])
    have = np.zeros((strata, len(open_splits)))
    for i, split in enumerate(open_splits):
        for g in np.flatnonzero(fixed == PROTECTED[split]):
            have[columns[g], i] += counts[g]

    size = np.array([c.sum() for c in counts])
    hashed = [hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest() for name in names]
    choice = fixed.copy()
    for g in sorted(np.flatnonzero(fixed < 0), key=lambda g: (-size[g], hashed[g])):
        column, count = columns[g], counts[g]
        # How far each split would be behind its share if this group went elsewhere.
        total = have[column].sum(axis=1, keepdims=True) + count[:, None]
        behind = ((total * wanted - have[column]) / wanted * count[:, None]).sum(axis=0)
        best = int(np.argmax(behind))
        have[column, best] += count
        choice[g] = PROTECTED[open_splits[best]]
    return pd.Series(np.array(SPLITS)[choice[group]], index=frame.index, name="split")


def _counts(
    group: np.ndarray, stratum: np.ndarray, groups: int, strata: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows per stratum of each group, as short lists: a group touches few strata. Input is sorted by group."""
    key, count = np.unique(group * strata + stratum, return_counts=True)
    bounds = np.searchsorted(key // strata, np.arange(1, groups))
    return np.split(count, bounds), np.split(key % strata, bounds)


def _earlier_by_group(
    frame: pd.DataFrame, group: np.ndarray, groups: int, earlier: Mapping[str, str]
) -> np.ndarray:
    """The most protected earlier split of each group, as a rank; -1 where there is none."""
    ranks = frame["id"].map(earlier).map(PROTECTED).fillna(-1).to_numpy(int)
    most = np.full(groups, -1)
    np.maximum.at(most, group, ranks)
    return most
