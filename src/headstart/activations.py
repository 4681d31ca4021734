"""Activations: what the frozen layers of a classifier make of each row, computed once.

Goes in: a classifier whose first layers are frozen, and packed rows. Comes out: an array on the disk, which
the rest of the network is given at each step instead of running those layers again. Never keeps what training
could change, or what chance changes from epoch to epoch.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.packs import Sentences, let_go
from headstart.progress import bar
from headstart.recipe import Augment, Train

if TYPE_CHECKING:
    from headstart.classifiers import Classifier
    from headstart.packs import Pack, Rows

SWEEP = 64  # rows at a time where nothing is learned
SHARE_OF_DISK = 0.5  # of what is free, at most
log = logging.getLogger(__name__)


def constant(choices: Train) -> bool:
    """Whether every epoch shows the frozen layers the same: nothing random stands before them."""
    return choices.freeze is not None and choices.augment == Augment() and not choices.mixup


class Activations:
    """The outputs of the last frozen layer for some rows of a pack, in the dtype in which they are computed.

    Args:
        classifier: on its device; ``splits`` says whether its frozen layers can be run alone.
        pack: inputs of all rows.
        rows: those wanted.
        dtype: that steps compute in.
        folder: on whose disk the array lies, which is as large as all activations together. It has no name:
            no other process can take it for its own, and it is gone with this object, however that ends.

    Raises:
        OSError: the disk is full.
    """

    def __init__(
        self, classifier: Classifier, pack: Pack, rows: Rows, dtype: torch.dtype, folder: Path
    ) -> None:
        self.pack, self.device = pack, next(classifier.parameters()).device
        self.lengths = pack.tokens.lengths if isinstance(pack, Sentences) else None
        # Where each row begins, counting rows of pictures and tokens of texts.
        sizes = np.zeros(len(self.lengths) if self.lengths is not None else int(rows.max()) + 1, np.int64)
        sizes[rows] = 1 if self.lengths is None else np.maximum(1, self.lengths[rows])
        self.held = sizes > 0
        self.starts = np.cumsum(sizes) - sizes
        total = int(sizes.sum())
        folder.mkdir(parents=True, exist_ok=True)
        array: NDArray[Any] | None = None
        with bar(total=len(rows), desc="running the frozen layers", unit=" rows") as progress:
            for batch in pack.sweep(rows, SWEEP):
                inputs = tuple(torch.from_numpy(part).to(self.device) for part in pack.batch(batch))
                with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                    found = classifier.frozen_output(*inputs)
                lines = _lines(found, None if self.lengths is None else inputs[1])
                if array is None:
                    self.kept = found.dtype
                    shape = (total, *lines.shape[1:])
                    needed = lines.itemsize * int(np.prod(shape))
                    if needed > SHARE_OF_DISK * shutil.disk_usage(folder).free:
                        raise OSError(f"{needed / 1e9:.3g} GB of activations would fill half of the disk")
                    with tempfile.TemporaryFile(dir=folder) as file:
                        array = np.memmap(file, lines.dtype, "w+", shape=shape)
                array[self._places(batch)] = lines
                let_go(array)
                progress.update(len(batch))
        assert array is not None
        self.array = array

    def holds(self, rows: Rows) -> bool:
        """Whether all of these are among the rows wanted."""
        return bool(rows.max() < len(self.held) and self.held[rows].all())

    def batch(self, rows: Rows) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the classifier is given: inputs, of which pictures are left blank, and the known output."""
        lines = torch.from_numpy(self.array[self._places(rows)]).view(self.kept).to(self.device)
        let_go(self.array)
        if self.lengths is None:
            blank = torch.zeros(len(rows), 1, 1, 3, dtype=torch.uint8, device=self.device)
            return (blank,), lines.permute(0, 3, 1, 2) if lines.ndim == 4 else lines
        inputs = tuple(torch.from_numpy(part).to(self.device) for part in self.pack.batch(rows))
        known = lines.new_zeros(*inputs[0].shape, lines.shape[-1])
        known[inputs[1].bool()] = lines
        return inputs, known

    def _places(self, rows: Rows) -> NDArray[np.int64]:
        if self.lengths is None:
            return self.starts[rows]
        lengths = np.maximum(1, self.lengths[rows])
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places: NDArray[np.int64] = np.repeat(self.starts[rows], lengths) + offsets
        return places


def _lines(found: Tensor, mask: Tensor | None) -> NDArray[Any]:
    """Pictures with channels last, as they lie in memory; of texts the tokens that are no padding."""
    if mask is not None:
        found = found[mask.bool()]
    elif found.ndim == 4:
        found = found.permute(0, 2, 3, 1)
    found = found.contiguous().cpu()
    # numpy has no bfloat16.
    lines: NDArray[Any] = (found.view(torch.int16) if found.dtype == torch.bfloat16 else found).numpy()
    return lines
