"""Downloads: the bytes of a web address, through whatever the network does on the way.

Goes in: an address, and what an earlier attempt left of it. Comes out: the complete file at the path that
the caller chose, and its name; or what went wrong, in words. Never decodes, unpacks or verifies what it
brings, and never tells a credential.
"""

from __future__ import annotations

import contextlib
import email.message
import email.utils
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from headstart.errors import HeadstartError
from headstart.progress import bar

if TYPE_CHECKING:
    import requests

T = TypeVar("T")

ATTEMPTS = 4  # in a row without a single new byte
BACKOFF = 0.5  # seconds: the first pause, doubled each time
LONGEST_PAUSE = 120.0  # seconds: the most a server may ask for
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
PIECE = 1 << 16  # bytes; the most that a dropped connection costs
RETRIED = {408, 425, 429}  # besides 5xx
MIRRORS = "set HEADSTART_MIRRORS"


# An address in a text; what a sentence or a quotation puts behind it is none of it.
ADDRESS = re.compile(r"//[^\s\"<>]*[^\s\"<>'`)\]},;.]")
# A login, even with a slash in its password: no port has letters.
LOGIN = re.compile(r"//(?:[^/\s]*|[^/:\[\s]*:(?!\d*/)\S*)@")
# In a text that leaves out the start of an address, as errors of web clients do.
VALUE = re.compile(r"([?&][^\s=&#?]+=)[^\s&#\"]*[^\s&#\"'`)\]},;.]")


def redacted(text: str) -> str:
    """Text without what may be secret in the addresses in it: before the ``@``, and after ``?`` or ``;``."""
    return VALUE.sub(r"\1***", ADDRESS.sub(_bare, text))


def _bare(address: re.Match[str]) -> str:
    place, mark, member = LOGIN.sub("//***@", address[0], count=1).partition("#")
    return re.sub(r";[^/?]+", ";***", re.sub(r"\?.+", "?***", place)) + mark + member


