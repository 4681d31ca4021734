"""Augmentation: how a picture looks in one epoch, without its label changing.

Goes in: packed pictures, and the number of each. Comes out: pictures of the same form. What happens to a
picture depends on the seed, the epoch and its own number alone. There is no random state: neither the batch
that it is in, nor the process that asks, nor what was asked before makes a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.recipe import Augment

Words = NDArray[np.uint64]
HORIZONTAL, VERTICAL, TURNS, BRIGHTNESS, CONTRAST, AREA, ASPECT, TOP, LEFT = range(9)  # one draw for each
CROP, CHANGE = 0.7, 0.3  # what may happen at least to a picture that is changed much
ASPECT_MOST = 4 / 3  # of a crop, and its inverse the least, as in Szegedy et al. 2015


def augmented(pixels: Tensor, options: Augment, seed: int, epoch: int, rows: NDArray[np.int64]) -> Tensor:
    """The pictures as they look in an epoch: uint8 [n, side, side, c] of uint8 [n, side, side, c].

    Args:
        pixels: c is 1 or 3.
        options: what may happen; if nothing may, ``pixels`` itself comes back.
        seed: of the training.
        epoch: of the training, from 0.
        rows: [n], the number of each picture.
    """
    if options == Augment():
        return pixels
    draws = _uniform(seed, epoch, rows)
    if options.crop < 1:
        pixels = _cropped(pixels, options.crop, draws)
    pixels = _turned(pixels, options, draws)
    if options.brightness or options.contrast:
        factors = [
            torch.from_numpy(1 + strength * (2 * draws[:, which] - 1))
            .float()
            .to(pixels.device)
            .view(-1, 1, 1, 1)
            for strength, which in ((options.brightness, BRIGHTNESS), (options.contrast, CONTRAST))
        ]
        values = pixels.float()
        # Added up in whole numbers: a sum of fractions depends on how threads and batches divide it.
        mean = pixels.sum(dim=(1, 2, 3), keepdim=True).float() / prod(pixels.shape[1:])
        # (values - mean) * contrast + mean, all of it times brightness, in one pass over the values.
        values = torch.addcmul(mean * (1 - factors[1]) * factors[0], values, factors[1] * factors[0])
        pixels = values.round_().clamp_(0, 255).to(torch.uint8)
    return pixels


def weak(options: Augment) -> Augment:
    """What may happen to a picture that is to be named by itself: flips and turns, as in FixMatch."""
    return options.model_copy(update={"crop": 1.0, "brightness": 0.0, "contrast": 0.0})


def strong(options: Augment) -> Augment:
    """What may happen to a picture that is changed much: at least what may happen anyway."""
    return options.model_copy(
        update={
            "crop": min(options.crop, CROP),
            "brightness": max(options.brightness, CHANGE),
            "contrast": max(options.contrast, CHANGE),
        }
    )


def views(pixels: Tensor, count: int) -> Iterator[Tensor]:
    """The pictures [n, side, side, c] as they are, mirrored if ``count`` is 2, and turned too if it is 8."""
    for turns in range(count // 2 or 1):
        for mirrored in (False, True)[:count]:
            view = pixels.flip(2) if mirrored else pixels
            yield torch.rot90(view, turns, (1, 2)) if turns else view


def mixed(  # noqa: PLR0917  # a batch has three parts
    pixels: Tensor, targets: Tensor, weights: Tensor, alpha: float, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch blended with itself in another order (mixup: Zhang et al. 2018, arXiv:1710.09412).

    The loss of a blend is the blend of two losses, each with its own weight.

    Args:
        pixels: [n, side, side, c].
        targets: float32 [n, k], each row a distribution.
        weights: float32 [n].
        alpha: of the Beta distribution that the proportion is drawn from, one for the batch.
        seed: of the training.
        step: of the training; the draws depend on it and on the seed alone.

    Returns:
        float32 pixels, targets and weights, of the same shapes.
    """
    chance = np.random.default_rng([seed, step])
    share = float(chance.beta(alpha, alpha))
    share = max(share, 1 - share)
    other = torch.from_numpy(chance.permutation(len(pixels))).to(pixels.device)
    blend = torch.lerp(pixels[other].float(), pixels.float(), share)
    ours, theirs = share * weights, (1 - share) * weights[other]
    total = ours + theirs
    # Where neither counts, their targets are blended like the pixels: still a distribution.
    part = torch.where(total > 0, ours / total, share)[:, None]
    return blend, part * targets + (1 - part) * targets[other], total


def _turned(pixels: Tensor, options: Augment, draws: NDArray[np.float64]) -> Tensor:
    """Mirrored and turned: pictures that share one of the square's eight symmetries are moved together."""
    n = len(pixels)
    mirror = (draws[:, HORIZONTAL] < 0.5) if options.horizontal_flip else np.zeros(n, bool)
    upside = (draws[:, VERTICAL] < 0.5) if options.vertical_flip else np.zeros(n, bool)
    turns = (4 * draws[:, TURNS]).astype(int) if options.quarter_turns else np.zeros(n, int)
    kind = mirror + 2 * upside + 4 * turns
    if not kind.any():
        return pixels
    result = torch.empty_like(pixels)
    for each in np.unique(kind):
        chosen = torch.from_numpy(np.flatnonzero(kind == each)).to(pixels.device)
        part = pixels[chosen]
        flips = [axis for axis, flipped in ((2, each & 1), (1, each & 2)) if flipped]
        result[chosen] = torch.rot90(torch.flip(part, flips) if flips else part, int(each // 4), (1, 2))
    return result


def _cropped(pixels: Tensor, least: float, draws: NDArray[np.float64]) -> Tensor:
    """A part of each picture at the size of the whole.

    The larger the area, the nearer to a square the box has to be to fit. torchvision draws both until they
    fit, ten times; here the aspect is drawn from those that fit, so that a box is never cut to less area.
    """
    from torchvision.transforms.v2.functional import resized_crop

    side = pixels.shape[1]
    share = least + (1 - least) * draws[:, AREA]
    widest = np.minimum(log(ASPECT_MOST), -np.log(share))  # its logarithm; the narrowest is the inverse
    aspect = np.exp(widest * (2 * draws[:, ASPECT] - 1))
    width = (side * np.sqrt(share * aspect)).round().clip(1, side).astype(int)
    height = (side * np.sqrt(share / aspect)).round().clip(1, side).astype(int)
    top, left = (
        (draws[:, where] * (side - size + 1)).astype(int) for where, size in ((TOP, height), (LEFT, width))
    )
    channels_first = pixels.permute(0, 3, 1, 2)
    parts = [
        resized_crop(picture, int(t), int(f), int(h), int(w), [side, side], antialias=True)
        for picture, t, f, h, w in zip(channels_first, top, left, height, width, strict=True)
    ]
    return torch.stack(parts).permute(0, 2, 3, 1).contiguous()


def _uniform(seed: int, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [n, draws] in [0, 1): a hash of seed, epoch, row and draw (splitmix64, Steele et al. 2014)."""
    state: Words = np.array(rows).astype(np.uint64)
    for part in (epoch, seed):
        state = _scrambled(_scrambled(state) + np.uint64(part))
    each = _scrambled(np.add.outer(state, np.arange(LEFT + 1, dtype=np.uint64)))
    uniform: NDArray[np.float64] = (each >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def _scrambled(x: Words) -> Words:
    """Other numbers, in which no pattern of the given ones survives; sums and products wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
