from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from headstart import drift_report
from headstart.drift import Side, detect
from headstart.layout import Layout
from headstart.monitoring import Monitored, Rows
from headstart.recipe import Recipe
from tests import cached, examples
from tests.browser import opened
from tests.test_report import CONTRASTS, HOSTILE, words

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest_plugins = ["tests.browser"]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("drift_report")]


def found_in(root: Path, modality: str, shift: float, labelled: bool = True) -> Monitored:
    """What monitoring finds where features move this far."""
    chance = np.random.default_rng(0)

    def side(rows: int, far: float) -> Side:
        vectors = chance.normal(size=(rows, 6)) + far
        p = 1 / (1 + np.exp(-vectors[:, 0]))
        inputs = {"brightness": vectors[:, 1], "width": np.full(rows, 64.0)}
        right = (chance.random(rows) < 0.7).astype(np.float64) if labelled else np.full(rows, np.nan)
        return Side(vectors, np.stack([1 - p, p], axis=1), (p > 0.5).astype(np.int64), inputs, right)

    known, recent = side(120, 0.0), side(40, shift)
    if modality == "image":
        examples.write_images(root / "images", per_class=20)
        items: list[Any] = sorted((root / "images").rglob("*.png"))
    else:
        items = [f"text {i} {HOSTILE} & <b>bold</b>" for i in range(40)]
    rows = Rows([f"row {i} {HOSTILE}" for i in range(40)], items, ["yes"] * 40 if labelled else [""] * 40)
    figures = {"accuracy": {"value": 0.9, "low": 0.85, "high": 0.95}}
    worse = {"accuracy": {"value": 0.7, "low": 0.6, "high": 0.8}}
    return Monitored(
        model="case",
        version="3",
        where=f"batch {HOSTILE}",
        classes=["no", "yes"],
        drift=detect(known, recent, ["no", "yes"]),
        known=known,
        recent=recent,
        rows=rows,
        unread=2,
        promised=figures,
        measured=worse if labelled else {},
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a page about drifted pictures with labels, and about texts that have not drifted."""
    made = {}
    for modality, shift in (("image", 2.0), ("text", 0.0)):
        root = tmp_path_factory.mktemp(modality)
        found = found_in(root, modality, shift, labelled=modality == "image")
        made[modality] = drift_report.write(recipe(), Layout(root, "case"), found).as_uri()
    return made


def recipe() -> Recipe:
    return cached.recipe()


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("width", [375, 1200])
def test_the_page_opens_without_a_network_and_never_scrolls_sideways(
    pages: dict[str, str], browser: Browser, modality: str, width: int
) -> None:
    with opened(browser, pages[modality], width=width) as page:
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
        requests: list[str] = page.evaluate("performance.getEntriesByType('resource').map(each => each.name)")
        assert all(request.startswith("data:") for request in requests)


def test_drift_is_told_in_words_with_its_tests_and_its_rows(pages: dict[str, str], browser: Browser) -> None:
    with opened(browser, pages["image"]) as page:
        said = words(page, "#verdict")
        for part in ("! Drift", "domain classifier", "AUROC", "KS", "PSI", "MMD²", "drift"):
            assert part in said
        assert "worse" in words(page, "#performance")
        assert "0.600 to 0.800" in words(page, "#performance")
        assert page.locator("#projection circle").count() == 120 + 40 + 2  # and two in the legend
        assert page.locator("#projection polyline").count() == 0
        titles = [each.inner_text() for each in page.locator("#distributions h3").all()]
        assert titles == ["Probability of yes", "Brightness"]  # the width never varies
        pictures = page.locator("#rows img")
        assert pictures.count() == drift_report.SHOWN
        assert pictures.evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")


def test_no_drift_is_told_as_such_and_the_texts_are_shown_as_they_are(
    pages: dict[str, str], browser: Browser
) -> None:
    with opened(browser, pages["text"]) as page:
        assert "No drift is shown" in words(page, "#verdict")
        assert page.locator("#performance").count() == 0
        assert page.locator("#rows .text").count() == drift_report.SHOWN
        assert HOSTILE in page.locator("#rows .text").first.inner_text()
        assert page.title() == "case: drift"
        assert page.locator("script").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(pages: dict[str, str], browser: Browser, scheme: Any) -> None:
    with opened(browser, pages["image"], scheme=scheme) as page:
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 80
        assert not [(ratio, text) for ratio, text in contrasts if ratio < 4.5]


def test_a_screen_reader_finds_its_way(pages: dict[str, str], browser: Browser) -> None:
    with opened(browser, pages["image"]) as page:
        levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(one => Number(one.tagName[1]))")
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert page.locator("table:not(:has(caption))").count() == 0
        ids = page.locator("[id]").evaluate_all("all => all.map(one => one.id)")
        assert len(ids) == len(set(ids))
        links = page.locator("nav a").evaluate_all("all => all.map(one => one.getAttribute('href').slice(1))")
        assert set(links) <= set(ids)


def test_features_of_one_dimension_that_never_varies_still_make_a_page(tmp_path: Path) -> None:
    found = found_in(tmp_path, "text", 0.0)
    flat = [replace(side, vectors=np.ones((len(side), 1))) for side in (found.known, found.recent)]
    page = drift_report.write(
        recipe(), Layout(tmp_path, "case"), replace(found, known=flat[0], recent=flat[1])
    )
    assert "NaN" not in page.read_text()
    assert "nan" not in page.read_text().replace("nance", "")
