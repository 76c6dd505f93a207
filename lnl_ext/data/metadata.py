"""What stands in image files beside the pixels: the orientation, and files without all the rest.

Pillow refuses an image whose metadata it cannot parse. Nothing but the orientation matters here.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

from PIL import ExifTags, Image

__all__ = ["carried", "orientation", "without_metadata"]

_PROFILE = "Raw profile type exif"
_XMP = "XML:com.adobe.xmp"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_LONGEST_TEXT = 1 << 20  # bytes of a compressed text that are read; an orientation stands before

# What a TIFF's decoder and its colours need, and the orientation (274).
_TIFF_TAGS = {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320}
_TIFF_TAGS |= {322, 323, 324, 325, 332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}


def orientation(notes: Iterable[bytes]) -> int:
    """Return the first orientation in EXIF or XMP data, 1 (upright) to 8; 1 without any.

    Parameters
    ----------
    notes
        Metadata of any kind, in the order of their authority, damaged or not.
    """
    for note in notes:
        found = _exif_orientation(note) or _xmp_orientation(note)
        if found:
            return found
    return 1


def _exif_orientation(note: bytes) -> int | None:
    exif = Image.Exif()
    try:
        exif.load(note)
        value = exif.get(ExifTags.Base.Orientation)
    except Exception:  # damaged tags raise nearly anything
        return None
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def _xmp_orientation(note: bytes) -> int | None:
    found = re.search(rb"tiff:Orientation(?:=\"|>)([1-8])", note)
    return int(found[1]) if found else None


def carried(image: Image.Image) -> list[bytes]:
    """Return what may hold the orientation of an image that Pillow has loaded.

    Nothing of a TIFF, which Pillow turns while it loads it.
    """
    if image.format == "TIFF":
        return []
    profile = image.info.get(_PROFILE)
    notes = [
        image.info.get("exif"),
        _unpacked(profile) if isinstance(profile, str) else None,
        image.info.get("xmp"),
        image.info.get(_XMP),
    ]
    encoded = [note.encode(errors="replace") if isinstance(note, str) else note for note in notes]
    return [note for note in encoded if isinstance(note, bytes)]


def _unpacked(profile: str) -> bytes:
    """Return the bytes in a text of ImageMagick: a name, their number, hexadecimal digits."""
    digits = re.match("[0-9a-fA-F]*", "".join(profile.split()[2:]))
    assert digits is not None
    return bytes.fromhex(digits[0][: len(digits[0]) // 2 * 2])


def without_metadata(content: bytes) -> tuple[bytes, list[bytes]]:
    """Return an image file with its pixels alone, and what of the rest may hold its orientation.

    Parameters
    ----------
    content
        A file. A PNG, JPEG, TIFF or AVIF comes back without metadata, anything else as it is.
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(content)
    if content.startswith(b"\xff\xd8"):
        return _bare_jpeg(content)
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _bare_tiff(content), []
    if content[4:8] == b"ftyp":
        # An item of another type is no EXIF; the orientation stands elsewhere as well.
        return re.sub(rb"(?s)(infe(?:\x02.{7}|\x03.{9}))Exif", rb"\1none", content), []
    return content, []


def _bare_png(content: bytes) -> tuple[bytes, list[bytes]]:
    """Keep the critical chunks (capital letters) and the transparency."""
    kept, exif, texts = [content[:8]], [], []
    at = 8
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        kind, body = content[at + 4 : at + 8], content[at + 8 : end - 4]
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(content[at:end])
        elif kind == b"eXIf":
            exif.append(body)
        elif kind in _TEXTS:
            texts.append(_png_text(kind, body))
        at = end
    return b"".join(kept), exif + texts


def _png_text(kind: bytes, body: bytes) -> bytes:
    """Return the EXIF or XMP data in a chunk of text; nothing of another text."""
    key, _, text = body.partition(b"\0")
    name = key.decode("latin-1")
    if name not in (_PROFILE, _XMP):
        return b""
    compressed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"zTXt":
        text = text[1:]
    elif kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]  # after the language and the translated key
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, _LONGEST_TEXT)
        except zlib.error:
            return b""
    return _unpacked(text.decode("latin-1")) if name == _PROFILE else text


def _bare_jpeg(content: bytes) -> tuple[bytes, list[bytes]]:
    """Drop comments and application segments, but not those that tell the colours."""
    kept, notes = [content[:2]], []
    at = 2
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        marker = content[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker in (0x01, *range(0xD0, 0xDB)):  # the pixels begin, or what has no length
            break
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        body = content[at + 4 : end]
        colours = (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14) or (
            marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        )
        if marker == 0xE1:
            notes.append(body)
        if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(content[at:end])
        at = end
    return b"".join([*kept, content[at:]]), notes


def _bare_tiff(content: bytes) -> bytes:
    """Put a directory of the first image, with the tags that its decoder needs, at the end."""
    order = "little" if content[:1] == b"I" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(content[at : at + size], order)  # type: ignore[arg-type]

    # Where the offset of the directory stands, its size, that of a tag and that of their number.
    place, width, size, counter = (8, 8, 20, 8) if number(2, 2) == 43 else (4, 4, 12, 2)
    first = number(place, width)
    count = min(number(first, counter), len(content) // size)
    starts = range(first + counter, first + counter + count * size, size)
    tags = [content[at : at + size] for at in starts if number(at, 2) in _TIFF_TAGS]
    padding = bytes(len(content) % 2)
    directory = len(content) + len(padding)
    return b"".join(
        [
            content[:place],
            directory.to_bytes(width, order),  # type: ignore[arg-type]
            content[place + width :],
            padding,
            len(tags).to_bytes(counter, order),  # type: ignore[arg-type]
            *tags,
            bytes(width),  # no other image
        ]
    )
