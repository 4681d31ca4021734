"""Results: figures that a benchmark keeps in ``results/``, a file for each, in git.

Goes in: numbers by name. Comes out: JSON, and what was kept before: some benchmarks can measure a part alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def known(name: str) -> dict[str, Any]:
    """What was kept last time; empty before the first."""
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def keep(name: str, figures: Mapping[str, Any]) -> None:
    """Write the figures in place of those."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
