"""Candidates against champions, through the flow: noise, a model like the champion, and a better one."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import pytest

from tests import examples
from tests.conftest import Project, clone

pytestmark = pytest.mark.long


def write(path: Path, noise: float, rows: int = 360) -> None:
    """Texts in fixed splits, of which this share of the training rows has its labels shuffled."""
    examples.write_texts(path, rows)
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    chance = random.Random(1)
    for i, line in enumerate(lines):
        line["split"] = ("train", "train", "val", "test", "test", "test")[i // 2 % 6]
    noisy = chance.sample([line for line in lines if line["split"] == "train"], int(noise * rows / 3))
    shuffled = [line["mood"] for line in noisy]
    chance.shuffle(shuffled)
    for line, mood in zip(noisy, shuffled, strict=True):
        line["mood"] = mood
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["body", "mood", "shop", "split"])
        writer.writeheader()
        writer.writerows(lines)


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, session_environment: dict[str, str]
) -> tuple[Project, str]:
    """A project whose champion learned from labels of which 30% were shuffled, and what the run printed."""
    project = clone(tmp_path_factory.mktemp("trials") / "project", session_environment)
    examples.write_text_project(project.root)
    recipe = project.root / "recipes/moods.yaml"
    text = recipe.read_text().replace('"domain": "shop"}', '"domain": "shop", "split": "split"}')
    recipe.write_text(text.replace("train: {}", 'train: {"l2": [0.1]}'))
    write(project.root / "start/moods.csv", noise=1.0)
    return project, project.ok("headstart", "run", "recipes/moods.yaml")


@pytest.fixture
def project(started: tuple[Project, str], tmp_path: Path) -> Project:
    return started[0].copy(tmp_path / "project")


def retrained(project: Project, *, noise: float, seed: int = 0) -> str:
    """The last line of a run on labels with so much noise."""
    write(project.root / "start/moods.csv", noise)
    recipe = project.root / "recipes/moods.yaml"
    recipe.write_text(re.sub(r"train: .*", f'train: {{"seed": {seed}, "l2": [0.1]}}', recipe.read_text()))
    return project.ok("headstart", "run", "recipes/moods.yaml").strip().splitlines()[-1]


def aliases(project: Project) -> dict[str, str]:
    """Version by alias, as ``headstart models`` shows them: words between the number and the figures."""
    found = {}
    for line in project.ok("headstart", "models", "moods").splitlines()[1:]:
        version, first = re.split(r"\s{2,}", line)[:2]
        found |= {alias: version for alias in first.split(", ") if alias.isalpha()}
    return found


def test_a_model_that_learned_nothing_is_registered_and_does_not_become_champion(
    started: tuple[Project, str],
) -> None:
    project, printed = started
    assert "registered as moods version 1 (candidate)" in printed
    assert "is not promoted, there is no champion: " in printed
    assert "champion" not in aliases(project)


def test_a_better_model_is_promoted_an_equal_and_a_worse_one_are_refused_with_reasons_and_rollback_undoes(
    project: Project,
) -> None:
    better = retrained(project, noise=0.0)
    assert "moods version 2 promoted to champion: accuracy" in better
    assert aliases(project)["champion"] == "2"

    equal = retrained(project, noise=0.0, seed=1)
    assert "moods version 3 is not promoted, version 2 stays champion: " in equal
    assert "not shown to be more than 0" in equal
    assert aliases(project) == {"candidate": "3", "champion": "2", "challenger": "3"}

    worse = retrained(project, noise=0.9, seed=2)
    assert "moods version 4 is not promoted, version 2 stays champion: " in worse
    assert "not shown to be more than 0" in worse

    again = project.ok("headstart", "run", "recipes/moods.yaml").strip().splitlines()[-1]
    assert "nothing changed, nothing done" in again
    assert "moods version 4 was not promoted, version 2 stays champion;" in again

    done = project("headstart", "promote", "moods", "3")
    assert done.returncode == 1
    assert "moods version 3 is not promoted" in done.stdout  # on other rows than before: judged anew
    done = project("headstart", "promote", "moods", "4", "--force")
    assert done.returncode == 1
    assert "needs a reason" in done.stderr
    project.ok("headstart", "promote", "moods", "4", "--force", "--because", "a demo")
    assert aliases(project)["champion"] == "4"
    assert aliases(project)["previous"] == "2"
    compared = project.ok("headstart", "compare", "moods", "previous", "champion")
    assert "moods previous would be promoted over champion" in compared

    printed = project.ok("headstart", "rollback", "moods", "--because", "the demo is over")
    assert "version 2 is champion again, version 4 was rolled back" in printed
    again = project.ok("headstart", "run", "recipes/moods.yaml").strip().splitlines()[-1]
    assert "version 2 stays champion" in again
    history = project.ok("headstart", "models", "moods", "--history").splitlines()
    assert [line.split()[5].rstrip(":") for line in history] == [
        "refused",
        "promoted",
        "refused",
        "refused",
        "refused",
        "forced",
        "rolled",
    ]


SCRIPT = """
import json, os, signal, sys
from pathlib import Path

