"""Normalisation: BatchNorm that sees a target domain as it saw the source domain.

Goes in: a trained backbone, and inputs of both domains. Comes out: the tensors of its BatchNorm layers for
the target. Adaptive batch normalisation, Li et al. 2016, arXiv:1603.04779. Never sees a label, and changes
no other weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart import backbones, features
from headstart.layout import sha256_of
from headstart.recipe import Features

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BATCH = 64  # rows that are normalised together: fewer have statistics of their own
Inputs = tuple[Tensor, ...]


def adapted(
    weights: Path, options: Features, source: Iterable[Inputs], target: Iterable[Inputs], device: torch.device
) -> dict[str, Tensor]:
    """What BatchNorm needs so that each channel has in the target the mean and deviation of the source.

    In the paper a layer that learned with the source's statistics gets the target's. Ours may have learned
    with those of other data, which it came with: first these are replaced by the source's, with scales and
    shifts that make up for it, so that the network says what it said. Then the target's take their place.

    Args:
        weights: a backbone's folder.
        options: which layers to tap.
        source: batches of the rows that it learned from, as ``features.Tapped`` takes them.
        target: batches of rows of the target, dealt at random; each layer is measured with those before it
            normalised by the batch.
        device: to compute on.

    Returns:
        Tensors on the CPU by their names in ``weights.safetensors``, of the layers that run.
    """
    network, spec = backbones.load(weights)
    tapped = features.Tapped(network, spec, options.layers, options.views).eval().to(device)
    layers: dict[str, Any] = {name: m for name, m in network.named_modules() if isinstance(m, NORMS)}
    with torch.inference_mode():
        seen = _moments(tapped, layers, source, device)
        for name, (mean, variance) in seen.items():
            _rebased(layers[name], mean, variance)
            layers[name].reset_running_stats()
            layers[name].train()
            layers[name].register_forward_pre_hook(_counted())
        for batch in target:
            tapped(*(tensor.to(device) for tensor in batch))
    return {
        f"{name}.{key}": getattr(layers[name], key).detach().cpu().clone()
        for name in seen
        for key in ("weight", "bias", "running_mean", "running_var")
    }


def _counted() -> Callable[[Any, tuple[Tensor, ...]], None]:
    """A hook that makes a layer's statistics the mean over all rows it is given, however they are dealt."""
    rows = 0

    def count(layer: Any, given: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(given[0])
        layer.momentum = len(given[0]) / rows

    return count


def write(weights: Path, changed: dict[str, Tensor]) -> None:
    """Put these tensors in the place of those of a backbone's folder."""
    from safetensors.torch import load_file, save_file

    path = weights / "weights.safetensors"
    save_file(load_file(path) | changed, path)
    replace(backbones.Spec.read(weights), sha256=sha256_of(path)).write(weights)


def _moments(
    tapped: nn.Module, layers: dict[str, Any], batches: Iterable[Inputs], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of what each layer that runs is given, float64 [channels], on the CPU.

    Apple's GPUs have no float64.
    """
    sums: dict[str, Tensor] = {}  # [3, channels]: values, their sum, the sum of their squares

    def note(name: str, given: Tensor) -> None:
        over = [axis for axis in range(given.ndim) if axis != 1]
        # Copies in float64 would be the largest thing in memory; numbers per channel are small.
        variance, mean = (part.cpu().double() for part in torch.var_mean(given, dim=over, correction=0))
        count = torch.full_like(mean, given.numel() / given.shape[1])
        sums[name] = sums.get(name, 0) + torch.stack(
            [count, count * mean, count * (variance + mean.square())]
        )

    handles = [
        layer.register_forward_pre_hook(lambda module, given, name=name: note(name, given[0]))
        for name, layer in layers.items()
    ]
    for batch in batches:
        tapped(*(tensor.to(device) for tensor in batch))
    for handle in handles:
        handle.remove()
    found = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        found[name] = mean, (squares / count - mean.square()).clamp(min=0)
    return found


def _rebased(layer: Any, mean: Tensor, variance: Tensor) -> None:
    """Give a layer other statistics, and the scale and shift with which it says what it said."""
    weight, bias, own_mean, own_variance = (
        tensor.cpu().double() for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    )
    scale = weight / (own_variance + layer.eps).sqrt()
    layer.bias.copy_(bias + scale * (mean - own_mean))
    layer.weight.copy_(scale * (variance + layer.eps).sqrt())
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
