"""Activations: a run that keeps them learns what a run without them learns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart import activations, alignment, packs
from headstart.classifiers import Classifier
from headstart.examples import soft_targets
from headstart.finetuning import Labels, Tuning
from headstart.recipe import Features, Train
from tests import examples, tuning

EPOCHS = 2
DEFAULTS = {"epochs": EPOCHS, "batch": 16, "precision": "float32", "choose_by": "last"}


def choices(**keys: Any) -> Train:
    return Train(method="fine_tune", **(DEFAULTS | keys))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning.write_weights(tmp_path_factory.mktemp("resnet"))


def runs_of(module: torch.nn.Module) -> list[int]:
    """A list that grows by one number, the rows, whenever the module runs."""
    counts: list[int] = []
    inner = next(part for part in module.modules() if not list(part.children()))
    inner.register_forward_hook(lambda m, given, output: counts.append(len(output)))
    return counts


def losses(run: Tuning) -> list[float]:
    return [line["loss"] for line in run.run().steps]


def test_frozen_layers_run_once_and_the_losses_are_the_same(resnet: Path, tmp_path: Path) -> None:
    plain, kept = (
        tuning.case(resnet, choices(freeze="layer2"), work=work) for work in (None, tmp_path / "kept")
    )
    plain_runs, kept_runs = (runs_of(run.classifier.tapped.network.layer1) for run in (plain, kept))
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-5)
    rows = len(tuning.TRAIN) + len(tuning.VAL)
    assert sum(plain_runs) == EPOCHS * rows + len(tuning.VAL)  # validation comes once more, before the first
    assert sum(kept_runs) - rows <= activations.SWEEP  # one batch more, to compare
    assert [round(line["auroc"], 6) for line in kept.history.epochs] == [
        round(line["auroc"], 6) for line in plain.history.epochs
    ]


def test_a_tapped_layer_at_the_boundary_is_still_tapped(resnet: Path, tmp_path: Path) -> None:
    layers = ["layer2", "layer3"]
    plain, kept = (
        tuning.case(resnet, choices(freeze="layer2"), work=work, layers=layers)
        for work in (None, tmp_path / "kept")
    )
    runs = runs_of(kept.classifier.tapped.network.layer1)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-5)
    assert sum(runs) <= len(tuning.TRAIN) + len(tuning.VAL) + activations.SWEEP


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        (None, {}),
        (["layer1", "layer3"], {"freeze": "layer2"}),
        (["layer2.0", "layer3"], {"freeze": "layer2"}),
        (None, {"freeze": "layer2", "mixup": 0.2}),
        (None, {"freeze": "layer2", "augment": {"horizontal_flip": True}}),
        (None, {"freeze": "layer2", "epochs": 1}),
    ],
)
def test_nothing_is_kept_that_is_needed_or_changes(
    resnet: Path, tmp_path: Path, layers: list[str] | None, keys: dict[str, Any]
) -> None:
    run = tuning.case(resnet, choices(**keys), work=tmp_path, layers=layers)
    run.keep_activations()
    assert run.activations is None


def test_a_network_that_looks_back_past_the_frozen_layers_is_run_whole(resnet: Path, tmp_path: Path) -> None:
    run = tuning.case(resnet, choices(freeze="layer2"), work=tmp_path)
    network = run.classifier.tapped.network
    seen: list[torch.Tensor] = []
    network.layer1.register_forward_hook(lambda m, given, output: seen.append(output.mean() * 5))
    network.layer3.register_forward_hook(lambda m, given, output: output + seen[-1])
    run.keep_activations()
    assert run.activations is None


def test_without_room_the_frozen_layers_run_anew(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(activations, "SHARE_OF_DISK", 0.0)
    run = tuning.case(resnet, choices(freeze="layer2"), work=tmp_path)
    with caplog.at_level(logging.WARNING):
        run.keep_activations()
    assert run.activations is None
    assert "run anew in every epoch" in caplog.text


@pytest.mark.parametrize("layer", ["patch_embed", "blocks.1"])
def test_a_vision_transformer_is_run_whole(layer: str, tmp_path: Path, caplog: Any) -> None:
    """The token that it puts before those of its patches is no layer's."""
    weights = tuning.write_weights(tmp_path / "vit", "timm", "test_vit")
    plain, tried = (tuning.case(weights, choices(freeze=layer), work=work) for work in (None, tmp_path))
    with caplog.at_level(logging.INFO):
        assert losses(tried) == losses(plain)
    assert "run anew in every epoch" in caplog.text


