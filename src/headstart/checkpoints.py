"""Checkpoints: the last two states of one training run, each of them whole or not there.

Goes in: named tensors and plain notes. Comes out: the newest state that can be read back, bit for bit. Never
ends a training: where nothing can be written, the states before are what is left, and the log says so.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.layout import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2  # of one run
NAME = re.compile(r"step-(\d+)\.json")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A state that was read back.

    Args:
        step: the step after which it was saved.
        tensors: by name, on the CPU, with the dtypes and shapes they were saved with, and contiguous: another
            layout in memory, such as channels last, is not kept.
        notes: what JSON makes of the notes that were saved.
    """

    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, Any]


class Checkpoints:
    """The last two states of one training run, in one folder.

    Each is ``step-N.safetensors`` and ``step-N.json``, which holds the step, the notes and the sha256 of the
    tensors. The JSON gets its name last: where there is none, there is no checkpoint.

    Args:
        folder: theirs alone; made when the first is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> bool:
        """Write one, then remove the oldest of those that are now too many.

        A kill at any moment leaves the ones of earlier steps as they were. So does a disk that is full or
        read-only, or fails in any other way: one warning says so, and training can go on.

        Args:
            step: at least 0; one saved at this step before is replaced.
            tensors: of any dtype that safetensors knows, on any device; they may be views of each other.
            notes: what JSON can hold; floats may be ``nan`` and ``inf``.

        Returns:
            Whether it was written.

        Raises:
            TypeError: JSON cannot hold the notes.
            KeyError: safetensors does not know a dtype.
            SafetensorError: it refuses the tensors, for no fault of the disk.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        stem = f"step-{step:07}"
        # A folder of its own: safetensors writes under yet another temporary name, which only it knows.
        partial = self._partial
        tensors_file, json_file = partial / f"{stem}.safetensors", partial / f"{stem}.json"
        told = {"step": step, "sha256": "", "notes": notes}
        try:
            self._tidy()
            partial.mkdir(parents=True)
            save_file(_apart(tensors), tensors_file)
            _flush(tensors_file)
            told["sha256"] = sha256_of(tensors_file)
            json_file.write_text(json.dumps(told), encoding="utf-8")
            _flush(json_file)
            tensors_file.replace(self.folder / tensors_file.name)
            json_file.replace(self.folder / json_file.name)
        except (OSError, SafetensorError) as error:
            # safetensors tells of a full disk in an error of its own; its others are the caller's mistakes.
            if isinstance(error, SafetensorError) and "os error" not in str(error):
                raise
            before = max(self._saved(), default=None)
            left = "there is none before" if before is None else f"the one of step {before} is kept"
            log.warning(
                "could not save the checkpoint of step %d in %s: %s; %s", step, self.folder, error, left
            )
            return False
        finally:
            self._tidy()
        with suppress(OSError):  # some file systems cannot flush a folder
            _flush(self.folder)
        earlier = sorted((number, file) for number, file in self._saved().items() if number < step)
        for _, file in earlier[: max(0, len(earlier) + 1 - KEPT)]:
            _forget(file)
        return True

    def latest(self) -> Checkpoint | None:
        """The newest that is whole, or None.

        Those that are newer and damaged are removed. A warning for each names the file, what is wrong with
        it, and where training continues. One that only could not be read just now stays where it is.
        """
        self._tidy()
        found = None
        skipped: list[tuple[Path, Exception]] = []
        for _, file in sorted(self._saved().items(), reverse=True):
            try:
                found = _read(file)
                break
            except (OSError, ValueError) as error:
                skipped.append((file, error))
        onward = "starting anew" if found is None else f"continuing from step {found.step}"
        for file, reason in skipped:
            log.warning("skipped the checkpoint %s: %s; %s", file.stem, reason, onward)
            if isinstance(reason, (FileNotFoundError, ValueError)):
                _forget(file)
        return found

    @property
    def _partial(self) -> Path:
        return self.folder / ".partial"

    def _saved(self) -> dict[int, Path]:
        """The JSON files there are, by step."""
        names = ((NAME.fullmatch(file.name), file) for file in self.folder.glob("step-*.json"))
        return {int(match[1]): file for match, file in names if match}

    def _tidy(self) -> None:
        """Remove what a kill or a failure left: temporary files, and tensors whose JSON never came."""
        shutil.rmtree(self._partial, ignore_errors=True)
        for file in self.folder.glob("step-*.safetensors"):
            if not file.with_suffix(".json").exists():
                _forget(file)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as safetensors takes them: on the CPU, contiguous, no two in one storage.

    Only what has to be is copied.
    """
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous().cpu()
        storage = value.untyped_storage().data_ptr()
        result[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return result


def _read(file: Path) -> Checkpoint:
    """The checkpoint of one JSON file.

    Raises:
        OSError: one of its two files is missing or cannot be read.
        ValueError: it is damaged; the words name the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors_file = file.with_suffix(".safetensors")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        step, digest, notes = int(told["step"]), told["sha256"], dict(told["notes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the JSON of a checkpoint ({error!r})") from error
    if sha256_of(tensors_file) != digest:
        raise ValueError(f"{tensors_file} does not have the sha256 it was saved with")
    try:
        return Checkpoint(step, load_file(tensors_file), notes)
    except SafetensorError as error:
        raise ValueError(f"{tensors_file} does not load ({error})") from error


def _forget(file: Path) -> None:
    """Remove a checkpoint, given either of its files; where nothing can be removed, nothing is."""
    with suppress(OSError):
        file.with_suffix(".json").unlink(missing_ok=True)  # first: without it there is no checkpoint
        file.with_suffix(".safetensors").unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
