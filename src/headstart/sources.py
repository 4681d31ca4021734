"""Sources: where bytes come from, as one URI with a pinned version.

Goes in: a URI and, once it is known, its sha256. Comes out: the path of a complete, verified file or
folder in the one cache that all recipes and projects share (``file:`` alone stays where it is). Never
unpacks, builds or runs what it brings, and never tells a credential. docs/reference/sources.md lists
the kinds of URI.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import email.message
import email.utils
import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import platformdirs
from filelock import FileLock

from headstart.errors import HeadstartError
from headstart.layout import UNWRITABLE, sha256_of
from headstart.progress import bar

if TYPE_CHECKING:
    import requests

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 4  # in a row without a single new byte
BACKOFF, LONGEST_PAUSE = (
    0.5,
    120.0,
)  # seconds: the first pause, doubled each time; the most a server may ask for
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
PIECE = 1 << 16  # bytes; the most that a dropped connection costs
RETRIED = {408, 425, 429}  # besides 5xx
PART = "download.part"
MIRRORS = "set HEADSTART_MIRRORS"
# What a transformers model needs and no code: configuration, tokenizer, weights.
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
TRUE = {"1", "true", "yes", "on", "y", "t"}


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
    entry = _cache() / _key(uri)
    try:
        if kept := _kept(entry, sha256):
            return kept
        if _offline():
            raise HeadstartError(
                "this source is not in the cache, and HEADSTART_OFFLINE forbids to fetch it",
                f"{redacted(uri)}, sha256 {sha256 or 'not pinned'}, in {_cache()}",
                "fetch it once without HEADSTART_OFFLINE, or copy the cache of a machine that has it",
            )
        entry.mkdir(parents=True, exist_ok=True)
        with FileLock(entry / "lock"):  # whoever had to wait here finds it in the cache
            return _kept(entry, sha256) or _bring(uri, get, entry, sha256)
    except OSError as error:
        if error.errno not in UNWRITABLE | {errno.EFBIG, errno.ENOTDIR, errno.EEXIST}:
            raise
        raise HeadstartError(
            f"could not write to the cache: {error.strerror}",
            str(error.filename or entry),
            "free disk space, mend the permissions, or set HEADSTART_CACHE to a folder elsewhere",
        ) from None


def digest_of(path: Path) -> str:
    """Hex sha256 of a file's bytes; of a folder, of the line "NAME, NUL, SHA256" of each file, in order."""
    if path.is_file():
        return sha256_of(path)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(
        "".join(f"{name}\0{sha256_of(path / name)}\n" for name in names).encode()
    ).hexdigest()


def redacted(text: str) -> str:
    """Text without the credentials that addresses in it may carry: before the ``@``, or in the query."""
    return re.sub(r"([?&][\w.~%-]+=)[^&\s#'\"]+", r"\1***", re.sub(r"//[^/\s]*@", "//***@", text))


def _offline() -> bool:
    return os.environ.get("HEADSTART_OFFLINE", "").lower() in TRUE


# The cache. ENTRY/sha256-DIGEST.json says what ENTRY/DIGEST[:12]/NAME is: a URI may have several contents in
# the course of time, and none of them changes under a reader.


