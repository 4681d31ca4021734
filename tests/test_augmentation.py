from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from headstart.augmentation import augmented, mixed, strong, views, weak
from headstart.recipe import Augment

Array = np.ndarray[Any, np.dtype[Any]]

SIDE = 24
FLIPS = {"horizontal_flip": True, "vertical_flip": True, "quarter_turns": True}
EVERYTHING = Augment(**FLIPS, crop=0.4, brightness=0.3, contrast=0.3)


def pictures(n: int, channels: int = 3, side: int = SIDE) -> Tensor:
    """Pictures without any symmetry."""
    values = np.random.default_rng(0).integers(0, 256, (n, side, side, channels))
    return torch.from_numpy(values.astype(np.uint8))


def copies(picture: Tensor, n: int) -> Tensor:
    """One picture n times: what differs afterwards differs by the draws alone."""
    return picture[None].repeat(n, 1, 1, 1)


def symmetries(picture: Array) -> dict[str, Array]:
    """The eight symmetries of the square: turned by quarters, and mirrored left to right before."""
    mirrored = picture[:, ::-1]
    plain = {f"turn {k}": np.rot90(picture, k) for k in range(4)}
    return plain | {f"mirror, turn {k}": np.rot90(mirrored, k) for k in range(4)}


def kinds(options: Augment, rows: Array, seed: int = 0, epoch: int = 0, channels: int = 1) -> list[str]:
    """By row, the symmetry that its picture got; fails if it is none."""
    picture = pictures(1, channels, 6)[0]
    known = {form.tobytes(): name for name, form in symmetries(picture.numpy()).items()}
    assert len(known) == 8
    found = augmented(copies(picture, len(rows)), options, seed, epoch, rows)
    return [known[form.tobytes()] for form in found.numpy()]


def flipped(seed: int, epoch: int, rows: Array, option: str = "horizontal_flip") -> Array:
    """bool [n]: whether the picture of each row was flipped."""
    result: Array = np.array(kinds(Augment(**{option: True}), rows, seed, epoch)) != "turn 0"
    return result


def boxes(least: float, n: int, side: int = 64) -> tuple[Array, Array, Array, Array, Array]:
    """Top, left, height and width of n crops, int64 [n] each, and the crops, uint8 [n, side, side, 3].

    The first channel of the picture is its column, four levels for each, and the second its row. A crop is
    only ever enlarged, and the middle of its first pixel is then nearest to the middle of the box's first:
    the corners of the crop bear the values of the corners of the box.
    """
    down, right = np.mgrid[:side, :side]
    picture = torch.from_numpy(np.stack([4 * right, 4 * down, 0 * down], axis=2).astype(np.uint8))
    crops = augmented(copies(picture, n), Augment(crop=least), 0, 0, np.arange(n)).numpy()
    first, last = crops[:, 0, 0].astype(int), crops[:, -1, -1].astype(int)
    assert not (first % 4).any() and not (last % 4)[:, :2].any()
    left, top = first[:, 0] // 4, first[:, 1] // 4
    return top, left, last[:, 1] // 4 - top + 1, last[:, 0] // 4 - left + 1, crops


def factors(found: Array, given: Array, about: Array) -> Array:
    """float64 [n]: by how much the values of each picture were stretched about one value.

    Each pixel says between which bounds the factor is, or above which one if it was clamped. Fails where the
    bounds exclude each other: then no factor, rounding to the nearest and clamping explain the picture.
    """
    result = []
    for picture, before, centre in zip(found.astype(float), given.astype(float), about, strict=True):
        telling = np.abs(before - centre) > 0.5
        after, distance = picture[telling], (before - centre)[telling]
        low = np.where(after == 0, -np.inf, after - 0.501) - centre
        high = np.where(after == 255, np.inf, after + 0.501) - centre
        bounds = np.sort(np.stack([low / distance, high / distance]), axis=0)
        least, most = bounds[0].max(), bounds[1].min()
        assert least <= most
        assert most - least < 0.02
        result.append((least + most) / 2)
    return np.array(result)


def means(values: Tensor) -> Array:
    """float64 [n]: of each picture, over its channels too."""
    result: Array = values.numpy().astype(float).mean(axis=(1, 2, 3))
    return result


