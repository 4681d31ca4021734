from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from headstart.errors import HeadstartError
from headstart.evaluation import evaluate, headline
from headstart.layout import Layout
from headstart.metrics import METRICS
from tests import cached


def write(root: Path, rows: int = 400, classes: tuple[str, ...] = ("no", "yes"), **columns: Any) -> Layout:
    """A model's predictions: half of the rows val, half test."""
    chance = np.random.default_rng(0)
    truth = chance.integers(0, len(classes), rows)
    odds = np.exp(chance.normal(size=(rows, len(classes))) + 1.5 * np.eye(len(classes))[truth])
    table = pd.DataFrame(
        {
            "id": [f"row-{i}" for i in range(rows)],
            "split": np.where(np.arange(rows) < rows // 2, "val", "test"),
            "label": np.array(classes)[truth],
            "domain": np.where(np.arange(rows) % 4 > 0, "east", "west"),
            "group": [f"group-{i // 2}" for i in range(rows)],
            **{
                f"p:{name}": p
                for name, p in zip(classes, (odds / odds.sum(axis=1, keepdims=True)).T, strict=True)
            },
        }
    ).assign(**columns)
    layout = Layout(root, "case")
    layout.model.mkdir(parents=True)
    table.to_parquet(layout.model / "predictions.parquet", index=False)
    (layout.model / "model.json").write_text(json.dumps({"classes": classes}))
    return layout


def metrics(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((layout.evidence / "metrics.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_evidence_is_metrics_plots_and_a_page_to_read(tmp_path: Path) -> None:
    layout = write(tmp_path)
    evaluate(cached.recipe(), layout)
    assert set(contents(layout.evidence)) == {
        "metrics.json",
        "summary.md",
        "plots/confusion.csv",
        "plots/roc.csv",
        "plots/calibration.csv",
    }
    found = metrics(layout)
    assert set(found) == {"val", "test", "test_by_domain"}
    assert set(found["test_by_domain"]) == {"east", "west"}
    for part in (found["val"], found["test"], *found["test_by_domain"].values()):
        assert set(part) == {*METRICS, "rows", "groups", "majority"}
        assert part["accuracy"]["low"] <= part["accuracy"]["value"] <= part["accuracy"]["high"]
    assert (found["test"]["rows"], found["test"]["groups"]) == (200, 100)
    assert sum(part["rows"] for part in found["test_by_domain"].values()) == 200


def test_the_majority_is_the_accuracy_of_always_naming_the_commonest_class(tmp_path: Path) -> None:
    layout = write(tmp_path, label=["no"] * 250 + ["yes"] * 150)
    evaluate(cached.recipe(), layout)
    assert metrics(layout)["val"]["majority"] == 1
    assert metrics(layout)["test"]["majority"] == 0.75


def test_the_plots_hold_what_happened(tmp_path: Path) -> None:
    layout = write(tmp_path)
    evaluate(cached.recipe(), layout)
    plots, test = layout.evidence / "plots", metrics(layout)["test"]
    confusion = pd.read_csv(plots / "confusion.csv")
    assert (confusion["actual"] == confusion["predicted"]).mean() == pytest.approx(test["accuracy"]["value"])
    roc = pd.read_csv(plots / "roc.csv")
    assert set(roc["class"]) == {"yes"}
    assert (roc.iloc[0][["fpr", "tpr"]].tolist(), roc.iloc[-1][["fpr", "tpr"]].tolist()) == ([0, 0], [1, 1])
    assert np.trapezoid(roc["tpr"], roc["fpr"]) == pytest.approx(test["auroc"]["value"], abs=0.01)
    calibration = pd.read_csv(plots / "calibration.csv")
    assert calibration["rows"].sum() == 200
    assert calibration[["predicted", "observed"]].stack().between(0, 1).all()


@pytest.mark.parametrize("classes", [("a",), ("cat", "dog", 'a|b, "c"')])
def test_any_class_names_and_numbers_of_classes_but_one_work(
    classes: tuple[str, ...], tmp_path: Path
) -> None:
    layout = write(tmp_path, classes=("x", *classes))
    evaluate(cached.recipe(), layout)
    with (layout.evidence / "plots/confusion.csv").open(newline="") as file:
        assert {row["actual"] for row in csv.DictReader(file)} == {"x", *classes}
    table = [
        line for line in (layout.evidence / "summary.md").read_text().splitlines() if line.startswith("|")
    ]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 3  # three tables, each of one width


def test_the_same_predictions_give_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "two"):
        evaluate(cached.recipe(), write(tmp_path / place))
    assert contents(tmp_path / "one/evidence") == contents(tmp_path / "two/evidence")


def test_the_page_says_whether_the_model_beats_naming_the_commonest_class(tmp_path: Path) -> None:
    layout = write(tmp_path)
    evaluate(cached.recipe(), layout)
    page = (layout.evidence / "summary.md").read_text()
    assert "groups: better than always naming the commonest class" in page
    assert "| AUROC |" in page and "| east |" in page and "How to read this" in page
    assert len(page.splitlines()) < 50
    useless = write(tmp_path / "useless", **{"p:no": 0.6, "p:yes": 0.4})
    evaluate(cached.recipe(), useless)
    assert "not shown to be better" in (useless.evidence / "summary.md").read_text()


@pytest.mark.parametrize(("groups", "shown"), [(2, False), (5, False), (6, True)])
def test_a_handful_of_groups_does_not_show_that_a_model_is_better(
    groups: int, shown: bool, tmp_path: Path
) -> None:
    layout = write(tmp_path, group=[f"module {i % groups}" for i in range(400)])
    evaluate(cached.recipe(), layout)
    test, page = metrics(layout)["test"], (layout.evidence / "summary.md").read_text()
    assert test["accuracy"]["low"] > test["majority"]
    assert ("not shown to be better than" in page) != shown
    assert ("Fewer than 6 groups of test rows cannot show" in page) != shown


def test_the_page_warns_of_few_groups(tmp_path: Path) -> None:
    layout = write(tmp_path, group=[f"module {i % 9}" for i in range(400)])
    evaluate(cached.recipe(), layout)
    assert "Fewer than 20 groups: test" in (layout.evidence / "summary.md").read_text()


def test_what_cannot_be_known_is_null_and_a_dash(tmp_path: Path) -> None:
    layout = write(tmp_path, label="no", group="one", domain="all")
    evaluate(cached.recipe(), layout)
    test = metrics(layout)["test"]
    assert test["auroc"]["value"] is None and test["accuracy"]["low"] is None
    assert "| AUROC | - | - |" in (layout.evidence / "summary.md").read_text()
    assert "AUROC - on 200 rows" in headline(metrics(layout))


def test_the_page_says_why_auroc_of_very_many_classes_has_no_interval(tmp_path: Path) -> None:
    layout = write(tmp_path, classes=tuple(f"class {i}" for i in range(60)))
    evaluate(cached.recipe(), layout)
    page = (layout.evidence / "summary.md").read_text()
    assert "AUROC of more than 50 classes is given without an interval" in page
    assert metrics(layout)["test"]["auroc"]["value"] is not None


def test_one_line_says_how_good_the_model_is() -> None:
    def measured(value: float, low: float, high: float) -> dict[str, float]:
        return {"value": value, "low": low, "high": high}

    test = {
        "accuracy": measured(0.832, 0.815, 0.848),
        "balanced_accuracy": measured(0.82, 0.8, 0.84),
        "auroc": measured(0.91, 0.9, 0.92),
        "rows": 4012,
        "majority": 0.55,
    }
    assert headline({"test": test}) == (
        "test accuracy 0.832 (0.815-0.848), balanced 0.82, AUROC 0.91 on 4,012 rows; majority class 0.55"
    )


def test_evaluating_imports_no_torch(tmp_path: Path) -> None:
    write(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tests import cached\n"
        "from headstart.evaluation import evaluate; from headstart.layout import Layout\n"
        f"evaluate(cached.recipe(), Layout(Path({str(tmp_path)!r}), 'case'))\n"
        "sys.exit(bool({'torch', 'sklearn', 'mlflow'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_without_predictions_the_error_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="nothing to evaluate") as caught:
        evaluate(cached.recipe(), Layout(tmp_path, "case"))
    assert caught.value.do.endswith("`dvc repro train@case`")


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"split": "val"}, "no test rows"),
        ({"label": "maybe"}, "labels that are no class: maybe"),
        ({"p:more": 0.1}, "model.json names the classes no, yes"),
    ],
)
def test_predictions_that_do_not_fit_their_model_are_refused(
    columns: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    layout = write(tmp_path, **columns)
    with pytest.raises(HeadstartError) as caught:
        evaluate(cached.recipe(), layout)
    assert any(fault in line for line in caught.value.table)
    assert not layout.evidence.exists()


def put_aside(root: Path, labelled: bool, only: str | None = None) -> Layout:
    """Predictions of which those of ``west`` have their labels in another file, or ``only`` of a split."""
    layout = write(root)
    table = pd.read_parquet(layout.model / "predictions.parquet")
    west = table["domain"] == "west"
    layout.truth.mkdir(parents=True)
    known = west & labelled & (only is None or table["split"] == only)
    table.loc[known, ["id", "label"]].to_parquet(layout.truth / "labels.parquet", index=False)
    table.assign(label=table["label"].mask(west, "")).to_parquet(
        layout.model / "predictions.parquet", index=False
    )
    return layout


def test_a_target_is_measured_by_the_labels_that_were_put_aside(tmp_path: Path) -> None:
    layout = put_aside(tmp_path / "one", labelled=True)
    evaluate(cached.adapting(), layout)
    other = write(tmp_path / "two")
    table = pd.read_parquet(other.model / "predictions.parquet")
    table[table["domain"] == "west"].to_parquet(other.model / "predictions.parquet", index=False)
    evaluate(cached.adapting(), other)
    assert contents(layout.evidence) == contents(other.evidence)
    assert set(metrics(layout)["test_by_domain"]) == {"west"}


@pytest.mark.parametrize(("labelled", "only"), [(False, None), (True, "val"), (True, "test")])
def test_of_a_target_with_too_few_labels_the_page_says_that_nothing_is_known(
    labelled: bool, only: str | None, tmp_path: Path
) -> None:
    layout = put_aside(tmp_path, labelled, only)
    evaluate(cached.adapting(), layout)
    assert set(metrics(layout)["test_by_domain"]) == {"east"}
    page = (layout.evidence / "summary.md").read_text()
    assert "Too few labels of the target domain, west, are known" in page
    evaluate(cached.adapting(), put_aside(tmp_path / "other", labelled=True))
    assert "Too few labels" not in (Layout(tmp_path / "other", "case").evidence / "summary.md").read_text()


def test_the_page_tells_of_the_shift(tmp_path: Path) -> None:
    layout = put_aside(tmp_path, labelled=True)
    path = layout.model / "model.json"
    shift = {
        "adaptation": "coral",
        "reason": "named in the recipe",
        "taught": True,
        "expected_accuracy": {"value": 0.781, "low": 0.69, "high": 0.87},
        "shift": {"words": ["It has moved."]},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | shift))
    evaluate(cached.adapting(), layout)
    page = (layout.evidence / "summary.md").read_text()
    assert (
        "## The shift\n\n- It has moved.\n\nAdapted by `coral`: named in the recipe. Then a new backbone"
        in page
    )
    accuracy = metrics(layout)["test"]["accuracy"]["value"]
    assert f"target's labels: 0.78 (0.69-0.87); measured is {accuracy:.2f}." in page
