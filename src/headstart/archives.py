"""Archives: the content of a file, a folder or an archive, or one member of it, put into a folder.

Goes in: a path, the member wanted, and an existing empty folder. Comes out: plain files (mode 0644) and
folders (0755), the same for the same input. Never writes outside the folder, never makes a link or a
device, never runs anything, and stops at what grows beyond all reason. An archive inside an archive is
unpacked only when the member names it or leads through it.
"""

from __future__ import annotations

import difflib
import errno
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from headstart.errors import HeadstartError
from headstart.layout import leads_out
from headstart.progress import bar
from headstart.sources import walk

ZIPS = (".zip", ".whl")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# Bounds on what comes out of archives, nested ones included. A folder of the user's own has none.
MAX_BYTES = 20 << 30
MAX_FILES = 1_000_000
# Honest data seldom shrink to a hundredth, which deflate's 1:1032 and xz's far more leave behind.
MAX_RATIO, RATIO_FROM = 200, 64 << 20
MAX_HEADER = 1 << 18  # bytes of a name, or of what else a tar tells of a member
MAX_FOLDERS = 100  # that a file lies in: Python goes down into each by a call of its own
NESTED = ".nested"  # inside the folder, so that a kill leaves nothing beside it
PIECE = 1 << 20
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    LookupError,
    OverflowError,
    ValueError,
    RuntimeError,
)
# OSErrors that are the archive's fault: bad compressed bytes (no errno), or names and sizes that cannot be.
ILL_NAMED = {None, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL}


@dataclass(frozen=True)
class Entry:
    """One file or folder of a container.

    Args:
        name: where it stands in the container.
        folder: it is a folder.
        open: gives its bytes.
        fault: why it must not be written, or nothing.
        size: bytes it must have, if the container says so.
        path: where it already lies on the disk as it is.
    """

    name: str
    folder: bool
    open: Callable[[], IO[bytes] | None]
    fault: str = ""
    size: int | None = None
    path: Path | None = None


@dataclass
class Spent:
    """What has come out of archives so far."""

    files: int = 0
    size: int = 0


def is_archive(name: str) -> bool:
    """Whether a file of this name is unpacked. ``.pth`` and ``.npz`` are zip files too, and are not."""
    return name.lower().endswith(ZIPS + TARS)


def place(path: Path, member: str | None, folder: Path, *, links: bool = True) -> Path:
    """Put what ``path`` holds, or only ``member`` of it, into the existing empty ``folder``.

    A folder's content lands directly in ``folder``, an archive is unpacked into it, and any other file
    lands there under its own name. ``member`` may lead through archives: ``inner.tar.gz/data``. Links on the
    disk are followed, unless ``links`` is false: where others put them, they may lead anywhere.

    Returns:
        The one plain file that was placed, or else ``folder`` itself.

    Raises:
        HeadstartError: no such member, a member that is unsafe to write, a damaged archive, or one
            that is far larger than it should be.
    """
    wanted = (member or "").replace("\\", "/").removeprefix("./").strip("/")
    wanted = "" if wanted == "." else wanted
    try:
        with bar(desc=f"unpacking {path.name}", unit="B", unit_scale=True) as progress:
            placed = _unpack(path, wanted, folder, Spent(), progress.update, links=links)
    finally:
        shutil.rmtree(folder / NESTED, ignore_errors=True)
    for made in folder.rglob("*"):
        made.chmod(0o755 if made.is_dir() else 0o644)
    return placed


