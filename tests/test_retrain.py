"""The line as a whole: raw data in, registered model out, through Prefect or through DVC alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from headstart.heads import Head
from tests import examples
from tests.conftest import Project, Ran, clone

pytestmark = pytest.mark.slow

DERIVED = ("manifest", "truth", "weights", "features", "model", "evidence")


def contents(root: Path) -> dict[str, bytes]:
    """Every derived file and DVC's record of them."""
    files = [file for folder in DERIVED for file in (root / folder).rglob("*") if file.is_file()]
    files += [root / "dvc.lock", root / "data.dvc", root / "params.yaml"]
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


@pytest.fixture
def finished(moods: Ran, tmp_path: Path) -> Project:
    """A copy of the finished text project, free to be changed."""
    return moods.project.copy(tmp_path / "project")


def test_a_run_ends_with_one_line_that_says_what_happened_how_good_and_where(moods: Ran) -> None:
    last = moods.printed.strip().splitlines()[-1]
    assert last.startswith("moods: ingest ran, ")
    assert "test accuracy" in last
    assert "registered as moods version 1 (candidate)" in last
    assert last.endswith(str(moods.project.root / "reports/moods/report.html"))


def test_images_go_the_same_way_as_texts(photos: Ran) -> None:
    assert "registered as photos version 1" in photos.printed
    metrics = json.loads((photos.project.root / "evidence/photos/metrics.json").read_text())
    assert metrics["test"]["accuracy"]["value"] > metrics["test"]["majority"]


def test_repro_alone_gives_the_bytes_that_the_flow_gives(moods: Ran, tmp_path: Path) -> None:
    flow = moods.project
    alone = clone(tmp_path / "project", flow.environment)
    shutil.copytree(flow.root / "start", alone.root / "start")
    shutil.copy(flow.root / "recipes/moods.yaml", alone.root / "recipes/moods.yaml")
    alone.ok("headstart", "ingest", "recipes/moods.yaml")
    alone.ok("dvc", "repro")
    assert contents(alone.root) == contents(flow.root)


def test_after_the_flow_repro_has_nothing_to_do(finished: Project) -> None:
    before = contents(finished.root)
    assert "Data and pipelines are up to date." in finished.ok("dvc", "repro")
    assert contents(finished.root) == before


def test_a_second_run_does_no_work_and_registers_nothing(finished: Project) -> None:
    before = contents(finished.root)
    printed = finished.ok("headstart", "run", "recipes/moods.yaml")
    assert "moods: nothing changed, nothing done" in printed
    assert "already registered as moods version 1" in printed
    assert contents(finished.root) == before


def test_what_a_killed_run_left_undone_is_made_up_for_though_every_stage_is_fresh(finished: Project) -> None:
    page = finished.root / "reports/moods/report.html"
    page.write_text("of an earlier model")
    marks = [finished.root / f".headstart/moods/{name}" for name in ("unreported", "unmonitored")]
    assert not any(mark.exists() for mark in marks)
    for mark in marks:
        mark.touch()
    printed = finished.ok("headstart", "run", "recipes/moods.yaml")
    assert "moods: report ran; " in printed
    assert "of an earlier model" not in page.read_text()
    assert not any(mark.exists() for mark in marks)


def test_a_changed_training_parameter_reruns_only_what_follows_without_a_network_and_going_back_restores(
    photos: Ran, tmp_path: Path
) -> None:
    project = photos.project.copy(tmp_path / "project")
    recipe = project.root / "recipes/moods.yaml"
    before, original = contents(project.root), recipe.read_text()
    recipe.write_text(original.replace("train: {}", 'train: {"l2": [0.5]}'))
    both = ("headstart", "run", "recipes/moods.yaml", "recipes/photos.yaml")
    printed = project.ok(*both, extra={"HEADSTART_OFFLINE": "1"})
    assert "registered as moods version 2" in printed
    assert "moods: train ran, evaluate ran, register ran, promote ran, report ran;" in printed
    assert "photos: nothing changed, nothing done" in printed
    recipe.write_text(original)
    printed = project.ok("headstart", "run", "recipes/moods.yaml")
    assert "moods: train restored, evaluate restored, report ran;" in printed
    assert contents(project.root) == before


