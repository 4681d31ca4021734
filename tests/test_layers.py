"""The rules of the house, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from headstart import features
from headstart.stages import STAGES

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src" / "headstart"
# What every command passes through: a changed message or progress bar makes no result stale.
PLUMBING = {"__init__", "cli", "environment", "errors", "progress", "stages"}


def imported(module: Path) -> set[str]:
    """Full names of everything that a file imports anywhere, outside of type checking."""
    names = set()
    tree = ast.parse(module.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def library_modules_used(module: str) -> set[str]:
    """The library's modules that one of them uses, directly or not, itself included."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or not (LIBRARY / f"{name}.py").exists():
            continue
        seen.add(name)
        waiting += [
            full.split(".")[1] for full in imported(LIBRARY / f"{name}.py") if full.startswith("headstart.")
        ]
    return seen - PLUMBING


@pytest.mark.parametrize("module", sorted(LIBRARY.glob("*.py")), ids=lambda path: path.stem)
def test_the_library_imports_neither_prefect_nor_dvc(module: Path) -> None:
    forbidden = {"prefect", "dvc"} if module.stem == "cli" else {"prefect", "dvc", "flows", "tasks"}
    assert not {name.split(".")[0] for name in imported(module)} & forbidden


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_every_module_that_it_uses(stage: str) -> None:
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    declared = {Path(dep).stem for dep in graph["stages"][stage]["deps"] if dep.startswith("src/")}
    assert declared == library_modules_used(STAGES[stage].split(":")[0].removeprefix("headstart."))


def test_vectors_are_kept_only_as_long_as_all_code_that_makes_them_is_the_same() -> None:
    moving_files, in_the_key = {"earlier", "layout"}, {"recipe"}
    assert {*features.MODULES} == library_modules_used("features") - moving_files - in_the_key


@pytest.mark.parametrize("stage", ["validate", "evaluate", "train"])
def test_only_stages_that_run_a_backbone_import_torch(stage: str) -> None:
    module = STAGES[stage].split(":")[0]
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_one_word_names_a_stage_everywhere() -> None:
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert list(graph) == list(STAGES)
    for stage in STAGES:
        assert (ROOT / "tasks" / f"{stage}.py").is_file()
        assert f"headstart stage {stage} " in graph[stage]["cmd"]
        assert graph[stage]["params"] == [{"recipes/${item.recipe}.yaml": [stage]}]


def test_no_drawer_for_odds_and_ends() -> None:
    names = {path.stem for folder in ("src", "tasks", "flows") for path in (ROOT / folder).rglob("*.py")}
    assert not {
        name for name in names if name.strip("_") in {"utils", "helpers", "common", "manager", "misc"}
    }
