"""Packages: a wheel or sdist as a mere file, from wherever pip on this machine would get it.

Goes in: ``pip:NAME==VERSION``, and what pip's own files and environment say. Comes out: one file, which
the index and the recipe determine and the platform does not, and the sha256 that the index promises.
Never installs, builds, unpacks or runs a package, and never asks an index that pip would not.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from headstart.downloads import SECURE, TIMEOUT, download, mirrored, patiently, redacted, safe_name
from headstart.errors import HeadstartError

if TYPE_CHECKING:
    import requests

PATTERN = r"[A-Za-z0-9][\w.-]*==[\w.!+-]+(\?sdist)?"
ADVICE = "write pip:NAME==VERSION with one exact version, and ?sdist after it for the source distribution"
TRUE = {"1", "true", "yes", "on", "y", "t"}


def bring(uri: str, part: Path, sha256: str | None) -> tuple[str, str]:
    """Have the wheel, or else the sdist, at ``part``; return its name and the sha256 promised ("" if none).

    Raises:
        HeadstartError: pip's places do not have it, or (transient) one of them is out of reach.
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import Version

    project, _, pinned = uri.removeprefix("pip:").partition("==")
    version, _, sdist = pinned.partition("?")
    try:
        wanted = SpecifierSet(f"=={version}")
    except InvalidSpecifier:
        raise HeadstartError(f"{version!r} is not a version", uri, ADVICE) from None
    pip = _settings()
    pages = _Pages(pip)
    packages, looked, transient = _offers(project, pip, pages)
    links = [
        package.link
        for package in packages
        if wanted.contains(package.version, prereleases=True) and not (sdist and package.link.is_wheel)
    ]
    if not links:
        newest = sorted({package.version for package in packages}, key=Version)[-12:]
        raise HeadstartError(
            f"pip's indexes have no {sdist or 'file'} of {project} {version}",
            uri,
            "check name and version, and which index pip uses: `pip config list`, PIP_INDEX_URL",
            [*looked, f"versions there: {', '.join(newest) or 'none'}"],
            transient,
        )

    def preference(link: Any) -> tuple[object, ...]:
        """The pinned bytes first; then the same choice on every machine, whatever its platform."""
        return (_promised(link) != sha256, not link.is_wheel, "-none-any" not in link.filename, link.filename)

    link = min(links, key=preference)
    if not link.is_file:
        download(link.url_without_fragment, part, sha256, **pages.options(link.url))
    elif link.file_path.is_file():
        shutil.copyfile(link.file_path, part)
    else:
        what = "pip's index names a file that is not there"
        raise HeadstartError(what, str(link.file_path), "mend the index")
    return safe_name(link.filename), _promised(link)


def _promised(link: Any) -> str:
    """The sha256 that the index gives for a file, or ""."""
    return str((link.hash_option or {}).get("sha256", [""])[0])


def _settings() -> dict[str, str]:
    """What pip is told by its files, as pip itself reads them, and by the environment: option -> value."""
    listing = ""
    for pip in ([sys.executable, "-m", "pip"], ["pip"]):  # an environment need not hold pip itself
        with contextlib.suppress(OSError):
            command, loud = [*pip, "config", "list"], os.environ | {"PIP_QUIET": "0"}
            listing = subprocess.run(command, env=loud, capture_output=True, text=True, check=False).stdout
        if listing:
            break
    told = [  # what comes later counts for more
        (option, str(ast.literal_eval(value)))
        for section in ("global", "install", "download")
        for option, value in re.findall(rf"(?m)^{section}\.([\w-]+)=(['\"].*)$", listing)
    ]
    variables = [(name, value) for name, value in os.environ.items() if name.startswith("PIP_")]
    told += [(name[4:].lower().replace("_", "-"), value) for name, value in variables]
    return {option: value for option, value in told if value.strip()}


def _offers(project: str, pip: Mapping[str, str], pages: _Pages) -> tuple[list[Any], list[str], bool]:
    """All that pip's places have of a project; what was found in each; and whether one was out of reach."""
    from unearth import PackageFinder

    finder = PackageFinder(session=pages, ignore_compatibility=True)
    places = []
    if pip.get("no-index", "").lower() not in TRUE:
        indexes = [pip.get("index-url", finder.sources[0]["url"]), *pip.get("extra-index-url", "").split()]
        places += [(url, "index") for url in indexes]
    for url in pip.get("find-links", "").split():
        places.append((url if "://" in url else str(Path(url).expanduser()), "find_links"))
    packages, looked, transient = [], [], False
    for url, kind in places:
        finder.sources = [{"url": url, "type": kind}]
        found: list[Any] = []
        try:
            with contextlib.suppress(ValueError):  # a folder that is not there
                found = list(finder.find_all_packages(project, allow_yanked=True))
            looked.append(f"{redacted(url)}: {len(found) or 'no'} files of {project}")
        except HeadstartError as error:
            looked.append(f"{redacted(url)}: {error.what}")
            transient = transient or error.transient
        login, at, host = urlsplit(url).netloc.rpartition("@")
        for package in found:
            address = urlsplit(package.link.url)
            if at and address.netloc == host:  # as pip does: the index's login is good for its whole host
                address = address._replace(netloc=f"{login}@{host}")
            link = dataclasses.replace(package.link, url=address.geturl())
            packages.append(dataclasses.replace(package, link=link))
    return packages, looked, transient


class _Pages:
    """What unearth needs of a session: the pages of indexes, with headstart's mirrors and patience."""

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
            headers = {"Content-Type": "text/html"}
            return SimpleNamespace(
                url=url, status_code=200, reason="", headers=headers, content=content, encoding="utf-8"
            )
        import requests

        def once() -> requests.Response:
            address = mirrored(url)
            options = self.options(url) | {"headers": headers, "hooks": SECURE}
            page = requests.request(method, address, timeout=TIMEOUT, **options)
            page.raise_for_status()
            page.url = page.url if address == url else url  # links count from the original
            return page

        return patiently(url, once)

    head = functools.partialmethod(get, method="head")

    def iter_secure_origins(self) -> Iterator[tuple[str, str, str]]:
        """Scheme, host and port of what may be read without TLS."""
        from unearth.fetchers import DEFAULT_SECURE_ORIGINS

        yield from DEFAULT_SECURE_ORIGINS
        for trusted in self.trusted:
            host, _, port = trusted.partition(":")
            yield "*", host, port or "*"
