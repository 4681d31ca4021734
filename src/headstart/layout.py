"""Where the files of a recipe live: the one place that knows folder names.

Goes in: a project root and a recipe's name. Comes out: paths, and folders that appear
whole or not at all. Never reads what is inside them, but for MLflow's own list of a model's parts.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headstart.errors import HeadstartError

EARLIER_SPLITS = ".splits.parquet"  # in the raw folder: ids and splits of all snapshots before this one
HIDDEN = ""  # in a manifest, the label of a row whose label is unknown or put aside
REGISTERED = "registered"  # beside a backbone that was a registered model's: its head, and what goes with it
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


@dataclass(frozen=True)
class Layout:
    """Paths of one recipe in one project.

    Args:
        root: the project root, the folder that holds ``dvc.yaml``.
        recipe: the recipe's name, the stem of its file.
    """

    root: Path
    recipe: str

    @property
    def raw(self) -> Path:
        """Raw files as ingested; inside ``data/``, which ``data.dvc`` versions."""
        return self.root / "data" / self.recipe

    @property
    def batches(self) -> Path:
        """Batches taken in since the source was, a folder each; hidden, so that adapters pass over it."""
        return self.raw / ".batches"

    @property
    def inbox(self) -> Path:
        """Where new batches arrive, unless the recipe names another place; git-ignored."""
        return self.root / "inbox" / self.recipe

    @property
    def quarantine(self) -> Path:
        """Batches that are being looked at, or were rejected; git-ignored."""
        return self.root / "quarantine" / self.recipe

    @property
    def manifest(self) -> Path:
        """Output of ``validate``."""
        return self.root / "manifest" / self.recipe

    @property
    def truth(self) -> Path:
        """Output of ``validate`` that ``evaluate`` alone may read: labels put aside."""
        return self.root / "truth" / self.recipe

    @property
    def weights(self) -> Path:
        """Output of ``fetch``."""
        return self.root / "weights" / self.recipe

    @property
    def features(self) -> Path:
        """Output of ``features``."""
        return self.root / "features" / self.recipe

    @property
    def model(self) -> Path:
        """Output of ``train``."""
        return self.root / "model" / self.recipe

    @property
    def evidence(self) -> Path:
        """Output of ``evaluate``."""
        return self.root / "evidence" / self.recipe

    @property
    def report(self) -> Path:
        """The report and the model card of what is in the tree now; git-ignored, no stage's output."""
        return self.root / "reports" / self.recipe

    @property
    def work(self) -> Path:
        """Undeclared, git-ignored working files: shards to resume from, tables of failures."""
        return self.root / ".headstart" / self.recipe


@contextmanager
def unwritable_named(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk, met while ``folder`` is being made, into words.

    Raises:
        HeadstartError: the disk is full or not writable, or something else may not be read.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        met = Path(os.fsdecode(error.filename)).absolute() if error.filename else folder
        if error.errno == errno.EACCES and not met.is_relative_to(folder.parent.absolute()):
            raise HeadstartError(
                f"no permission for {met.name}", str(met), "mend it, then run the same command again"
            ) from error
        raise HeadstartError(
            f"could not write {folder.name}: {error.strerror}",
            where=str(error.filename or folder),
            do="free disk space or mend the permissions, then run the same command again",
        ) from error


def parent_made(output: Path) -> None:
    """Make the folder that ``output`` is to lie in, unless it is there.

    Raises:
        HeadstartError: what is there is a file.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise HeadstartError(
            "the output lies below a file", where=str(output), do="name a place in a folder"
        ) from None


def room_for_file(output: Path) -> None:
    """Make the folder that the file ``output`` is to lie in, unless it is there.

    Raises:
        HeadstartError: there is a file in place of the folder, or a folder in place of the file.
    """
    parent_made(output)
    if output.is_dir():
        raise HeadstartError("the output is a folder", where=str(output), do="name a file in a folder")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``folder`` that takes its place on success.

    A failure or a kill inside the block leaves ``folder`` as it was; a kill after it leaves the old one, none
    or the new one, and never a part of one.

    Raises:
        HeadstartError: the disk is full or not writable, or ``folder`` lies below a file.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old.partial")
    try:
        with unwritable_named(folder):
            _clear(folder, partial, old)
            parent_made(folder)
            partial.mkdir()
            yield partial
            if folder.exists():
                folder.rename(old)  # deleting it takes time, in which a kill would leave half of it
            partial.rename(folder)
    finally:
        _clear(folder, partial, old)


def _clear(folder: Path, partial: Path, old: Path) -> None:
    """Put the old folder back if nothing took its place, and delete what is left over."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (partial, old):
        if left.is_symlink() or left.is_file():
            left.unlink()
        else:
            shutil.rmtree(left, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def leads_out(path: str) -> bool:
    """Whether a path is none inside of a folder, going by its name: DVC may keep the files as links."""
    return path.startswith("/") or ".." in path.split("/") or "\0" in path


def registered_parts(folder: Path) -> dict[str, Path]:
    """The parts of a model, as ``models.parts_of`` names them, in MLflow's folder of a version.

    Raises:
        HeadstartError: a part is said to lie elsewhere.
    """
    import yaml

    described = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
    paths = described["flavors"]["python_function"]["artifacts"]
    for part, where in paths.items():
        if leads_out(where["path"]):
            raise HeadstartError(
                f"the model's {part} does not lie in its folder",
                where=f"{folder / 'MLmodel'}: {where['path']}",
                do="take the model from a source that you trust",
            )
    return {part: folder / where["path"] for part, where in paths.items()}
