"""An image file of any kind as an RGB image, or why it cannot be read."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lnl_ext.data.metadata import carried, orientation, without_metadata

__all__ = ["MAX_PIXELS", "MAX_SIDE", "UnreadableImageError", "decode", "load_image"]

#: Largest image that is decoded, in pixels: Pillow's own limit, a quarter of a GiB as RGB.
MAX_PIXELS = 89_478_485
#: Longest side of an image that is decoded, in pixels.
MAX_SIDE = 32_768

_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """An image file is missing, empty, truncated, too large, or not an image."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file of any format that Pillow knows as 8-bit RGB.

    The EXIF orientation is applied if it can be read; other metadata are ignored, broken or not.
    Of an animation the first frame is taken; transparency is laid over white; of 16 bits a channel
    the upper 8 are kept; palette, grey, CMYK and other colour spaces are converted.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    PIL.Image.Image
        Mode ``RGB``, in memory: the file is closed.

    Raises
    ------
    UnreadableImageError
        The file is missing, empty, truncated, damaged or not an image; it has more than
        `MAX_PIXELS` pixels or a side longer than `MAX_SIDE` (found in its header, before anything
        is decoded: a decompression bomb costs nothing); or its numbers have no known range (32
        bits a channel). The message names the file and the reason.
    """
    image, reason = decode(path)
    if image is None:
        raise UnreadableImageError(f"{os.fspath(path)}: {reason}")
    return image


def decode(path: str | os.PathLike[str]) -> tuple[Image.Image | None, str]:
    """Return the image as `load_image` does, or None and the reason."""
    try:
        # Read first: what fails from here on is the content and not the disk.
        content = Path(path).read_bytes()
    except OSError as error:
        return None, error.strerror or str(error)
    if not content:
        return None, "the file is empty"
    image, reason = _pixels(content, [])
    if image is None:
        bare, notes = without_metadata(content)
        if bare != content:
            image, _ = _pixels(bare, notes)
    return image, "" if image is not None else reason


def _pixels(content: bytes, notes: list[bytes]) -> tuple[Image.Image | None, str]:
    """Decode a file; ``notes`` may hold the orientation if the file does not."""
    try:
        with warnings.catch_warnings():
            # Of metadata, which are not used, and of bombs, which the check below refuses.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                    return None, (
                        f"{width} x {height} pixels, expected at most {MAX_PIXELS} and no side "
                        f"over {MAX_SIDE}"
                    )
                opened.load()
                turn = _TURNS.get(orientation([*carried(opened), *notes]))
                image = _as_rgb(opened)
                return (image if turn is None else image.transpose(turn)), ""
    except UnidentifiedImageError:
        return None, "not an image in a format that Pillow knows"
    except Exception as error:  # decoders raise nearly anything on damaged data
        return None, f"{error or type(error).__name__}"


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB of 8 bits a channel."""
    if image.mode.startswith("I"):  # integers of 16 bits, or of 32 in which 16 are used
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("whole numbers beyond 16 bits, whose range is not known")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point numbers, whose range is not known")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.new("RGBA", seen.size, "white")
        image.alpha_composite(seen)
    return image.convert("RGB")
