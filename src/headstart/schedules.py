"""Schedules: how fast each layer learns, and when.

Goes in: named parameters and the choices of a recipe. Comes out: the parameter groups of an optimizer, and
the factor of their learning rates at each moment. Never steps an optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby, pairwise
from math import cos, pi
from typing import TYPE_CHECKING, Any

from headstart.recipe import Train

if TYPE_CHECKING:
    from torch.nn import Parameter

# Of the last layers: transformers forget at rates at which convolutions learn. docs/explanation/results.md
# has figures.
LEARNING_RATE = {"image": 1e-3, "text": 1e-4}
LAYER_DECAY = {"image": 0.8, "text": 1.0}
# Blocks whose number is part of their name, as in `encoder_layer_11`. A layer of DenseNet is none: it has
# dozens, and the first would stand still.
NUMBERED = re.compile(r"(?!denselayer)[a-z_]*(layer|block|transition)_?\d[\d-]*")
STEP_EPOCHS, STEP_FACTOR = 7, 0.1  # the step schedule of the classic tutorials


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number in it, or its first part.

    ``encoder.layer.3.output.dense.weight`` is of ``encoder.layer.3``, ``conv_stem.weight`` of ``conv_stem``.
    Below the outermost level a numbered block counts as a number, of blocks within blocks the innermost:
    ``trunk_output.block1.block1-0.proj.0.weight`` is of ``trunk_output.block1.block1-0``. At the outermost
    level any name with a number in it is a block, unless it holds numbered ones: branches that run side by
    side, such as ``inception3a.branch2.0`` and ``inception3a.branch3.0``, are of one layer.
    """
    parts = name.split(".")
    for place, (part, inner) in enumerate(pairwise([*parts, ""])):
        block = NUMBERED.fullmatch(part) if place else re.search(r"\d", part)
        if part.isdigit() or (block and not (inner.isdigit() or NUMBERED.fullmatch(inner))):
            return ".".join(parts[: place + 1])
    return parts[0]


def groups(
    backbone: Iterable[tuple[str, Parameter]],
    head: Iterable[tuple[str, Parameter]],
    choices: Train,
    modality: str,
) -> list[dict[str, Any]]:
    """Parameter groups with their base learning rates: layers by depth, with and without weight decay.

    Layers learn slower the further they are from the head (Howard & Ruder 2018, discriminative fine-tuning):
    the last at ``learning_rate``, each one before it at ``layer_decay`` of the next. Biases and
    normalisation, which have one dimension, do not decay.

    Args:
        backbone: parameters to train, in the order in which the network runs.
        head: those of the head.
        choices: ``learning_rate``, ``layer_decay``, ``weight_decay``, ``head_learning_rate``.
        modality: ``image`` or ``text``, whose defaults differ.

    Returns:
        Dicts of ``params``, ``lr`` (base), ``weight_decay``, and ``depth``: 0 for the
        head, 1 for the last layer.
    """
    # Runs of names: what an `encoder` holds behind its blocks is no part of what it holds before them.
    runs = groupby(backbone, key=lambda named: layer_of(named[0]))
    layers = [[parameter for _, parameter in run] for _, run in runs]
    rate = choices.learning_rate or LEARNING_RATE[modality]
    decay = choices.layer_decay or LAYER_DECAY[modality]
    found = []
    for depth, parameters in enumerate(reversed(layers), start=1):
        found += _by_decay(parameters, rate * decay ** (depth - 1), choices, depth)
    parameters = [parameter for _, parameter in head]
    return _by_decay(parameters, choices.head_learning_rate or rate, choices, 0) + found


def _by_decay(parameters: list[Parameter], rate: float, choices: Train, depth: int) -> list[dict[str, Any]]:
    parts = (
        ([p for p in parameters if p.ndim > 1], choices.weight_decay),
        ([p for p in parameters if p.ndim <= 1], 0.0),
    )
    return [
        {"params": part, "lr": rate, "weight_decay": decay, "depth": depth} for part, decay in parts if part
    ]


def factor(choices: Train, progress: float, epoch: int) -> float:
    """What base learning rates are multiplied by.

    Args:
        choices: ``schedule`` and ``warmup``.
        progress: share of the training that is done, counting the step at hand, in (0, 1].
        epoch: epochs that are done.
    """
    rising = min(1.0, progress / choices.warmup) if choices.warmup else 1.0
    if choices.schedule == "cosine":
        done = max(0.0, progress - choices.warmup) / (1 - choices.warmup)
        return rising * (1 + cos(pi * done)) / 2
    if choices.schedule == "step":
        return rising * STEP_FACTOR ** (epoch // STEP_EPOCHS)
    return rising
