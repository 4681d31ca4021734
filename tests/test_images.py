from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from headstart import images, validation
from headstart.adapters import IMAGE_SUFFIXES
from headstart.errors import HeadstartError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def smooth(width: int = 60, height: int = 40) -> Image.Image:
    """A colour picture without any symmetry."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [x, y, np.sqrt(x * y)]
    return Image.fromarray((255 * np.stack(channels, axis=2)).astype(np.uint8))


def read(item: Path | bytes, side: int = 32, interpolation: str = "bilinear") -> Pixels:
    into = np.full((side, side, 3), 77, np.uint8)
    images.read(item, side, interpolation, into)
    return into


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def resized(image: Image.Image, side: int = 32) -> Pixels:
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def distance(a: Pixels, b: Pixels) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_the_whole_picture_is_squeezed_into_the_square() -> None:
    assert (read(encoded(smooth())) == resized(smooth())).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_picture_is_in_memory_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, copied = Image.Image.copy, list[tuple[int, int]]()

    def noted(image: Image.Image) -> Image.Image:
        copied.append(image.size)
        return copy(image)

    content = encoded(smooth().convert(mode))
    monkeypatch.setattr(Image.Image, "copy", noted)
    read(content)
    assert (60, 40) not in copied


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_the_filter_is_the_one_that_the_backbone_names(interpolation: str) -> None:
    expected = smooth().resize((16, 16), Image.Resampling[interpolation.upper()])
    assert (read(encoded(smooth()), 16, interpolation) == np.asarray(expected)).all()


def test_a_file_and_its_bytes_give_the_same_pixels(tmp_path: Path) -> None:
    for kind in ("png", "jpeg", "bmp", "webp"):
        content = encoded(smooth(), kind)
        (tmp_path / f"picture.{kind}").write_bytes(content)
        assert (read(tmp_path / f"picture.{kind}") == read(content)).all()


def test_every_kind_that_counts_as_a_picture_is_read() -> None:
    kinds = Image.registered_extensions()
    for suffix in IMAGE_SUFFIXES:
        found = read(encoded(smooth(), kinds[suffix]))
        assert distance(found, resized(smooth())) < 12, suffix


def test_a_grey_picture_is_the_same_as_in_three_equal_channels() -> None:
    grey = smooth().convert("L")
    assert (read(encoded(grey)) == read(encoded(grey.convert("RGB")))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_the_camera_marked_as_turned_is_set_upright(orientation: int) -> None:
    marked = Image.new("L", (1, 1)).getexif()
    marked[0x0112] = orientation
    turned = Image.open(io.BytesIO(encoded(smooth(), "png", exif=marked)))
    expected = resized(ImageOps.exif_transpose(turned))
    assert (read(encoded(smooth(), "png", exif=marked)) == expected).all()
    assert (orientation == 1) == (expected == resized(smooth())).all()


def test_sixteen_bit_grey_keeps_its_upper_bits() -> None:
    levels = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    expected = resized(Image.fromarray((levels >> 8).astype(np.uint8)))
    for kind in ("png", "tiff"):
        found = read(encoded(Image.fromarray(levels), kind))
        assert (found == expected[:, :, None]).all()
        assert found.max() - found.min() > 200


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "YCbCr"])
def test_colour_survives_in_every_way_of_storing_it(mode: str) -> None:
    kind = "tiff" if mode in {"CMYK", "YCbCr"} else "png"
    found = read(encoded(smooth().convert(mode), kind))
    assert distance(found, resized(smooth())) < (12 if mode == "P" else 3)


def test_what_a_transparent_picture_shows_below_counts() -> None:
    see_through = smooth().convert("RGBA")
    see_through.putalpha(0)
    assert (read(encoded(see_through)) == resized(smooth())).all()
    grey = smooth().convert("L")
    veiled = Image.merge("LA", [grey, Image.new("L", grey.size, 0)])
    assert (read(encoded(veiled)) == resized(grey)[:, :, None]).all()


def test_a_palette_with_transparent_colours_is_read_without_a_warning() -> None:
    content = encoded(smooth().convert("P"), "png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(content)
    assert distance(found, resized(smooth())) < 12


def test_black_and_white_pictures_are_black_and_white() -> None:
    halves = Image.fromarray(np.repeat([[0, 255]], [30, 30], axis=1).repeat(40, axis=0).astype(np.uint8))
    found = read(encoded(halves.convert("1")))
    assert (found[:, :15] == 0).all()
    assert (found[:, 17:] == 255).all()


def test_an_animation_counts_as_its_first_picture(tmp_path: Path) -> None:
    first, second = smooth().convert("P"), Image.new("P", (60, 40), 0)
    content = encoded(first, "gif", save_all=True, append_images=[second])
    assert (read(content) == read(encoded(first, "gif"))).all()


def test_a_large_jpeg_read_at_a_fraction_of_its_size_looks_the_same() -> None:
    noise = np.random.default_rng(0).normal(0, 20, (900, 1300, 3))
    large = Image.fromarray((np.asarray(smooth(1300, 900)) + noise).clip(0, 255).astype(np.uint8))
    content = encoded(large, "jpeg", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(content)).resize((64, 64), Image.Resampling.BILINEAR))
    found = read(content, 64)
    assert distance(found, whole) < 2
    assert np.abs(found.astype(int) - whole.astype(int)).max() < 16


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match="cannot be read") as caught:
        read(tmp_path / "gone.png")
    assert caught.value.where == str(tmp_path / "gone.png")
    assert "No such file" in str(caught.value)


@pytest.mark.parametrize(("kind", "cut"), [("png", 0.5), ("jpeg", 0.5), ("bmp", 0.5), ("png", 0.01)])
def test_a_file_cut_short_is_named(kind: str, cut: float, tmp_path: Path) -> None:
    content = encoded(smooth(200, 200), kind)
    path = tmp_path / f"half.{kind}"
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(HeadstartError, match="cannot be read") as caught:
        read(path)
    assert caught.value.where == str(path)


def test_what_is_no_picture_is_told_by_its_size_when_it_has_no_name() -> None:
    with pytest.raises(HeadstartError) as caught:
        read(b"not a picture at all")
    assert "20 bytes" in str(caught.value)
    assert "not a picture" in str(caught.value)
    assert "0x" not in str(caught.value)  # no address in memory: the same error twice reads the same


def test_of_the_two_pictures_that_a_camera_may_put_into_one_file_the_first_counts() -> None:
    both = encoded(smooth(), "mpo", save_all=True, append_images=[smooth().rotate(180)])
    assert distance(read(both), resized(smooth())) < 12


@pytest.mark.parametrize("name", ["a.eps", "a.jpg"])
def test_postscript_is_no_picture_and_is_never_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(encoded(smooth(), "eps"))
    with pytest.raises(HeadstartError) as caught:
        read(tmp_path / name)
    assert caught.value.table == ["not a picture"]
    broken = validation.look_at(tmp_path, [name], 1).broken
    assert broken["value"].tolist() == [f"not a picture ({(tmp_path / name).stat().st_size} bytes)"]


def test_whatever_a_decoder_raises_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd.png").write_bytes(encoded(smooth()))

    def fail(image: Image.Image, in_place: bool) -> None:
        raise IndexError

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(HeadstartError) as caught:
        read(tmp_path / "odd.png")
    assert "odd.png" in caught.value.where
    assert "IndexError" in str(caught.value)


def test_a_picture_beyond_all_reason_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(HeadstartError, match="cannot be read"):
        read(encoded(smooth()))


def test_damaged_bytes_of_every_kind_end_in_one_error() -> None:
    chance = np.random.default_rng(0)
    for kind in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm", "tga"):
        content = np.frombuffer(encoded(smooth(), kind), np.uint8)
        for _ in range(25):
            damaged = content.copy()
            damaged[chance.integers(0, min(len(content), 200), 6)] = chance.integers(0, 256, 6)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert read(damaged.tobytes()).shape == (32, 32, 3)
                except HeadstartError as error:
                    assert "cannot be read" in str(error)


def test_fractions_are_refused_as_nobody_knows_which_is_white() -> None:
    content = encoded(Image.fromarray(np.linspace(0, 1, 2400).reshape(40, 60).astype(np.float32)), "tiff")
    with pytest.raises(HeadstartError, match="white"):
        read(content)
