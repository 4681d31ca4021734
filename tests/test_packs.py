"""Packed rows: batches of what a backbone is given, in orders fit for training and for measuring."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart import packs, texts
from headstart.errors import HeadstartError
from headstart.layout import Layout
from headstart.packs import Pack, Pixels, Rows, Sentences

PADDING = 9


def pixels(rows: int = 300, channels: int = 1) -> Pixels:
    """Noise, so that no two rows are alike."""
    chance = np.random.default_rng(0)
    return Pixels(chance.integers(0, 256, (rows, 4, 4, channels), np.uint8))


def sentences(rows: int = 3000) -> Sentences:
    """Texts of 3 to 128 tokens, most of them short, no two neighbours of one length by intent."""
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(3, 0.8, rows), 3, 128).astype(np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return Sentences(texts.Tokens(np.arange(bounds[-1], dtype=np.int32), bounds), PADDING)


def padding(pack: Sentences, batches: list[Rows]) -> float:
    """Share of the places in these batches that hold no token."""
    masks = [pack.batch(rows)[1] for rows in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)


def alike(one: list[Rows], two: list[Rows]) -> bool:
    return [rows.tolist() for rows in one] == [rows.tolist() for rows in two]


KINDS = pytest.mark.parametrize("make", [pixels, sentences])


# Batches


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_come_in_the_order_they_are_asked_for(channels: int) -> None:
    pack = pixels(channels=channels)
    rows = np.array([7, 2, 250, 2, 0])
    (found,) = pack.batch(rows)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert (found == np.stack([pack.array[row] for row in rows])).all()


def test_pictures_are_read_in_one_direction() -> None:
    class Disk:
        """Remembers what it was asked for."""

        shape = (100, 4, 4, 1)
        asked: Rows

        def __getitem__(self, rows: Rows) -> Any:
            self.asked = rows
            return np.zeros((len(rows), 4, 4, 1), np.uint8)

    disk: Any = Disk()
    Pixels(disk).batch(np.array([50, 3, 99, 3]))
    assert disk.asked.tolist() == [3, 3, 50, 99]


def test_what_training_does_to_a_batch_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", pixels().array)
    pack = Pixels(np.load(tmp_path / "pixels.npy", mmap_mode="r"))
    (found,) = pack.batch(np.arange(5))
    found[:] = 0
    assert (pack.array == pixels().array).all()


def test_texts_come_padded_to_the_longest_of_the_batch() -> None:
    pack = Sentences(texts.Tokens(np.arange(6, dtype=np.int32), np.array([0, 1, 4, 6])), PADDING)
    ids, mask = pack.batch(np.array([2, 0]))
    assert ids.tolist() == [[4, 5], [0, PADDING]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert ids.dtype == mask.dtype == np.int64


# Orders


@KINDS
@pytest.mark.parametrize("batch", [1, 32, 5000])
def test_an_order_has_every_row_once_in_full_batches_but_one(make: Any, batch: int) -> None:
    pack: Pack = make()
    rows = np.arange(1, 300, 2)  # a split is not all of the manifest
    for found in (pack.order(rows, batch, np.random.default_rng(0)), pack.sweep(rows, batch)):
        assert sorted(np.concatenate(found).tolist()) == rows.tolist()
        sizes = sorted(map(len, found))
        assert len(found) == -(-len(rows) // batch)
        assert set(sizes[1:]) <= {batch}


@KINDS
@pytest.mark.parametrize(
    ("rows", "batch", "sizes"),
    [
        (33, 16, [16, 17]),
        (34, 16, [2, 16, 16]),
        (32, 16, [16, 16]),
        (1, 16, [1]),
        (201, 4, [4] * 49 + [5]),  # of texts, a row more than a pool
        (3, 2, [3]),
    ],
)
def test_a_row_left_over_joins_another_batch_where_two_are_the_least(
    make: Any, rows: int, batch: int, sizes: list[int]
) -> None:
    pack: Pack = make()
    found = pack.order(np.arange(rows), batch, np.random.default_rng(0), 2)
    assert sorted(np.concatenate(found).tolist()) == list(range(rows))
    assert sorted(map(len, found)) == sizes
    assert len(found) == len(packs.cut(np.arange(rows), batch, 2))


@KINDS
def test_an_order_depends_on_the_state_of_chance_alone(make: Any) -> None:
    pack: Pack = make()
    rows = np.arange(300)
    chance = np.random.default_rng(5)
    first, second = (pack.order(rows, 16, chance) for _ in range(2))
    assert alike(first, pack.order(rows, 16, np.random.default_rng(5)))
    assert not alike(first, second)
    assert not alike(first, pack.order(rows, 16, np.random.default_rng(6)))


@KINDS
def test_a_row_meets_other_rows_in_every_epoch(make: Any) -> None:
    pack: Pack = make()
    chance = np.random.default_rng(0)
    met: list[set[int]] = []
    for _ in range(2):
        (batch,) = [rows for rows in pack.order(np.arange(300), 16, chance) if 100 in rows]
        met.append(set(batch.tolist()) - {100})
    assert len(met[0] & met[1]) < 0.7 * 15


def test_a_sweep_over_pictures_goes_through_the_file_once() -> None:
    found = pixels().sweep(np.array([8, 1, 200, 5, 3]), 2)
    assert [rows.tolist() for rows in found] == [[1, 3], [5, 8], [200]]


def test_random_batches_of_texts_hold_hardly_any_padding() -> None:
    pack, rows = sentences(), np.arange(3000)
    chance = np.random.default_rng(0)
    plain = padding(pack, packs.cut(chance.permutation(rows), 32))
    assert plain > 0.5
    assert padding(pack, pack.order(rows, 32, chance)) < 0.08
    assert padding(pack, pack.sweep(rows, 32)) < 0.04


def test_batches_of_long_and_of_short_texts_take_turns() -> None:
    pack, rows = sentences(), np.arange(1600)  # one pool: unshuffled, its batches would be sorted by length
    batches = pack.order(rows, 32, np.random.default_rng(0))
    longest = [int(pack.tokens.lengths[found].max()) for found in batches]
    assert len(longest) == packs.POOL
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.5


def test_a_sweep_over_texts_begins_with_the_longest() -> None:
    pack = sentences()
    lengths = pack.tokens.lengths[np.concatenate(pack.sweep(np.arange(3000), 32))]
    assert (np.diff(lengths) <= 0).all()


# Files


def test_what_was_written_is_what_is_loaded(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "case")
    layout.features.mkdir(parents=True)
    np.save(layout.features / "pixels.npy", pixels().array)
    pictures = packs.load(layout, "image", 0)
    assert isinstance(pictures, Pixels)
    assert isinstance(pictures.array, np.memmap)
    assert (pictures.array == pixels().array).all()
    expected = sentences(50)
    np.save(layout.features / "tokens.npy", expected.tokens.ids)
    np.save(layout.features / "bounds.npy", expected.tokens.bounds)
    found = packs.load(layout, "text", PADDING)
    assert isinstance(found, Sentences)
    assert isinstance(found.tokens.ids, np.memmap)
    for one, two in zip(found.batch(np.arange(50)), expected.batch(np.arange(50)), strict=True):
        assert (one == two).all()


@pytest.mark.parametrize(
    ("modality", "there", "missing"),
    [
        ("image", ["features"], "pixels"),
        ("text", ["features"], "tokens"),
        ("text", ["features", "tokens"], "bounds"),
        ("image", ["features", "tokens", "bounds"], "pixels"),
        ("image", [], "pixels"),
    ],
)
def test_rows_that_were_not_packed_say_how_to_pack_them(
    modality: str, there: list[str], missing: str, tmp_path: Path
) -> None:
    layout = Layout(tmp_path, "case")
    for name in there:
        layout.features.mkdir(parents=True, exist_ok=True)
        np.save(layout.features / f"{name}.npy", np.zeros(3, np.int64))
    with pytest.raises(HeadstartError) as caught:
        packs.load(layout, modality, 0)
    assert caught.value.what == "the rows are not packed"
    assert caught.value.where == str(layout.features / f"{missing}.npy")
    assert "packed: true" in caught.value.do
    assert "dvc repro features@case" in caught.value.do


def test_reading_packed_rows_needs_no_torch() -> None:
    check = "import sys, headstart.packs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
