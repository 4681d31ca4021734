"""The command line: quick to answer, and clear when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headstart import __version__
from tests.conftest import isolated

ROOT = Path(__file__).parents[1]


def headstart(*arguments: str, cwd: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headstart.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=isolated(tmp_path), capture_output=True, text=True, timeout=60, check=False
    )


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    check = (
        "import sys\nfrom typer.testing import CliRunner\nfrom headstart.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'pandas', 'numpy', 'mlflow', 'prefect', 'dvc', 'transformers', 'pydantic'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_told(tmp_path: Path) -> None:
    assert headstart("--version", cwd=ROOT, tmp_path=tmp_path).stdout == f"headstart {__version__}\n"


@pytest.mark.parametrize("command", [("run",), ("stage", "train"), ("ingest",), ("evaluate-protocol",)])
def test_a_wrong_key_is_one_screen_and_a_non_zero_exit(command: tuple[str, ...], tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    text = (ROOT / "recipes/sentiment.yaml").read_text(encoding="utf-8")
    recipe.write_text(text.replace("method:", "methd:"), encoding="utf-8")
    done = headstart(*command, str(recipe), cwd=ROOT, tmp_path=tmp_path)
    assert done.returncode == 1
    assert "did you mean 'method'?" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.splitlines()) < 10


def test_outside_a_project_it_says_where_to_go(tmp_path: Path) -> None:
    recipe = tmp_path / "sentiment.yaml"
    recipe.write_text((ROOT / "recipes/sentiment.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    done = headstart("run", "sentiment.yaml", cwd=tmp_path, tmp_path=tmp_path)
    assert done.returncode == 1
    assert "change into the folder that holds dvc.yaml" in done.stderr


def test_an_unknown_stage_lists_the_stages(tmp_path: Path) -> None:
    done = headstart("stage", "bake", "recipes/sentiment.yaml", cwd=ROOT, tmp_path=tmp_path)
    assert done.returncode == 1
    assert "validate, fetch, features, train, evaluate" in done.stderr
