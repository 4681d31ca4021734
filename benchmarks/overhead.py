"""What running by itself costs: a run's time beside its steps' own, a skipped run, an idle stack's memory.

Run it anywhere with ``make bench-overhead``: it makes small projects of its own in a temporary folder. A run
is timed from the command's first moment to its last. Its steps are what the run itself timed: each stage in
a process of its own, through DVC, and ingest, register, promote and report. The flow is what Prefect says
that it took, without the imports before it. The first run of all also makes Prefect's database, once per
machine.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
from results import keep

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import conftest, stacks  # noqa: E402  # the small text project

ROUNDS = 3
RUNS = {"first of all": (), "every stage": ("--force",), "skipped": ()}
IDLE = 30.0  # seconds after which a stack that has come up is at rest
STEPS = """
import json
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    found = max(client.read_artifacts(), key=lambda each: each.created)
    flow = max(client.read_flow_runs(), key=lambda each: each.created)
    steps = {row["step"]: float(row["seconds"]) for row in json.loads(found.data)}
    print(json.dumps({"steps": sum(steps.values()), "flow": flow.total_run_time.total_seconds()}))
"""


def fresh(folder: Path) -> conftest.Project:
    """A small project that has not run yet."""
    folder.mkdir()
    project = conftest.clone(folder / "project", conftest.isolated(folder))
    stacks.write_project(project.root)
    return project


def timed(project: conftest.Project, *options: str) -> dict[str, float]:
    """Seconds of one run: of its steps, of the flow, and of the command."""
    start = time.perf_counter()
    project.ok("headstart", "--quiet", "run", *options, "recipes/moods.yaml")
    wall = time.perf_counter() - start
    told = json.loads(project.ok("python", "-c", STEPS).splitlines()[-1])
    return {"steps s": told["steps"], "flow s": told["flow"], "command s": wall}


def memory(pid: int) -> dict[str, float]:
    """Megabytes of a process and all below it: what would be free without them, and as `ps` counts."""
    every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    full = [each.memory_full_info() for each in every]
    return {
        "proportional": sum(each.pss for each in full) / 1e6,
        "resident": sum(each.rss for each in full) / 1e6,
    }


def main() -> None:
    rows, idle = [], {}
    with tempfile.TemporaryDirectory() as base:
        for number in range(ROUNDS):
            for server in ("its own", "running"):
                project = fresh(Path(base) / f"{number}-{server.replace(' ', '-')}")
                if server == "its own":
                    measured = [timed(project, *options) for options in RUNS.values()]
                else:
                    with stacks.running(project, project.root.parent) as stack:
                        project.environment |= {
                            "PREFECT_API_URL": stack.api,
                            "MLFLOW_TRACKING_URI": stack.tracking,
                        }
                        if not idle:
                            time.sleep(IDLE)
                            idle = memory(stack.process.pid)
                        measured = [timed(project, *options) for options in RUNS.values()]
                for run, seconds in zip(RUNS, measured, strict=True):
                    rows.append({"server": server, "run": run} | seconds)
    table = pd.DataFrame(rows)
    for what in ("flow", "command"):
        table[f"{what} - steps"] = table[f"{what} s"] - table["steps s"]
    medians = table.groupby(["server", "run"], as_index=False).median()
    load = statistics.fmean(os.getloadavg())
    print(f"medians of {ROUNDS}, {os.cpu_count()} cores, load at the end {load:.1f}\n")
    print(medians.to_string(index=False, float_format="{:.1f}".format))
    print("\nidle stack: " + ", ".join(f"{value:.0f} MB {kind}" for kind, value in idle.items()))
    figures = {
        f"server {line['server']}, {line['run']}, {column}": round(line[column], 1)
        for line in medians.to_dict("records")
        for column in table.columns[2:]
    }
    figures |= {f"idle_{kind}_mb": round(value) for kind, value in idle.items()}
    keep("overhead", figures)


if __name__ == "__main__":
    main()
