"""Schedules: deep layers learn slower, and every rate rises and falls as the recipe says."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from headstart import schedules
from headstart.recipe import Train


def choices(**keys: Any) -> Train:
    return Train(method="fine_tune", **keys)


class Network(nn.Module):
    """A stem and three blocks, named as timm names its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(3))


def grouped(**keys: Any) -> tuple[list[dict[str, Any]], Network, nn.Linear]:
    network, head = Network(), nn.Linear(4, 2)
    given = choices(**{"learning_rate": 0.01} | keys)
    return (
        schedules.groups(network.named_parameters(), head.named_parameters(), given, "image"),
        network,
        head,
    )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("conv1.weight", "conv1"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("layer4.1.bn2.bias", "layer4.1"),
        ("layer3.0.downsample.0.weight", "layer3.0"),
        ("conv_stem.weight", "conv_stem"),
        ("blocks.2.1.conv_pw.weight", "blocks.2"),
        ("blocks.10.0.bn1.weight", "blocks.10"),
        ("conv_head.weight", "conv_head"),
        ("embeddings.word_embeddings.weight", "embeddings"),
        ("embeddings.LayerNorm.bias", "embeddings"),
        ("encoder.layer.3.output.dense.weight", "encoder.layer.3"),
        ("encoder.layer.11.attention.self.query.bias", "encoder.layer.11"),
        ("blocks.3.attn.qkv.weight", "blocks.3"),
        ("blocks.5.0.conv_pw.weight", "blocks.5"),
        ("features.1.0.block.0.0.weight", "features.1"),
        ("layers.0.blocks.1.mlp.fc1.weight", "layers.0"),
        ("body.layer1.0.conv2.conv.weight", "body.layer1.0"),
        ("stem.conv1.weight", "stem"),
        ("cell_0.comb_iter_0_left.separable_1.bn.weight", "cell_0"),
        ("encoder.layers.encoder_layer_11.self_attention.in_proj_weight", "encoder.layers.encoder_layer_11"),
        ("encoder.layers.encoder_layer_11.ln_1.weight", "encoder.layers.encoder_layer_11"),
        ("encoder.layers.encoder_layer_11.mlp.0.weight", "encoder.layers.encoder_layer_11"),
        ("features.conv0.weight", "features"),
        ("features.denseblock1.denselayer2.conv1.weight", "features.denseblock1"),
        ("features.transition1.conv.weight", "features.transition1"),
        ("trunk_output.block1.block1-0.f.a.0.weight", "trunk_output.block1.block1-0"),
        ("inception3a.branch1.conv.weight", "inception3a"),
        ("inception3a.branch2.0.conv.weight", "inception3a"),
        ("inception3a.branch2.1.bn.bias", "inception3a"),
        ("mixed_5b.branch1.1.conv.weight", "mixed_5b"),
        ("Mixed_7c.branch3x3_2a.conv.weight", "Mixed_7c"),
        ("repeat_1.17.branch1.2.conv.weight", "repeat_1.17"),
        ("block3.rep.4.conv1.weight", "block3"),
        ("s1.b1.downsample.1.weight", "s1"),
        ("crpe2.conv_list.0.weight", "crpe2"),
        ("serial_blocks2.1.mlp.fc1.weight", "serial_blocks2.1"),
        ("level3.tree1.project.0.weight", "level3"),
        ("transformer.layer.5.ffn.lin1.weight", "transformer.layer.5"),
        ("stages.2.blocks.8.norm.weight", "stages.2"),
        ("0.weight", "0"),
    ],
)
def test_a_parameter_belongs_to_the_layer_that_its_name_says(name: str, layer: str) -> None:
    assert schedules.layer_of(name) == layer


class Inception(nn.Module):
    """Blocks with branches side by side, of which only some are numbered."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("conv1", "inception3a", "inception3b"):
            branches = {"branch1": nn.Conv2d(1, 1, 1), "branch2": nn.Sequential(nn.Conv2d(1, 1, 1))}
            self.add_module(name, nn.ModuleDict(branches) if name != "conv1" else nn.Conv2d(1, 1, 1))


class Encoder(nn.Module):
    """A place and a norm around the blocks, named as torchvision names its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 2))
        self.encoder.layers = nn.ModuleDict({f"encoder_layer_{i}": nn.Linear(2, 2) for i in range(2)})
        self.encoder.ln = nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("network", "depths"),
    [
        (Inception(), [3] * 2 + [2] * 4 + [1] * 4),
        (Encoder(), [4, 3, 3, 2, 2, 1, 1]),
    ],
)
def test_branches_share_a_layer_and_what_follows_the_blocks_is_one_of_its_own(
    network: nn.Module, depths: list[int]
) -> None:
    head = nn.Linear(2, 2)
    found = schedules.groups(network.named_parameters(), head.named_parameters(), choices(), "image")
    depth = {id(parameter): group["depth"] for group in found for parameter in group["params"]}
    assert [depth[id(parameter)] for parameter in network.parameters()] == depths