def safe_name(name: str) -> str:
    """A file name from elsewhere as any disk takes it, its suffix kept."""
    last = name.replace("\\", "/").rpartition("/")[2]
    named = re.sub(r"[^\w.+-]+", "_", last).encode()[-120:].decode(errors="ignore")  # disks count bytes
    return named.lstrip(".") or "download"


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def facts(path: Path) -> dict[str, Any]:
    """A small JSON file; empty if it is missing or damaged, so that nobody need write it in one go."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def mirrored(url: str) -> str:
    """The address to ask instead, by the first pair in HEADSTART_MIRRORS that fits.

    Raises:
        HeadstartError: HEADSTART_MIRRORS is misspelt.
    """
    for pair in os.environ.get("HEADSTART_MIRRORS", "").split():
        match = re.fullmatch(r"(https?://.*?)=(https?://.*)", pair)
        if not match:
            do = "write it as https://example.com/=https://mirror.example.com/, with spaces between pairs"
            raise HeadstartError("HEADSTART_MIRRORS is not a list of PREFIX=PREFIX", redacted(pair), do)
        if url.startswith(match[1]):
            return match[2] + url.removeprefix(match[1])
    return url


def download(url: str, part: Path, sha256: str | None, **options: Any) -> str:
    """Bring an address's bytes to ``part``, going on from what an earlier attempt left; return their name.

    Only a file that is still the same goes on: its ETag or date must match, or a sha256 tell in the end.
    ``part``.json says which address and which of its contents the bytes in ``part`` are from.

    Raises:
        HeadstartError: there is nothing to be had, the way leads from https: to http:, or (transient)
            trouble on the way lasted.
    """
    import requests

    state, address = part.with_name(f"{part.name}.json"), redacted(url)

    def once() -> str:
        known = facts(state)
        if known.get("url") != address:
            remove(part)
        before = known.get("validator", "")
        done = _size(part) if before or sha256 else 0
        headers = {
            # As it is on the wire: a .tar.gz that a server calls "encoded" must not be unpacked.
            "Accept-Encoding": "identity",
            "Range": f"bytes={done}-" if done else None,
            "If-Range": before if done and before else None,
        }
        with requests.get(
            mirrored(url), headers=headers, timeout=TIMEOUT, stream=True, hooks=SECURE, **options
        ) as response:
            name, validator = _name_of(url, response), _validator(response)
            span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if response.status_code == 416 and span and span[2] == str(done):
                return name  # all of it is here already
            goes_on = response.status_code == 206 and span and span[1] == str(done)
            if response.status_code in {206, 416} and not (goes_on and before in {"", validator}):
                remove(part)
                raise requests.ConnectionError("the server has another file now")
            response.raise_for_status()
            if not goes_on:  # the old bytes go before the new validator comes: never one's with the other's
                remove(part)
                done = 0
            state.write_text(json.dumps({"url": address, "validator": validator}), encoding="utf-8")
            length = response.headers.get("Content-Length", "")
            total = done + int(length) if length.isdecimal() else None
            progress = bar(desc=f"downloading {name}", total=total, unit="B", unit_scale=True, initial=done)
            try:
                with progress, part.open("ab") as file:
                    for piece in response.raw.stream(PIECE, decode_content=False):
                        file.write(piece)
                        progress.update(len(piece))
            except OSError:
                if not (validator or sha256):
                    remove(part)  # nothing could ever go on from it
                raise
            if total not in {None, _size(part)}:
                raise requests.ConnectionError("the connection was dropped")
            return name

    return patiently(url, once, lambda: _size(part))


def _stays_secure(response: requests.Response, **_: Any) -> None:
    """Follow no redirect to where anyone on the way may read the address and change what comes."""
    leads = urljoin(response.url, response.headers.get("Location", ""))
    if response.is_redirect and urlsplit(response.url).scheme == "https" != urlsplit(leads).scheme:
        raise HeadstartError(
            "the server leads from https: to an address without encryption",
            where=f"{redacted(response.url)} leads to {redacted(leads)}",
            do="name an https: address that brings the file itself, or the http: one, pinned by its sha256",
        )


SECURE = {"response": _stays_secure}  # for requests


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _validator(response: requests.Response) -> str:
    """What tells that a file is still the same: a strong ETag, or else its date."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _name_of(url: str, response: requests.Response) -> str:
    """The file's name: what the server calls it, or the end of the address, or of where that led."""
    header = email.message.Message()
    header["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    names = [unquote(urlsplit(address).path).rpartition("/")[2] for address in (url, response.url)]
    return safe_name(header.get_filename() or next((name for name in names if "." in name), names[0]))


def patiently(url: str, once: Callable[[], T], size: Callable[[], int] = lambda: 0, also: str = MIRRORS) -> T:
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
            problem, answer = trouble(url, error, also), _answer(error)
            asked = answer.headers.get("Retry-After", "") if answer is not None else ""
        attempt, most = (1, size()) if size() > most else (attempt + 1, most)
        if not problem.transient or attempt >= ATTEMPTS:
            raise problem
        jittered = BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1)  # noqa: S311
        time.sleep(min(max(_seconds(asked), jittered), LONGEST_PAUSE))


def _answer(error: BaseException) -> Any:
    """What the server answered, if it did; an answer that says no is false."""
    answers = (getattr(each, "response", None) for each in (error, error.__cause__))
    return next((answer for answer in answers if answer is not None), None)


def _seconds(retry_after: str) -> float:
    """A Retry-After header, which is a number or a date, as seconds from now."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(retry_after))  # in this order NaN is 0
    with contextlib.suppress(ValueError, OverflowError):
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    return 0.0


def trouble(url: str, error: BaseException, also: str) -> HeadstartError:
    """One error for whatever went wrong between here and there, without a word that could be secret."""
    import requests

    status = getattr(_answer(error), "status_code", None)
    asked = mirrored(url)
    where = redacted(url) if asked == url else f"{redacted(url)}, asked at {redacted(asked)}"
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
    elif isinstance(error, ValueError):
        what, do = f"not an address: {reason}", look
    else:
        what, do, transient = f"could not download: {reason}", wait, True
    return HeadstartError(what, where, do, transient=transient)
