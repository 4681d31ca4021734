"""A real browser for tests of pages: Debian's Chromium, headless, and kept on this machine.

A test module asks for it with ``pytest_plugins = ["tests.browser"]``, and imports ``opened`` from here, which
is before pytest could rewrite what is asserted here: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.debian import missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
INLINE = {"about", "blob", "data", "file"}
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


# Not for the whole session: while Playwright runs, its event loop counts as running in this thread, and no
# other test could call asyncio.run.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, closed when the module's tests are done."""
    from playwright.sync_api import sync_playwright

    if not Path(CHROMIUM).exists():
        missing("chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def for_documents(otherwise: Path) -> Path:
    """The folder that pictures for the documents go to, if somebody wants them."""
    folder = Path(os.environ.get("HEADSTART_SCREENSHOTS", otherwise))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def colours(path: Path) -> int:
    """How many there are in a picture: a blank page has a handful."""
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 24) or ())


@contextmanager
def opened(
    browser: Browser,
    url: str,
    width: int = 1200,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
) -> Iterator[Page]:
    """A page; when done, it must have had no error and asked for nothing beyond this machine.

    Args:
        browser: the fixture.
        url: ``http:`` on loopback, or ``file:``.
        width: of the window, in CSS pixels; below 600 it is taken for a phone.
        height: likewise.
        scheme: the colours that the reader prefers.
    """
    faults: list[str] = []

    def stay_here(route: Route) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in INLINE or address.hostname in LOOPBACK:
            route.continue_()
        else:
            faults.append(f"asked for {route.request.url}")
            route.abort()

    phone = width < 600
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
        has_touch=phone,
    )
    try:
        context.route("**/*", stay_here)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.goto(url)
        yield page
        if faults:
            pytest.fail("\n".join(faults))
    finally:
        context.close()
