from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from headstart import report, stages
from headstart.charts import Axis
from headstart.errors import HeadstartError
from headstart.layout import Layout
from headstart.recipe import Recipe, load
from tests import examples
from tests.browser import colours, for_documents, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest_plugins = ["tests.browser"]
pytestmark = pytest.mark.xdist_group("report")

ROOT = Path(__file__).parents[1]
SHOWN = "solar-cells-tuned"  # whose report the documents show
HOSTILE = "<script>document.title = 'mine'</script>"
REFUSED = {
    "promoted": False,
    "checks": [
        {"rule": "floor", "passed": True, "words": "accuracy 0.900, at least the floor of 0"},
        {"rule": "min_gain", "passed": False, "words": "a gain of +0.010, not shown to be more than 0"},
    ],
    "reasons": ["a gain of +0.010, not shown to be more than 0"],
    "figures": {"candidate": 0.9, "against": 0.89, "gain": 0.01, "gain_low": -0.02, "gain_high": 0.03},
    "by_domain": {"a": 0.02, "b": -0.01},
    "version": "7",
    "against": "4",
    "action": "refused",
    "because": ["a gain of +0.010, not shown to be more than 0"],
    "before": "4",
    "champion": "4",
}
PROMOTED = REFUSED | {
    "promoted": True,
    "checks": [{"rule": "min_gain", "passed": True, "words": "a gain of +0.040, more than 0"}],
    "reasons": ["a gain of +0.040, more than 0"],
    "action": "promoted",
    "champion": "7",
}
FORCED = REFUSED | {"action": "forced", "because": ["the audit wants it"], "champion": "7"}


def through(root: Path, name: str) -> tuple[Recipe, Layout]:
    """Run every stage of a recipe in this process."""
    recipe, layout = load(root / "recipes" / f"{name}.yaml"), Layout(root, name)
    start = root / recipe.ingest.source.removeprefix("file:")
    layout.raw.mkdir(parents=True)
    (shutil.copytree if start.is_dir() else shutil.copy2)(start, layout.raw / start.name)
    for stage in stages.STAGES:
        stages.run(stage, recipe, layout)
    return recipe, layout


@pytest.mark.parametrize("values", [[0.97, 0.97], [0.97, 0.97 + 1e-12], [0.0], [-3.0, -3.0, -3.0]])
def test_an_axis_of_equal_values_has_ticks_that_differ(values: list[float]) -> None:
    axis = Axis.around("score", values)
    assert len({words for _, words in axis.ticks}) == len(axis.ticks) > 2
    assert 0.2 < axis.share(values[0]) < 0.8
    assert 0.1 < (axis.high - axis.low) / abs(values[0] or 1) < 3


def test_rows_of_many_classes_in_many_domains_are_counted_in_totals() -> None:
    classes, domains = (names.ravel() for names in np.meshgrid(np.arange(1000), np.arange(200)))
    rows = pd.DataFrame({"class": classes, "domain": domains, "split": "train"})
    rows = pd.concat([rows, rows[rows["class"] >= 990].assign(split="test")])
    by_class, by_domain = report._counted(rows)
    assert by_class["title"] == "Rows per class and split"
    assert by_class["of_all"] == f", of the {report.MOST_LINES} largest of 1,000"
    assert by_class["lines"][-1] == [999, 200, 0, 200]
    assert by_domain["of_all"] == "" and len(by_domain["lines"]) == 200
    assert by_domain["lines"][0] == [0, 1000, 0, 10]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Recipe, Layout]]]:
    """A text project with a hostile class, hostile texts and wrong labels; and an image project."""
    here = Path.cwd()
    root = tmp_path_factory.mktemp("reported")
    (root / "recipes").mkdir()
    examples.write_text_project(root, rows=360)
    csv = root / "start" / "moods.csv"
    table = pd.read_csv(csv)
    table.loc[::3, "mood"] = HOSTILE  # a third class, of good and bad words alike: hard to tell
    table["body"] += " <img src=x onerror=alert(1)> & <b>bold</b>"
    table.to_csv(csv, index=False)
    recipe = root / "recipes" / "moods.yaml"
    recipe.write_text("# from https://user:password@example.com/moods.csv\n" + recipe.read_text())
    examples.write_image_project(root)
    for i in range(0, 30, 4):  # wrong labels, for mistakes
        dark, light = (root / "start" / "photos" / side / f"{i:03}.png" for side in ("dark", "light"))
        dark.rename(light.with_name("swap.png"))
        light.rename(dark)
        light.with_name("swap.png").rename(light)
    examples.write_text_project(root, "moved")
    csv = root / "start" / "moved.csv"
    table = pd.read_csv(csv)
    table.loc[table["shop"] == "b", "body"] += " & it was a plan to watch the garden"
    table.to_csv(csv, index=False)
    examples.write_recipe(
        root / "recipes" / "moved.yaml",
        ingest={"source": "file:start/moved.csv"},
        validate={"adapter": "table", "columns": {"text": "body", "label": "mood", "domain": "shop"}}
        | {"target_domain": "b"},
        fetch={"backbone": "transformers:bert", "source": "file:start/bert"},
        train={"method": "domain_adaptation", "adaptation": "standardisation"},
    )
    os.chdir(root)
    found = {name: through(root, name) for name in ("moods", "photos", "moved")}
    report.write(*found["moods"], REFUSED)
    report.write(*found["photos"])
    report.write(*found["moved"])
    yield found
    os.chdir(here)


