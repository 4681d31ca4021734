"""Sources: what a URI names, had once and for all in the one cache that all recipes and projects share.

Goes in: a URI and, once it is known, its sha256. Comes out: the path of a complete, verified file or
folder (``file:`` alone stays where it is). Never unpacks, builds or runs what it brings, and never tells a
credential. docs/reference/sources.md lists the kinds of URI.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.request import url2pathname

import platformdirs
from filelock import FileLock

from headstart import downloads, packages
from headstart.downloads import redacted, remove, safe_name
from headstart.errors import HeadstartError
from headstart.layout import UNWRITABLE, leads_out, sha256_of
from headstart.progress import bar

__all__ = [
    "address_digest",
    "digest_of",
    "fetch",
    "files_of",
    "local",
    "redacted",
    "split_fragment",
    "trouble_named",
    "walk",
]

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

log = logging.getLogger(__name__)

PART = "download.part"
FILES = f"{PART}.files"  # for each file of a store's folder that is here whole, what the store knows of it
FILES_AT_ONCE, BYTES_AT_ONCE = 256, 4 << 30  # of a store's folder: the most that a failure costs
# What a store knows of a file that changes with it.
FACTS = ("size", "mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")
# What a transformers model needs and no code: configuration, tokenizer, weights.
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


def split_fragment(source: str) -> tuple[str, str | None]:
    """A recipe's source as its URI and the member wanted inside, which stands after ``#``."""
    uri, _, member = source.partition("#")
    return uri, member or None


def fetch(uri: str, sha256: str | None = None) -> Path:
    """Have what a URI names on the disk, downloading it if the cache does not hold it yet.

    Args:
        uri: a source without its ``#`` part. A relative ``file:`` counts from the working directory.
        sha256: hex digest that the file must have; of a folder, what ``digest_of`` gives. Without it,
            the first fetch logs the line to add to the recipe.

    Returns:
        A file or folder, to be read and never written.

    Raises:
        HeadstartError: a URI that is misspelt or not pinned, nothing there, a digest that differs, a full
            disk, ``HEADSTART_OFFLINE`` and not in the cache, or (transient) trouble on the way.
    """
    get = _getter(uri)
    if get is None:
        return _local(uri, sha256)
    entry = cache() / _key(uri)
    try:
        if kept := _kept(entry, sha256):
            return kept
        if _offline():
            what = (
                "this source is not in the cache as it should be, and HEADSTART_OFFLINE forbids to fetch it"
            )
            where = f"{redacted(uri)}, sha256 {sha256 or 'not pinned'}, in {cache()}"
            do = "fetch it once without HEADSTART_OFFLINE, or copy the cache of a machine that has it"
            raise HeadstartError(what, where, do)
        entry.mkdir(parents=True, exist_ok=True)
        with FileLock(entry / "lock"):  # whoever had to wait here finds it in the cache
            return _kept(entry, sha256) or _bring(uri, get, entry, sha256)
    except OSError as error:
        if error.errno not in UNWRITABLE | {errno.EFBIG, errno.ENOTDIR, errno.EEXIST}:
            raise
        what, where = f"could not write to the cache: {error.strerror}", str(error.filename or entry)
        do = "free disk space, mend the permissions, or set HEADSTART_CACHE to a folder elsewhere"
        raise HeadstartError(what, where, do) from None