def _cache() -> Path:
    chosen = os.environ.get("HEADSTART_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("headstart")


def _bare(url: str) -> str:
    """A web address without its login, so that everyone's is the same."""
    return re.sub(r"^(https?:)//[^/\s]*@", r"\1//", url)


def _key(uri: str) -> str:
    legible = re.sub(r"[^A-Za-z0-9.]+", "-", re.sub(r"//[^/\s]*@", "//", uri).partition("?")[0])[:60]
    return f"{legible.strip('-.')}-{hashlib.sha256(_bare(uri).encode()).hexdigest()[:12]}"


def _kept(entry: Path, sha256: str | None) -> Path | None:
    """What the cache holds of a URI, newest first, if it is whole and has the digest."""
    records = sorted(entry.glob(f"sha256-{sha256 or '*'}.json"), key=lambda file: file.stat().st_mtime_ns)
    for about in map(_read, reversed(records)):
        path = entry / str(about.get("sha256", ""))[:12] / str(about.get("name", ""))
        if about and path.exists() and _size(path) == about.get("size"):
            return path
    return None


def _bring(uri: str, get: Getter, entry: Path, sha256: str | None) -> Path:
    """Download, verify, and only then let it appear in the cache."""
    part = entry / PART
    for resumed in (part.exists(), False):
        name, promised = get(uri, part, sha256)
        digest = digest_of(part)
        expected = sha256 if sha256 and digest != sha256 else promised
        if digest.startswith(expected):
            break
        _remove(part)
        if not resumed:  # a resumed one may have been pieced together wrongly: once more from the start
            raise HeadstartError(
                "the download is not what it should be, and was removed",
                redacted(uri),
                "if the source was changed on purpose, check it and write the new sha256 into the recipe",
                [f"expected sha256 {expected}", f"got      sha256 {digest}"],
            )
    target = entry / digest[:12] / name
    _remove(target)
    target.parent.mkdir(exist_ok=True)
    # The record first: what is in place is on record, and what is not in place does not count.
    record = {"uri": redacted(uri), "name": name, "sha256": digest, "size": _size(part)}
    _write(entry / f"sha256-{digest}.json", record)
    part.replace(target)
    _remove(_state(part))
    if sha256 is None:
        log.info("fetched %s; to pin it, add this line to the recipe:\n  sha256: %s", redacted(uri), digest)
    return target


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """A small JSON file; empty if it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def _write(path: Path, content: Mapping[str, object]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _safe_name(name: str) -> str:
    """A file name from elsewhere as any disk takes it, its suffix kept."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "_", last)[-120:].lstrip(".") or "download"


# Getters. Each leaves a file or folder at the path it is given, and returns its name and the start of the
# sha256 that the source itself promises ("" if it does not).

Getter = Callable[[str, Path, str | None], tuple[str, str]]


def _getter(uri: str) -> Getter | None:
    """Who brings this kind of URI; nobody if it is a file that is already here.

    Raises:
        HeadstartError: a kind that does not exist, or a URI that is misspelt or not pinned.
    """
    scheme, _, rest = uri.partition(":") if ":" in uri else ("", "", uri)
    if kind := KINDS.get(scheme):
        if re.fullmatch(kind.pattern, uri):
            return kind.get
        unpinned = scheme in {"pip", "hf"} and not re.search(r"==[\w.!+-]+\?|@[0-9a-f]{40}$", uri)
        what = "the version of this source is not pinned" if unpinned else f"not a valid {scheme}: source"
        raise HeadstartError(what, redacted(uri), (_pinned_hf(rest) if scheme == "hf" else "") or kind.do)
    import fsspec

    stores = [name for name in fsspec.available_protocols() if name not in {"file", "local"}]
    if scheme in stores and rest.startswith("//"):
        return _from_fsspec
    alike = (
        f"{name}:{rest}"
        for name, kind in KINDS.items()
        if kind.get and re.fullmatch(kind.pattern, f"{name}:{rest}")
    )
    guess = next(alike, f"file:{uri}")
    if scheme in stores:
        guess = f"{scheme}://{rest.lstrip('/')}"
    elif near := difflib.get_close_matches(scheme, [*KINDS, *stores], n=1):
        guess = f"{near[0]}:{rest}"
    what = f"there is no kind of source {scheme!r}" if scheme else "the source does not say what kind it is"
    do = f"did you mean {redacted(guess)}? docs/reference/sources.md lists every kind"
    raise HeadstartError(what, redacted(uri), do)


def _pinned_hf(rest: str) -> str:
    """An offer to help: what to write for the commit that a branch or tag of the hub is at now."""
    repo, _, revision = rest.partition("@")
    with contextlib.suppress(Exception):
        if not _offline():
            from huggingface_hub import HfApi

            api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
            sha = api.model_info(repo, revision=revision or None, timeout=TIMEOUT[0]).sha
            return f"write hf:{repo}@{sha}, the commit that {revision or 'its main branch'} is at now"
    return ""


def _parts(uri: str) -> tuple[str, ...]:
    """What the brackets in the URI's pattern hold."""
    match = re.fullmatch(KINDS[uri.partition(":")[0]].pattern, uri)
    return match.groups() if match else ()


def _local(uri: str, sha256: str | None) -> Path:
    """A ``file:`` as it lies there; verified if the recipe gives a digest, and never removed."""
    rest = uri.removeprefix("file:")
    if rest.startswith("//"):
        host, slash, tail = rest[2:].partition("/")
        if host not in {"", "localhost"}:
            raise HeadstartError("a file: source names no host", uri, f"did you mean file:{rest[2:]}?")
        rest = url2pathname(slash + tail)
    path = Path(rest).expanduser()
    if not path.exists():
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        do = (
            f"did you mean file:{path.parent / near[0]}?"
            if near
            else "put it there, or mend the recipe's source"
        )
        raise HeadstartError("there is no such file or folder", str(path.absolute()), do)
    if sha256 and (digest := digest_of(path)) != sha256:
        do = "put the right file there, or write the new sha256 into the recipe"
        table = [f"expected sha256 {sha256}", f"got      sha256 {digest}"]
        raise HeadstartError("the file is not the one that the recipe pins", str(path), do, table)
    return path


def _from_http(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    return _download(uri, part, sha256), ""


def _from_torchvision(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    """The address is torchvision's own; the file's name ends in the first digits of its sha256."""
    from torchvision import models

    (name,) = _parts(uri)
    try:
        url = str(models.get_weight(name).url)
    except (KeyError, ValueError):
        known = [str(weight) for model in models.list_models() for weight in models.get_model_weights(model)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        do = f"did you mean torchvision:{near[0]}?" if near else KINDS["torchvision"].do
        raise HeadstartError("torchvision has no such weights", uri, do) from None
    _download(url, part, sha256)
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return _safe_name(url), digits[1] if digits else ""


def _from_fsspec(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    """Any other store, through its fsspec driver: one file, or a folder with all below it."""
    import fsspec

    _remove(part)
    try:
        store, root = fsspec.url_to_fs(uri)
        name = _safe_name(str(root).rstrip("/"))
        with bar(desc=f"downloading {name}", unit="B", unit_scale=True) as progress:
            tell = fsspec.Callback(
                hooks={"bar": lambda size, value, **_: progress.update(value - progress.n)}
            )
            if not store.isdir(root):
                store.get_file(root, str(part), callback=tell)
                return name, ""
            progress.unit = " files"
            files = sorted(file for file in store.find(root) if not file.endswith("/"))
            targets = [part / file.removeprefix(root.rstrip("/")).lstrip("/") for file in files]
            if not files or any(".." in target.parts for target in targets):
                raise FileNotFoundError(root)
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            store.get(files, [str(target) for target in targets], callback=tell)
            return name, ""
    except ImportError as error:
        what = "the driver for this kind of source is not installed"
        raise HeadstartError(what, redacted(uri), str(error)) from None
    except FileNotFoundError:
        raise HeadstartError("there is nothing at this address", redacted(uri), "check it") from None
    except Exception as error:  # drivers raise whatever their own libraries do
        if isinstance(error, OSError) and error.errno in UNWRITABLE - {errno.EACCES}:
            raise
        raise HeadstartError(
            "the store did not give the file",
            redacted(uri),
            "check the network and the store's own credentials, then try again",
            [redacted(f"{type(error).__name__}: {error}".splitlines()[0])[:200]],
            transient=not isinstance(error, PermissionError),
        ) from None


def _from_hub(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    """A model repository at one commit; the hub's own client resumes, and knows the checksums."""
    import requests
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repo, commit = _parts(uri)
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    mirror = "set HF_ENDPOINT to a mirror of the hub"
    # The client would try for half a minute before it says that nobody is there.
    _patiently(endpoint, lambda: requests.head(endpoint, timeout=TIMEOUT), also=mirror)
    try:
        for patterns in (HUB_FILES, [*HUB_FILES, "pytorch_model*.bin"]):
            snapshot_download(
                repo,
                revision=commit,
                local_dir=part,
                cache_dir=part.with_name("hub"),
                endpoint=endpoint,
                allow_patterns=patterns,
                tqdm_class=_hub_bar(),
            )
            if any(part.rglob("*.safetensors")):
                break
        checked = HfApi(endpoint=endpoint).verify_repo_checksums(repo, revision=commit, local_dir=part)
    except Exception as error:  # the client's own, its HTTP library's, the disk's
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        status = answer.response.status_code if isinstance(answer, HfHubHTTPError) else None
        raise _trouble(uri, status, error, mirror) from None
    # Only large files have a sha256. git's ids of the small ones are left alone: mirrors make them up.
    bad = [wrong for wrong in checked.mismatches if wrong["algorithm"] == "sha256"]
    table = [f"{wrong['path']}: expected sha256 {wrong['expected']}, got {wrong['actual']}" for wrong in bad]
    if bad:
        _remove(part)
        raise HeadstartError(
            "the files are not what the hub promises", uri, "try again", table, transient=True
        )
    if not checked.checked_count:
        raise HeadstartError(
            "this repository holds no model", uri, f"it needs some of {', '.join(HUB_FILES)}"
        )
    _remove(part / ".cache")
    return _safe_name(repo), ""


def _hub_bar() -> type[Any]:
    """The hub's progress bars, by headstart's rules for when and where."""
    from tqdm import tqdm

    with bar() as rule:
        rules = {"disable": rule.disable, "file": getattr(rule, "fp", None), "delay": 2, "leave": False}

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | rules))

    return Bar


def _from_pip(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    """The wheel, or else the sdist, from the indexes and folders that pip is configured for."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import Version

    project, version, sdist = _parts(uri)
    try:
        wanted = SpecifierSet(f"=={version}")
    except InvalidSpecifier:
        raise HeadstartError(f"{version!r} is not a version", uri, KINDS["pip"].do) from None
    pip = _pip_settings()
    pages = _Pages(pip)
    packages, looked, transient = _pip_packages(project, pip, pages)
    links = [package.link for package in packages if wanted.contains(package.version, prereleases=True)]
    links = [link for link in links if not (sdist and link.is_wheel)]
    if not links:
        newest = sorted({package.version for package in packages}, key=Version)[-12:]
        raise HeadstartError(
            f"pip's indexes have no {'sdist' if sdist else 'file'} of {project} {version}",
            uri,
            "check name and version, and which index pip uses: `pip config list`, PIP_INDEX_URL",
            [*looked, f"versions there: {', '.join(newest) or 'none'}"],
            transient,
        )

    def preference(link: Any) -> tuple[object, ...]:
        """The pinned bytes first; then the same choice on every machine, whatever its platform."""
        promised = (link.hash_option or {}).get("sha256", [])
        return (sha256 not in promised, not link.is_wheel, "-none-any" not in link.filename, link.filename)

    link = min(links, key=preference)
    if link.is_file and not link.file_path.is_file():
        raise HeadstartError(
            "pip's index names a file that is not there", str(link.file_path), "mend the index"
        )
    if link.is_file:
        shutil.copyfile(link.file_path, part)
    else:
        _download(link.url_without_fragment, part, sha256, **pages.options(link.url))
    return _safe_name(link.filename), (link.hash_option or {}).get("sha256", [""])[0]


def _pip_settings() -> dict[str, str]:
    """What pip is told by its files, as pip itself reads them, and by the environment: option -> value."""
    listing = ""
    for pip in ([sys.executable, "-m", "pip"], ["pip"]):  # an environment need not hold pip itself
        with contextlib.suppress(OSError):
            command, environment = [*pip, "config", "list"], os.environ | {"PIP_QUIET": "0"}
            listing = subprocess.run(command, env=environment, capture_output=True, text=True).stdout  # noqa: PLW1510
        if listing:
            break
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, "download": {}}
    for line in listing.splitlines():  # a later line comes from a file that counts for more
        if match := re.fullmatch(r"(global|install|download)\.([\w-]+)=(['\"].*)", line):
            sections[match[1]][match[2]] = str(ast.literal_eval(match[3]))
    sections["environment"] = {
        name[4:].lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_")
    }
    return {option: value for told in sections.values() for option, value in told.items() if value.strip()}


def _pip_packages(project: str, pip: Mapping[str, str], pages: _Pages) -> tuple[list[Any], list[str], bool]:
    """All that pip's places offer of a project; what was found in each; and whether one was out of reach."""
    from unearth import PackageFinder

    finder = PackageFinder(session=pages, ignore_compatibility=True)
    indexes = [pip.get("index-url", finder.sources[0]["url"]), *pip.get("extra-index-url", "").split()]
    places = [] if pip.get("no-index", "").lower() in TRUE else [(url, "index") for url in indexes]
    places += [(str(Path(url).expanduser()) if "://" not in url else url, "find_links")
               for url in pip.get("find-links", "").split()]  # fmt: skip
    packages, looked, transient = [], [], False
    for url, kind in places:
        finder.sources = [{"url": url, "type": kind}]
        found: list[Any] = []
        with contextlib.suppress(ValueError):  # a folder that is not there
            try:
                found = list(finder.find_all_packages(project, allow_yanked=True))
            except HeadstartError as error:
                looked.append(f"{redacted(url)}: {error.what}")
                transient = transient or error.transient
                continue
        looked.append(f"{redacted(url)}: {len(found) or 'no'} files of {project}")
        login, at, host = urlsplit(url).netloc.rpartition("@")
        for package in found:  # as pip does: the index's login is good for its whole host
            address = urlsplit(package.link.normalized)
            known_as = address._replace(
                netloc=f"{login}{at}{host}" if address.netloc == host else address.netloc
            )
            link = dataclasses.replace(package.link, url=known_as.geturl())
            packages.append(dataclasses.replace(package, link=link))
    return packages, looked, transient


class _Pages:
    """What unearth needs of a session: the pages of indexes, through this module's own requests."""

    def __init__(self, pip: Mapping[str, str]) -> None:
        self.pip, self.trusted = pip, pip.get("trusted-host", "").split()

    def options(self, url: str) -> dict[str, Any]:
        """How pip would ask this address."""
        address = urlsplit(url)
        given: dict[str, Any] = {"verify": self.pip["cert"]} if "cert" in self.pip else {}
        if {address.hostname, f"{address.hostname}:{address.port}"} & set(self.trusted):
            given["verify"] = False
        if proxy := self.pip.get("proxy"):
            given["proxies"] = {"http": proxy, "https": proxy}
        return given

    def get(self, url: str, *, headers: Mapping[str, str] | None = None, method: str = "get") -> Any:
        """One page.

        Raises:
            HeadstartError: there is none, or (transient) it is out of reach.
        """
        if url.startswith("file:"):
            try:
                content = Path(url2pathname(urlsplit(url).path)).read_bytes()
            except OSError as error:
                raise HeadstartError(f"no page: {error.strerror}", url) from None
            kind = {"Content-Type": "text/html"}
            return SimpleNamespace(
                status_code=200, reason="", headers=kind, content=content, encoding="utf-8", url=url
            )
        import requests

        def once() -> requests.Response:
            address = _mirrored(url)
            response = requests.request(
                method, address, headers=headers, timeout=TIMEOUT, **self.options(url)
            )
            response.raise_for_status()
            response.url = response.url if address == url else url  # links count from the original
            return response

        return _patiently(url, once)

    def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> Any:
        """The same without its content."""
        return self.get(url, headers=headers, method="head")

    def iter_secure_origins(self) -> Iterator[tuple[str, str, str]]:
        """Scheme, host and port of what may be read without TLS."""
        from unearth.fetchers import DEFAULT_SECURE_ORIGINS

        yield from DEFAULT_SECURE_ORIGINS
        yield from (
            ("*", name, port or "*") for name, _, port in (host.partition(":") for host in self.trusted)
        )


# HTTP


def _mirrored(url: str) -> str:
    """The address to ask instead, by the first pair in HEADSTART_MIRRORS that fits."""
    for pair in os.environ.get("HEADSTART_MIRRORS", "").split():
        match = re.fullmatch(r"(https?://.*?)=(https?://.*)", pair)
        if not match:
            do = "write it as https://example.com/=https://mirror.example.com/, with spaces between pairs"
            raise HeadstartError("HEADSTART_MIRRORS is not a list of PREFIX=PREFIX", redacted(pair), do)
        if url.startswith(match[1]):
            return match[2] + url.removeprefix(match[1])
    return url


def _state(part: Path) -> Path:
    """Where it says which address a partial file is from, and what tells whether that still has the same."""
    return part.with_name(f"{part.name}.json")


def _download(url: str, part: Path, sha256: str | None, **options: Any) -> str:
    """Bring an address's bytes to ``part``, going on from what an earlier attempt left; return their name.

    Only a file that is still the same goes on: its ETag or date must match, or a sha256 tell in the end.
    """
    import requests

    def once() -> str:
        known = _read(_state(part))
        if known.get("url") != _bare(url):
            _remove(part)
        done = part.stat().st_size if part.is_file() and (known["validator"] or sha256) else 0
        headers = {"Accept-Encoding": "identity"}
        if done:
            conditions = {"Range": f"bytes={done}-", "If-Range": known["validator"]}
            headers |= {name: value for name, value in conditions.items() if value}
        with requests.get(
            _mirrored(url), headers=headers, timeout=TIMEOUT, stream=True, **options
        ) as response:
            name, validator = _name_of(url, response), _validator(response)
            span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if response.status_code == 416 and span and span[2] == str(done):
                return name  # all of it is here already
            goes_on = response.status_code == 206 and span and span[1] == str(done)
            if response.status_code in {206, 416} and not (goes_on and known["validator"] in {"", validator}):
                _remove(part)
                raise requests.ConnectionError("the server has another file now")
            response.raise_for_status()
            if not goes_on:  # the old bytes go before the new validator comes: never one's with the other's
                _remove(part)
                done = 0
            _write(_state(part), {"url": _bare(url), "validator": validator})
            length = response.headers.get("Content-Length")
            total = done + int(length) if length else None
            progress = bar(desc=f"downloading {name}", total=total, unit="B", unit_scale=True, initial=done)
            try:
                with progress, part.open("ab") as file:
                    # As it is on the wire: a .tar.gz that a server calls "encoded" must not be unpacked.
                    for piece in response.raw.stream(PIECE, decode_content=False):
                        file.write(piece)
                        progress.update(len(piece))
            except OSError:
                if not (validator or sha256):
                    _remove(part)  # nothing could ever go on from it
                raise
            if total not in {None, part.stat().st_size}:
                raise requests.ConnectionError("the connection was dropped")
            return name

    return _patiently(url, once, lambda: part.stat().st_size if part.is_file() else 0)


def _validator(response: requests.Response) -> str:
    """What tells that a file is still the same: a strong ETag, or else its date."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _name_of(url: str, response: requests.Response) -> str:
    """The file's name: what the server calls it, or the end of the address, or of where that led."""
    header = email.message.Message()
    header["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    names = [unquote(urlsplit(address).path).rpartition("/")[2] for address in (url, response.url)]
    return _safe_name(header.get_filename() or next((name for name in names if "." in name), names[0]))


def _patiently(
    url: str, once: Callable[[], T], size: Callable[[], int] = lambda: 0, also: str = MIRRORS
) -> T:
    """Call ``once`` until it succeeds or there is no hope; as long as ``size`` grows, there is.

    Raises:
        HeadstartError: what went wrong the last time.
    """
    import requests
    import urllib3

    attempt, most = 0, size()
    while True:
        try:
            return once()
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            response = getattr(error, "response", None)
            trouble = _trouble(url, None if response is None else response.status_code, error, also)
            asked = "" if response is None else response.headers.get("Retry-After", "")
        attempt, most = (1, size()) if size() > most else (attempt + 1, most)
        if not trouble.transient or attempt >= ATTEMPTS:
            raise trouble
        jittered = BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1)  # noqa: S311
        time.sleep(min(max(_seconds(asked), jittered), LONGEST_PAUSE))


def _seconds(retry_after: str) -> float:
    """A Retry-After header, which is a number or a date, as seconds from now."""
    with contextlib.suppress(ValueError):
        return float(retry_after)
    with contextlib.suppress(ValueError, TypeError):
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    return 0.0


def _trouble(url: str, status: int | None, error: BaseException, also: str) -> HeadstartError:
    """One error for whatever went wrong between here and there, without a word that could be secret."""
    import requests

    where = (
        redacted(url) if _mirrored(url) == url else f"{redacted(url)}, asked at {redacted(_mirrored(url))}"
    )
    look, transient = "check the source in the recipe", False
    wait = f"check the network and try again; where that is no use, {also} (docs/how-to/offline.md)"
    cause: BaseException = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else type(cause).__name__
    if status in {404, 410}:
        what, do = "there is nothing at this address", look
    elif status in {401, 403}:
        what, do = "access is refused", "check the address, and the login in ~/.netrc or HF_TOKEN"
    elif status is not None:
        transient = status >= 500 or status in RETRIED
        what, do = f"the server answered {status}", wait if transient else look
    elif isinstance(error, requests.exceptions.SSLError):
        what, do = f"no secure connection: {reason}", "check the certificates: REQUESTS_CA_BUNDLE"
    elif isinstance(error, ValueError) and not isinstance(error, FileNotFoundError):
        what, do = f"not an address: {reason}", look
    else:
        what, do, transient = f"could not download: {reason}", wait, True
    return HeadstartError(what, where, do, transient=transient)


class Kind(NamedTuple):
    """A kind of URI: how it must be written, what to do if it is not, and who brings it."""

    pattern: str
    do: str
    get: Getter | None


KINDS = {
    "pip": Kind(
        r"pip:([A-Za-z0-9][\w.-]*)==([\w.!+-]+)(\?sdist)?",
        "write pip:NAME==VERSION with one exact version, and ?sdist after it for the source distribution",
        _from_pip,
    ),
    "hf": Kind(
        r"hf:([\w.-]+(?:/[\w.-]+)?)@([0-9a-f]{40})",
        "write hf:OWNER/REPO@COMMIT, with the 40 hex digits of a commit from the repository's history",
        _from_hub,
    ),
    "torchvision": Kind(
        r"torchvision:(\w+_Weights\.\w+)",
        "write it as torchvision:ResNet18_Weights.IMAGENET1K_V1",
        _from_torchvision,
    ),
    "https": Kind(r"https://[^\s/]+\S*", "write it as https://example.com/data.zip", _from_http),
    "http": Kind(r"http://[^\s/]+\S*", "write it as http://example.com/data.zip", _from_http),
    "file": Kind(r"(?s)file:.+", "write it as file:inbox/photos", None),
}
