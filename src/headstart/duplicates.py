"""Duplicates and near-duplicates: rows that must not stand on both sides of a split.

Goes in: texts, or pictures as small grey thumbnails. Comes out: pairs of row numbers. Candidates come
from hashing, so the work grows with the rows, not with their square; each candidate is verified.
"""

from __future__ import annotations

import re
import unicodedata
import zlib

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

Pairs = np.ndarray  # int64 [pairs, 2], first < second

THUMBNAIL = 32  # side in pixels
# Correlation of two contrast-normalised thumbnails above which two pictures are the same one, saved again.
SAME_PICTURE = 0.995
JACCARD = 0.8
SHINGLE_WORDS = 3
# A shingle in more texts than this is a phrase, not a sign of copying; it also bounds the work.
COMMON_SHINGLE = 200
BLOCK = 20_000


def exact(keys: list[str]) -> Pairs:
    """Each row paired with the first one that has the same key."""
    first = pd.Series(range(len(keys))).groupby(pd.Series(keys)).transform("first").to_numpy()
    later = np.flatnonzero(first != np.arange(len(keys)))
    return np.column_stack([first[later], later])


def normalised(text: str) -> str:
    """A text without case, accents' encoding, punctuation and spacing; itself if nothing else is left."""
    plain = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
    return plain or text


def near_texts(texts: list[str]) -> Pairs:
    """Pairs of texts whose sets of three-word shingles overlap by a Jaccard index of at least 0.8.

    Shingles as in Broder 1997. Texts of fewer than three words are only ever exact duplicates.
    """
    sets = []
    for text in texts:
        words = normalised(text).split()
        grams = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}
        sets.append(sorted({zlib.crc32(gram.encode()) for gram in grams}))
    sizes = np.array([len(shingles) for shingles in sets])
    flat = np.concatenate([np.array(shingles, dtype=np.int64) for shingles in sets] or [np.empty(0, np.int64)])
    column = np.unique(flat, return_inverse=True)[1]
    matrix = sparse.csr_matrix(
        (np.ones(len(flat), np.int32), column, np.concatenate([[0], np.cumsum(sizes)])),
        shape=(len(texts), int(column.max(initial=-1)) + 1),
    )
    frequency = np.asarray(matrix.sum(axis=0)).ravel()
    rare = matrix[:, frequency <= COMMON_SHINGLE]
    found = []
    for start in range(0, len(texts), BLOCK):
        overlap = (rare[start : start + BLOCK] @ rare.T).tocoo()
        first, second = overlap.row + start, overlap.col
        ahead = first < second
        first, second, common = first[ahead], second[ahead], overlap.data[ahead]
        alike = common >= JACCARD * (sizes[first] + sizes[second] - common)
        found.append(np.column_stack([first[alike], second[alike]]))
    return np.concatenate(found) if found else np.empty((0, 2), int)


def near_pictures(thumbnails: np.ndarray) -> Pairs:
    """Pairs of pictures that are one picture, saved again at another size, quality or brightness.

    Candidates agree in at least one quarter of a 64-bit difference hash (Krawetz 2013), and are next
    to each other among those who do; they are kept if their contrast-normalised thumbnails correlate
    above 0.995. Pictures that merely look alike, such as two intact solar cells, do not.

    Args:
        thumbnails: uint8 [n, 32, 32].
    """
    n = len(thumbnails)
    grey = thumbnails.astype(np.float32)
    small = grey[:, :, :].reshape(n, 8, 4, 8, 4).mean(axis=(2, 4))
    bits = np.packbits((small[:, :, :] > np.roll(small, 1, axis=2)).reshape(n, 64), axis=1)
    flat = grey.reshape(n, -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    found = []
    for band in range(0, 8, 2):
        key = bits[:, band].astype(np.int64) << 8 | bits[:, band + 1]
        # Within a band, order by the whole hash: copies become neighbours, a few steps suffice.
        order = np.lexsort((*bits.T, key))
        for step in range(1, 9):
            first, second = order[:-step], order[step:]
            same = key[first] == key[second]
            first, second = first[same], second[same]
            for start in range(0, len(first), BLOCK):
                a, b = first[start : start + BLOCK], second[start : start + BLOCK]
                alike = np.einsum("ij,ij->i", flat[a], flat[b]) > SAME_PICTURE
                found.append(np.sort(np.column_stack([a[alike], b[alike]]), axis=1))
    pairs = np.concatenate(found) if found else np.empty((0, 2), int)
    return np.unique(pairs, axis=0)


def merge(groups: pd.Series, pairs: Pairs) -> pd.Series:
    """Groups joined wherever a pair ties them, each named after its alphabetically first member."""
    code, names = pd.factorize(groups, sort=True)
    edges = sparse.coo_matrix(
        (np.ones(len(pairs)), (code[pairs[:, 0]], code[pairs[:, 1]])), shape=(len(names), len(names))
    )
    component = connected_components(edges, directed=False)[1]
    first = pd.Series(range(len(names))).groupby(component).transform("first").to_numpy()
    return pd.Series(np.asarray(names)[first[code]], index=groups.index, name="group")
