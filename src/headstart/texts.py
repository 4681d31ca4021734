"""Texts: tokens packed end to end, and batches in which hardly any place is padding.

Goes in: texts and a tokenizer.json. Comes out: token ids, and batches of texts of nearly one length. Never
changes a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK = 1 << 22  # characters tokenised at a time: each takes a hundred bytes of the tokenizer's own objects
LONG = 32  # characters for each token wanted, above which the beginning of a text is looked at first
SPARE = 16  # tokens that it must have beyond those wanted: where it was cut, they may be others


@dataclass(frozen=True)
class Tokens:
    """The tokens of all texts in one array; those of text i are ``ids[bounds[i]:bounds[i + 1]]``."""

    ids: NDArray[np.int32]  # [all tokens]
    bounds: NDArray[np.int64]  # [texts + 1]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [texts]: tokens of each."""
        return np.diff(self.bounds)

    def padded(self, rows: NDArray[np.int64], padding: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids of these texts and 1 where there is one, both int64 [rows, longest of them].

        Some tokenizers make nothing of an empty text: it gets one place, since attention to nothing is NaN.
        """
        lengths = self.bounds[rows + 1] - self.bounds[rows]
        mask = np.arange(max(1, lengths.max())) < lengths[:, None]
        ids = np.full(mask.shape, padding, np.int64)
        ids[mask] = np.concatenate([self.ids[self.bounds[row] : self.bounds[row + 1]] for row in rows])
        mask[:, 0] = True
        return ids, mask.astype(np.int64)


def tokenise(texts: Sequence[str], tokenizer: Path, max_tokens: int) -> Tokens:
    """Tokens of each text, with the marks that the network expects around them, cut at ``max_tokens``.

    Memory: half a gigabyte beside the ids, unless one text alone takes more; see ``beginning``.
    """
    from tokenizers import Tokenizer

    cutter = Tokenizer.from_file(str(tokenizer))
    cutter.no_padding()
    cutter.no_truncation()
    heads = [beginning(text, max_tokens, cutter) for text in texts]
    cutter.enable_truncation(max_tokens)
    ids, lengths, end = [], [np.zeros(1, np.int64)], 0
    while end < len(heads):
        start, room = end, CHUNK
        while end < len(heads) and room > 0:
            room -= len(heads[end])
            end += 1
        encoded = [found.ids for found in cutter.encode_batch_fast(heads[start:end])]
        lengths.append(np.array([len(found) for found in encoded], np.int64))
        ids.append(np.concatenate([np.array(found, np.int32) for found in encoded]))
    return Tokens(np.concatenate(ids or [np.empty(0, np.int32)]), np.cumsum(np.concatenate(lengths)))


def beginning(text: str, tokens: int, tokenizer: Tokenizer) -> str:
    """As much of a text as decides its first tokens, if that can be told without a look at all of it.

    Cut before a space, after a word, it has the same first tokens as the whole. Where spaces are too few, as
    in Chinese, it must have the same ones with twice as much of it. A tokenizer that takes a text for one
    word is given all of it.
    """
    size = LONG * tokens
    while tokenizer.pre_tokenizer is not None and size < len(text):
        words = text[: max(text.rfind(" ", 0, size), text.rfind("\n", 0, size), 0)].rstrip()
        if len(tokenizer.encode(words).ids) >= tokens + SPARE:
            return words
        found = tokenizer.encode(text[:size]).ids
        if len(found) >= tokens + SPARE and tokenizer.encode(text[: 2 * size]).ids[:tokens] == found[:tokens]:
            return text[:size]
        size *= 4
    return text


def batches(lengths: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Rows in batches of at most ``tokens`` places, the longest first: what does not fit fails at once.

    Equal lengths stay in order, so the same texts make the same batches.
    """
    order = np.argsort(-lengths, kind="stable")
    found, start = [], 0
    while start < len(order):
        size = max(1, tokens // max(1, int(lengths[order[start]])))
        found.append(order[start : start + size])
        start += size
    return found


def of_one_length(
    lengths: NDArray[np.int64], rows: NDArray[np.int64], tokens: int
) -> list[NDArray[np.int64]]:
    """These rows in batches of at most ``tokens`` places, each of texts of one length, the longest first.

    Nothing is filled up, so what a network says of a text does not depend on those beside it.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    ends = np.flatnonzero(np.diff(lengths[order])) + 1
    found = []
    for part in np.split(order, ends) if len(order) else ():
        size = max(1, tokens // max(1, int(lengths[part[0]])))
        found += [part[start : start + size] for start in range(0, len(part), size)]
    return found