import mlflow

from headstart import environment, promotion, recipe, registry, trials
from headstart.layout import Layout

root = Path.cwd()
environment.prepare(root)
start = root / "mlflow.db"
import headstart.features, mlflow.pyfunc.model  # once, for all children


def go(path, step):
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    steps = 0

    def deadly(write):
        def called(*given, **named):
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*given, **named)

        return called

    if step:
        for name in dir(mlflow.MlflowClient):
            if name.startswith(("set_", "delete_", "create_", "log_", "update_", "_log_")):
                setattr(mlflow.MlflowClient, name, deadly(getattr(mlflow.MlflowClient, name)))
    chosen, layout = recipe.load("recipes/moods.yaml"), Layout(root, "moods")
    trials.decide(chosen, layout, registry.register(chosen, layout).version)


def state(path):
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("moods").experiment_id])
    tags = [
        sorted(
            (key, json.loads(value) | {"at": ""} if key.startswith(promotion.ENTRY) else value)
            for key, value in version.tags.items()
            if key != promotion.VERDICT  # holds seconds
        )
        for version in promotion.versions(client, "moods")
    ]
    model = client.get_registered_model("moods")
    runs = sorted(
        (
            run.info.status,
            run.data.tags["headstart.digest"],
            len(run.data.metrics),
            len(run.data.params),
            len(run.inputs.dataset_inputs),
        )
        for run in runs
    )
    print(json.dumps([model.aliases, dict(model.tags), tags, runs], sort_keys=True, default=str), flush=True)


def child(work, *given):
    pid = os.fork()
    if pid == 0:
        try:
            work(*given)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# All writes take minutes: HEADSTART_EVERY=1 tries each, by default every third is.
for step in [0, *range(1, 200, int(os.environ.get("HEADSTART_EVERY", "3")))]:
    path = root / f"{step}.db"
    path.write_bytes(start.read_bytes())
    ended = child(go, path, step)
    if step and ended == 0:
        break
    assert ended == (-signal.SIGKILL if step else 0), ended
    assert child(go, path, 0) == 0
    assert child(state, path) == 0
else:
    sys.exit("there are more writes than were tried")
print(step)
"""


def test_killed_at_any_write_registering_and_promoting_again_end_as_if_undisturbed(project: Project) -> None:
    recipe = project.root / "recipes/moods.yaml"
    write(project.root / "start/moods.csv", noise=0.0)
    recipe.write_text(recipe.read_text().replace('"l2": [0.1]', '"seed": 1, "l2": [0.1]'))
    project.ok("headstart", "ingest", "recipes/moods.yaml")
    project.ok("dvc", "repro")
    (project.root / "kill.py").write_text(SCRIPT)
    printed = project.ok("python", "kill.py").strip().splitlines()
    *states, steps = [line for line in printed if line.startswith("[") or line.isdecimal()]
    assert int(steps) > 20  # writes, and so far
    assert len(states) > 7
    assert json.loads(states[0])[0] == {"candidate": 2, "champion": 2, "challenger": 1}
    assert set(states) == {states[0]}
