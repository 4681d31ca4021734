"""The inbox: new batches, taken out whole once they are complete, and looked at before they touch the data.

Goes in: what arrives in a folder or under a prefix of a store. Comes out: batches beside the source's files
in ``data/<recipe>/.batches/``, or in ``quarantine/<recipe>/`` with ``reasons.csv``. Whatever stands in
quarantine without reasons is still to be looked at, so a kill at any moment loses nothing and takes nothing
by halves. What cannot be copied stays where it lies, with its reasons there. Never changes what was there
before, and never follows a link.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from filelock import FileLock

from headstart import adapters, archives, batches, schemas, sources, validation
from headstart.errors import HeadstartError
from headstart.layout import HIDDEN, Layout, unwritable_named
from headstart.progress import bar
from headstart.recipe import Recipe, Validate

# What programs call a file that they have not finished.
UNFINISHED = (".part", ".partial", ".tmp", ".crdownload", ".filepart")
REASONS = "reasons.csv"
GONE = ".gone"  # of a batch that is in quarantine, and whose files in the inbox are being deleted
STAYS = "stays"  # noted of a batch that is rejected, and of which no copy is made
GRACE = 5.0  # seconds that a command waits longer than a batch needs to settle
OWN = (batches.ABOUT, f"{batches.ABOUT}.partial", f".{REASONS}.partial")  # what is noted of a batch
MAX_NAME = 255  # bytes that file systems take
REMIND = 3600.0  # seconds after which a batch that nobody took is news again
PATTERN = {"*", "?", "["}  # what a store's driver takes for more than a name
UNUSABLE = "usable_rows"
REMEDY = {
    "known_id": "take the id from the manifest, or the path within its batch",
    "known_label": "correct the label; to allow a new class, name all in the recipe: `validate: classes:`",
    "label_differs": "a label that is there stays: correct it where it came from",
    "one_row": "write the whole id",
    "readable": "mend the batch",
    "row_left_out": "the row is not used, with or without a label",
    "unique_id": "give each row an id of its own; another row has this one",
    UNUSABLE: "check the batch and the adapter",
    "value_missing": "fill it in, or delete the line",
}


class UnfitError(HeadstartError):
    """A batch in a store that cannot be brought here, which is its own fault."""


@dataclass(frozen=True)
class Arrival:
    """A top-level entry of the inbox."""

    name: str
    waits: str  # why it is not taken yet; empty once it is settled
    settling: bool  # whether time alone will do
    told: bool  # whether somebody was told of it lately


def look(recipe: Recipe, layout: Layout) -> list[Arrival]:
    """Everything in the inbox, oldest first; from the first look on it is known since when nothing changed.

    Times of files count for nothing: a copy may bear the old file's.

    Raises:
        HeadstartError: the inbox names a store that cannot be reached (transient).
    """
    inbox, now, arrivals = Inbox.of(recipe, layout), time.time(), []
    with _remembered(layout) as known:
        names = inbox.names()
        found = inbox.entries(names)
        lower = {name.lower() for name in names}
        for gone in known.keys() - found.keys():
            del known[gone]
        for name, (fingerprint, unfinished) in found.items():
            entry = known.setdefault(name, {})
            if entry.get("fingerprint") != fingerprint or entry["since"] > now:
                entry.clear()
                entry |= {"fingerprint": fingerprint, "since": now}
            unfinished += [mark for mark in UNFINISHED if f"{name}{mark}".lower() in lower]
            still = entry["since"] + recipe.ingest.settle - now
            waits = f"{unfinished[0]} is not finished" if unfinished else ""
            if not waits and still > 0:
                waits = f"nothing may change for another {still:.0f} s"
            if not waits and STAYS in entry:
                waits = "it is rejected until it changes"
            told = 0 <= now - entry.get("told", 0) < REMIND  # a clock may have been ahead
            arrivals.append(Arrival(name, waits, not unfinished and still > 0, told))
        return sorted(arrivals, key=lambda arrival: (known[arrival.name]["since"], arrival.name))


def waiting(recipe: Recipe, layout: Layout) -> list[str]:
    """Names of the settled batches in the inbox, oldest first."""
    return [arrival.name for arrival in look(recipe, layout) if not arrival.waits]


def tell(layout: Layout, names: list[str]) -> None:
    """Remember that somebody was told of these batches."""
    with _remembered(layout) as known:
        for name in known.keys() & set(names):
            known[name]["told"] = time.time()


def settle(recipe: Recipe, layout: Layout) -> None:
    """Wait until every batch that time alone will settle is settled; not longer than that takes at most."""
    deadline = time.monotonic() + recipe.ingest.settle + GRACE
    while any(arrival.settling for arrival in look(recipe, layout)) and time.monotonic() < deadline:
        time.sleep(min(1.0, recipe.ingest.settle / 4))


def bring(recipe: Recipe, layout: Layout) -> None:
    """Move every settled batch into quarantine: unpacked, under a name of its own, whole or not at all.

    Raises:
        HeadstartError: the store cannot be reached, or the disk is full or not writable.
    """
    inbox = Inbox.of(recipe, layout)
    with unwritable_named(layout.inbox):
        inbox.sweep()
    for partial in layout.quarantine.glob(".*.partial"):
        shutil.rmtree(partial)
    for name in waiting(recipe, layout):
        with _remembered(layout) as known:
            if name not in known:  # it was withdrawn, and somebody has looked since
                continue
            fingerprint = known[name]["fingerprint"]
            named = {str(entry.get("as")).lower() for entry in known.values()}
            target = known[name].setdefault("as", _unique(name, layout, named))
        here = (layout.quarantine / target).exists() or (layout.batches / target).exists()
        if here or _copied(inbox, name, fingerprint, layout.quarantine / target, layout):
            stays = batches.about(layout.quarantine / target).get(STAYS, False)
            if not stays:
                inbox.remove(name, fingerprint)
            with _remembered(layout) as known:
                if stays and name in known:
                    known[name][STAYS] = True
                else:
                    known.pop(name, None)  # the same file, brought again with its old time, is another batch


def pending(layout: Layout) -> list[str]:
    """Batches in quarantine that nobody has looked at, in the order they came."""
    found = []
    for folder in layout.quarantine.iterdir() if layout.quarantine.is_dir() else ():
        if folder.is_dir() and not folder.name.startswith(".") and not (folder / REASONS).exists():
            if (layout.batches / folder.name).exists():  # it was copied there, from one disk to another
                shutil.rmtree(folder)
            else:
                found.append((batches.about(folder).get("number", 0), folder.name))
    return [name for _, name in sorted(found)]


def accept(layout: Layout, name: str) -> None:
    """Put a batch beside the source's files, as what it is by now: in quarantine it may have been mended."""
    source, target = layout.quarantine / name, layout.batches / name
    about = batches.about(source) | {"kind": "rows"}
    if batches.label_table(source) is not None:
        about |= {"kind": "labels", "after": batches.names(layout)}
    with unwritable_named(target):
        written = source / f"{batches.ABOUT}.partial"
        written.write_text(json.dumps(about) + "\n", encoding="utf-8")
        written.replace(source / batches.ABOUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            partial = target.with_name(f".{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.rename(target)
            shutil.rmtree(source)


def reject(layout: Layout, name: str, reasons: pd.DataFrame) -> None:
    """Leave a batch in quarantine, with all the reasons."""
    path = layout.quarantine / name / REASONS
    with unwritable_named(path):
        reasons.to_csv(path.with_name(f".{REASONS}.partial"), index=False)
        path.with_name(f".{REASONS}.partial").replace(path)


def check(recipe: Recipe, layout: Layout, name: str) -> pd.DataFrame:
    """What is wrong with a batch in quarantine, by the rules that ``validate`` has for rows.

    Returns:
        Columns ``rule``, ``id`` (or the place of a row without one), ``value``, ``do``; empty if it is fit.

    Raises:
        HeadstartError: the source or the batches before cannot be read.
    """
    folder, options = layout.quarantine / name, recipe.validate_
    if fault := batches.about(folder).get("fault"):
        return _table([tuple(fault)])
    before = batches.everything(layout, options)
    late = batches.late_labels(layout)
    known = validation.labelled_late(validation.completed(before), late)
    try:
        if (table := batches.label_table(folder)) is not None:
            return _check_labels(adapters.columns(table, batches.LABEL_COLUMNS), known, options)
        asked = options
        if options.adapter == "image_folder":  # it does not see the source here, whose classes it must know
            asked = options.model_copy(update={"classes": _classes(known, options) or None})
        came = batches.rows_of(folder, name, asked)
        rows = validation.completed(pd.concat([before, came], ignore_index=True))
    except HeadstartError as error:
        lines = [error.what, *error.table]
        return _table([("readable", "", " ".join(lines), error.do)])
    except Exception as error:  # an adapter may raise what it likes over files that it was not made for
        return _table([("readable", "", f"{type(error).__name__}: {error}", REMEDY["readable"])])
    return _check_rows(rows[rows["batch"] == name], known, folder, options)


def _check_rows(rows: pd.DataFrame, known: pd.DataFrame, folder: Path, options: Validate) -> pd.DataFrame:
    """``rows`` are the batch's, ``known`` all others."""
    reason = rows["left_out"].mask(rows["left_out"] == adapters.NO_LABEL)
    if options.target_domain and options.source_domains:
        alien = ~rows["domain"].isin([options.target_domain, *options.source_domains])
        reason = reason.mask(alien & reason.isna(), validation.ALIEN)
    rows = rows[reason.isna()].reset_index(drop=True)
    if rows.empty:
        counts = reason.value_counts()
        why = [(UNUSABLE, "", f"{n} rows: {words}", REMEDY[UNUSABLE]) for words, n in counts.items()]
        return _table(why)
    classes = _classes(known, options)
    # A missing label is no fault.
    asked = rows.assign(label=rows["label"].fillna(classes[0] if classes else HIDDEN))
    strict = options.model_copy(update={"classes": classes or None})
    found = schemas.failures(asked, strict)
    found = found[~found["rule"].isin({"two_classes", "unique_id"})]
    taken = set(known.loc[known["left_out"].isna() | (known["left_out"] == adapters.NO_LABEL), "id"])
    again = rows["id"].isin(taken) | rows["id"].duplicated()
    faults = [("unique_id", place, row) for place, row in zip(rows["place"], rows["id"], strict=True)]
    torn = rows.groupby("group")["split"].nunique()
    faults = [fault for fault, bad in zip(faults, again, strict=True) if bad]
    faults += [("group_in_one_split", str(group), "") for group in torn.index[torn > 1]]
    tables = [found, _table([(*fault, "") for fault in faults])]
    if "path" in rows:
        inside = rows["path"].str.replace(r"^\.batches/[^/]+/", "", regex=True).fillna("").tolist()
        tables.append(validation.look_at(folder, inside, options.min_image_side).broken)
    found = pd.concat(tables, ignore_index=True)
    found["id"] = found["id"].str.replace(rf"^(\.batches/{folder.name}/|{folder.name}: )", "", regex=True)
    remedy = found["rule"].map(schemas.REMEDY | REMEDY)
    return found.assign(do=remedy.fillna(found["do"])).astype("str")


def _check_labels(labels: pd.DataFrame, known: pd.DataFrame, options: Validate) -> pd.DataFrame:
    classes, faults = _classes(known, options), []
    if labels.empty:
        faults.append((UNUSABLE, "", "no labels"))
    again = labels["id"].duplicated(keep="first")
    for i, (rows, name, label) in enumerate(
        zip(validation.named(known, labels), labels["id"], labels["label"], strict=True)
    ):
        place = f"row {i + 1}" if pd.isna(name) else str(name)
        if pd.isna(name) or pd.isna(label):
            faults.append(("value_missing", place, "no id" if pd.isna(name) else "no label"))
        elif again.iloc[i]:
            faults.append(("unique_id", place, "twice in this table"))
        elif len(rows) != 1:
            faults.append(("one_row", place, f"{len(rows)} rows") if rows else ("known_id", place, "no row"))
        else:
            present, left_out = known["label"].iloc[rows[0]], known["left_out"].iloc[rows[0]]
            if classes and label not in classes:
                faults.append(("known_label", place, label))
            elif pd.notna(present) and present != label:
                faults.append(("label_differs", place, f"{label}, but it has the label {present}"))
            elif pd.notna(left_out) and left_out != adapters.NO_LABEL:
                faults.append(("row_left_out", place, left_out))
    return _table([(*fault, REMEDY[fault[0]]) for fault in faults])


def _classes(known: pd.DataFrame, options: Validate) -> list[str]:
    """The labels allowed: those of the recipe, or those that are learned from so far."""
    learned = known["left_out"].isna() & (known["domain"] != options.target_domain)
    return options.classes or sorted(set(known.loc[learned, "label"].dropna()))


def _table(lines: Sequence[tuple[str, ...]]) -> pd.DataFrame:
    # A name is whatever bytes the disk has.
    said = [[words.encode("utf-8", "backslashreplace").decode() for words in line] for line in lines]
    return pd.DataFrame(said, columns=schemas.COLUMNS, dtype="str")


# Quarantine


def _unique(name: str, layout: Layout, named: set[str]) -> str:
    """A safe name that no other batch has: the entry's own, without what says how it was packed."""
    packed = sorted((*archives.TARS, *archives.ZIPS, *adapters.TABLE_SUFFIXES), key=len, reverse=True)
    ending = next((ending for ending in packed if name.lower().endswith(ending)), "")
    stem = name[: len(name) - len(ending)]
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:80] or "batch"
    there = [path for folder in (layout.quarantine, layout.batches) for path in folder.glob("*")]
    taken, number = named | {path.name.lower() for path in there}, 1
    while (wanted := safe if number == 1 else f"{safe}-{number}").lower() in taken:
        number += 1
    return wanted


def _copied(inbox: Inbox, name: str, fingerprint: str, target: Path, layout: Layout) -> bool:
    """Copy a batch into quarantine; False if it changed meanwhile and stays where it is, or was withdrawn."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        return _copy(inbox, name, fingerprint, target, partial, layout)
    except (HeadstartError, OSError):
        if inbox.fingerprint(name) == fingerprint:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        return False


def _copy(  # noqa: PLR0917  # all that it is made of
    inbox: Inbox, name: str, fingerprint: str, target: Path, partial: Path, layout: Layout
) -> bool:
    content = partial / "content"
    with unwritable_named(target):
        content.mkdir(parents=True)
        note: dict[str, object] = {"entry": name}
        came = None
        try:
            came = inbox.fetch(name, partial / "came")
            _place(came, content)
        except HeadstartError as error:
            if came is None and not isinstance(error, UnfitError):  # the store's fault
                raise
            shutil.rmtree(content)
            content.mkdir()
            if came is not None and came.is_file() and not came.is_symlink():
                shutil.copy2(came, content / name)  # it is kept as it came
            else:  # there may be no copying it: links, pipes, names too long
                note[STAYS] = True
            note["fault"] = ["readable", name, " ".join([error.what, *error.table]), error.do]
        if (content / REASONS).exists():  # that name says that a batch is rejected
            _set_aside(content / REASONS)
        folders = [folder for parent in (layout.quarantine, layout.batches) for folder in parent.glob("*")]
        number = 1 + max((batches.about(folder).get("number", 0) for folder in folders), default=0)
        about = json.dumps(note | {"number": number})
        (content / batches.ABOUT).write_text(f"{about}\n", encoding="utf-8")
        same = inbox.fingerprint(name) == fingerprint
        if same:
            content.rename(target)
        shutil.rmtree(partial)
    return same


def _place(came: Path, content: Path) -> None:
    """Unpack a batch.

    Raises:
        HeadstartError: it cannot be unpacked as it is.
    """
    try:
        archives.place(came, None, content, links=False)
    except OSError as error:
        if error.errno not in archives.ILL_NAMED - {None}:
            raise
        where = str(error.filename or came)
        raise HeadstartError("the batch holds a name that cannot be here", where, "rename it") from error
    for name in OWN:
        if (content / name).is_dir():
            raise HeadstartError(f"the batch holds a folder {name}", str(came), "rename it")


def _set_aside(path: Path) -> None:
    """Remove reasons that a batch brings along from an earlier look; anything else gets another name."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            if file.readline(1000).strip() == ",".join(schemas.COLUMNS):
                path.unlink()
                return
    other = path
    while other.exists():
        other = other.with_name(f"batch-{other.name}")
    path.rename(other)


# The inbox itself


@dataclass(frozen=True)
class Inbox:
    """A folder, or a prefix of a store, through its fsspec driver."""

    uri: str  # as the recipe gives it
    store: Any
    root: str
    apart: frozenset[str]  # entries that are no batches: they hold the source

    @classmethod
    def of(cls, recipe: Recipe, layout: Layout) -> Inbox:
        """The inbox of a recipe.

        Raises:
            HeadstartError: the source holds the inbox, or the store cannot be reached (transient).
        """
        import fsspec

        given = recipe.ingest.inbox or str(layout.inbox)
        if "://" in given and not given.startswith("file:"):
            with sources.trouble_named(given):
                store, root = fsspec.url_to_fs(given)
                return cls(given, store, root.rstrip("/"), frozenset())
        here = (layout.root / sources.local(given)).resolve()
        apart = set()
        uri, _ = sources.split_fragment(recipe.ingest.source)
        if uri.startswith("file:"):
            source = (layout.root / sources.local(uri)).resolve()
            if here.is_relative_to(source):
                raise HeadstartError(
                    "the source holds the inbox, so nobody could tell a new batch from what is there",
                    where=f"ingest.source {recipe.ingest.source}, inbox {here}",
                    do="keep the source elsewhere, or name another folder in `ingest: inbox:`",
                )
            if source.is_relative_to(here):  # the source itself is no batch, whatever it is called
                apart.add(source.relative_to(here).parts[0])
        return cls(given, fsspec.filesystem("file"), str(here), frozenset(apart))

    @property
    def local(self) -> bool:
        """Whether it is a folder here."""
        return "file" in self.store.protocol

    def names(self) -> list[str]:
        """Visible entries, finished or not."""
        self.store.invalidate_cache()
        with sources.trouble_named(self.uri):
            try:
                listed = self.store.ls(self.root, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = sorted({path.rstrip("/").rpartition("/")[2] for path in listed} - {""})
        return [name for name in names if not name.startswith(".") and name not in self.apart]

    def entries(self, names: list[str]) -> dict[str, tuple[str, list[str]]]:
        """Fingerprint of each of these that may be a batch, and its files that are not finished."""
        found = {}
        for name in names:
            files = {} if name.lower().endswith(UNFINISHED) else self._files(name)
            if files:  # a folder may have been made just now
                unfinished = [file for file in files if file.lower().endswith(UNFINISHED)]
                found[name] = _digest(files), unfinished
        return found

    def fingerprint(self, name: str) -> str:
        """Digest of names, sizes and times of an entry's files, as the store tells them now."""
        self.store.invalidate_cache()
        return _digest(self._files(name))

    def fetch(self, name: str, folder: Path) -> Path:
        """The entry as a path, to be read; from a store it is copied into ``folder``.

        Raises:
            UnfitError: the entry's names cannot be those of files here.
            HeadstartError: it is gone, or (transient) the store does not give it.
        """
        from fsspec.callbacks import TqdmCallback

        if self.local:
            return Path(self.root, name)
        files = list(self._files(name))
        above = {str(parent) for file in files for parent in PurePosixPath(file).parents}
        for file in files:
            if file in above or not _can_be(file):
                where = sources.redacted(self.uri.rstrip("/")) + file
                raise UnfitError("the batch holds a name that no file here can have", where, "rename it")
        folder.mkdir()
        with (
            sources.trouble_named(f"{self.uri.rstrip('/')}/{name}"),
            TqdmCallback({"desc": f"downloading {name}", "unit": " files"}, tqdm_cls=bar) as tell,
        ):
            if not files:
                raise FileNotFoundError(name)
            # Not by its address: `a::b` would be two.
            self.store.get(
                [self.root + file for file in files], [f"{folder}{file}" for file in files], callback=tell
            )
        return folder / name

    def remove(self, name: str, fingerprint: str) -> None:
        """Delete an entry, unless it has changed since."""
        self.store.invalidate_cache()
        files = self._files(name)
        if _digest(files) != fingerprint:
            return
        with unwritable_named(Path(name)), sources.trouble_named(self.uri):
            if self.local:
                path = Path(self.root, name)
                path.rename(path.with_name(f".{fingerprint[:16]}{GONE}"))  # at once, for whoever looks
                self.sweep()
            else:
                self._delete([f"{self.root}{file}" for file in files])

    def _delete(self, paths: list[str]) -> None:
        """Delete these files of a store and no others, and the folders that they leave empty."""
        plain = [path for path in paths if not PATTERN & set(path)]
        if plain:
            self.store.rm(plain)  # many at once
        for path in set(paths) - set(plain):  # `rm` would delete all that they match
            self.store.rm_file(path)
        above = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
        for folder in sorted(above, reverse=True):
            if folder.startswith(f"{self.root}/"):
                try:
                    self.store.rmdir(folder)
                except (FileNotFoundError, NotImplementedError):  # as of most stores, which have none
                    break
                except OSError:  # it is not empty
                    continue

    def sweep(self) -> None:
        """Delete what a kill has left of entries that are gone."""
        for path in Path(self.root).glob(f".*{GONE}") if self.local else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _files(self, name: str) -> dict[str, list[str]]:
        with sources.trouble_named(self.uri):
            try:
                if self.local and (path := Path(self.root, name)).is_symlink():
                    return {f"/{name}": [str(path.readlink())]}  # nobody looks at what it leads to
                found = self.store.find(f"{self.root}/{name}", detail=True)
            except FileNotFoundError:  # it is going, or is being renamed
                return {}
            except RecursionError:  # too deep to be looked at, so no batch
                return {f"/{name}/..": []}
        # Of a file here all times but the last change's change with its name.
        known = sources.FACTS[:2] if self.local else sources.FACTS
        return {
            path.removeprefix(self.root): [str(facts.get(fact)) for fact in known]
            for path, facts in found.items()
            if not path.endswith("/")  # of S3, what stands for an empty folder
        }


def _can_be(file: str) -> bool:
    """Whether what a store calls so can be a file here, and no other."""
    parts = file.removeprefix("/").split("/")
    strange = {"", ".", ".."} & set(parts) or "\0" in file or len(parts) > archives.MAX_FOLDERS
    return not strange and all(len(os.fsencode(part)) <= MAX_NAME for part in parts)


def _digest(files: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _remembered(layout: Layout) -> Iterator[dict[str, dict[str, Any]]]:
    """What was seen of each entry before, to be changed: its fingerprint, since when, and more."""
    path = layout.work / "inbox.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
        yield known
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
