"""The recipes of the README, and the shipped ones that need the internet, run whole on loopback alone."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from tests import examples
from tests.conftest import ROOT, Project, Ran
from tests.servers import Loopback, offer, serving

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_hymenoptera_runs_from_a_zip_and_a_resnet_behind_a_mirror(project: Project, tmp_path: Path) -> None:
    import torch
    import torchvision

    pictures, packed = tmp_path / "hymenoptera_data", io.BytesIO()
    for split, per_class in (("train", 40), ("val", 8)):
        examples.write_images(pictures / split, per_class, side=64)
        for there, named in (("dark", "ants"), ("light", "bees")):
            (pictures / split / there).rename(pictures / split / named)
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(pictures.rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path))
    torch.manual_seed(0)
    weights = io.BytesIO()
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    published = {"/tutorial/hymenoptera_data.zip": packed, "/models/resnet18.pth": weights}
    files = {path: content.getvalue() for path, content in published.items()}
    # Other bytes have other digests, and two epochs are enough; whatever else the recipe says is as it ships.
    # That the named weights of torchvision are fetched from the address it knows, and no others accepted,
    # test_sources shows.
    recipe = project.root / "recipes/hymenoptera.yaml"
    text = recipe.read_text(encoding="utf-8")
    (shipped,) = [line for line in text.splitlines() if "  sha256: " in line]
    zipped, tensors = (hashlib.sha256(content).hexdigest() for content in files.values())
    text = text.replace(shipped, f"  sha256: {zipped}").replace(
        "torchvision:ResNet18_Weights.IMAGENET1K_V1",
        f"https://download.pytorch.org/models/resnet18.pth\n  sha256: {tensors}",
    )
    recipe.write_text(text.replace("epochs: 25", "epochs: 2"), encoding="utf-8")
    with serving(Loopback(files)) as mirror:
        printed = project.ok(
            "headstart",
            "run",
            "recipes/hymenoptera.yaml",
            extra={"HEADSTART_MIRRORS": f"https://download.pytorch.org/={mirror.url}/"},
        )
    assert "registered as hymenoptera version 1" in printed
    report = json.loads((project.root / "manifest/hymenoptera/report.json").read_text())
    assert report["by_split"]["test"] == 16  # the val folder, which training never looks at
    assert json.loads((project.root / "weights/hymenoptera/spec.json").read_text())["dim"] == 512


@pytest.mark.long
def test_bert_runs_as_it_ships_from_a_mirror_of_the_hub(project: Project, tmp_path: Path) -> None:
    examples.write_bert(tmp_path / "bert")
    examples.write_texts(project.root / "inbox/texts.csv")
    table = project.root / "inbox/texts.csv"
    table.write_text(table.read_text().replace("body,mood,shop", "text,label,shop"))
    model = {file.name: file.read_bytes() for file in (tmp_path / "bert").iterdir()}
    with serving(Loopback()) as hub:
        offer(hub, model, "google-bert/bert-base-uncased")
        printed = project.ok("headstart", "run", "recipes/bert.yaml", extra={"HF_ENDPOINT": hub.url})
    assert "registered as bert version 1" in printed


def test_the_readmes_recipes_and_predictions_work_on_ones_own_data_as_they_stand(
    photos: Ran, session_environment: dict[str, str], tmp_path: Path
) -> None:
    """That of images has run, where it was made; here the one of texts does, with a server of its own."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    home, project = tmp_path / "home", photos.project.copy(tmp_path / "project")
    project.environment = session_environment
    examples.write_images(home / "new-photos", 2, seed=1)
    for file, rows in (("tickets.csv", 240), ("new.csv", 4)):
        examples.write_texts(home / file, rows)
        table = pd.read_csv(home / file).rename(columns={"mood": "queue", "shop": "country"})
        table.assign(customer=table.index).to_csv(home / file, index=False)
    tickets = examples.recipe_of_the_readme("tickets", "transformers:bert", "file:start/bert")
    (project.root / "recipes/tickets.yaml").write_text(tickets, encoding="utf-8")
    project.ok("headstart", "run", "recipes/tickets.yaml", extra={"HOME": str(home)})
    for name in ("photos", "tickets"):
        command = re.search(rf"^headstart predict {name} .*$", readme, re.M)
        assert command
        project.ok("sh", "-c", command[0], extra={"HOME": str(home)})
        answers = pd.read_csv(project.root / "answers.csv")
        assert len(answers) == 4
        assert answers["error"].isna().all()