# --- What a draw depends on.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 10])
def test_how_rows_are_divided_into_batches_makes_no_difference(channels: int, size: int) -> None:
    given, rows = pictures(20, channels), np.arange(100, 120)
    whole = augmented(given, EVERYTHING, 3, 5, rows)
    assert whole.shape == given.shape and whole.dtype == torch.uint8
    assert sum(bool((a != b).any()) for a, b in zip(whole, given, strict=True)) >= 19
    parts = [augmented(given[i : i + size], EVERYTHING, 3, 5, rows[i : i + size]) for i in range(0, 20, size)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_order_of_rows_makes_no_difference() -> None:
    given, rows = pictures(20), np.arange(20)
    order = np.random.default_rng(1).permutation(20)
    shuffled = augmented(given[order], EVERYTHING, 3, 5, rows[order])
    assert torch.equal(shuffled, augmented(given, EVERYTHING, 3, 5, rows)[order])


def test_rows_may_be_a_list() -> None:
    given: Any = [7, 2, 9]
    expected = augmented(pictures(3), EVERYTHING, 0, 1, np.array(given))
    assert torch.equal(augmented(pictures(3), EVERYTHING, 0, 1, given), expected)


def test_random_states_are_neither_read_nor_moved() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), repr(np.random.get_state())
        found.append(augmented(pictures(8), EVERYTHING, 0, 0, np.arange(8)))
        found.append(mixed(pictures(8), torch.eye(8), torch.ones(8), 0.4, 0, 0)[0])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert repr(np.random.get_state()) == before[1]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize(
    ("seed", "epoch", "shift"),
    [
        (0, 1, 0),
        (1, 0, 0),
        (0, 0, 1),
        (1, 1, 0),
        (0, 1, -1),
        (0, 1, 1),
        (1, 0, -1),
        (1, 0, 1),
        (7, 3, 0),
    ],
)
def test_another_seed_epoch_or_row_draws_afresh(seed: int, epoch: int, shift: int) -> None:
    rows = np.arange(1, 4001)
    agree = (flipped(0, 0, rows) == flipped(seed, epoch, rows + shift)).mean()
    assert agree == pytest.approx(0.5, abs=0.04)


def test_seed_and_epoch_are_not_confused() -> None:
    rows = np.arange(4000)
    assert (flipped(1, 0, rows) == flipped(0, 1, rows)).mean() == pytest.approx(0.5, abs=0.04)


def test_one_picture_is_flipped_in_half_of_the_epochs_and_by_half_of_the_seeds() -> None:
    row = np.array([5])
    assert np.mean([flipped(0, epoch, row) for epoch in range(1000)]) == pytest.approx(0.5, abs=0.07)
    assert np.mean([flipped(seed, 0, row) for seed in range(1000)]) == pytest.approx(0.5, abs=0.07)


def test_options_do_not_shift_each_others_draws() -> None:
    """What all options do together is what each does alone, one after the other."""
    given, rows = pictures(40), np.arange(40)
    single = [
        Augment(crop=0.4),
        Augment(horizontal_flip=True),
        Augment(vertical_flip=True),
        Augment(quarter_turns=True),
        Augment(brightness=0.3, contrast=0.3),
    ]
    found = given
    for options in single:
        before = found
        found = augmented(found, options, 1, 2, rows)
        assert not torch.equal(found, before)
    assert torch.equal(found, augmented(given, EVERYTHING, 1, 2, rows))


def test_one_option_does_not_follow_another() -> None:
    rows = np.arange(4000)
    across, down = flipped(0, 0, rows), flipped(0, 0, rows, "vertical_flip")
    assert (across == down).mean() == pytest.approx(0.5, abs=0.04)
    ramp = copies(torch.arange(256, dtype=torch.uint8).view(16, 16, 1), 1000)
    bright = augmented(ramp, Augment(brightness=0.3), 0, 0, rows[:1000]).numpy()
    strong = augmented(ramp, Augment(contrast=0.3), 0, 0, rows[:1000]).numpy()
    drawn = [factors(bright, ramp.numpy(), np.zeros(1000)), factors(strong, ramp.numpy(), means(ramp))]
    table = np.corrcoef([across[:1000], down[:1000], *drawn])
    assert np.abs(table - np.eye(4)).max() < 0.12


# --- Flips and turns.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        (["horizontal_flip"], ["turn 0", "mirror, turn 0"]),
        (["vertical_flip"], ["turn 0", "mirror, turn 2"]),
        (["horizontal_flip", "vertical_flip"], ["turn 0", "turn 2", "mirror, turn 0", "mirror, turn 2"]),
        (["quarter_turns"], [f"turn {k}" for k in range(4)]),
        (["horizontal_flip", "quarter_turns"], list(symmetries(np.zeros((1, 1, 1))))),
        (["vertical_flip", "quarter_turns"], list(symmetries(np.zeros((1, 1, 1))))),
        (list(FLIPS), list(symmetries(np.zeros((1, 1, 1))))),
    ],
)
def test_flips_and_turns_are_the_symmetries_allowed_each_as_often(
    names: list[str], allowed: list[str], channels: int
) -> None:
    rows = np.arange(4000)
    counts = Counter(kinds(Augment(**dict.fromkeys(names, True)), rows, channels=channels))
    assert set(counts) == set(allowed)
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


