"""The closed loop on real data: rows of another kind arrive without labels, and the champion adapts.

Run it with `make demo-loop`, after `make demo`. Twice, in a project of its own that is thrown away: a
champion learns from cells of one crystal (from film reviews), then cells of many (tweets) arrive in the
inbox, without labels. One run takes them in, finds that they have drifted, adapts the champion to them, and
refuses to promote what nobody can judge. Then labels come that only the gate sees, and it decides. What is
printed is what the commands print.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from results import keep, known

from headstart import environment

ROOT = environment.project_root(Path(__file__).parent)
BATCH, JUDGED = "arrived", "judged.csv"  # in the inbox: rows without labels, and the labels for the gate


def shown(project: Path, *command: str) -> str:
    """Run a command in the project, print what it prints, and return it."""
    print(f"\n$ {' '.join(command)}", flush=True)
    said = []
    quiet = os.environ | {"HEADSTART_QUIET": "1", "MLFLOW_TRACKING_URI": store(project)}
    with subprocess.Popen(command, cwd=project, env=quiet, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            print(line, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(said)


def store(project: Path) -> str:
    """The project's own registry, whatever else is configured."""
    return f"sqlite:///{project / 'mlflow.db'}"


def fresh(folder: Path) -> Path:
    """This project's tracked files in a folder of their own, with no recipe and no data."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    for name in ("data.dvc", "dvc.lock"):
        (folder / name).unlink()
    (folder / "params.yaml").write_text("recipes: []\n", encoding="utf-8")
    return folder


def write_recipe(project: Path, name: str, like: str, validate: dict[str, Any]) -> None:
    """A recipe like one of the examples, for data that come in two parts; two rows in five judge."""
    made = yaml.safe_load((ROOT / "recipes" / f"{like}.yaml").read_text(encoding="utf-8"))
    made["ingest"] = {"source": "file:known", "settle": 0}
    made["validate"] = validate | {"splits": {"train": 0.4, "val": 0.2, "test": 0.4}}
    made["promote"] = {"metric": "balanced_accuracy"}
    (project / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")


def write_labels(inbox: Path, ids: pd.Series, labels: pd.Series) -> None:
    """The labels of the rows that arrived, for the gate alone."""
    pd.DataFrame({"id": ids, "label": labels}).to_csv(inbox / JUDGED, index=False, quoting=csv.QUOTE_ALL)


def cells(project: Path) -> None:
    """Cells of one crystal are known, and those of many arrive."""
    raw, inbox = ROOT / "data/solar-cells", project / "inbox/cells"
    columns = ["path", "defect", "type"]
    listed = pd.read_csv(raw / "labels.csv", sep=r"\s+", header=None, names=columns, dtype=str)
    many = listed["type"] == "poly"
    hidden = listed[many].assign(defect="nan")
    for rows, folder in ((listed[~many], project / "known"), (hidden, inbox / BATCH)):
        (folder / "images").mkdir(parents=True)
        for path in rows["path"]:
            shutil.copy(raw / path, folder / path)
        rows.to_csv(folder / "labels.csv", sep=" ", header=False, index=False)
    doubt = listed.loc[many, "defect"].astype(float)
    labels = doubt.ge(0.5).map({True: "defective", False: "functional"})
    write_labels(inbox, f".batches/{BATCH}/" + listed.loc[many, "path"], labels)
    write_recipe(
        project,
        "cells",
        "solar-cells-mono-to-poly",
        {
            "adapter": "elpv",
            "classes": ["functional", "defective"],
            "source_domains": ["mono"],
            "target_domain": "poly",
        },
    )


def texts(project: Path) -> None:
    """Film reviews are known, and tweets arrive."""
    rows = pd.read_parquet(ROOT / "manifest/sentiment/manifest.parquet")
    rows, inbox = rows[["id", "text", "label", "domain", "group"]], project / "inbox/texts"
    movies, tweets = (rows[rows["domain"] == name] for name in ("movies", "tweets"))
    for folder in (project / "known", inbox):
        folder.mkdir(parents=True)
    movies.to_csv(project / "known/movies.csv", index=False)
    tweets.assign(label="").to_csv(inbox / f"{BATCH}.csv", index=False)
    write_labels(inbox, tweets["id"], tweets["label"])
    write_recipe(
        project,
        "texts",
        "sentiment-movies-to-tweets",
        {
            "adapter": "table",
            "columns": {name: name for name in ("id", "domain", "group")},
            "classes": ["negative", "positive"],
            "source_domains": ["movies"],
            "target_domain": "tweets",
        },
    )


def main(parts: list[str]) -> None:
    """Close these loops, or both, and write what was found, beside what is known of the other."""
    figures: dict[str, Any] = known("closed_loop")
    for name, prepare in {"cells": cells, "texts": texts}.items():
        if parts and name not in parts:
            continue
        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            project = fresh(Path(folder) / "project")
            prepare(project)
            inbox, later = project / "inbox" / name, project / "later"
            inbox.rename(later)
            inbox.mkdir()
            shown(project, "headstart", "run", f"recipes/{name}.yaml")
            labels = later / JUDGED
            for arrival in [each for each in later.iterdir() if each != labels]:
                arrival.rename(inbox / arrival.name)
            shown(project, "headstart", "run", f"recipes/{name}.yaml")
            labels.rename(inbox / JUDGED)
            shown(project, "headstart", "run", f"recipes/{name}.yaml")
            shown(project, "headstart", "models", name, "--history")
            tags = json.loads(verdict(project, name))
            figures |= {f"{name}, {key}": value for key, value in tags["figures"].items()}
            figures[f"{name}, promoted"] = tags["promoted"]
        keep("closed_loop", figures)


def verdict(project: Path, name: str) -> str:
    """What the gate said of the latest version."""
    os.environ["MLFLOW_TRACKING_URI"] = store(project)
    from headstart import promotion

    return str(promotion.known(promotion.opened(), name)[0].tags[promotion.VERDICT])


if __name__ == "__main__":
    main(sys.argv[1:])