def _unpack(
    path: Path, wanted: str, folder: Path, spent: Spent, tell: Callable[[float], object], *, links: bool
) -> Path:
    """Walk the container once, writing what is ``wanted`` or lies below it."""
    placed, found = folder, not wanted
    packed = path.stat().st_size if path.is_file() and is_archive(path.name) else None
    before, names, made = spent.size, set[str](), {folder, folder / NESTED}
    with _damage_named(path):
        for name, entry in _entries(path, links):
            names.add(name)
            within = f"{wanted}/".startswith(f"{name}/")  # wanted is this entry, or inside of it
            through = within and not entry.folder and is_archive(name)
            if wanted and not (through or name == wanted or name.startswith(f"{wanted}/")):
                continue
            if fault := entry.fault or _escape(name):
                if path == entry.path:
                    raise HeadstartError(f"this is {fault}", str(path), "put a file or a folder in its place")
                if path.is_dir():
                    raise HeadstartError(f"the folder holds {fault}", f"{path}: {name}", "mend or delete it")
                raise HeadstartError(
                    f"the archive holds {fault}, which is never unpacked",
                    where=f"{path}: {name}",
                    do="take the archive from a source that you trust, or name a safe member after `#`",
                )
            found = True
            spent.files += packed is not None
            _bound(spent, spent.size - before, packed, path)
            if entry.folder:
                continue
            target = folder / (name[len(wanted) :].lstrip("/") or name.rpartition("/")[2])
            if through:
                target = entry.path or folder / NESTED / str(len(wanted)) / name.rpartition("/")[2]
            elif name == wanted or (packed is None and path.is_file()):
                placed = target
            if target != entry.path:
                _distinct(target, made, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    for piece in _pieces(entry):
                        spent.size += len(piece) if packed is not None else 0
                        _bound(spent, spent.size - before, packed, path)
                        file.write(piece)
                        tell(len(piece))
            if through:
                return _unpack(target, wanted[len(name) + 1 :], folder, spent, tell, links=links)
    if not found:
        raise _missing(wanted, names, path)
    return placed


def _distinct(target: Path, made: set[Path], path: Path) -> None:
    """Note a file and the folders above it; on disks as of macOS and Windows ``Cat`` would be ``cat``."""
    for each in (target, *target.parents):
        if each in made:
            break
        if each.exists():
            raise HeadstartError(
                "two names differ in capitals or accents alone, and are one name on this disk",
                where=f"{path}: {each.name}",
                do="rename one of them, or unpack on a disk that tells them apart",
            )
        made.add(each)


def _entries(path: Path, links: bool) -> Iterator[tuple[str, Entry]]:
    """Entries under plain relative names, without the litter of macOS, in a fixed order."""
    kind = path.name.lower()
    if (path.exists() or path.is_symlink()) and (fault := _odd(path, links)):
        yield path.name, Entry(path.name, False, _opener(path), fault, path=path)
        return
    if not path.is_dir() and not is_archive(kind):
        yield path.name, Entry(path.name, False, _opener(path))
        return
    packed = _of_zip if kind.endswith(ZIPS) else _of_tar
    for entry in _of_folder(path, links) if path.is_dir() else packed(path):
        name = entry.name.replace("\\", "/").removeprefix("./").rstrip("/")
        last = name.rpartition("/")[2]
        if name not in {"", "."} and not ("__MACOSX" in name.split("/") or last == ".DS_Store"):
            yield name, entry


def _odd(path: Path, links: bool) -> str:
    """Why what lies on the disk is not read, or nothing."""
    if path.is_symlink() and not links:
        return "a link"
    return "" if path.is_file() or path.is_dir() else "a broken link, device or pipe"


def _of_folder(root: Path, links: bool) -> Iterator[Entry]:
    """Links in a folder of the user's own are followed."""
    for parent, folders, files in walk(root):
        for name in sorted(folders + files):
            path = Path(parent, name)
            fault = _odd(path, links)
            if fault and name in folders:
                folders.remove(name)  # a hidden one is passed over with all that it leads to
            inside = path.relative_to(root)
            # Editors and other programs keep locks and sockets where nobody sees them.
            if not (fault and any(part.startswith(".") for part in inside.parts)):
                yield Entry(inside.as_posix(), path.is_dir(), _opener(path), fault, path=path)


def _of_zip(path: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            fault = "" if kind in {0, stat.S_IFREG, stat.S_IFDIR} else "a link or device"
            if info.flag_bits & 1:
                fault = "an encrypted file"
            yield Entry(_name(info), info.is_dir(), _opener(info, archive.open), fault, info.file_size)


def _name(info: zipfile.ZipInfo) -> str:
    """A zip's entry by its name: Info-ZIP and macOS write UTF-8 without the flag that says so."""
    utf_8 = 0x800
    if info.flag_bits & utf_8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")  # zipfile has read the bytes as cp437
    except UnicodeError:
        return info.filename


def _of_tar(path: Path) -> Iterator[Entry]:
    with tarfile.open(path, tarinfo=_Header) as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            fault = "" if info.isreg() or info.isdir() else "a link or device"
            try:
                tarfile.data_filter(info, str(path.parent))  # Python's own opinion, besides ours
            except tarfile.FilterError as error:
                fault = fault or f"an unsafe member ({type(error).__name__})"
            yield Entry(info.name, info.isdir(), _opener(info, archive.extractfile), fault, info.size)


class _Header(tarfile.TarInfo):
    """The header of a tar's member. Names and notes before it are read whole, so huge ones never are."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        kinds = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE}
        if self.type in kinds | {tarfile.SOLARIS_XHDTYPE} and self.size > MAX_HEADER:
            raise HeadstartError(
                f"the archive holds a header of {self.size:,} bytes, which is never read",
                where=str(archive.name),
                do="take the archive from a source that you trust, or pack its files again",
            )
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


def _opener(
    what: object, how: Callable[..., IO[bytes] | None] | None = None
) -> Callable[[], IO[bytes] | None]:
    """Binds the loop variable, which a bare lambda would not."""
    return lambda: how(what) if how else Path(str(what)).open("rb")


def _pieces(entry: Entry) -> Iterator[bytes]:
    """An entry's bytes.

    Raises:
        EOFError: there are fewer than the container says.
    """
    size = 0
    source = entry.open()
    if source is not None:
        with source:
            while piece := source.read(PIECE):
                size += len(piece)
                yield piece
    if entry.size is not None and size != entry.size:
        raise EOFError(f"{entry.name} ends after {size} of {entry.size} bytes")


def _escape(name: str) -> str:
    """Why a name would lead out of the folder, or nothing."""
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if name.count("/") > MAX_FOLDERS:
        return f"a path of more than {MAX_FOLDERS} folders"
    return "a path that leads out of it" if leads_out(name) else ""


def _bound(spent: Spent, size: int, packed: int | None, path: Path) -> None:
    """Stop an archive that unpacks to far more than it should."""
    for grown in (
        f"more than {MAX_BYTES >> 30} GiB" if spent.size > MAX_BYTES else "",
        f"more than {MAX_FILES:,} files and folders" if spent.files > MAX_FILES else "",
        f"more than {MAX_RATIO} times its size"
        if packed and size > max(RATIO_FROM, MAX_RATIO * packed)
        else "",
    ):
        if grown:
            raise HeadstartError(
                f"the archive unpacks to {grown}",
                where=str(path),
                do="if you trust it, unpack it yourself and name the folder as `file:FOLDER`",
            )


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever a damaged archive raises becomes one error that names it."""
    try:
        yield
    except NotImplementedError as error:  # what Windows makes of a large folder, for one: Deflate64
        raise HeadstartError(
            "the archive is packed in a way that Python cannot read",
            where=str(path),
            table=[str(error)[:200]],
            do="unpack it and pack it again, as .tar.gz or as .zip with Deflate",
        ) from None
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and (not is_archive(path.name) or error.errno not in ILL_NAMED):
            raise
        raise HeadstartError(
            "the archive is damaged or incomplete",
            where=str(path),
            table=[f"{type(error).__name__}: {error}"[:200]],
            do="fetch or make it anew, and check its sha256",
        ) from None


def _missing(wanted: str, names: Iterable[str], path: Path) -> HeadstartError:
    """The names that come nearest: the same file elsewhere first, then similar spellings."""
    known = sorted(
        {"/".join(name.split("/")[:end]) for name in names for end in range(1, name.count("/") + 2)}
    )
    same = [name for name in known if name.rpartition("/")[2] == wanted.rpartition("/")[2]]
    similar = difflib.get_close_matches(wanted, known[:5000], n=5, cutoff=0.5)
    return HeadstartError(
        f"there is no member {wanted!r}",
        where=str(path),
        table=list(dict.fromkeys([*same[:5], *similar, *(known[:5] if not same + similar else [])])),
        do="name one of the members above after `#`"
        if known
        else "there is nothing in it: take another source",
    )
