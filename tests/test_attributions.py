"""What speaks for a label: the parts add up to the whole, and point at what makes the class."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headstart import heads, images
from headstart.attributions import Explainer, attribute
from headstart.calibration import Decision
from headstart.errors import HeadstartError
from headstart.features import Extractor
from headstart.models import Model
from headstart.precision import Arithmetic
from headstart.recipe import Features
from tests import examples, tuning, versions

SIDE = 64
GOOD = ["splendid", "delight", "warm", "lovely", "bright", "joy"]
BAD = ["dreadful", "bore", "cold", "awful", "bleak", "pain"]


def fitted(model: Model, items: list[str] | list[bytes], truth: list[int]) -> Model:
    """The model with a head that has learned these items."""
    targets = np.eye(2)[truth]
    head = heads.fit(model.extractor(items), targets, np.ones(len(items)), l2=0.01)
    return replace(model, head=head)


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = versions.read(versions.write_texts_version(tmp_path_factory.mktemp("texts"))).model
    things = examples.THINGS
    texts = [f"{things[i % 10]} {words[i % 6]} {things[i // 6]}" for words in (GOOD, BAD) for i in range(60)]
    return fitted(model, texts, [0] * 60 + [1] * 60)


def lit(corner: tuple[int, int] | None, seed: int) -> bytes:
    """A dark, noisy picture with a bright patch in one quarter, or without."""
    pixels = np.random.default_rng(seed).normal(50, 8, (SIDE, SIDE, 3))
    if corner is not None:
        top, left = (each * SIDE // 2 + 8 for each in corner)
        pixels[top : top + 16, left : left + 16] += 150
    sink = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(sink, format="PNG")
    return sink.getvalue()


CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture(scope="module", params=[None, ["blocks.0", "blocks.2"]], ids=["pooled", "tapped"])
def lamps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    root = tmp_path_factory.mktemp("images")
    model = versions.read(versions.write_images_version(root, image_size=SIDE, layers=request.param)).model
    pictures = [lit(CORNERS[i % 4] if i < 20 else None, i) for i in range(40)]
    return fitted(model, pictures, [0] * 20 + [1] * 20)


def pixels_of(model: Model, picture: bytes) -> torch.Tensor:
    (pixels,) = model.extractor.reader([picture]).read(np.zeros(1, np.int64))
    return torch.from_numpy(pixels)


def test_the_word_that_makes_the_class_speaks_loudest_for_it(moods: Model) -> None:
    words = [*GOOD, *BAD]
    found = attribute(moods, [f"film {word} lamp" for word in words], ["good"] * 6 + ["bad"] * 6)
    loudest = [max(each.words, key=lambda word: word[1]) for each in found]
    assert sum(said.strip() == word for (said, _), word in zip(loudest, words, strict=True)) >= 10


def test_what_speaks_for_one_of_two_labels_speaks_against_the_other(moods: Model) -> None:
    text = "the film was splendid next to the lamp"
    one, other = attribute(moods, [text, text], ["good", "bad"])
    np.testing.assert_allclose(
        [score for _, score in one.words], [-score for _, score in other.words], atol=1e-4
    )


def test_the_tokens_scores_sum_to_the_difference_that_the_words_make(moods: Model) -> None:
    explain = Explainer(moods)
    arrays = moods.extractor.reader(["the film was splendid next to a dull lamp"]).read(np.zeros(1, np.int64))
    ids, mask = map(torch.from_numpy, arrays)
    blank = ids.clone()
    blank[:, 1:-1] = moods.extractor.padding
    with torch.no_grad():
        difference = explain.contrasts(ids, mask) - explain.contrasts(blank, mask)
    assert abs(difference[0, 0]) > 0.1
    assert explain.tokens(ids, mask, 0).sum() == pytest.approx(float(difference[0, 0]), rel=0.02)


def test_what_is_explained_is_what_the_model_says(moods: Model) -> None:
    text = "the film was splendid next to the lamp"
    arrays = moods.extractor.reader([text]).read(np.zeros(1, np.int64))
    with torch.no_grad():
        said = Explainer(moods).contrasts(*map(torch.from_numpy, arrays))[0].numpy()
    probabilities = moods([text]).probabilities[0]
    np.testing.assert_allclose(
        said[0] / 2 - said[1] / 2, np.log(probabilities[0] / probabilities[1]), rtol=1e-3
    )


@pytest.mark.parametrize(
    "text",
    [
        "  the FILM was  splendid,\n\nnext to -- 'the' lamp…  ",
        "unwonderfully quarrelsome",
        "映画は good",
        "naïve café 🙂 e\u0301",
        "",
        " ",
        "word " * 300,
    ],
    ids=["blanks", "parts of words", "ideographs", "accents", "empty", "blank", "cut off"],
)
def test_the_words_joined_are_the_text(moods: Model, text: str) -> None:
    (found,) = attribute(moods, [text], ["good"])
    assert "".join(word for word, _ in found.words) == text
    assert all(-1 <= score <= 1 for _, score in found.words)


def test_the_parts_of_a_word_are_scored_as_one_word(moods: Model) -> None:
    (found,) = attribute(moods, ["splendid zebras, don't!"], ["good"])
    assert [word for word, _ in found.words] == ["splendid ", "zebras", ", ", "don't", "!"]


def test_words_beyond_what_the_network_reads_have_no_score(moods: Model) -> None:
    (found,) = attribute(moods, ["splendid lamp " * 100_000], ["good"])
    assert found.words[0][1] != 0
    assert found.words[-1][1] == 0
    assert len(found.words) <= moods.extractor.options.max_tokens  # no list of what nobody has looked at


def test_a_word_that_is_cut_in_its_midst_stays_whole(moods: Model) -> None:
    moods = replace(moods, extractor=copy.copy(moods.extractor))
    moods.extractor.options = moods.extractor.options.model_copy(update={"max_tokens": 4})
    text = "lamp unwonderfully quarrelsome lamp"
    (found,) = attribute(moods, [text], ["good"])
    assert [word for word, _ in found.words] == ["lamp ", "unwonderfully ", "quarrelsome lamp"]


def test_pictures_are_decoded_one_at_a_time(lamps: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    explain, decode, locked = Explainer(lamps), images.read, list[bool]()

    def noted(*arguments: Any) -> None:
        locked.append(explain.lock.locked())
        decode(*arguments)

    monkeypatch.setattr(images, "read", noted)
    explain([lit((0, 0), 1)], ["good"])
    assert locked == [True]


def test_the_map_is_brightest_where_the_lamp_is(lamps: Model) -> None:
    for corner in CORNERS:
        (found,) = attribute(lamps, [lit(corner, 99)], ["good"])
        assert found.map is not None
        quarters = found.map.reshape(2, SIDE // 2, 2, SIDE // 2).sum(axis=(1, 3))
        assert np.unravel_index(quarters.argmax(), (2, 2)) == corner


def test_a_map_has_the_size_that_the_network_sees_and_goes_from_0_to_1(lamps: Model, tmp_path: Path) -> None:
    sink = tmp_path / "wide.png"
    Image.open(io.BytesIO(lit((0, 1), 5))).resize((200, 80)).save(sink)
    (found,) = attribute(lamps, [sink], ["good"])
    assert found.map is not None
    assert (found.map.shape, found.map.dtype) == ((SIDE, SIDE), np.float32)
    assert (found.map.min(), found.map.max()) == (0, 1)
    assert found.words == []


def test_the_places_shares_sum_to_what_the_model_says_of_the_image(lamps: Model) -> None:
    explain, pixels = Explainer(lamps), pixels_of(lamps, lit((1, 0), 7))
    with torch.no_grad():
        said = explain.contrasts(pixels)
    assert explain.places(pixels, 0).sum() + float(explain.bias[0]) == pytest.approx(
        float(said[0, 0]), rel=1e-3
    )


def test_a_vision_transformers_places_sum_to_the_difference_to_a_grey_picture(tmp_path: Path) -> None:
    weights = tuning.write_weights(tmp_path / "vit", "timm", "test_vit")
    options = Features(image_size=160)
    extractor = Extractor(weights, options, Arithmetic())
    chance = np.random.default_rng(0)
    ones = np.ones(extractor.dim, np.float32)
    weight = chance.normal(size=(2, extractor.dim)).astype(np.float32)
    model = Model(
        extractor, heads.Head(weight, ones[:2], 0 * ones, ones), Decision.likeliest(2), ["good", "bad"]
    )
    explain, pixels = Explainer(model), pixels_of(model, lit((0, 1), 3))
    grey = 255 * torch.tensor(extractor.spec.preprocessing["mean"]).expand(1, 160, 160, 3)
    with torch.no_grad():
        difference = explain.contrasts(pixels) - explain.contrasts(grey)
    assert explain.places(pixels, 0).sum() == pytest.approx(float(difference[0, 0]), rel=0.02)


def test_an_unknown_label_is_told_with_those_that_are_known(moods: Model) -> None:
    with pytest.raises(HeadstartError, match="good, bad"):
        attribute(moods, ["the film"], ["wonderful"])


def test_an_item_that_the_model_does_not_read_is_told(moods: Model, lamps: Model) -> None:
    with pytest.raises(HeadstartError, match="reads texts"):
        attribute(moods, [b"bytes"], ["good"])
    with pytest.raises(HeadstartError, match="cannot be read"):
        attribute(lamps, [b"bytes"], ["good"])


def test_with_three_classes_the_others_are_weighed_alike(moods: Model) -> None:
    chance = np.random.default_rng(3)
    dim = len(moods.head.mean)
    head = replace(
        moods.head,
        weight=chance.normal(size=(3, dim)).astype(np.float32),
        bias=chance.normal(size=3).astype(np.float32),
    )
    three = replace(moods, head=head, classes=["a", "b", "c"])
    arrays = three.extractor.reader(["the film"]).read(np.zeros(1, np.int64))
    with torch.no_grad():
        said = Explainer(three).contrasts(*map(torch.from_numpy, arrays))[0].numpy()
    logits = head.logits(three.extractor(["the film"]))[0]
    np.testing.assert_allclose(said, [logits[i] - np.delete(logits, i).mean() for i in range(3)], rtol=1e-3)
