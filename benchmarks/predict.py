"""``headstart predict`` against asking the registered model row by row, and its memory at ten times the rows.

Run it with `make bench-predict`, after `make demo` and with both models promoted. Both ways load the same
version from the same registry, each in a process of its own with the same environment; loading is left out
of both and shown apart. Asking row by row is measured on the first 500 rows; compared are mean times per row,
of the faster of two rounds in which the two take turns. Predicting starts at the file of rows and ends at
the file of answers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from results import keep

from headstart import environment

ROOT = environment.project_root()
SAMPLE, ROUNDS = 500, 2
CASES = {  # recipe: column, rows to time, rows of the smaller and the larger run whose memory is measured
    "solar-cells": ("path", 2_000, (300, 3_000)),
    "sentiment": ("text", 20_000, (2_000, 20_000)),
}


def main() -> None:
    """Print the table, write the figures."""
    figures: dict[str, float] = {}
    print("| model | row by row, rows/s | predict, rows/s | times | peak MB | at 10 times the rows |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (column, rows, sizes) in CASES.items():
            table = Path(folder) / "rows.parquet"
            write(name, column, rows, table)
            # The two take turns, so that a machine that slows down slows both.
            took = [(run("pyfunc", name, table), run("predict", name, table)) for _ in range(ROUNDS)]
            plain, ours = (min(each[side]["seconds_per_row"] for each in took) for side in (0, 1))
            peaks = []
            for size in sizes:
                write(name, column, size, table)
                peaks.append(run("predict", name, table)["peak_mb"])
            key = name.replace("-", "_")
            figures |= {
                f"{key}_pyfunc_rows_s": round(1 / plain, 2),
                f"{key}_predict_rows_s": round(1 / ours, 2),
                f"{key}_speedup": round(plain / ours, 2),
                f"{key}_load_s": round(took[-1][1]["load_s"], 1),
                f"{key}_rows": rows,
                f"{key}_threads": took[-1][1]["threads"],
                f"{key}_peak_mb_at_{sizes[0]}": round(peaks[0], 1),
                f"{key}_peak_mb_at_{sizes[1]}": round(peaks[1], 1),
            }
            print(
                f"| {name} | {1 / plain:.1f} | {1 / ours:.1f} | {plain / ours:.1f} | {peaks[0]:.0f} "
                f"| {peaks[1]:.0f} |"
            )
    keep("predict", figures)


def write(name: str, column: str, rows: int, path: Path) -> None:
    """A table of the recipe's own rows, from the start again where there are too few."""
    values = pd.read_parquet(ROOT / "manifest" / name / "manifest.parquet")[column]
    if column == "path":
        values = str(ROOT / "data" / name) + "/" + values
    repeated = pd.concat([values] * (1 + rows // len(values)), ignore_index=True)[:rows]
    repeated.to_frame(column).to_parquet(path, index=False)


def run(way: str, name: str, table: Path) -> dict[str, float]:
    """One way in a fresh process."""
    command = [sys.executable, __file__, way, name, str(table)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(way: str, name: str, table: Path) -> dict[str, float]:
    """Seconds per row, seconds to load, and the most memory that was resident, in MB."""
    environment.prepare(ROOT)
    begun = time.perf_counter()
    if way == "pyfunc":
        import mlflow

        model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
        rows = pd.read_parquet(table)[:SAMPLE]
        frames = [rows.iloc[place : place + 1] for place in range(len(rows))]
        model.predict(frames[0])
        start = time.perf_counter()
        for frame in frames:
            model.predict(frame)
        count = len(frames)
    else:
        from headstart import models, scoring

        version = models.load(name)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            count = scoring.score(version, [str(table)], Path(folder) / "answers.parquet").rows
    took = time.perf_counter() - start
    import torch

    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "seconds_per_row": took / count,
        "load_s": start - begun,
        "peak_mb": peak / 1024,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
