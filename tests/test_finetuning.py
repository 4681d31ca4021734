from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from math import isfinite
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from headstart import alignment, augmentation, finetuning, packs, recipe, training
from headstart.errors import HeadstartError
from headstart.features import averaged
from headstart.layout import sha256_of
from headstart.recipe import Train
from tests import examples, tuning

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {
    "method": "fine_tune",
    "batch": 8,
    "epochs": 2,
    "precision": "float32",
    "dropout": 0.2,
}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning.write_weights(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning.write_weights(tmp_path_factory.mktemp("efficientnet"), "timm", "test_efficientnet")


def losses(run: finetuning.Tuning) -> list[float]:
    return [line["loss"] for line in run.history.steps]


def process(weights: Path, out: Path, choices: Train, *launcher: str) -> list[str]:
    out.mkdir(exist_ok=True)
    program = [*launcher] if launcher else [sys.executable]
    return [
        *program,
        "-m",
        "tests.tuning",
        str(weights),
        str(out),
        choices.model_dump_json(exclude_unset=True),
    ]


def test_the_tutorials_image_loop_is_reproduced_step_by_step(resnet: Path) -> None:
    import torchvision

    shipped = recipe.load(ROOT / "recipes/hymenoptera.yaml").train
    choices = shipped.model_copy(update={"epochs": 10, "precision": "float32"})
    run = tuning.case(resnet, choices)
    plain = torchvision.models.resnet18()
    plain.fc = nn.Linear(512, 2)
    network = run.classifier.tapped.network
    plain.load_state_dict(
        {name: v.clone() for name, v in network.state_dict().items()}
        | {f"fc.{name}": v.clone() for name, v in run.classifier.linear.state_dict().items()}
    )
    run.run()

    # BatchNorm over few pixels magnifies rounding, so the sums have to be taken in one order.
    plain = plain.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.001, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    pack, truth = tuning.pictures()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    found = []
    plain.train()
    for epoch in range(10):
        for rows in pack.order(tuning.TRAIN, 32, np.random.default_rng([0, epoch])):
            pixels = torch.from_numpy(pack.array[rows])
            pixels = augmentation.augmented(pixels, shipped.augment, 0, epoch, rows)
            optimizer.zero_grad()
            logits = plain((pixels.permute(0, 3, 1, 2) - 255 * mean) / (255 * std))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(truth[rows]))
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        scheduler.step()
    assert len(found) == 20
    assert losses(run) == pytest.approx(found, abs=1e-5)