def answers_of_the_candidate(project: Project, rows: pd.DataFrame, name: str = "moods") -> pd.DataFrame:
    """What the registered model says of texts, in a process that may not load a pickle."""
    rows[["text"]].to_parquet(project.root / "rows.parquet")
    project.ok(
        "python",
        "-c",
        "import mlflow, pandas as pd\n"
        f"model = mlflow.pyfunc.load_model('models:/{name}@candidate')\n"
        "model.predict(pd.read_parquet('rows.parquet')).to_parquet('answers.parquet')",
        extra={
            "MLFLOW_TRACKING_URI": f"sqlite:///{project.root}/mlflow.db",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        },
    )
    return pd.read_parquet(project.root / "answers.parquet")


@pytest.mark.parametrize(
    ("choices", "tolerance"),
    [
        pytest.param({}, 2e-2, marks=pytest.mark.long),  # bfloat16 has 8 bits
        pytest.param(
            {"tune": True, "alignment": "domain_adversarial", "adaptation": "coral", "epochs": 1},
            1e-5,
            marks=pytest.mark.long,
        ),
        pytest.param({"tune": True, "teach": True, "epochs": 1}, 1e-5, marks=pytest.mark.long),
    ],
)
def test_a_domain_without_labels_is_adapted_to_registered_and_served(
    choices: dict[str, object], tolerance: float, finished: Project
) -> None:
    text = (finished.root / "recipes/moods.yaml").read_text()
    text = text.replace('"adapter": "table"', '"adapter": "table", "target_domain": "b"')
    if choices:
        text = text.replace("features: {}", 'features: {"packed": true, "precision": "float32"}')
    train = json.dumps({"method": "domain_adaptation"} | choices)
    recipe = finished.root / "recipes/shops.yaml"
    recipe.write_text(text.replace("train: {}", f"train: {train}"))
    printed = finished.ok("headstart", "run", "recipes/shops.yaml")
    assert "registered as shops version 1" in printed
    assert "shops: nothing changed, nothing done" in finished.ok("headstart", "run", "recipes/shops.yaml")
    manifest = pd.read_parquet(finished.root / "manifest/shops/manifest.parquet")
    assert set(manifest.loc[manifest["domain"] == "b", "label"]) == {""}
    metrics = json.loads((finished.root / "evidence/shops/metrics.json").read_text())
    assert set(metrics["test_by_domain"]) == {"b"}
    expected = pd.read_parquet(finished.root / "model/shops/predictions.parquet")
    rows = expected[expected["domain"] == "b"].merge(manifest[["id", "text"]], on="id")
    answers = answers_of_the_candidate(finished, rows, "shops")
    columns = ["p:happy", "p:unhappy"]
    assert (answers[columns] - rows[columns]).abs().to_numpy().max() < tolerance
    assert (finished.root / "model/shops/backbone").is_dir() == ("tune" in choices)
    clocks = [path.stem for path in finished.root.glob(".headstart/shops/train/*.csv")]
    assert len(clocks) == ("tune" in choices)
    assert not any("taught" in stem for stem in clocks)


