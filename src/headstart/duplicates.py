"""Duplicates and near-duplicates: rows that must not stand on both sides of a split.

Goes in: texts, or pictures as small grey thumbnails. Comes out: pairs of row numbers. Candidates come
from hashing, so the work grows with the rows, not with their square; each candidate is verified.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pandas as pd

from headstart import progress

Pairs = np.ndarray  # int64 [pairs, 2], first < second

THUMBNAIL = 32  # side in pixels
# Correlation of two contrast-normalised thumbnails above which two pictures are the same one, saved again.
# Of 3.4 million pairs of different ELPV cells none reaches it (highest: 0.9984); of JPEG copies at quality
# 50 and of copies of other sizes, 99 in 100 do.
SAME_PICTURE = 0.9985
JACCARD = 0.8
SHINGLE_WORDS = 3
# Rows that share a hash are compared with this many neighbours each: all of them, as a rule. In a larger
# bucket, neighbours in the alphabet stand for the rest; it bounds the work.
NEIGHBOURS = 16
BLOCK = 20_000


def exact(keys: list[str]) -> Pairs:
    """Each row paired with the first one that has the same key."""
    first = pd.Series(range(len(keys))).groupby(pd.Series(keys)).transform("first").to_numpy()
    later = np.flatnonzero(first != np.arange(len(keys)))
    return np.column_stack([first[later], later])


class _Plain(dict[int, str]):
    """Letters, marks and numbers stay; all else becomes a space. Scripts without spaces get some."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if not unicodedata.category(character).startswith(("L", "M", "N")):
            character = " "
        elif 0x3040 <= code <= 0x30FF or 0x3400 <= code <= 0x9FFF:  # kana, Chinese characters
            character = f" {character} "
        self[code] = character
        return character


class _Codes(dict[str, int]):
    """A 64-bit code per word that does not depend on which words came before."""

    def __missing__(self, word: str) -> int:
        self[word] = code = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        return code


_plain = _Plain()


def normalised(text: str) -> str:
    """A text without case, accents' encoding, punctuation and spacing; itself if nothing else is left."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_plain).split())
    return plain or text


def near_texts(texts: list[str]) -> Pairs:
    """Pairs of different texts whose sets of three-word shingles have a Jaccard index of at least 0.8.

    Shingles as in Broder 1997; two sets so alike share one of their few rarest shingles, which gives
    the candidates (prefix filtering, Bayardo et al. 2007). Texts of fewer than three words are only
    ever exact duplicates.

    Args:
        texts: as ``normalised`` leaves them; of equal ones, the first stands for all.
    """
    from scipy import sparse  # a fifth of a second, which a run with nothing to do can save

    codes, names = pd.factorize(pd.Series(texts, dtype=object), sort=True)
    row = np.unique(codes, return_index=True)[1]
    owner, shingle = _shingles(list(names))
    size = np.bincount(owner, minlength=len(names))
    ordered = np.sort(shingle)
    column = np.searchsorted(ordered, shingle)  # where it first stands: one number for each shingle
    frequency = np.searchsorted(ordered, shingle, side="right") - column
    shared = frequency > 1  # as a rule few: the others tie no two texts
    owner, column, frequency = owner[shared], column[shared], frequency[shared]
    there = np.bincount(owner, minlength=len(names))
    start = np.concatenate([[0], np.cumsum(there)])
    matrix = sparse.csr_matrix(
        (np.ones(len(column), np.int32), column, start), shape=(len(names), len(ordered))
    )
    rarest_first = np.lexsort((column, frequency, owner))
    rank = np.arange(len(owner)) + (size - there - start[:-1])[owner]  # the others are rarer
    prefix = rank <= size[owner] - np.ceil(JACCARD * size[owner] - 1e-9)
    entry = rarest_first[prefix]
    entry = entry[np.lexsort((owner[entry], column[entry]))]
    found = [np.empty((0, 2), np.int64)]
    steps = _neighbours(column[entry])
    for first, second in progress.bar(steps, total=NEIGHBOURS, desc="comparing texts", unit="steps"):
        a, b = owner[entry[first]], owner[entry[second]]
        similar = np.minimum(size[a], size[b]) >= JACCARD * np.maximum(size[a], size[b]) - 1e-9
        pairs = np.unique(a[similar].astype(np.int64) * len(names) + b[similar])
        for begin in range(0, len(pairs), BLOCK):
            a, b = np.divmod(pairs[begin : begin + BLOCK], len(names))
            common = np.asarray(matrix[a].multiply(matrix[b]).sum(axis=1)).ravel()
            alike = common >= JACCARD * (size[a] + size[b] - common) - 1e-9
            found.append(np.column_stack([row[a[alike]], row[b[alike]]]))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Text number, int32, and 64-bit hash of each different shingle of each text, in the order of both."""
    codes = _Codes()
    words = np.fromiter(map(codes.__getitem__, chain.from_iterable(map(str.split, texts))), np.uint64)
    owner = np.repeat(np.arange(len(texts), dtype=np.int32), [len(text.split()) for text in texts])
    count = max(len(words) - SHINGLE_WORDS + 1, 0)
    shingle = np.zeros(count, np.uint64)
    for i in range(SHINGLE_WORDS):
        shingle = shingle * np.uint64(0x9E3779B97F4A7C15) + words[i : i + count]  # wraps around at 64 bits
    inside = owner[:count] == owner[SHINGLE_WORDS - 1 :][:count]
    owner, shingle = owner[:count][inside], shingle[inside]
    order = np.lexsort((shingle, owner))
    owner, shingle = owner[order], shingle[order]
    new = np.ones(len(owner), bool)
    new[1:] = (owner[1:] != owner[:-1]) | (shingle[1:] != shingle[:-1])
    return owner[new], shingle[new]