@pytest.mark.parametrize("count", [1, 2, 8])
def test_views_are_the_first_of_the_eight_symmetries(count: int) -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    found = [view[0].numpy().tolist() for view in views(torch.from_numpy(picture[None]), count)]
    by_name = {name: symmetry.tolist() for name, symmetry in symmetries(picture).items()}
    names = [name for view in found for name, symmetry in by_name.items() if view == symmetry]
    assert len(found) == len(set(names)) == count
    assert set(names) == {1: {"turn 0"}, 2: {"turn 0", "mirror, turn 0"}, 8: set(by_name)}[count]


def test_pictures_keep_their_places() -> None:
    given = pictures(64)
    found = augmented(given, Augment(**FLIPS), 0, 0, np.arange(64))
    for before, after in zip(given.numpy(), found.numpy(), strict=True):
        assert any((after == form).all() for form in symmetries(before).values())


# --- Crops.


@pytest.mark.parametrize("least", [0.08, 0.5, 0.8, 0.95])
def test_a_crop_keeps_at_least_its_share_and_no_more_than_the_picture(least: float) -> None:
    top, left, height, width, _ = boxes(least, 2000)
    # Sides are whole pixels: each may have lost half of one.
    assert ((height + 0.5) * (width + 0.5) >= least * 64 * 64).all()
    assert (height <= 64).all() and (width <= 64).all()
    assert (top >= 0).all() and (top + height <= 64).all()
    assert (left >= 0).all() and (left + width <= 64).all()


@pytest.mark.parametrize("least", [0.08, 0.5, 0.8])
def test_shares_are_uniform(least: float) -> None:
    _, _, height, width, _ = boxes(least, 2000)
    share = height * width / 64**2
    quarters = np.quantile((share - least) / (1 - least), [0.25, 0.5, 0.75])
    assert quarters == pytest.approx([0.25, 0.5, 0.75], abs=0.06)


def test_small_crops_have_aspects_from_three_quarters_to_four_thirds() -> None:
    _, _, height, width, _ = boxes(0.3, 3000)
    small = height * width < 0.7 * 64**2  # any aspect fits
    aspect = np.log(width / height)[small] / np.log(4 / 3)
    assert np.abs(aspect).max() < 1.15  # whole pixels again
    assert np.quantile(aspect, [0.05, 0.25, 0.5, 0.75, 0.95]) == pytest.approx(
        [-0.9, -0.5, 0, 0.5, 0.9], abs=0.1
    )


def test_crops_lie_anywhere() -> None:
    top, left, height, width, _ = boxes(0.2, 3000)
    for start, size in ((top, height), (left, width)):
        loose = 64 - size >= 10
        place = (start / np.maximum(64 - size, 1))[loose]
        assert place.min() == 0 and place.max() == 1
        assert np.quantile(place, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.06)
    both = (64 - height >= 10) & (64 - width >= 10)
    places = (start[both] / (64 - size[both]) for start, size in ((top, height), (left, width)))
    assert abs(np.corrcoef(*places)[0, 1]) < 0.1


def test_a_crop_is_enlarged_linearly() -> None:
    top, left, height, width, crops = boxes(0.3, 200)
    middles = np.arange(64) + 0.5
    for channel, start, size in ((0, left, width), (1, top, height)):
        place = middles * size[:, None] / 64 - 0.5
        expected = 4 * (start[:, None] + place.clip(0, size[:, None] - 1))
        line = crops[:, :, :, channel]
        for index in range(64):
            found = line[:, index, :] if channel == 0 else line[:, :, index]
            assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_has_the_size_and_the_channels_of_the_whole(channels: int) -> None:
    given = pictures(4, channels)
    found = augmented(given, Augment(crop=0.5), 0, 0, np.arange(4))
    assert found.shape == given.shape and found.dtype == torch.uint8
    assert not torch.equal(found, given)


