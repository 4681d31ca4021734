"""Quality: what an input measures before any model looks at it.

Goes in: pictures or texts. Comes out: a number for each by name. Knows no model, and judges nothing: what is
good is for whoever compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headstart import images, texts
from headstart.metrics import Floats
from headstart.progress import bar

SIDE = 256  # of the square that pictures are looked at in: about what a network sees of them
UNKNOWN = ("[UNK]", "<unk>")
MOST_TOKENS = 1_000_000  # so none is cut


def of_images(items: Sequence[Path | bytes]) -> dict[str, Floats]:
    """Width and height in pixels; brightness, contrast and sharpness of grey values from 0 to 255.

    Contrast is the standard deviation, sharpness that of the Laplacian (Pech-Pacheco et al. 2000): it falls
    when a lens is out of focus, and rises with noise. About 3 ms an image.

    Returns:
        float64 [items] by name.

    Raises:
        HeadstartError: an image that cannot be read.
    """
    from scipy.ndimage import laplace

    found = np.empty((len(items), 5))
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    for row, item in enumerate(bar(items, desc="measuring images", unit=" images")):
        images.read(item, SIDE, "bilinear", pixels)
        with images.opened(item) as image:
            width, height = image.size
        grey = pixels.mean(axis=2)
        found[row] = width, height, grey.mean(), grey.std(), laplace(grey).std()
    names = ("width", "height", "brightness", "contrast", "sharpness")
    return dict(zip(names, found.T.copy(), strict=True))


def of_texts(items: Sequence[str], tokenizer: Path) -> dict[str, Floats]:
    """Length in characters and in tokens, share of tokens that are unknown, and of characters beyond ASCII.

    Args:
        items: the texts, none of them empty.
        tokenizer: the tokenizer.json of the model that is to read them.

    Returns:
        float64 [items] by name.
    """
    from tokenizers import Tokenizer

    cutter = Tokenizer.from_file(str(tokenizer))
    unknown = [place for word in UNKNOWN if (place := cutter.token_to_id(word)) is not None]
    tokens = texts.tokenise(items, tokenizer, MOST_TOKENS)
    strange = np.concatenate([[0], np.cumsum(np.isin(tokens.ids, unknown))])[tokens.bounds]
    characters = np.array([len(item) for item in items], np.float64)
    beyond = np.array([sum(not letter.isascii() for letter in item) for item in items], np.float64)
    return {
        "characters": characters,
        "tokens": tokens.lengths.astype(np.float64),
        "unknown tokens": np.diff(strange) / np.maximum(tokens.lengths, 1),
        "characters beyond ASCII": beyond / np.maximum(characters, 1),
    }