def _neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions that hold the same key, 1 to ``NEIGHBOURS`` apart; equal keys stand together."""
    first = np.arange(len(keys))
    for step in range(1, NEIGHBOURS + 1):
        first = first[first + step < len(keys)]
        first = first[keys[first] == keys[first + step]]
        yield first, first + step


def near_pictures(thumbnails: np.ndarray) -> Pairs:
    """Pairs of pictures that are one picture, saved again at another size, quality or brightness.

    Candidates agree in at least one quarter of a 64-bit difference hash (Krawetz 2013), and are next
    to each other among those who do; they are kept if their contrast-normalised thumbnails correlate
    above 0.9985. Pictures that merely look alike, such as two intact solar cells, do not.

    Args:
        thumbnails: uint8 [n, 32, 32].
    """
    n = len(thumbnails)
    small = thumbnails.reshape(n, 8, 4, 8, 4).mean(axis=(2, 4), dtype=np.float32)
    bits = np.packbits((small > np.roll(small, 1, axis=2)).reshape(n, 64), axis=1)
    found = [np.empty((0, 2), np.int64)]
    for band in range(0, 8, 2):
        key = bits[:, band].astype(np.int64) << 8 | bits[:, band + 1]
        # Within a band, order by the whole hash: copies become neighbours, a few steps suffice.
        order = np.lexsort((*bits.T, key))
        for first, second in _neighbours(key[order]):
            for start in range(0, len(first), BLOCK):
                a, b = order[first[start : start + BLOCK]], order[second[start : start + BLOCK]]
                alike = (
                    np.einsum("ij,ij->i", _standard(thumbnails[a]), _standard(thumbnails[b])) > SAME_PICTURE
                )
                found.append(np.column_stack([a[alike], b[alike]]))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _standard(thumbnails: np.ndarray) -> np.ndarray:
    """Flat float32 rows of mean 0 and length 1; of one colour alone, zeros."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(length, 1e-6))


def merge(groups: pd.Series, pairs: Pairs) -> pd.Series:
    """Groups joined wherever a pair ties them, each named after its alphabetically first member."""
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    code, names = pd.factorize(groups, sort=True)
    edges = sparse.coo_matrix(
        (np.ones(len(pairs)), (code[pairs[:, 0]], code[pairs[:, 1]])), shape=(len(names), len(names))
    )
    component = connected_components(edges, directed=False)[1]
    first = pd.Series(range(len(names))).groupby(component).transform("first").to_numpy()
    return pd.Series(np.asarray(names)[first[code]], index=groups.index, name="group")