# --- Brightness and contrast.


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_multiplies(channels: int) -> None:
    given = pictures(300, channels)
    found = augmented(given, Augment(brightness=0.6), 0, 0, np.arange(300)).numpy()
    drawn = factors(found, given.numpy(), np.zeros(300))
    assert stats.kstest(drawn, stats.uniform(0.4, 1.2).cdf).pvalue > 0.01
    assert (found == 255).mean() > 0.1  # values that would otherwise have begun again at nothing


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_stretches_about_the_mean_of_each_picture(channels: int) -> None:
    given = pictures(300, channels)
    given[::2] //= 2  # means of their own
    found = augmented(given, Augment(contrast=0.6), 0, 0, np.arange(300)).numpy()
    drawn = factors(found, given.numpy(), means(given))
    assert stats.kstest(drawn, stats.uniform(0.4, 1.2).cdf).pvalue > 0.01
    assert (found == 0).mean() > 0.02 and (found == 255).mean() > 0.02


def test_both_together_multiply_what_was_stretched() -> None:
    given, rows = pictures(100), np.arange(100)
    bright = augmented(given, Augment(brightness=0.5), 0, 0, rows).numpy()
    strong = augmented(given, Augment(contrast=0.5), 0, 0, rows).numpy()
    b = factors(bright, given.numpy(), np.zeros(100))[:, None, None, None]
    c = factors(strong, given.numpy(), means(given))[:, None, None, None]
    mean = means(given)[:, None, None, None]
    expected = np.clip(b * (c * (given.numpy() - mean) + mean), 0, 255)
    found = augmented(given, Augment(brightness=0.5, contrast=0.5), 0, 0, rows).numpy()
    assert np.abs(found - expected).max() < 1.2  # half a level by rounding, the rest by the factors
    assert np.abs(found - expected).mean() < 0.3


# --- Nothing.


@pytest.mark.parametrize("own", [Augment(), Augment(**FLIPS), EVERYTHING, Augment(crop=0.08, brightness=0.8)])
def test_a_weak_view_is_flipped_and_turned_alone_and_a_strong_one_changed_more_than_it(own: Augment) -> None:
    little, much = weak(own), strong(own)
    for name in FLIPS:
        assert getattr(little, name) == getattr(much, name) == getattr(own, name)
    assert (little.crop, little.brightness, little.contrast) == (1, 0, 0)
    assert much.crop == min(own.crop, 0.7)
    assert much.brightness == max(own.brightness, 0.3)
    assert much.contrast == max(own.contrast, 0.3)


def test_without_options_the_pictures_themselves_come_back() -> None:
    given = pictures(3)
    off = Augment(horizontal_flip=False, crop=1, brightness=0, contrast=0)
    assert augmented(given, off, 0, 0, np.arange(3)) is given


@pytest.mark.parametrize("options", [EVERYTHING, Augment(**FLIPS), Augment(brightness=0.3)])
def test_what_is_given_stays_as_it_is(options: Augment) -> None:
    given = pictures(8)
    augmented(given, options, 0, 0, np.arange(8))
    assert torch.equal(given, pictures(8))


# --- Blends.


def proportions(n: int, alpha: float, seed: int, step: int) -> Array:
    """float64 [n, n]: how much of picture j is in blend i, seen in pictures of one bright pixel each."""
    side = int(np.ceil(np.sqrt(n)))
    one = torch.zeros(n, side * side, dtype=torch.uint8)
    one[torch.arange(n), torch.arange(n)] = 255
    blend, _, _ = mixed(one.view(n, side, side, 1), torch.ones(n, 1), torch.ones(n), alpha, seed, step)
    assert blend.dtype == torch.float32 and blend.shape == (n, side, side, 1)
    result: Array = blend.view(n, -1)[:, :n].numpy().astype(float) / 255
    return result