@pytest.mark.long
def test_a_registered_model_goes_on_where_none_of_its_rows_are(finished: Project) -> None:
    root = finished.root
    manifest = pd.read_parquet(root / "manifest/moods/manifest.parquet")
    (root / "start/elsewhere").mkdir()
    manifest.loc[manifest["domain"] == "b", ["text", "label"]].to_csv(root / "start/elsewhere/rows.csv")
    finished.ok("headstart", "export", "moods", "--version", "1", "--output", "given")
    again = finished("headstart", "export", "moods", "--version", "1", "--output", "given")
    assert "there is something already" in again.stderr
    finished.ok("sh", "-c", "cd start && headstart export moods --onnx --output moods.onnx")
    assert (root / "start/moods.onnx").exists() and not (root / "moods.onnx").exists()
    recipe = yaml.safe_load((root / "recipes/moods.yaml").read_text())
    recipe["ingest"]["source"] = "file:start/elsewhere"
    recipe["validate"] = {"adapter": "table", "target_domain": "all", "near_duplicates": False}
    recipe["fetch"] = {"backbone": recipe["fetch"]["backbone"], "source": "file:given"}
    recipe["features"] = {"packed": True, "precision": "float32"}
    recipe["train"] = {"method": "domain_adaptation", "source_free": "hypothesis_transfer", "epochs": 1}
    (root / "recipes/elsewhere.yaml").write_text(yaml.safe_dump(recipe))
    printed = finished.ok("headstart", "run", "recipes/elsewhere.yaml")
    assert "registered as elsewhere version 1" in printed
    said = json.loads((root / "model/elsewhere/model.json").read_text())
    assert said["adaptation"] == "hypothesis_transfer"
    assert "Adapted by `hypothesis_transfer`" in (root / "evidence/elsewhere/summary.md").read_text()
    reports = root / "reports/elsewhere"
    assert "a registered model, gone on" in (reports / "report.html").read_text()
    assert "without the rows that it had learned from" in (reports / "model-card.md").read_text()
    there = pd.read_parquet(root / "manifest/elsewhere/manifest.parquet")
    assert set(there["label"]) == {""}
    rows = pd.read_parquet(root / "model/elsewhere/predictions.parquet").merge(there[["id", "text"]], on="id")
    answers = answers_of_the_candidate(finished, rows, "elsewhere")
    columns = ["p:happy", "p:unhappy"]
    assert (answers[columns] - rows[columns]).abs().to_numpy().max() < 1e-5
    given = Head.load(root / "weights/elsewhere/registered/head.safetensors")
    assert (Head.load(root / "model/elsewhere/head.safetensors").weight == given.weight).all()


def test_the_registered_model_predicts_what_training_predicted_and_holds_no_pickle(finished: Project) -> None:
    manifest = pd.read_parquet(finished.root / "manifest/moods/manifest.parquet")
    expected = pd.read_parquet(finished.root / "model/moods/predictions.parquet")
    rows = expected.merge(manifest[["id", "text"]], on="id")
    answers = answers_of_the_candidate(finished, rows)
    columns = ["p:happy", "p:unhappy"]
    assert (answers[columns] - rows[columns]).abs().to_numpy().max() < 2e-2  # bfloat16 has 8 bits
    sure = (rows["p:happy"] - 0.5).abs() > 2e-2
    assert (answers["p:happy"] > 0.5)[sure].equals((rows["p:happy"] > 0.5)[sure])
    artifacts = [file.suffix for file in (finished.root / "mlartifacts").rglob("*")]
    assert not {".pkl", ".pickle", ".pth", ".pt"} & set(artifacts)


def test_the_run_in_mlflow_says_where_the_model_comes_from(finished: Project) -> None:
    printed = finished.ok(
        "python",
        "-c",
        "import json, mlflow\n"
        "client = mlflow.MlflowClient()\n"
        "version = client.get_model_version_by_alias('moods', 'candidate')\n"
        "run = client.get_run(version.run_id)\n"
        "print(json.dumps({'tags': run.data.tags, 'metrics': run.data.metrics, 'params': run.data.params,"
        " 'inputs': [i.dataset.digest for i in run.inputs.dataset_inputs],"
        " 'files': [f.path for f in client.list_artifacts(run.info.run_id, 'evidence')]}))",
        extra={"MLFLOW_TRACKING_URI": f"sqlite:///{finished.root}/mlflow.db"},
    )
    run = json.loads(printed.splitlines()[-1])
    assert run["params"]["fetch.backbone"] == "transformers:bert"
    assert 0 <= run["metrics"]["test.accuracy.value"] <= 1
    assert len(run["tags"]["headstart.git_commit"]) == 40
    assert run["tags"]["headstart.dvc_data"].endswith(".dir")
    assert run["inputs"]
    assert "evidence/metrics.json" in run["files"]


