from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from headstart import quality
from headstart.errors import HeadstartError
from tests import examples


def test_pictures_are_measured_in_size_light_and_sharpness(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(100, 200, (256, 512), np.uint8)
    plain = Image.fromarray(pixels)
    shades = [plain, plain.filter(ImageFilter.GaussianBlur(3)), plain.point(lambda value: value - 50)]
    paths = []
    for number, picture in enumerate(shades):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    found = quality.of_images(paths)
    assert found["width"].tolist() == [512] * 3
    assert found["height"].tolist() == [256] * 3
    assert found["brightness"] == pytest.approx([149.5, 149.5, 99.5], abs=1)
    assert found["sharpness"][1] < found["sharpness"][0] / 3
    assert found["sharpness"][2] == pytest.approx(found["sharpness"][0])
    assert found["contrast"][1] < found["contrast"][0]


def test_bytes_measure_like_the_file_that_they_are_of(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(sink, "PNG")
    (tmp_path / "a.png").write_bytes(sink.getvalue())
    one, other = quality.of_images([sink.getvalue()]), quality.of_images([tmp_path / "a.png"])
    assert {name: values.tolist() for name, values in one.items()} == {
        name: values.tolist() for name, values in other.items()
    }


def test_what_is_no_picture_is_an_error() -> None:
    with pytest.raises(HeadstartError, match="cannot be read"):
        quality.of_images([b"nothing"])


def test_texts_are_measured_in_length_and_strangeness(tmp_path: Path) -> None:
    examples.write_bert(tmp_path / "bert")
    texts = ["the film was bright", "the film was \N{SNOWMAN}", "bright " * 200]
    found = quality.of_texts(texts, tmp_path / "bert" / "tokenizer.json")
    assert found["characters"].tolist() == [19, 14, 1400]
    assert found["tokens"].tolist() == [6, 6, 202]  # with the marks around them; none is cut
    assert found["unknown tokens"] == pytest.approx([0, 1 / 6, 0])
    assert found["characters beyond ASCII"] == pytest.approx([0, 1 / 14, 0])