def batch(n: int, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, targets and weights, none of them equal."""
    chance = np.random.default_rng(4)
    targets = torch.from_numpy(chance.dirichlet(np.ones(classes), n)).float()
    return pictures(n), targets, torch.from_numpy(chance.uniform(0.1, 5, n)).float()


def test_a_blend_is_of_two_pictures_in_one_proportion_for_the_batch() -> None:
    found = proportions(16, 1.0, 0, 0)
    assert found.sum(axis=1) == pytest.approx(np.ones(16), abs=1e-5)
    assert found.sum(axis=0) == pytest.approx(np.ones(16), abs=1e-5)  # each is a partner once
    own = np.diag(found)
    partner = (found - np.diag(own)).max(axis=1)
    alone = np.isclose(own, 1, atol=1e-5)  # a picture may be its own partner
    assert alone.sum() <= 4
    share = own.min()
    assert 0.5 <= share < 0.999
    assert own[~alone] == pytest.approx(np.full((~alone).sum(), share), abs=1e-5)
    assert partner[~alone] == pytest.approx(np.full((~alone).sum(), 1 - share), abs=1e-5)


def test_pixels_targets_and_weights_are_blended_alike() -> None:
    pixels, targets, weights = batch(16)
    blend, soft, heavy = mixed(pixels, targets, weights, 1.0, 2, 3)
    m = proportions(16, 1.0, 2, 3)
    expected = (m @ pixels.view(16, -1).numpy().astype(float)).reshape(blend.shape)
    assert blend.numpy() == pytest.approx(expected, abs=1e-3)
    total = m @ weights.numpy()
    assert heavy.numpy() == pytest.approx(total, rel=1e-5)
    weighted = m @ (weights[:, None] * targets).numpy() / total[:, None]
    assert soft.numpy() == pytest.approx(weighted, abs=1e-5)
    assert soft.sum(dim=1).numpy() == pytest.approx(np.ones(16), abs=1e-5)


def test_two_pictures_by_hand() -> None:
    step = next(step for step in range(20) if proportions(2, 1.0, 0, step)[0, 1] > 0.1)
    share = proportions(2, 1.0, 0, step)[0, 0]
    assert 0.5 <= share <= 0.9
    pixels = torch.tensor([[[[10]]], [[[200]]]], dtype=torch.uint8)
    blend, soft, heavy = mixed(pixels, torch.eye(2), torch.tensor([3.0, 1.0]), 1.0, 0, step)
    assert blend.flatten().tolist() == pytest.approx([200 - 190 * share, 10 + 190 * share], abs=1e-3)
    assert heavy.tolist() == pytest.approx([1 + 2 * share, 3 - 2 * share], abs=1e-5)
    first = 3 * share / (1 + 2 * share)
    second = share / (3 - 2 * share)
    assert soft.flatten().tolist() == pytest.approx([first, 1 - first, 1 - second, second], abs=1e-5)


def test_the_loss_of_a_blend_is_the_blend_of_the_losses() -> None:
    pixels, targets, weights = batch(16)
    _, soft, heavy = mixed(pixels, targets, weights, 1.0, 2, 3)
    logits = torch.from_numpy(np.random.default_rng(9).normal(size=(16, 3))).float()
    found = heavy * nn.functional.cross_entropy(logits, soft, reduction="none")
    # What every picture's own target would cost at every logit, [blend, picture].
    costs = weights * -(logits.log_softmax(dim=1) @ targets.T)
    expected = (proportions(16, 1.0, 2, 3) * costs.numpy()).sum(axis=1)
    assert found.numpy() == pytest.approx(expected, rel=1e-4)


def test_pictures_without_weight_stay_finite() -> None:
    pixels, targets, weights = batch(8)
    weights[:7] = 0
    _, soft, heavy = mixed(pixels, targets, weights, 1.0, 2, 3)
    assert (heavy == 0).sum() >= 6 and (heavy > 0).any()
    assert torch.isfinite(soft).all()
    assert soft.sum(dim=1).numpy() == pytest.approx(np.ones(8), abs=1e-5)  # of no weight, yet a target
    partner = heavy[:7] > 0
    for row in soft[:7][partner]:
        assert row.numpy() == pytest.approx(targets[7].numpy(), abs=1e-5)  # what has no weight says nothing


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_proportions_are_the_larger_part_of_a_beta_draw(alpha: float) -> None:
    shares = np.array([np.diag(proportions(3, alpha, 0, step)).min() for step in range(1500)])
    shares = shares[shares < 1 - 1e-6]  # where every picture was its own partner nothing is seen
    assert shares.min() >= 0.5 - 1e-6

    def larger(x: Array) -> Array:
        result: Array = stats.beta(alpha, alpha).cdf(x) - stats.beta(alpha, alpha).cdf(1 - x)
        return result

    # A share so near 1 that it cannot be told from it is not seen either.
    top = larger(np.array(1 - 1e-6))
    assert stats.kstest(shares, lambda x: larger(x) / top).pvalue > 0.01


def test_another_seed_or_step_blends_afresh() -> None:
    found = {
        (seed, step): proportions(12, 1.0, seed, step) for seed, step in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    partners = {key: tuple((m - np.diag(np.diag(m))).argmax(axis=1)) for key, m in found.items()}
    assert len(set(partners.values())) == 4
    assert len({round(float(np.diag(m).min()), 4) for m in found.values()}) == 4


def test_what_is_blended_stays_as_it_is() -> None:
    given, fresh = batch(8), batch(8)
    mixed(*given, 1.0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(given, fresh, strict=True))