def test_a_model_that_the_tree_no_longer_explains_is_not_registered(finished: Project) -> None:
    recipe = finished.root / "recipes/moods.yaml"
    recipe.write_text(recipe.read_text().replace("train: {}", 'train: {"seed": 7}'))
    done = finished(
        "python",
        "-c",
        "from pathlib import Path\n"
        "from headstart import environment, recipe, registry\n"
        "from headstart.layout import Layout\n"
        "environment.prepare(Path.cwd())\n"
        "registry.register(recipe.load('recipes/moods.yaml'), Layout(Path.cwd(), 'moods'))",
    )
    assert done.returncode != 0
    assert "the model was not made from what is in the tree now" in done.stderr


def test_new_rows_join_without_moving_old_ones(finished: Project) -> None:
    old = pd.read_parquet(finished.root / "manifest/moods/manifest.parquet").set_index("id")["split"]
    examples.write_texts(finished.root / "start/moods.csv", rows=400)
    printed = finished.ok("headstart", "run", "recipes/moods.yaml")
    assert "ingest ran" in printed
    new = pd.read_parquet(finished.root / "manifest/moods/manifest.parquet").set_index("id")["split"]
    assert len(new) > len(old)
    assert new.loc[old.index].equals(old)


def test_a_bad_file_stops_the_run_with_the_stages_own_words(project: Project) -> None:
    examples.write_image_project(project.root)
    broken = project.root / "start/photos/dark/000.png"
    broken.write_bytes(broken.read_bytes()[:600])
    done = project("headstart", "run", "recipes/photos.yaml")
    assert done.returncode == 1
    message = done.stderr[done.stderr.index("error: ") :]
    assert "dark/000.png" in message
    assert "Traceback" not in done.stdout + done.stderr
    assert len(message.splitlines()) < 40
    assert not (project.root / "manifest/photos").exists()
    assert not (project.root / "dvc.lock").exists()


def test_a_fine_tuned_model_is_registered_with_its_history_and_predicts_what_training_predicted(
    finished: Project,
) -> None:
    project, recipe = finished, finished.root / "recipes/moods.yaml"
    train = '{"method": "fine_tune", "epochs": 1}'
    features = '{"packed": true, "precision": "float32"}'
    recipe.write_text(
        recipe.read_text()
        .replace("train: {}", f"train: {train}")
        .replace("features: {}", f"features: {features}")
    )
    printed = project.ok("headstart", "run", "recipes/moods.yaml")
    assert "registered as moods version 2 (candidate)" in printed
    manifest = pd.read_parquet(project.root / "manifest/moods/manifest.parquet")
    expected = pd.read_parquet(project.root / "model/moods/predictions.parquet")
    rows = expected[expected["split"] == "test"].merge(manifest[["id", "text"]], on="id")
    answers = answers_of_the_candidate(project, rows)
    printed = project.ok(
        "python",
        "-c",
        "import json, mlflow\n"
        "client = mlflow.MlflowClient()\n"
        "run = client.get_model_version_by_alias('moods', 'candidate').run_id\n"
        "names = sorted(client.get_run(run).data.metrics)\n"
        "print(json.dumps({name: len(client.get_metric_history(run, name)) for name in names}))",
        extra={"MLFLOW_TRACKING_URI": f"sqlite:///{project.root}/mlflow.db"},
    )
    columns = ["p:happy", "p:unhappy"]
    assert len(rows)
    assert (answers[columns] - rows[columns]).abs().to_numpy().max() < 1e-5
    logged = json.loads(printed.splitlines()[-1])
    steps, epochs = (
        pd.read_csv(project.root / "model/moods" / f"{name}.csv") for name in ("steps", "epochs")
    )
    assert logged["train.step.loss"] == logged["train.step.learning_rate"] == len(steps)
    assert logged["train.epoch.accuracy"] == len(epochs)
    assert logged["train.epoch.seconds"] == 1

    before = contents(project.root)
    printed = project.ok("headstart", "run", "recipes/moods.yaml")
    assert "moods: nothing changed, nothing done" in printed
    assert "already registered as moods version 2" in printed
    assert contents(project.root) == before
