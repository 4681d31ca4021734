from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from headstart import backbones, models, normalisation, training
from headstart.errors import HeadstartError
from headstart.examples import Examples
from headstart.features import Tapped
from headstart.fitting import Tuned
from headstart.recipe import Features, Train, load
from tests import cached, examples, tuning

CPU = torch.device("cpu")
OPTIONS = Features(layers=["layer1", "layer2"])  # what comes after these does not run


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 that came with statistics, scales and shifts of its own."""
    folder = tuning.write_weights(tmp_path_factory.mktemp("weights") / "resnet")
    network, _ = backbones.load(folder)
    chance = torch.Generator().manual_seed(1)
    changed: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, normalisation.NORMS):
            size = module.num_features
            for key, least in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
                changed[f"{name}.{key}"] = torch.rand(size, generator=chance) + least
    normalisation.write(folder, changed)
    return folder


def pixels(rows: int, seed: int = 0) -> Tensor:
    return 255 * torch.rand(rows, tuning.SIDE, tuning.SIDE, 3, generator=torch.Generator().manual_seed(seed))


def vectors(weights: Path, x: Tensor) -> Tensor:
    network, spec = backbones.load(weights)
    with torch.inference_mode():
        return Tapped(network, spec, OPTIONS.layers).eval()(x)


@pytest.fixture
def changed(weights: Path, tmp_path: Path) -> Iterator[Any]:
    """Writes the backbone anew for a source and a target, and returns its folder and what has changed."""

    def change(source: Tensor, target: Tensor) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path / "target"
        shutil.copytree(weights, folder, dirs_exist_ok=True)
        found = normalisation.adapted(folder, OPTIONS, [(s,) for s in source.split(16)], [(target,)], CPU)
        normalisation.write(folder, found)
        return folder, found

    yield change


def test_the_first_layer_has_the_moments_of_the_target_and_its_outputs_those_of_the_source(
    weights: Path, changed: Any
) -> None:
    source, target = pixels(48), 0.3 * pixels(40, seed=1) + 60
    folder, found = changed(source, target)
    before, spec = backbones.load(weights)
    after, _ = backbones.load(folder)
    given: list[Tensor] = []
    before.bn1.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    with torch.inference_mode():
        tapped = Tapped(before, spec, OPTIONS.layers)
        for x in (source, target):
            tapped(x)
        assert found["bn1.running_mean"] == pytest.approx(given[1].mean(dim=(0, 2, 3)), abs=1e-4)
        assert found["bn1.running_var"] == pytest.approx(given[1].var(dim=(0, 2, 3)), rel=1e-3)
        mine, theirs = before.bn1(given[0]), after.bn1(given[1])
        assert theirs.mean(dim=(0, 2, 3)) == pytest.approx(mine.mean(dim=(0, 2, 3)), abs=1e-3)
        assert theirs.std(dim=(0, 2, 3)) == pytest.approx(mine.std(dim=(0, 2, 3)), rel=1e-2)


def test_pictures_of_less_contrast_are_seen_as_they_were_at_full_contrast(
    weights: Path, changed: Any
) -> None:
    source = pixels(48)
    _, spec = backbones.load(weights)
    grey = 255 * torch.tensor(spec.preprocessing["mean"])
    pale = grey + 0.3 * (source - grey)  # all that the first layer makes of it is 0.3 times as large
    expected = vectors(weights, source)
    folder, _ = changed(source, pale)
    assert (vectors(weights, pale) - expected).abs().mean() > 0.1 * expected.abs().mean()
    assert vectors(folder, pale) == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_a_target_like_the_source_changes_nothing_and_what_does_not_run_is_left_alone(
    weights: Path, changed: Any
) -> None:
    source = pixels(48)
    folder, found = changed(source, source)
    assert vectors(folder, source) == pytest.approx(vectors(weights, source), rel=1e-2, abs=1e-2)
    assert not any(name.startswith(("layer3", "layer4")) for name in found)
    before, after = (load_file(f / "weights.safetensors") for f in (weights, folder))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == before.keys() - found.keys()
    backbones.Spec.read(folder)


@pytest.mark.parametrize("views", [1, 2])
def test_every_row_of_the_target_counts_the_same_in_whatever_batches(weights: Path, views: int) -> None:
    source, target = pixels(48), pixels(48, seed=1)
    target[40:] *= 0.3
    options = OPTIONS.model_copy(update={"views": views})
    whole, parts = (
        normalisation.adapted(weights, options, [(source,)], [(x,) for x in target.split(size)], CPU)
        for size in (48, 40)
    )
    assert parts["bn1.running_mean"] == pytest.approx(whole["bn1.running_mean"], abs=1e-4)


def test_a_row_more_than_a_batch_is_no_batch_of_its_own(tmp_path: Path) -> None:
    """One row alone has no variance: the last map of these pictures is of one place."""
    run = tuning.case(tuning.write_weights(tmp_path / "resnet"), Train(method="fine_tune"))
    features = np.zeros((tuning.ROWS, 512), np.float16)
    known = Examples(pd.DataFrame(), features, ["a", "b"], run.labels.truth)
    tuned = Tuned(cached.recipe(), known, run, None, None, np.zeros((0, 2)))
    target = np.arange(normalisation.BATCH + 1)
    found = tuned.reading(target, tuning.TRAIN, target).normalised
    assert found is not None
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.slow
def test_what_is_published_reads_the_target_as_it_was_read_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    examples.write_cameras_project(tmp_path, target_statistics=True, adaptation="source_only")
    recipe, layout = examples.prepared(tmp_path, "cameras")
    training.train(recipe, layout)
    said = json.loads((layout.model / "model.json").read_text())
    assert said["target_statistics"] is True
    assert not (layout.model / "source.safetensors").exists()  # no backbone is left that it belongs to
    own = pd.read_parquet(layout.model / "predictions.parquet")
    target = own[own["domain"] == "new"]
    paths = pd.read_parquet(layout.manifest / "manifest.parquet").set_index("id").loc[target["id"], "path"]
    served = models.Model.read(models.parts_of(recipe, layout, tmp_path))([layout.raw / p for p in paths])
    assert served.probabilities == pytest.approx(target[["p:dark", "p:light"]].to_numpy(), abs=1e-5)
    training.train(recipe.training(target_statistics=False), layout)
    plain = pd.read_parquet(layout.model / "predictions.parquet")
    # What the statistics hide is still told.
    assert json.loads((layout.model / "model.json").read_text())["shift"] == said["shift"]
    odds = {
        name: np.log(rows["p:dark"] / rows["p:light"])[rows["domain"] == domain].to_numpy()
        for name, rows, domain in (
            ("source", own, "old"),
            ("source before", plain, "old"),
            ("target", own, "new"),
            ("target before", plain, "new"),
        )
    }
    assert odds["source"] == pytest.approx(odds["source before"], abs=1e-2)
    assert np.abs(odds["target"] - odds["target before"]).mean() > 1


@pytest.mark.slow
def test_a_network_without_batch_norm_is_refused_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    examples.write_text_project(tmp_path)
    recipe = tmp_path / "recipes/moods.yaml"
    train = {"method": "domain_adaptation", "tune": True, "target_statistics": True}
    recipe.write_text(
        recipe.read_text()
        .replace('"adapter": "table"', '"adapter": "table", "target_domain": "b"')
        .replace("features: {}", 'features: {"packed": true}')
        .replace("train: {}", f"train: {json.dumps(train)}")
    )
    _, layout = examples.prepared(tmp_path, "moods")
    with pytest.raises(HeadstartError, match="has no BatchNorm") as raised:
        training.train(load(recipe), layout)
    assert raised.value.where == "train.target_statistics"
    assert not layout.model.exists()
