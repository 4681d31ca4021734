"""Images: files or bytes as square arrays of pixels, upright and in three channels.

Goes in: paths, or the bytes of files. Comes out: uint8 arrays in the memory order that networks are fastest
with. Never crops, and never scales values: that is the backbone's.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headstart.errors import HeadstartError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]

# What a file may be, whatever it is called; JPEG with several pictures (MPO) is JPEG. Pillow knows dozens of
# others, and hands PostScript to Ghostscript, which runs it.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")


def opened(item: Path | bytes) -> Image:
    """A picture of one of the formats that are read, from a file's path or its bytes; nothing is decoded yet.

    Raises:
        PIL.UnidentifiedImageError: it is none.
        OSError: no such file.
    """
    from PIL import Image

    return Image.open(item if isinstance(item, Path) else io.BytesIO(item), formats=FORMATS)


def read(item: Path | bytes, side: int, interpolation: str, into: Pixels) -> None:
    """Decode one image, squeeze it into a square, and write it to ``into``, uint8 [side, side, 3].

    The whole picture is kept: a defect in a corner is as good as one in the middle. Grey pictures are resized
    in one channel, large JPEGs decoded at a fraction of their size; about 1 ms an image either way.

    Args:
        item: a file's path, or its bytes.
        side: pixels of the square.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or another name of Pillow's filters.
        into: where the pixels go.

    Raises:
        HeadstartError: no such file, damaged, or not an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    resampling = Image.Resampling[interpolation.upper()]
    try:
        with opened(item) as image:
            image.draft(None, (2 * side, 2 * side))  # JPEG only: decodes at the next larger eighth
            ImageOps.exif_transpose(image, in_place=True)
            resized = _eight_bits(image).resize((side, side), resampling).convert("RGB")
    except Exception as error:  # decoders raise what they like on a damaged file
        why = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        why = getattr(error, "strerror", None) or why or type(error).__name__
        raise HeadstartError(
            "an image cannot be read",
            where=str(item) if isinstance(item, Path) else f"{len(item)} bytes",
            table=[why[:150]],
            do="replace the file, or leave it out",
        ) from error
    into[:] = np.asarray(resized)


def _eight_bits(image: Image) -> Image:
    """The image in mode L or RGB; 16-bit grey keeps its upper eight bits, where Pillow would cut it off.

    Transparency is left away: what a program painted below it counts. Nothing is copied without need: a large
    picture is large.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its values are fractions, and nothing says which of them is white")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # Pillow warns of one that it does not convert
    if image.mode in {"L", "RGB"}:
        return image
    return image.convert("L" if image.mode in {"1", "LA"} else "RGB")