@pytest.fixture
def changed(made: dict[str, tuple[Recipe, Layout]], tmp_path: Path) -> tuple[Recipe, Layout]:
    """A copy of the text project, to be changed."""
    recipe, layout = made["moods"]
    shutil.copytree(layout.root, tmp_path / "copy")
    return recipe, Layout(tmp_path / "copy", layout.recipe)


def address(made: dict[str, tuple[Recipe, Layout]], name: str) -> str:
    return (made[name][1].report / "report.html").as_uri()


def tell(layout: Layout, **said: Any) -> None:
    """Change what ``model.json`` says."""
    path = layout.model / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def words(page: Page, selector: str) -> str:
    return " ".join(page.locator(selector).inner_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moods", "photos", "moved"])
@pytest.mark.parametrize("width", [375, 768, 1200])
def test_a_report_opens_without_a_network_and_never_scrolls_sideways(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser, name: str, width: int
) -> None:
    with opened(browser, address(made, name), width=width) as page:
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
        assert page.locator("main section").count() >= 7
        requests: list[str] = page.evaluate("performance.getEntriesByType('resource').map(each => each.name)")
        assert all(request.startswith("data:") for request in requests)


@pytest.mark.slow
def test_mistaken_pictures_are_shown_with_what_mattered(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser
) -> None:
    with opened(browser, address(made, "photos")) as page:
        pictures = page.locator("#mistakes img")
        assert pictures.count() >= 2
        loaded = pictures.evaluate_all(
            "all => all.every(one => one.complete && one.naturalWidth > 0 && one.alt)"
        )
        assert loaded


@pytest.mark.slow
def test_mistaken_texts_are_shown_whole_with_a_number_for_each_word(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser
) -> None:
    _, layout = made["moods"]
    texts = set(pd.read_parquet(layout.manifest / "manifest.parquet")["text"])
    with opened(browser, address(made, "moods")) as page:
        shown = page.locator("#mistakes .text")
        assert shown.count() > 0
        for i in range(shown.count()):
            assert shown.nth(i).text_content() in texts
        numbers = page.locator("#mistakes .text span").evaluate_all("all => all.map(one => one.title)")
        assert any(float(number.replace("\N{MINUS SIGN}", "-")) != 0 for number in numbers)


@pytest.mark.slow
def test_what_users_wrote_is_text_and_never_runs(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser
) -> None:
    with opened(browser, address(made, "moods")) as page:
        assert page.title() == "moods: report"
        assert page.locator("script").count() == 1
        assert page.locator("img").count() == 0
        assert HOSTILE in words(page, "header")
        assert "<b>bold</b>" in words(page, "#mistakes")
    card = (made["moods"][1].report / "model-card.md").read_text()
    assert "<script>" not in card.replace("\\<", "")


@pytest.mark.slow
def test_tables_sort_by_click_and_by_keyboard(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser
) -> None:
    with opened(browser, address(made, "moods")) as page:
        table = page.locator("#domains table").nth(1)
        column = "trs => trs.map(tr => Number(tr.cells[2].textContent))"
        heading = table.locator("th", has_text="recall")
        heading.locator("button").click()
        rising = table.locator("tbody tr").evaluate_all(column)
        assert heading.get_attribute("aria-sort") == "ascending"
        assert rising == sorted(rising)
        heading.locator("button").focus()
        page.keyboard.press("Enter")
        assert heading.get_attribute("aria-sort") == "descending"
        assert table.locator("tbody tr").evaluate_all(column) == rising[::-1]
        table.locator("th", has_text="precision").locator("button").click()
        assert heading.get_attribute("aria-sort") == "none"


CONTRASTS = """() => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colour, below) => {
    pen.fillStyle = `rgb(${below})`; pen.fillRect(0, 0, 1, 1);
    pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (rgb) => rgb.map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].filter((node) => node.nodeType === 3);
    const text = own.map((node) => node.data.trim()).join("");
    if (!text || each.closest("script, .hidden, .skip") || !each.getClientRects().length) continue;
    const chain = []; for (let up = each; up; up = up.parentElement) chain.unshift(up);
    const grounds = chain.map((up) => getComputedStyle(up).backgroundColor);
    const ground = grounds.reduce((below, colour) => over(colour, below), [255, 255, 255]);
    const style = getComputedStyle(each), svg = each instanceof SVGElement;
    const ink = over(svg ? style.fill : style.color, ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moods", "photos", "moved"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser, name: str, scheme: Any
) -> None:
    with opened(browser, address(made, name), scheme=scheme) as page:
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 100
        assert not [(ratio, text) for ratio, text in contrasts if ratio < 4.5]


@pytest.mark.slow
def test_the_page_is_dark_for_who_prefers_that(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser
) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        with opened(browser, address(made, "moods"), scheme=scheme) as page:
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = {s: sum(map(int, g.removeprefix("rgb(")[:-1].split(","))) for s, g in grounds.items()}
    assert brightness["light"] > 600
    assert brightness["dark"] < 150


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moods", "photos", "moved"])
def test_a_screen_reader_finds_its_way(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser, name: str
) -> None:
    with opened(browser, address(made, name)) as page:
        levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(one => Number(one.tagName[1]))")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        for landmark in ("main", "nav[aria-label]", "header"):
            assert page.locator(landmark).count() == 1
        assert page.locator("table:not(:has(caption))").count() == 0
        assert page.locator("th:not([scope])").count() == 0
        named = "svg[role=img][aria-label], svg[role=img]:has(title):has(desc), svg[aria-hidden=true]"
        assert page.locator("svg").count() == page.locator(named).count()
        ids = page.locator("[id]").evaluate_all("all => all.map(one => one.id)")
        assert len(ids) == len(set(ids))
        targets = page.locator("nav a").evaluate_all(
            "all => all.map(one => one.getAttribute('href').slice(1))"
        )
        assert set(targets) <= set(ids)


@pytest.mark.slow
def test_the_decision_and_its_reasons_are_in_words(
    changed: tuple[Recipe, Layout], made: dict[str, tuple[Recipe, Layout]], browser: Browser
) -> None:
    with opened(browser, address(made, "moods")) as page:
        said = words(page, "#decision")
        for part in ("Refused", "version 4 stays champion", "passed", "failed", *REFUSED["reasons"]):
            assert part in said
        assert "+0.020" in words(page, "#domains")
    with opened(browser, address(made, "photos")) as page:
        assert "Not judged yet" in words(page, "#decision")
    with opened(browser, report.write(*changed, PROMOTED).as_uri()) as page:
        assert "Promoted Version 7 is champion now, in place of version 4" in words(page, "#decision")
    first = PROMOTED | {"against": None, "before": None}
    with opened(browser, report.write(*changed, first).as_uri()) as page:
        assert "is champion now, the first" in words(page, "#decision")
    with opened(browser, report.write(*changed, FORCED).as_uri()) as page:
        said = words(page, "#decision")
        assert "Promoted by force Version 7 is champion now, in place of version 4, by force: the a" in said
        assert "Why the gate refused it" in said


@pytest.mark.parametrize(
    ("verdict", "told"),
    [
        (REFUSED, "Version 7 was not promoted: version 4 stays champion."),
        (REFUSED | {"champion": "8"}, "Version 7 was not promoted. Version 8 is champion now."),
        (REFUSED | {"before": None, "champion": None}, "Version 7 was not promoted. There is no champion."),
        (PROMOTED, "Version 7 is champion now, in place of version 4."),
        (PROMOTED | {"before": None}, "Version 7 is champion now, the first."),
        (
            PROMOTED | {"champion": "8"},
            "Version 7 became champion, in place of version 4. Version 8 is champion now.",
        ),
        (FORCED, "Version 7 is champion now, in place of version 4, by force: the audit wants it."),
        (
            PROMOTED
            | {"action": "rolled back", "before": "7", "champion": "4"}
            | {"because": ["it calls everything happy", "version 4 is champion again"]},
            "Version 7 was rolled back from: it calls everything happy. Version 4 is champion now.",
        ),
    ],
)
def test_the_latest_decision_is_told_and_who_is_champion_now(verdict: dict[str, Any], told: str) -> None:
    assert report._told(verdict) == told


@pytest.mark.slow
def test_the_lineage_says_what_the_model_was_made_from_but_no_secret(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser
) -> None:
    _, layout = made["moods"]
    stamps = json.loads((layout.model / "model.json").read_text())["stamps"]
    html = (layout.report / "report.html").read_text()
    assert "user:password" not in html
    assert "example.com/moods.csv" in html
    with opened(browser, address(made, "moods")) as page:
        said = words(page, "#lineage")
        for part in (stamps["data"], stamps["backbone"], "torch", "cores", "train", "evaluate"):
            assert part in said


@pytest.mark.slow
def test_a_fine_tuned_model_shows_its_learning_curves(
    changed: tuple[Recipe, Layout], browser: Browser
) -> None:
    _, layout = changed
    steps = [{"step": s, "epoch": 1 + (s > 20), "loss": 1 / s, "accuracy": 0.5} for s in range(1, 41)]
    scored = {"accuracy": 0.7, "balanced_accuracy": 0.7, "auroc": 0.8, "log_loss": 0.5}
    pd.DataFrame(steps).to_csv(layout.model / "steps.csv", index=False)
    epochs = pd.DataFrame([{"epoch": e, "step": 20 * e, **scored} for e in range(3)])
    epochs.to_csv(layout.model / "epochs.csv", index=False)
    tell(layout, epoch=2, epochs=2)
    with opened(browser, report.write(*changed).as_uri()) as page:
        said = words(page, "#training")
        assert "Epoch 2 of 2 was kept" in said
        assert page.locator("#training polyline").count() == 4


@pytest.mark.slow
def test_an_adapted_model_tells_of_the_shift_and_of_every_way_to_adapt(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser
) -> None:
    _, layout = made["moved"]
    model = json.loads((layout.model / "model.json").read_text())
    metrics = json.loads((layout.evidence / "metrics.json").read_text())
    accuracy = metrics["test"]["accuracy"]["value"]
    with opened(browser, address(made, "moved")) as page:
        said = words(page, "#shift")
        for part in (
            model["shift"]["words"][0],
            "standardisation: named in the recipe",
            "none of these figures decided",
            f"{model['expected_accuracy']['value']:.2f} was expected",
            f"Measured is {accuracy:.2f}",
        ):
            assert " ".join(part.split()) in said
        for view in ("before", "after"):
            figure = page.locator(f"#shift figure:has(#plane-{view}-title)")
            assert 100 < figure.locator("svg[role=img] circle").count() <= 600
        assert page.locator("#shift polyline").count() == 0
        lines = page.locator("#shift table:has-text('true accuracy') tbody tr")
        told = {line.split()[0]: line.split() for line in lines.all_inner_texts()}
        assert set(told) == set(model["candidates"])
        assert [way for way, line in told.items() if "chosen" in line] == ["standardisation"]
        assert told["standardisation"][-2] == f"{accuracy:.3f}"  # of so few rows it is the very head
        assert f"{model['candidates']['coral']['diversity']:.3f}" in told["coral"]


@pytest.mark.slow
def test_without_a_label_of_the_target_no_way_to_adapt_is_said_to_be_right(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser, tmp_path: Path
) -> None:
    recipe, layout = made["moved"]
    shutil.copytree(layout.root, tmp_path / "copy")
    layout = Layout(tmp_path / "copy", layout.recipe)
    labels = layout.truth / "labels.parquet"
    pd.read_parquet(labels).iloc[:0].to_parquet(labels)
    tell(layout, decided_by="shift")
    rows = pd.read_parquet(layout.model / "projection.parquet")
    rows[rows["view"] == "before"].to_parquet(layout.model / "projection.parquet")
    stages.run("evaluate", recipe, layout)
    with opened(browser, report.write(recipe, layout).as_uri()) as page:
        said = words(page, "#shift")
        assert "true accuracy" not in said
        assert "Nothing of it can be measured" in said
        assert "None of these figures decided alone" in said
        assert "leaves every row where it is" in said


@pytest.mark.slow
def test_a_model_that_abstains_says_how_often_it_answers(
    changed: tuple[Recipe, Layout], browser: Browser
) -> None:
    _, layout = changed
    decision = json.loads((layout.model / "model.json").read_text())["decision"]
    tell(layout, decision=decision | {"abstain": 0.5})
    rows = pd.read_parquet(layout.model / "predictions.parquet")
    likeliest = rows.loc[rows["split"] == "test"].filter(like="p:").max(axis=1)
    with opened(browser, report.write(*changed).as_uri()) as page:
        assert f"it answers {(likeliest >= 0.5).mean():.0%} of the test rows" in words(page, "#decision")


@pytest.mark.slow
def test_a_long_list_of_rows_says_what_is_left_out(
    changed: tuple[Recipe, Layout], browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_LINES", 2)
    with opened(browser, report.write(*changed).as_uri()) as page:
        said = words(page, "#data")
    assert "Rows per class and split, of the 2 largest of 3" in said and "all together 216 72 72" in said
    assert "Rows per domain and split" in said and "Rows per class, domain and split" not in said


@pytest.mark.slow
def test_a_stage_notes_how_long_it_took(made: dict[str, tuple[Recipe, Layout]]) -> None:
    _, layout = made["moods"]
    noted = json.loads((layout.work / stages.SECONDS).read_text())
    assert set(noted) == set(stages.STAGES)
    assert all(seconds >= 0 for seconds in noted.values())
    assert [file.name for file in layout.work.iterdir() if "partial" in file.name] == []


@pytest.mark.slow
def test_without_evidence_there_is_no_report_and_the_error_says_what_to_do(
    changed: tuple[Recipe, Layout],
) -> None:
    _, layout = changed
    before = (layout.report / "report.html").read_bytes()
    shutil.rmtree(layout.evidence)
    with pytest.raises(HeadstartError, match="nothing to report") as raised:
        report.write(*changed)
    assert raised.value.do == "run `headstart run recipes/moods.yaml`"
    assert (layout.report / "report.html").read_bytes() == before


@pytest.mark.slow
def test_screenshots_for_the_documents(
    made: dict[str, tuple[Recipe, Layout]], browser: Browser, tmp_path: Path
) -> None:
    real = Layout(ROOT, SHOWN).report / "report.html"
    page = real.as_uri() if real.exists() else address(made, "photos")
    folder = for_documents(tmp_path)
    take(browser, page, folder)
    for name, width in (("report-light", 1200), ("report-dark", 1200), ("report-phone", 375)):
        with Image.open(folder / f"{name}.png") as shown:
            assert shown.width % width == 0  # a phone has several dots a pixel
        assert colours(folder / f"{name}.png") > 100  # and no page that is blank


def take(browser: Browser, url: str, folder: Path) -> None:
    """Pictures of a report: its top, its mistakes in dark colours, and its top on a phone."""
    with opened(browser, url, height=1500) as page:
        page.screenshot(path=folder / "report-light.png")
    with opened(browser, url, height=1100, scheme="dark") as page:
        page.locator("#mistakes").scroll_into_view_if_needed()
        page.evaluate("document.documentElement.style.scrollBehavior = 'auto'; location.hash = 'mistakes'")
        page.screenshot(path=folder / "report-dark.png")
    with opened(browser, url, width=375, height=812) as page:
        page.screenshot(path=folder / "report-phone.png")
