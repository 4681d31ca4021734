from __future__ import annotations

import io
import random
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from headstart import duplicates
from headstart.duplicates import SAME_PICTURE, exact, merge, near_pictures, near_texts, normalised

WORDS = [f"word{i}" for i in range(400)]


def sentences(count: int, words: int = 20, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=words)) for _ in range(count)]


def pairs(found: np.ndarray) -> set[tuple[int, int]]:
    return {(int(first), int(second)) for first, second in found}


def jaccard(one: str, other: str) -> float:
    sets = []
    for text in (one, other):
        words = text.split()
        sets.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello,  World!", "hello world"),
        ("STRASSE", "straße"),
        ("cafe\u0301", "café"),
        ("\uff57\uff49\uff44\uff45", "wide"),
        ("so good 😀", "so good"),
        ("我爱 你。", "我 爱你"),
    ],
)
def test_case_punctuation_and_spacing_make_no_new_text(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"), [("5 stars", "6 stars"), ("का", "कि"), ("!!!", "???"), ("ab c", "a bc")]
)
def test_other_words_numbers_and_vowel_signs_are_another_text(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_equal_rows_are_paired_with_the_first_of_them() -> None:
    assert pairs(exact(["a", "b", "a", "c", "a", "b"])) == {(0, 2), (0, 4), (1, 5)}
    assert len(exact(["a", "b"])) == 0


def test_a_text_that_is_forwarded_with_a_few_words_more_is_a_near_duplicate() -> None:
    texts = sentences(50)
    assert pairs(near_texts([*texts, "rt someone " + texts[17]])) == {(17, 50)}


def test_near_texts_are_exactly_those_whose_shingles_overlap_by_four_fifths() -> None:
    chance = random.Random(1)
    texts = sentences(60, 20)
    for text in list(texts):
        for _ in range(4):
            words = text.split()
            place = chance.randrange(len(words))
            words[place : place + 1] = chance.choice([[], [chance.choice(WORDS)], [words[place], "new"]])
            texts.append(" ".join(words))
    texts = list(dict.fromkeys(texts))
    chance.shuffle(texts)
    expected = {
        (i, j) for j in range(len(texts)) for i in range(j) if jaccard(texts[i], texts[j]) >= 0.8 - 1e-9
    }
    assert len(expected) > 30
    assert pairs(near_texts(texts)) == expected


def test_a_shared_phrase_alone_makes_no_near_duplicates() -> None:
    texts = [f"thank you for your message dear customer {text}" for text in sentences(300)]
    assert len(near_texts(texts)) == 0


def test_a_thousand_copies_with_another_ending_are_one_group_not_a_million_pairs() -> None:
    texts = [f"{sentences(1)[0]} number {i}" for i in range(1000)]
    found = near_texts(texts)
    assert merge(pd.Series([f"g{i:04}" for i in range(1000)]), found).nunique() == 1
    assert len(found) < 20 * 1000


def test_equal_texts_are_one_to_near_texts() -> None:
    texts = [sentences(1)[0]] * 3 + ["and " + sentences(1)[0]]
    assert pairs(near_texts(texts)) == {(0, 3)}


@pytest.mark.parametrize("texts", [[], ["one"], ["two words", "two more"], ["!!!", "a b c"]])
def test_few_and_short_texts_have_no_near_duplicates(texts: list[str]) -> None:
    assert near_texts(texts).shape == (0, 2)


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth random scenes of 160 by 120 pixels."""
    chance = np.random.default_rng(seed)
    small = chance.integers(0, 256, (count, 9, 12, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize((160, 120), Image.Resampling.BICUBIC) for array in small]


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(i.convert("L").resize((32, 32), Image.Resampling.BILINEAR)) for i in images])


def saved_again(image: Image.Image, how: str) -> Image.Image:
    match how:
        case "half the size":
            return image.resize((80, 60))
        case "odd size":
            return image.resize((133, 101))
        case "darker":
            return image.point(lambda value: int(value * 0.8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


@pytest.mark.parametrize("how", ["half the size", "odd size", "darker", "as a JPEG of quality 50"])
def test_a_picture_that_was_saved_again_is_a_near_duplicate(how: str) -> None:
    scenes = pictures(40)
    again = [saved_again(scene, how) for scene in scenes]
    assert pairs(near_pictures(thumbnails(scenes + again))) == {(i, i + 40) for i in range(40)}


def test_pictures_that_merely_look_alike_are_not_near_duplicates() -> None:
    cell = pictures(1)[0]
    chance = np.random.default_rng(1)
    alike = [
        Image.fromarray(
            (np.asarray(cell) + chance.normal(0, 20, (120, 160, 3))).clip(0, 255).astype(np.uint8)
        )
        for _ in range(30)
    ]
    flat = thumbnails(alike).reshape(30, -1).astype(float)
    assert 0.99 < np.corrcoef(flat)[np.triu_indices(30, 1)].min() < SAME_PICTURE
    assert len(near_pictures(thumbnails(alike))) == 0


def test_empty_pictures_are_near_nothing() -> None:
    assert len(near_pictures(np.zeros((5, 32, 32), np.uint8))) == 0
    assert len(near_pictures(np.zeros((0, 32, 32), np.uint8))) == 0


def test_groups_that_a_pair_ties_become_one_named_after_the_first() -> None:
    groups = pd.Series(["d", "b", "c", "a", "b"], index=[9, 8, 7, 6, 5])
    merged = merge(groups, np.array([[0, 1], [1, 2]]))
    assert merged.to_dict() == {9: "b", 8: "b", 7: "b", 6: "a", 5: "b"}
    assert merge(groups, np.empty((0, 2), int)).to_list() == groups.to_list()


def test_rows_are_compared_with_one_neighbour_after_the_other_in_memory_that_stays_flat() -> None:
    keys = np.zeros(100_000, np.int64)
    tracemalloc.start()
    steps = sum(len(first) == len(second) for first, second in duplicates._neighbours(keys))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert steps == duplicates.NEIGHBOURS
    assert peak < 8 * keys.nbytes  # all steps at once take 32