def test_the_tutorials_text_loop_is_reproduced_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertModel

    from headstart.classifiers import Classifier
    from headstart.examples import soft_targets
    from headstart.finetuning import Labels, Tuning

    (tmp_path / "recipes").mkdir()
    examples.write_text_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    weights, pack, truth = tuning.text_case(tmp_path)
    choices = recipe.load(ROOT / "recipes/bert.yaml").train.model_copy(update={"precision": "float32"})
    torch.manual_seed(0)
    classifier = Classifier(weights, recipe.Features(packed=True), choices, 2)
    n = len(truth)
    labels = Labels(truth, soft_targets(truth, np.ones(n), 2), np.ones(n), list("x" * n), list("x" * n))
    train, val = np.arange(0, 220), np.arange(220, 240)
    run = Tuning(classifier, pack, labels, train, val)
    plain = BertModel.from_pretrained(tmp_path / "start/bert", add_pooling_layer=False)
    linear = nn.Linear(32, 2)
    linear.load_state_dict(classifier.linear.state_dict())
    run.run()

    optimizer = torch.optim.Adam([*plain.parameters(), *linear.parameters()], lr=2e-5)
    drop = nn.Dropout(0.3)
    found: list[float] = []
    plain.train()
    for epoch in range(3):
        for rows in pack.order(train, choices.batch, np.random.default_rng([0, epoch])):
            ids, mask = (torch.from_numpy(array) for array in pack.batch(rows))
            torch.manual_seed(finetuning.seed_of(0, len(found)))  # the same units drop out
            hidden = plain(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = hidden[:, 0] if classifier.tapped.pooling == "cls" else averaged(hidden, mask)
            loss = nn.functional.cross_entropy(linear(drop(pooled)), torch.from_numpy(truth[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert len(found) >= 20
    assert losses(run) == pytest.approx(found, abs=1e-5)


def test_it_learns_and_keeps_the_best_epoch(efficientnet: Path) -> None:
    choices = Train(**QUICK | {"epochs": 8, "choose_by": "accuracy", "learning_rate": 0.01})
    run = tuning.case(efficientnet, choices)
    history = run.run()
    accuracies = [line["accuracy"] for line in history.epochs]
    assert max(accuracies) > 0.8 > accuracies[0]
    assert accuracies[history.chosen] == max(accuracies)
    assert history.chosen == accuracies.index(max(accuracies)) or accuracies[-1] == max(accuracies)
    found = run.probabilities(tuning.VAL).argmax(axis=1)
    assert (found == run.labels.truth[tuning.VAL]).mean() == accuracies[history.chosen]


def test_what_is_not_trained_stays_bit_for_bit(efficientnet: Path) -> None:
    choices = Train(**QUICK | {"freeze": "blocks.1", "epochs": 1})
    run = tuning.case(efficientnet, choices)
    before = {name: value.clone() for name, value in run.classifier.state_dict().items()}
    run.run()
    moved = {name for name, value in run.classifier.state_dict().items() if not value.equal(before[name])}
    assert moved == set(run.changing)
    assert not any("running" in name or "blocks.1." in name or "conv_stem" in name for name in moved)
    assert any("blocks.2." in name for name in moved)


def test_layers_behind_the_last_one_tapped_are_not_trained(efficientnet: Path) -> None:
    run = tuning.case(efficientnet, Train(**QUICK), layers=["blocks.1", "blocks.2"])
    assert {name.split(".")[1] for name, _ in run.classifier.trained() if name.startswith("blocks")} == {
        "0",
        "1",
        "2",
    }
    assert not any(name.startswith("conv_head") for name, _ in run.classifier.trained())


def test_gradual_unfreezing_goes_from_the_last_layer_down(efficientnet: Path) -> None:
    run = tuning.case(
        efficientnet, Train(**QUICK | {"gradual": True, "epochs": 1, "ema": None, "choose_by": "last"})
    )
    before = {name: value.clone() for name, value in run.changing.items()}
    run.run()
    moved = {name for name, value in run.changing.items() if not value.equal(before[name])}
    last = list(run.classifier.trained())[-1][0]
    layer = finetuning.schedules.layer_of(last)
    assert {finetuning.schedules.layer_of(name.removeprefix("tapped.network.")) for name in moved} == {
        layer,
        "linear",
    }


def test_the_running_mean_is_what_is_judged_and_kept(efficientnet: Path) -> None:
    choices = Train(**QUICK | {"epochs": 1, "ema": 0.5, "choose_by": "last", "dropout": 0.0})
    run = tuning.case(efficientnet, choices)
    mean = {name: value.clone() for name, value in run.changing.items()}
    average = run._average

    def shadow() -> None:
        average()
        kept = min(0.5, (1 + run.step) / (10 + run.step))
        for name, value in run.changing.items():
            mean[name] = kept * mean[name] + (1 - kept) * value

    run._average = shadow  # type: ignore[method-assign]
    run.run()
    for name, value in run.changing.items():
        torch.testing.assert_close(value, mean[name], rtol=1e-5, atol=1e-6)


def test_views_count_where_rows_are_judged_and_not_where_they_are_learned_from(efficientnet: Path) -> None:
    made = Train(method="fine_tune", batch=8, precision="float32", dropout=0.0)
    one, both = (tuning.case(efficientnet, made, views=views) for views in (1, 2))
    rows = one.train_rows[:8]
    assert one.learn(rows, 0, 0.0)["loss"] == both.learn(rows, 0, 0.0)["loss"]
    mirrored = tuning.case(efficientnet, made)
    pixels = mirrored.pack.array[:, :, ::-1]  # type: ignore[attr-defined]
    mirrored.pack = packs.Pixels(np.ascontiguousarray(pixels))
    logits = [np.log(run.probabilities(rows)) for run in (one, mirrored, both)]
    margins = [found[:, 1] - found[:, 0] for found in logits]
    assert np.abs(margins[0] - margins[1]).max() > 1e-3
    assert margins[2] == pytest.approx((margins[0] + margins[1]) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("epochs", "groups", "mistakes", "kept"),
    [
        (2, 16, 5, 1),  # of sixteen groups all five are missing in a quarter of a per cent of the resamples
        (2, 16, 3, 2),  # all three in four per cent
        (2, 8, 4, 2),  # two groups of eight in a tenth
        (2, 1, 16, 2),  # never, but one group says nothing about others
        (2, 4, 16, 2),  # nor do four: each is better by luck in half of all cases
        (1, 16, 4, 0),  # one per cent: enough for the only epoch that could have been chosen
        (6, 16, 4, 6),  # and not for the best of six
    ],
)
def test_the_last_epoch_is_kept_unless_another_is_surely_better(
    efficientnet: Path, monkeypatch: pytest.MonkeyPatch, *, epochs: int, groups: int, mistakes: int, kept: int
) -> None:
    run = tuning.case(efficientnet, Train(method="fine_tune", batch=8, epochs=epochs, choose_by="accuracy"))
    place = np.zeros(tuning.ROWS, int)
    place[tuning.VAL] = np.arange(len(tuning.VAL)) * groups // len(tuning.VAL)
    run.labels = dataclasses.replace(run.labels, groups=place.tolist())
    # The last epoch but one has all rows right, every other the same rows wrong.
    truth = run.labels.truth[tuning.VAL]
    wrong = truth.copy()
    wrong[:mistakes] = 1 - wrong[:mistakes]
    right, worse = np.eye(2)[truth], np.eye(2)[wrong]
    said = [*[worse] * (epochs - 1), right, worse, right, worse]  # the last two to compare them
    monkeypatch.setattr(run, "probabilities", lambda rows: said.pop(0))
    assert run.run().chosen == kept


def test_patience_ends_the_run(efficientnet: Path) -> None:
    run = tuning.case(efficientnet, Train(**QUICK | {"epochs": 30, "patience": 2, "learning_rate": 1e-12}))
    history = run.run()
    assert history.epochs[-1]["epoch"] - history.chosen == 2


def test_a_budget_ends_the_run_and_its_schedule_with_it(efficientnet: Path) -> None:
    run = tuning.case(efficientnet, Train(**QUICK | {"epochs": 100_000, "budget": 0.05, "warmup": 0.0}))
    history = run.run()
    assert len(history.steps) < 100_000 * run.per_epoch
    assert history.steps[-1]["learning_rate"] < 0.2 * history.steps[0]["learning_rate"]
    assert history.epochs[-1]["step"] == len(history.steps)


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(
    efficientnet: Path, tmp_path: Path
) -> None:
    choices = Train(**QUICK | {"optimizer": "sgd", "learning_rate": 1e30, "clip": None, "warmup": 0.0})
    run = tuning.case(efficientnet, choices, work=tmp_path)
    with pytest.raises(HeadstartError, match="diverged") as caught:
        run.run()
    named = (tmp_path / finetuning.BAD_ROWS).read_text().split()
    step = len(run.history.steps)
    epoch, place = divmod(step, run.per_epoch)
    assert named == ["id", *(f"row-{row}" for row in run.order(epoch)[place])]
    assert finetuning.BAD_ROWS in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (MPS has 9")],
)
def test_what_does_not_fit_into_memory_is_halved_and_the_batch_stays(
    error: RuntimeError, efficientnet: Path, caplog: Any
) -> None:
    choices = Train(**QUICK | {"dropout": 0.0, "epochs": 1})
    whole, parts = tuning.case(efficientnet, choices), tuning.case(efficientnet, choices)

    def too_large(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if module.training and len(given[0]) > 2:
            raise error

    parts.classifier.register_forward_pre_hook(too_large)
    whole.run()
    parts.run()
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert parts.micro == 2
    assert "2 rows at a time" in caplog.text
    parts.micro, parts.step = 1, 0
    parts.classifier.register_forward_pre_hook(lambda module, given: too_large(module, (torch.zeros(3),)))
    with pytest.raises(HeadstartError, match="does not fit into memory"):
        parts.run()


def test_ranks_that_a_platform_gives_its_own_processes_keep_no_training_waiting(
    efficientnet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, rank in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, rank)
    run = tuning.case(efficientnet, Train(**QUICK))
    assert run.accelerator.num_processes == 1
    assert run.accelerator.is_main_process


def test_rows_count_by_their_weight(efficientnet: Path) -> None:
    run = tuning.case(efficientnet, Train(**QUICK | {"dropout": 0.0}))
    rows = tuning.TRAIN[:8]
    run.labels.weights[rows[4:]] = 0
    half, _ = run._gradients(rows, 0)
    gradient = run.classifier.linear.weight.grad.clone()  # type: ignore[union-attr]
    run.optimizer.zero_grad()
    assert run._gradients(rows[:4], 0)[0] == pytest.approx(half, rel=1e-5)
    torch.testing.assert_close(run.classifier.linear.weight.grad, gradient, rtol=1e-4, atol=1e-6)


ALIGNING: dict[str, Any] = QUICK | {"method": "domain_adaptation", "tune": True, "dropout": 0.0}


@pytest.mark.parametrize("name", get_args(recipe.Alignment))
def test_alignment_changes_what_is_learned_and_weighs_what_it_is_given(name: str, efficientnet: Path) -> None:
    """The targets of target rows are NaN: one look at them would end the run."""

    def trained(**more: Any) -> finetuning.Tuning:
        run = tuning.case(efficientnet, Train(**ALIGNING | {"alignment": name} | more))
        if name == "consistency":  # two epochs make nothing sure enough
            run.classifier.linear.weight.data *= 1000
        run.run()
        return run

    aligned, ignored = trained(alignment_weight=10.0), trained(alignment_weight=0.0)
    weights = [dict(run.classifier.tapped.named_parameters()) for run in (aligned, ignored)]
    assert all(isfinite(loss) for loss in losses(aligned))
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    if name in alignment.ADVERSARIAL:
        before = tuning.case(efficientnet, Train(**ALIGNING | {"alignment": name})).classifier.discriminator
        after = aligned.classifier.discriminator
        assert before and after
        assert not torch.equal(before.layers[0].weight, after.layers[0].weight)


def test_a_step_aligns_with_as_many_rows_of_the_target_and_meets_all_of_them(efficientnet: Path) -> None:
    run = tuning.case(efficientnet, Train(**ALIGNING | {"alignment": "mmd"}))
    seen = []
    for step in range(run.per_epoch):
        run.step = step
        seen.append(run._of_target(8, 0))
        assert len(seen[-1]) == 8
    assert set(np.concatenate(seen)) == set(run.target_rows)
    assert not np.array_equal(np.concatenate(seen[:2]), np.concatenate([run._of_target(8, 1)] * 2))


def test_rows_of_the_target_are_named_by_a_weak_view_and_learned_by_a_stronger_one(
    efficientnet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"horizontal_flip": True, "crop": 0.3, "contrast": 0.9}
    run = tuning.case(efficientnet, Train(**ALIGNING | {"alignment": "consistency", "augment": own}))
    seen = []
    augmented = augmentation.augmented

    def watched(pixels: torch.Tensor, options: recipe.Augment, *given: Any) -> torch.Tensor:
        seen.append(options)
        return augmented(pixels, options, *given)

    monkeypatch.setattr(augmentation, "augmented", watched)
    run.learn(run.order(0)[0], 0, 1.0)
    source, weak, strong = seen
    assert source == recipe.Augment(**own)
    assert weak == recipe.Augment(horizontal_flip=True)
    assert strong == recipe.Augment(**own | {"brightness": 0.3})


LIVE: list[dict[str, Any]] = [
    {"batch_norm": "updated", "batch": 11},  # of 56 rows one is left over
    {"batch_norm": "updated", "batch": 13, "method": "domain_adaptation", "tune": True, "alignment": "mmd"},
    {"batch_norm": "updated", "batch": 15, "method": "domain_adaptation", "tune": True, "alignment": "mmd"},
    {"source_free": "entropy", "batch": 11, "method": "domain_adaptation"},
]


@pytest.mark.parametrize("more", LIVE)
def test_a_row_left_over_is_no_batch_for_statistics_to_follow(more: dict[str, Any], resnet: Path) -> None:
    """The last map of these pictures is of one place: a row alone has no variance."""
    run = tuning.case(resnet, Train(**QUICK | {"epochs": 1} | more))
    assert min(map(len, run.order(0))) > 1
    assert len(run.run().steps) == run.per_epoch == len(run.order(0))
    assert tuning.case(resnet, Train(**QUICK | {"batch": 11})).per_epoch == 6  # statistics stay: it may be


def test_no_part_of_a_batch_is_too_small_for_statistics_to_follow(resnet: Path) -> None:
    run = tuning.case(resnet, Train(**QUICK | {"batch_norm": "updated"}))
    run.micro = 4
    assert isfinite(run.learn(tuning.TRAIN[:9], 0, 1.0)["loss"])

    def too_large(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.classifier.register_forward_pre_hook(too_large)
    with pytest.raises(HeadstartError, match="does not fit into memory"):
        run.learn(tuning.TRAIN[:9], 0, 1.0)
    assert run.micro == 2


@pytest.mark.parametrize(("batch", "rows"), [(1, 56), (8, 1)])
def test_statistics_cannot_follow_single_rows(
    batch: int, rows: int, resnet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TRAIN", np.arange(rows))
    tuning.case(resnet, Train(**QUICK | {"batch": batch}))
    with pytest.raises(HeadstartError, match="cannot follow batches of a single row") as caught:
        tuning.case(resnet, Train(**QUICK | {"batch_norm": "updated", "batch": batch}))
    assert caught.value.where == f"train.batch: {batch}; {rows} rows to learn from"


FREE: dict[str, Any] = QUICK | {"method": "domain_adaptation", "dropout": 0.0}


@pytest.mark.parametrize("way", get_args(recipe.SourceFree))
def test_without_a_source_the_head_stays_and_what_the_way_trains_moves(way: str, efficientnet: Path) -> None:
    run = tuning.case(efficientnet, Train(**FREE | {"source_free": way}))
    before = {name: value.clone() for name, value in run.classifier.state_dict().items()}
    history = run.run()
    moved = {name for name, value in run.classifier.state_dict().items() if not value.equal(before[name])}
    assert moved == set(run.changing)
    assert not any(name.startswith("linear") for name in moved)
    layers = dict(run.classifier.named_modules())
    kinds = {type(layers[name.rpartition(".")[0]]).__name__ for name in moved}
    assert kinds == {"BatchNormAct2d"} if way == "entropy" else "Conv2d" in kinds
    assert history.chosen == run.epochs == history.epochs[-1]["epoch"]


@pytest.mark.parametrize("way", get_args(recipe.SourceFree))
def test_without_a_source_a_model_finds_its_classes_again_in_brighter_pictures(
    way: str, efficientnet: Path, tmp_path: Path
) -> None:
    taught = tuning.case(efficientnet, Train(**QUICK | {"epochs": 8, "learning_rate": 0.01}))
    taught.run()
    free = Train(**FREE | {"source_free": way, "epochs": 20, "batch_norm": "updated"})
    taught.classifier.save(tmp_path)
    run = tuning.case(tmp_path / "backbone", free, head=taught.classifier.head().tempered(20))
    run.pack, truth = tuning.pictures(brighter=60)

    def right() -> float:
        return float((run.probabilities(tuning.VAL).argmax(axis=1) == truth[tuning.VAL]).mean())

    before = right()
    run.run()
    assert right() > before + 0.2


def test_without_normalisation_to_train_there_is_no_entropy_to_lower_by_it(efficientnet: Path) -> None:
    with pytest.raises(HeadstartError, match="no normalisation to train"):
        tuning.case(efficientnet, Train(**FREE | {"source_free": "entropy", "freeze": "bn2"}))


def test_features_that_are_handed_out_are_those_that_the_head_was_trained_on(efficientnet: Path) -> None:
    run = tuning.case(efficientnet, Train(**QUICK))
    run.run()
    rows = np.array([70, 3, 41])
    found = run.classifier.head().probabilities(run.vectors(rows))
    assert found == pytest.approx(run.probabilities(rows), abs=1e-5)


def test_the_speed_of_an_epoch_that_was_taken_up_is_that_of_its_steps_since(
    efficientnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(finetuning, "SHARE_OF_TIME", float("inf"))
    choices = Train(**QUICK | {"epochs": 1})
    killed, run = (tuning.case(efficientnet, choices, work=tmp_path) for _ in range(2))
    steps = killed.per_epoch
    learn = killed.learn

    def dies(*given: Any) -> dict[str, float]:
        if killed.step == steps - 2:
            raise KeyboardInterrupt
        return learn(*given)

    monkeypatch.setattr(killed, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    (clock,) = run.run().clock
    assert len(run.history.steps) == steps > 2
    assert clock["rows_per_second"] * clock["seconds"] == pytest.approx(2 * choices.batch)


@pytest.mark.parametrize(("wish", "taken"), [("cuda:1", [1]), ("cuda", []), ("cpu:0", [])])
def test_the_gpu_wished_for_is_made_the_current_one(
    wish: str, taken: list[int], efficientnet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[int | None] = []
    monkeypatch.setattr(finetuning.devices, "device", lambda: torch.device(wish))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    tuning.case(efficientnet, Train(**QUICK))
    assert current == taken


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"batch_norm": "updated"}, "train.batch_norm"),
        ({"tune": True, "alignment": "mmd", "teach": True}, "train.alignment, train.teach"),
        ({"tune": True, "target_statistics": True}, "train.target_statistics"),
        ({"source_free": "entropy"}, "train.source_free"),
    ],
)
def test_what_needs_one_process_is_refused_in_several_before_anything_is_learned(
    more: dict[str, Any], where: str, efficientnet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning.Accelerator, "num_processes", 2)
    tuning.case(efficientnet, Train(**QUICK))
    method = {} if "batch_norm" in more else {"method": "domain_adaptation"}
    with pytest.raises(HeadstartError, match="needs one process, and there are 2") as caught:
        tuning.case(efficientnet, Train(**QUICK | method | more))
    assert caught.value.where == where
    assert "HEADSTART_PROCESSES=1" in caught.value.do


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "kills"),
    [
        ({"mixup": 0.2}, 3),
        *(
            pytest.param(more, 10, marks=pytest.mark.long)
            for more in (
                {"mixup": 0.2},
                {"alignment": "conditional_adversarial"},
                {"source_free": "hypothesis_transfer"},
            )
        ),
    ],
)
def test_a_run_killed_anywhere_ends_with_the_same_bits(
    more: dict[str, Any], kills: int, efficientnet: Path, tmp_path: Path
) -> None:
    """Kills at random moments of runs that save after every step, each then run to its end."""
    method = ALIGNING if "alignment" in more else FREE if "source_free" in more else QUICK
    choices = Train(**method | {"epochs": 4, "augment": {"horizontal_flip": True}} | more)
    undisturbed = tmp_path / "undisturbed"
    subprocess.run(process(efficientnet, undisturbed, choices), cwd=ROOT, check=True)
    expected = (undisturbed / "done.safetensors").read_bytes()
    history = (undisturbed / "history.json").read_text()
    killed, chance = 0, random.Random(0)
    out = tmp_path / "killed"
    while killed < kills:
        command = process(efficientnet, out, choices)
        kept = out / "kept"
        latest = max((file.name for file in kept.glob("*.json")), default="")
        running = subprocess.Popen(command, cwd=ROOT)
        while running.poll() is None and max((f.name for f in kept.glob("*.json")), default="") <= latest:
            time.sleep(0.005)  # it has not got further yet
        time.sleep(chance.random() * 0.4)
        running.kill()
        running.wait()
        killed += 1
        if (out / "done.safetensors").exists():  # it was faster than the kill: compare, and begin anew
            assert (out / "done.safetensors").read_bytes() == expected
            out = tmp_path / f"killed-{killed}"
    subprocess.run(process(efficientnet, out, choices), cwd=ROOT, check=True)
    assert (out / "done.safetensors").read_bytes() == expected
    assert (out / "history.json").read_text() == history


@pytest.mark.long
def test_teaching_that_is_killed_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while the second network trains, of a run that saves after every step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    examples.write_cameras_project(tmp_path, teach=True, epochs=1)
    chosen, layout = examples.prepared(tmp_path, "cameras")
    script = (
        "from headstart import finetuning, recipe, training\n"
        "from headstart.layout import Layout\n"
        "from pathlib import Path\n"
        "finetuning.SECONDS_BETWEEN, finetuning.SHARE_OF_TIME = 0.0, float('inf')\n"
        "training.train(recipe.load('recipes/cameras.yaml'), Layout(Path.cwd(), 'cameras'))\n"
    )
    running = subprocess.Popen([sys.executable, "-c", script])
    while running.poll() is None and not [*layout.work.glob("train/*-taught/*2.json")]:
        time.sleep(0.002)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not layout.model.exists()
    taken_up: list[int] = []
    begun = finetuning.Tuning._resumed

    def watched(tuning: finetuning.Tuning) -> bool:
        taken = begun(tuning)
        taken_up.append(tuning.step)
        return taken

    monkeypatch.setattr(finetuning.Tuning, "_resumed", watched)
    training.train(chosen, layout)
    source, taught = taken_up
    steps = len(pd.read_csv(layout.model / "steps.csv"))
    assert source > 0
    assert 2 <= taught < steps
    continued = {path.name: sha256_of(path) for path in layout.model.rglob("*") if path.is_file()}
    training.train(chosen, layout)
    assert taken_up[2:] == [0, 0]
    assert continued == {path.name: sha256_of(path) for path in layout.model.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.long
def test_memory_does_not_grow_with_the_rows(efficientnet: Path, tmp_path: Path) -> None:
    """64 times 64 pixels in colour: at 16 times the rows there are 94 MB more of them on the disk."""
    script = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from headstart import packs
from headstart.classifiers import Classifier
from headstart.finetuning import Labels, Tuning
from headstart.recipe import Features, Train
n = int(sys.argv[2])
classifier = Classifier(Path(sys.argv[1]), Features(packed=True), Train(method="fine_tune", epochs=1), 2)
truth = np.arange(n) % 2
labels = Labels(truth, np.eye(2)[truth], np.ones(n), range(n), range(n))
pack = packs.Pixels(np.load(sys.argv[3], mmap_mode="r")[:n])
Tuning(classifier, pack, labels, np.arange(n - 64), np.arange(n - 64, n)).run()
now = next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, now)
"""
    pixels = np.random.default_rng(0).integers(0, 255, (8_192, 64, 64, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    peaks = []
    for rows in (512, 2_048, 8_192):
        command = [sys.executable, "-c", script, str(efficientnet), str(rows), str(tmp_path / "pixels.npy")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append([int(kib) / 1024 for kib in done.stdout.split()[-2:]])
    assert (np.ptp(peaks, axis=0) < 45).all(), peaks


@pytest.mark.long  # tests/test_launching.py has it as a user sees it
def test_two_processes_take_the_same_steps_as_one(efficientnet: Path, tmp_path: Path) -> None:
    choices = Train(**QUICK | {"dropout": 0.0, "class_weight": None})
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(process(efficientnet, one, choices), cwd=ROOT, check=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(process(efficientnet, two, choices, *launch), cwd=ROOT, check=True)
    alone, together = (json.loads((out / "history.json").read_text()) for out in (one, two))
    assert (alone["processes"], together["processes"]) == (1, 2)
    for key in ("loss", "accuracy", "gradient_norm"):
        assert [s[key] for s in together["steps"]] == pytest.approx(
            [s[key] for s in alone["steps"]], abs=1e-4
        )
    assert [e["auroc"] for e in together["epochs"]] == pytest.approx(
        [e["auroc"] for e in alone["epochs"]], abs=1e-3
    )