def test_every_layer_learns_slower_than_the_one_behind_it() -> None:
    found, network, _ = grouped(layer_decay=0.5)
    rates = {id(parameter): (g["lr"], g["depth"]) for g in found for parameter in g["params"]}
    for module, depth in ((network.blocks[2], 1), (network.blocks[1], 2), (network.blocks[0], 3)):
        assert {rates[id(p)] for p in module.parameters()} == {(0.01 * 0.5 ** (depth - 1), depth)}
    assert {rates[id(p)] for p in network.conv_stem.parameters()} == {(0.01 * 0.5**3, 4)}


@pytest.mark.parametrize(("modality", "decay", "rate"), [("image", 0.8, 1e-3), ("text", 1.0, 1e-4)])
def test_what_a_recipe_leaves_out_depends_on_what_it_reads(modality: str, decay: float, rate: float) -> None:
    network = Network()
    found = schedules.groups(
        network.named_parameters(), nn.Linear(4, 2).named_parameters(), choices(), modality
    )
    assert {group["lr"] for group in found if group["depth"] < 2} == {rate}
    assert [group["lr"] for group in found if group["depth"] == 2] == pytest.approx([rate * decay] * 2)


def test_without_layer_decay_all_learn_at_one_rate() -> None:
    found, _, _ = grouped(layer_decay=1.0)
    assert {group["lr"] for group in found} == {0.01}
    assert {group["depth"] for group in found} == {0, 1, 2, 3, 4}


def test_biases_and_normalisation_do_not_decay() -> None:
    found, network, head = grouped(weight_decay=0.3)
    decays = {id(parameter): group["weight_decay"] for group in found for parameter in group["params"]}
    for parameter in (*network.parameters(), *head.parameters()):
        assert decays[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0)


def test_the_head_comes_first_and_learns_as_the_last_layers_do() -> None:
    found, _, head = grouped(layer_decay=0.5)
    first = [group for group in found if group["depth"] == 0]
    assert found[: len(first)] == first
    assert {id(p) for group in first for p in group["params"]} == {id(p) for p in head.parameters()}
    assert {group["lr"] for group in first} == {0.01}


def test_the_head_may_have_a_rate_of_its_own() -> None:
    found, _, _ = grouped(head_learning_rate=0.7, layer_decay=1.0)
    assert {group["lr"] for group in found if group["depth"] == 0} == {0.7}
    assert {group["lr"] for group in found if group["depth"] > 0} == {0.01}


def test_every_parameter_is_in_one_group_and_no_group_is_empty() -> None:
    found, network, head = grouped()
    ids = [id(parameter) for group in found for parameter in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in (*network.parameters(), *head.parameters()))
    assert all(group["params"] for group in found)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_whole_rate(schedule: str) -> None:
    given = choices(schedule=schedule, warmup=0.25)
    found = [schedules.factor(given, step / 100, 0) for step in range(1, 26)]
    assert found == pytest.approx([step / 25 for step in range(1, 26)])


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_without_warm_up_the_first_step_has_the_whole_rate(schedule: str) -> None:
    given = choices(schedule=schedule, warmup=0.0)
    assert schedules.factor(given, 1e-6, 0) == pytest.approx(1)


def test_the_cosine_falls_all_the_way_to_nothing() -> None:
    given = choices(schedule="cosine", warmup=0.2)
    found = [schedules.factor(given, step / 100, 0) for step in range(20, 101)]
    assert all(after < before for before, after in pairwise(found))
    assert schedules.factor(given, 0.6, 0) == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0, abs=1e-12)


def test_the_steps_are_those_of_torch() -> None:
    given = choices(schedule="step", warmup=0.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    for epoch in range(25):
        assert schedules.factor(given, (epoch + 0.5) / 25, epoch) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_a_constant_rate_stays() -> None:
    given = choices(schedule="constant", warmup=0.1)
    assert [schedules.factor(given, progress, 30) for progress in (0.1, 0.5, 1.0)] == [1, 1, 1]