def digest_of(path: Path) -> str:
    """Hex sha256 of a file's bytes; of a folder, of the line "NAME, NUL, SHA256" of each file, in order."""
    if path.is_file():
        return sha256_of(path)
    names = sorted(file.relative_to(path).as_posix() for file in files_of(path))
    lines = "".join(f"{name}\0{sha256_of(path / name)}\n" for name in names)
    # A name is whatever bytes the disk has.
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` in order, also through links to folders, but for one that leads back to where it stands."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _leads_back(Path(parent, name)))
        yield parent, folders, sorted(files)


def _leads_back(path: Path) -> bool:
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def files_of(folder: Path) -> Iterator[Path]:
    """Every file in a folder and below, as ``archives`` would copy it: also behind links."""
    for parent, _, names in walk(folder):
        yield from (file for name in names if (file := Path(parent, name)).is_file())


def _offline() -> bool:
    return os.environ.get("HEADSTART_OFFLINE", "").lower() in packages.TRUE


# The cache. ENTRY/sha256-DIGEST.json says what ENTRY/DIGEST[:12]/NAME is: a URI may have several contents in
# the course of time, and none of them changes under a reader.


def cache() -> Path:
    """The folder of what is kept for all projects of this user."""
    chosen = os.environ.get("HEADSTART_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("headstart")


def _key(uri: str) -> str:
    """The entry's name: what a person can read of the URI, and a digest without anyone's web login."""
    legible = re.sub(r"[^A-Za-z0-9.]+", "-", redacted(uri).partition("?")[0])[:60].strip("-.")
    return f"{legible}-{address_digest(uri)}"


def address_digest(uri: str) -> str:
    """12 hex digits that tell one URI from another, its query included, without anyone's web login."""
    everyones = re.sub(r"^(https?:)//[^/\s]*@", r"\1//", uri)
    return hashlib.sha256(everyones.encode()).hexdigest()[:12]


def _kept(entry: Path, sha256: str | None) -> Path | None:
    """What the cache holds of a URI, newest first, if it is whole and has the digest that is pinned."""
    records = sorted(entry.glob(f"sha256-{sha256 or '*'}.json"), key=lambda file: file.stat().st_mtime_ns)
    for about in map(downloads.facts, reversed(records)):
        path: Path = entry / about.get("sha256", "")[:12] / about.get("name", "")
        whole = path.exists() and _size(path) == about.get("size")
        if whole and (sha256 is None or digest_of(path) == sha256):
            return path
    return None


def _bring(uri: str, get: Getter, entry: Path, sha256: str | None) -> Path:
    """Download, verify, and only then let it appear in the cache."""
    part = entry / PART
    for resumed in (part.exists(), False):
        if not part.exists():
            remove(entry / FILES)
        name, promised = get(uri, part, sha256)
        digest = digest_of(part)
        expected = sha256 if sha256 and digest != sha256 else promised
        if digest.startswith(expected):
            break
        remove(part)
        if not resumed:  # a resumed one may have been pieced together wrongly: once more from the start
            what = "the download is not what it should be, and was removed"
            do = "if the source was changed on purpose, check it and write the new sha256 into the recipe"
            raise HeadstartError(what, redacted(uri), do, _both(expected, digest))
    target = entry / digest[:12] / name
    remove(target)
    target.parent.mkdir(exist_ok=True)
    # The record first: what is in place is on record, and what is not in place does not count.
    record = {"uri": redacted(uri), "name": name, "sha256": digest, "size": _size(part)}
    (entry / f"sha256-{digest}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(target)
    remove(entry / f"{PART}.json")
    remove(entry / FILES)
    if sha256 is None:
        log.info("fetched %s; to pin it, add this line to the recipe:\n  sha256: %s", redacted(uri), digest)
    return target


def _both(expected: str, got: str) -> list[str]:
    return [f"expected sha256 {expected}", f"got      sha256 {got}"]


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else files_of(path)))


# Kinds. A getter leaves a file or folder at the path it is given, and returns its name and the start of the
# sha256 that the source itself promises ("" if it does not).

Getter = Callable[[str, Path, str | None], tuple[str, str]]


class Kind(NamedTuple):
    """A kind of URI: what must follow its scheme, what to do if it does not, and who brings it."""

    pattern: str
    do: str
    get: Getter | None


def _getter(uri: str) -> Getter | None:
    """Who brings this kind of URI; nobody if it is a file that is already here.

    Raises:
        HeadstartError: a kind that does not exist, or a URI that is misspelt or not pinned.
    """
    scheme, _, rest = uri.partition(":") if ":" in uri else ("", "", uri)
    if kind := KINDS.get(scheme):
        if re.fullmatch(kind.pattern, rest):
            return kind.get
        unpinned = scheme in {"pip", "hf"} and not re.search(r"==[\w.!+-]+\?|@[0-9a-f]{40}$", uri)
        what = "the version of this source is not pinned" if unpinned else f"not a valid {scheme}: source"
        raise HeadstartError(what, redacted(uri), (_pinned_hf(rest) if scheme == "hf" else "") or kind.do)
    import fsspec

    stores = [name for name in fsspec.available_protocols() if name not in {"file", "local"}]
    if scheme in stores:
        if rest.startswith("//"):
            return _from_store
        guess = f"{scheme}://{rest.lstrip('/')}"
    elif near := difflib.get_close_matches(scheme, [*KINDS, *stores], n=1):
        guess = f"{near[0]}:{rest}"
    else:
        fits = (name for name, kind in KINDS.items() if kind.get and re.fullmatch(kind.pattern, rest))
        name = next(fits, None)
        guess = f"{name}:{rest}" if name else f"file:{uri}"
    what = f"there is no kind of source {scheme!r}" if scheme else "the source does not say what kind it is"
    do = f"did you mean {redacted(guess)}? docs/reference/sources.md lists every kind"
    raise HeadstartError(what, redacted(uri), do)


def _pinned_hf(rest: str) -> str:
    """An offer to help: what to write for the commit that a branch or tag of the hub is at now."""
    repo, _, revision = rest.partition("@")
    with contextlib.suppress(Exception):
        if not _offline():
            from huggingface_hub import HfApi

            sha = HfApi().model_info(repo, revision=revision or None, timeout=downloads.TIMEOUT[0]).sha
            return f"write hf:{repo}@{sha}, the commit that {revision or 'its main branch'} is at now"
    return ""


def local(uri: str) -> Path:
    """The path that a ``file:`` names.

    Raises:
        HeadstartError: it names a host.
    """
    rest = uri.removeprefix("file:")
    if rest.startswith("//"):
        host, slash, tail = rest[2:].partition("/")
        if host not in {"", "localhost"}:
            raise HeadstartError("a file: source names no host", uri, f"did you mean file:{rest[2:]}?")
        rest = url2pathname(slash + tail)
    return Path(rest).expanduser()


def _local(uri: str, sha256: str | None) -> Path:
    """A ``file:`` as it lies there; verified if the recipe gives a digest, and never removed."""
    path = local(uri)
    if not path.exists():
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        do = f"did you mean file:{path.parent / near[0]}?" if near else "put it there, or mend the source"
        raise HeadstartError("there is no such file or folder", str(path.absolute()), do)
    if sha256 and (digest := digest_of(path)) != sha256:
        what = "the file is not the one that the recipe pins"
        do = "put the right file there, or write the new sha256 into the recipe"
        raise HeadstartError(what, str(path), do, _both(sha256, digest))
    return path


def _from_web(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    return downloads.download(uri, part, sha256), ""


def _from_torchvision(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    """The address is torchvision's own; the file's name ends in the first digits of its sha256."""
    from torchvision import models

    name = uri.removeprefix("torchvision:")
    try:
        url = str(models.get_weight(name).url)
    except (KeyError, ValueError):
        known = [str(weight) for model in models.list_models() for weight in models.get_model_weights(model)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        do = f"did you mean torchvision:{near[0]}?" if near else KINDS["torchvision"].do
        raise HeadstartError("torchvision has no such weights", uri, do) from None
    downloads.download(url, part, sha256)
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return safe_name(url), digits[1] if digits else ""


def _from_store(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    """Put a file or a folder of any other store at ``part``, through the store's fsspec driver."""
    import fsspec
    from fsspec.callbacks import TqdmCallback

    with trouble_named(uri):
        store, root = fsspec.url_to_fs(uri)
        root = root.rstrip("/")
        name = safe_name(root)
        if store.isdir(root):
            _folder_of(store, root, part)
            return name, ""
        remove(part)
        looks = {"desc": f"downloading {name}", "unit": "B", "unit_scale": True}
        with TqdmCallback(looks, tqdm_cls=bar) as tell:
            store.get_file(root, str(part), callback=tell)
        return name, ""


def _folder_of(store: AbstractFileSystem, root: str, part: Path) -> None:
    """Make ``part`` what a folder is now, keeping the files that an earlier try has brought whole.

    A store may hold millions of files, and one that fails must not cost the others.
    """
    from fsspec.callbacks import Callback

    listed = {
        path.removeprefix(root).lstrip("/"): (path, facts)
        for path, facts in sorted(store.find(root, detail=True).items())
        if not path.endswith("/")
    }
    there = {name: [str(facts.get(fact)) for fact in FACTS] for name, (_, facts) in listed.items()}
    if not there or any(map(leads_out, there)):
        raise FileNotFoundError(root)
    if part.is_file():
        remove(part)
    journal = part.with_name(FILES)
    whole = {name: facts for name, facts in _lines(journal) if there.get(name) == facts}
    for folder, _, files in os.walk(part, topdown=False):
        for file in files:
            path = Path(folder, file)
            if path.relative_to(part).as_posix() not in whole:
                path.unlink()
        with contextlib.suppress(OSError):
            Path(folder).rmdir()  # if nothing is left in it: its name may be a file's by now
    wanted = [name for name in there if name not in whole or not (part / name).exists()]
    words, known = f"downloading {safe_name(root)}", len(there) - len(wanted)
    with (
        bar(total=len(there), initial=known, desc=words, unit=" files") as shown,
        journal.open("a", encoding="utf-8") as notes,
    ):
        for some in _at_once(wanted, {name: facts.get("size") or 0 for name, (_, facts) in listed.items()}):
            paths = [listed[name][0] for name in some], [str(part / name) for name in some]
            before = shown.n
            hooks = {"tell": lambda size, value, before=before, **_: shown.update(before + value - shown.n)}
            store.get(*paths, callback=Callback(hooks=hooks))
            notes.writelines(json.dumps([name, there[name]]) + "\n" for name in some)
            notes.flush()


def _at_once(names: list[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names in parts of at most ``FILES_AT_ONCE``, and, but for the largest, ``BYTES_AT_ONCE``."""
    some, size = list[str](), 0
    for name in names:
        if some and (len(some) == FILES_AT_ONCE or size + sizes[name] > BYTES_AT_ONCE):
            yield some
            some, size = [], 0
        some.append(name)
        size += sizes[name]
    if some:
        yield some


def _lines(journal: Path) -> Iterator[tuple[str, list[str]]]:
    """What a journal says; a kill may have cut its last line short."""
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        with contextlib.suppress(ValueError):
            name, facts = json.loads(line)
            yield name, facts


@contextlib.contextmanager
def trouble_named(uri: str) -> Iterator[None]:
    """Whatever a store's driver raises becomes one error that names the address.

    Raises:
        HeadstartError: nothing is there, the driver is missing, or (transient) the store does not answer.
    """
    try:
        yield
    except ImportError as error:
        what = "the driver for this kind of source is not installed"
        raise HeadstartError(what, redacted(uri), str(error)) from None
    except FileNotFoundError:
        raise HeadstartError("there is nothing at this address", redacted(uri), "check it") from None
    except Exception as error:  # drivers raise whatever their own libraries do
        if isinstance(error, OSError) and error.errno in UNWRITABLE - {errno.EACCES}:
            raise
        do = "check the network and the store's own credentials, then try again"
        table = [redacted(f"{type(error).__name__}: {error}".splitlines()[0])[:200]]
        passing = not isinstance(error, PermissionError)
        raise HeadstartError("the store did not give the file", redacted(uri), do, table, passing) from None


def _from_hub(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    """A model repository at one commit; the hub's own client resumes, and knows the checksums."""
    import requests
    from huggingface_hub import HfApi, constants, snapshot_download
    from tqdm import tqdm

    with bar() as rule:  # the hub's bars too keep headstart's rules for when and where
        rules = {"disable": rule.disable, "file": getattr(rule, "fp", None), "delay": 2, "leave": False}
    made = {"__init__": lambda self, *args, **options: tqdm.__init__(self, *args, **(options | rules))}
    repo, _, commit = uri.removeprefix("hf:").partition("@")
    hub = constants.ENDPOINT  # HF_ENDPOINT, if that is set
    mirror = "set HF_ENDPOINT to a mirror of the hub"
    # The client would try for half a minute before it says that nobody is there.
    downloads.patiently(hub, lambda: requests.head(hub, timeout=downloads.TIMEOUT), also=mirror)
    try:
        for patterns in (HUB_FILES, [*HUB_FILES, "pytorch_model*.bin"]):
            snapshot_download(
                repo,
                revision=commit,
                local_dir=part,
                cache_dir=part.with_name("hub"),
                allow_patterns=patterns,
                tqdm_class=type("Bar", (tqdm,), made),
            )
            if any(part.rglob("*.safetensors")):
                break
        checked = HfApi().verify_repo_checksums(repo, revision=commit, local_dir=part)
    except Exception as error:  # the client's own, its HTTP library's, the disk's
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise
        raise downloads.trouble(uri, error, mirror) from None
    # Only large files have a sha256. git's ids of the small ones are left alone: mirrors make them up.
    bad = [wrong for wrong in checked.mismatches if wrong["algorithm"] == "sha256"]
    table = [f"{wrong['path']}: expected sha256 {wrong['expected']}, got {wrong['actual']}" for wrong in bad]
    if bad:
        remove(part)
        raise HeadstartError("the files are not what the hub promises", uri, "try again", table, True)
    if not checked.checked_count:
        need = f"it needs some of {', '.join(HUB_FILES)}"
        raise HeadstartError("this repository holds no model", uri, need)
    remove(part / ".cache")
    return safe_name(repo), ""


KINDS = {
    "pip": Kind(packages.PATTERN, packages.ADVICE, packages.bring),
    "hf": Kind(
        r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}",
        "write hf:OWNER/REPO@COMMIT, with the 40 hex digits of a commit from the repository's history",
        _from_hub,
    ),
    "torchvision": Kind(
        r"\w+_Weights\.\w+",
        "write it as torchvision:ResNet18_Weights.IMAGENET1K_V1",
        _from_torchvision,
    ),
    "https": Kind(r"//[^\s/]+\S*", "write it as https://example.com/data.zip", _from_web),
    "http": Kind(r"//[^\s/]+\S*", "write it as http://example.com/data.zip", _from_web),
    "file": Kind(r"(?s).+", "write it as file:path/to/photos", None),
}