def test_of_two_runs_in_one_folder_each_keeps_its_own(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, beside = (
        tuning.case(resnet, choices(freeze=layer), work=tmp_path) for layer in ("layer2", "layer1")
    )
    inner = run.classifier.frozen_output

    def meanwhile(*inputs: torch.Tensor) -> torch.Tensor:
        beside.keep_activations()
        return inner(*inputs)

    monkeypatch.setattr(run.classifier, "frozen_output", meanwhile)
    run.keep_activations()
    for each in (run, beside):
        assert each.activations
        (pixels,), known = each.pack.batch(tuning.VAL), each.activations.batch(tuning.VAL)[1]
        found = each.classifier.frozen_output(torch.from_numpy(pixels))
        assert torch.allclose(known, found, atol=1e-5)


def test_whatever_ends_a_run_leaves_no_array(resnet: Path, tmp_path: Path) -> None:
    run = tuning.case(resnet, choices(freeze="layer2"), work=tmp_path)
    run.keep_activations()
    assert run.activations
    assert not list(tmp_path.iterdir())  # not even now, so that a killed run has none to take away


Sentences = Callable[[Train, Path | None], Tuning]


@pytest.fixture
def sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sentences:
    """A run over sentences that has not begun; if it aligns, then with rows whose labels it lacks."""
    (tmp_path / "recipes").mkdir()
    examples.write_text_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    weights, pack, truth = tuning.text_case(tmp_path)
    n = len(truth)
    names = [str(i) for i in range(n)]
    labels = Labels(truth, soft_targets(truth, np.ones(n), 2), np.ones(n), names, names)

    def run(made: Train, work: Path | None) -> Tuning:
        torch.manual_seed(0)
        classifier = Classifier(weights, Features(packed=True), made, 2)
        train, val, target = np.arange(0, n - 12), np.arange(n - 12, n), None
        if made.alignment:
            train, target = train[:120], train[120:]
        return Tuning(classifier, pack, labels, train, val, target=target, work=work)

    return run


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sentences_keep_their_tokens_apart(sentences: Sentences, tmp_path: Path, precision: str) -> None:
    made = choices(freeze="encoder.layer.0", precision=precision)
    plain, kept = sentences(made, None), sentences(made, tmp_path)
    counts = runs_of(kept.classifier.tapped.network.encoder.layer[0])
    # In bfloat16 the order of a sum in a batch of another size shows.
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-5 if precision == "float32" else 0.01)
    assert 0 < sum(counts) <= len(kept.labels.truth) + activations.SWEEP


def test_frozen_layers_see_the_sentences_without_the_tokens_that_a_change_drops(
    sentences: Sentences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapting = {"method": "domain_adaptation", "tune": True, "alignment": "consistency"}
    made = Train(**DEFAULTS | adapting | {"freeze": "encoder.layer.0", "alignment_weight": 10.0})
    # Two epochs make nothing sure enough to count.
    monkeypatch.setattr(alignment, "SURE", 0.0)
    plain, kept = sentences(made, None), sentences(made, tmp_path)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-5)


def test_rows_that_were_not_wanted_are_not_held(resnet: Path, tmp_path: Path) -> None:
    run = tuning.case(resnet, choices(freeze="layer2"), work=tmp_path)
    pack: packs.Pixels = run.pack  # type: ignore[assignment]
    found = activations.Activations(run.classifier, pack, np.array([3, 1]), torch.float32, tmp_path)
    assert found.holds(np.array([1, 3]))
    assert not found.holds(np.array([1, 2]))
    assert not found.holds(np.array([70]))
    _, known = found.batch(np.array([3, 1]))
    pixels = torch.from_numpy(pack.batch(np.array([3, 1]))[0])
    assert torch.equal(known, run.classifier.frozen_output(pixels))
    assert known.is_contiguous(memory_format=torch.channels_last)
