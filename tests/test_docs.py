"""What the documents say is true: commands exist, recipes in them load, generated pages are current."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer

from headstart import cli
from headstart.layout import Layout
from headstart.recipe import load
from headstart.validation import validate
from tests import examples

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    pytest.param(language, body, id=f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}")
    for page, text in TEXT.items()
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for language, body in [match.groups()]
]


def of_language(*languages: str) -> list[object]:
    return [block for block in BLOCKS if block.values[0] in languages]


@pytest.mark.parametrize(("language", "body"), of_language("yaml"))
def test_every_recipe_in_the_docs_loads_and_is_short(language: str, body: str, tmp_path: Path) -> None:
    if "adapter:" not in body:
        pytest.skip("not a recipe")
    path = tmp_path / "shown.yaml"
    path.write_text(body, encoding="utf-8")
    load(path)
    assert len(body.strip().splitlines()) <= 15


@pytest.mark.parametrize(("language", "body"), of_language("sh"))
def test_every_command_in_the_docs_exists(language: str, body: str) -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in body.splitlines():
        if match := re.match(r"(?:\w+=\S+ )*headstart ([a-z-]+)([^#|]*)", line):
            assert match[1] in commands, line
            options = {name for parameter in commands[match[1]].params for name in parameter.opts}
            assert set(re.findall(r"(?<!\S)--[a-z-]+", match[2])) <= options | {"--help"}, line
        for target in re.findall(r"^make ([a-z-]+)", line):
            assert target in targets, line
        for recipe in re.findall(r"recipes/((?:solar-cells|sentiment)[a-z-]*|hymenoptera|bert)\.yaml", line):
            assert (ROOT / "recipes" / f"{recipe}.yaml").exists()


@pytest.mark.parametrize(("language", "body"), of_language("python"))
def test_every_python_block_in_the_docs_compiles(language: str, body: str) -> None:
    compile(body, "docs", "exec")


def test_the_adapter_in_the_docs_makes_rows_of_pictures_and_their_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = TEXT[ROOT / "docs/how-to/adapters.md"]
    (module,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (text,) = re.findall(r"^```yaml\n(# headstart run.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "skin.yaml").write_text(text, encoding="utf-8")
    chosen, layout = load(tmp_path / "skin.yaml"), Layout(tmp_path, "skin")
    name, _ = chosen.validate_.adapter.split(":")
    (tmp_path / f"{name}.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    examples.write_images(layout.raw, 40)
    files = sorted(path.relative_to(layout.raw) for path in layout.raw.rglob("*.png"))
    listed = [(file, file.parts[0], f"camera {i % 2}", f"patient {i // 2}") for i, file in enumerate(files)]
    table = pd.DataFrame(listed, columns=["file", "label", "camera", "patient"])
    table.to_csv(layout.raw / "labels.csv", index=False)
    validate(chosen, layout)
    manifest = pd.read_parquet(layout.manifest / "manifest.parquet").set_index("path")
    given = table.astype(str).set_index("file")
    assert manifest["label"].to_dict() == given["label"].to_dict()
    assert manifest["domain"].to_dict() == given["camera"].to_dict()
    assert manifest["group"].to_dict() == given["patient"].to_dict()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", TEXT[page]):
        if "://" in target:
            continue
        led = (page.parent / target).resolve() if target else page
        assert led.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", led.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in known, f"{target}#{anchor}"


@pytest.mark.parametrize(
    "name", ["recipes/recipe.schema.json", "docs/reference/recipe.md", "docs/reference/cli.md"]
)
def test_the_generated_pages_are_current(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs/reference/generate.py"), run_name="__main__")
    assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), (
        "run `make reference`"
    )


def test_every_environment_variable_in_the_code_is_documented() -> None:
    page = TEXT[ROOT / "docs/reference/environment.md"]
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("src", "flows", "tasks")
        for path in (ROOT / folder).rglob("*.py")
    )
    for name in sorted(set(re.findall(r"\"(HEADSTART_[A-Z_]+)\"", code))):
        assert f"`{name}`" in page, name


def test_every_folder_and_file_of_a_run_is_documented() -> None:
    page = TEXT[ROOT / "docs/reference/files.md"]
    graph = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    for folder, file in re.findall(r"^ +- (\w+)/\$\{item.recipe\}(?:/([\w./]+))?:?$", graph, re.MULTILINE):
        assert f"`{folder}/R/`" in page
        assert not file or f"`{file}`" in page


def test_no_index_address_stands_in_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", lock.strip()))
