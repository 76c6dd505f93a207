"""Images are their pixels: an orientation is applied if it can be read, all else passed over."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lnl_ext.data.images import UnreadableImageError, load_image, readable

ORIENTATION = 0x0112
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
PICTURE = Image.new("RGB", (16, 8), (220, 20, 60))
PICTURE.paste((10, 60, 200), (8, 0, 16, 8))


def exif(**tags: object) -> bytes:
    made = Image.Exif()
    made[ORIENTATION] = 6
    for name, value in tags.items():
        made[int(name[1:], 16)] = value
    return made.tobytes()


TURNED = exif()[6:]  # a TIFF header and the orientation alone


def ifd(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of tags, types, numbers and values."""
    tags = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4)


SIX = (ORIENTATION, 3, 1, b"\6\0")
LONG = ifd(SIX, (0x0131, 2, 4, b"abc"), (0x0132, 2, 4, b"abc"))  # the orientation ends at 22


def saved(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    PICTURE.save(stream, kind, **({"lossless": True} if kind == "webp" else {}), **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    checked = kind + content
    crc = zlib.crc32(checked) if crc is None else crc
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", crc)


def png(*chunks: bytes, after: bytes = b"") -> bytes:
    content = saved("png")
    return content[:33] + b"".join(chunks) + content[33:-12] + after + content[-12:]


def profile(payload: bytes) -> bytes:
    """Hexadecimal digits as ImageMagick writes them."""
    digits = payload.hex()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    return f"\nexif\n{len(payload):8}\n".encode() + "\n".join(lines).encode() + b"\n"


def text(payload: bytes) -> bytes:
    return chunk(b"tEXt", b"Raw profile type exif\0" + payload)


def packed(payload: bytes) -> bytes:
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(payload))


def xmp_text(flag: bytes = b"\0") -> bytes:
    body = zlib.compress(XMP) if flag == b"\1" else XMP
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0" + flag + b"\0\0\0" + body)


def jpeg(*segments: tuple[int, bytes], header: bool = True) -> bytes:
    content = saved("jpeg", quality=95)
    start = 20 if header else 2  # with JFIF's segment or without
    made = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return content[:start] + made + content[20:]


def tiff(
    tag: int, kind: int, count: int, value: int, *, there: int = 0, big: bool = False, **options
) -> bytes:
    """A TIFF whose ``tag`` is as given, in the place of the one that is ``there``."""
    made = Image.Exif()
    made[ORIENTATION] = 6
    made[0x010F] = "the maker"
    made[0x011A] = made[0x011B] = 72.0
    made[0x0128] = 3
    content = saved("tiff", exif=made, big_tiff=big, icc_profile=bytes(200), **options)
    start, width, entry, counter, form = (8, 8, 20, 8, "<HHQQ") if big else (4, 4, 12, 2, "<HHII")
    first = int.from_bytes(content[start : start + width], "little")
    number = int.from_bytes(content[first : first + counter], "little")
    for at in range(first + counter, first + counter + number * entry, entry):
        if int.from_bytes(content[at : at + 2], "little") == (there or tag):
            changed = struct.pack(form, tag, kind, count, value)
            return content[:at] + changed + content[at + entry :]
    raise AssertionError(f"no tag {tag}")


def avif(payload: bytes) -> bytes:
    """An AVIF with other bytes where its EXIF data began."""
    content = saved("avif", exif=exif(x010F="m" * 100), quality=95)
    at = content.index(b"MM\0*")
    return content[:at] + payload + content[at + len(payload) :]


BOMB = zlib.compress(bytes(80 << 20))
UPRIGHT: dict[str, Callable[[], bytes]] = {
    "png eXIf of something else": lambda: png(chunk(b"eXIf", b"<x:xmpmeta/>")),
    "png eXIf empty": lambda: png(chunk(b"eXIf", b"")),
    "png eXIf cut in the header": lambda: png(chunk(b"eXIf", TURNED[:6])),
    "png eXIf after the pixels": lambda: png(after=chunk(b"eXIf", b"no TIFF header")),
    "png eXIf with another checksum": lambda: png(chunk(b"eXIf", b"no TIFF header", crc=1)),
    "png profile that is XMP": lambda: png(packed(profile(b"http://ns.adobe.com/xap/1.0/\0<x/>"))),
    "png profile cut short": lambda: png(text(profile(TURNED)[:31])),
    "png profile that is no number": lambda: png(text(b"\nexif\n  9\nno digits\n")),
    "png profile empty": lambda: png(text(b"")),
    "png iCCP empty": lambda: png(chunk(b"iCCP", b"")),
    "png iCCP of another compression": lambda: png(chunk(b"iCCP", b"icc\0\1x")),
    "png iCCP that is not compressed": lambda: png(chunk(b"iCCP", b"icc\0\0x")),
    "png iCCP that is a bomb": lambda: png(chunk(b"iCCP", b"icc\0\0" + BOMB)),
    "png zTXt that is a bomb": lambda: png(chunk(b"zTXt", b"a\0\0" + BOMB)),
    "png zTXt of another compression": lambda: png(after=chunk(b"zTXt", b"a\0\1x")),
    "png iTXt that is a bomb": lambda: png(after=chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "png gAMA short": lambda: png(chunk(b"gAMA", b"")),
    "png cHRM short": lambda: png(chunk(b"cHRM", b"x")),
    "png sRGB short": lambda: png(chunk(b"sRGB", b"")),
    "png pHYs short": lambda: png(chunk(b"pHYs", b"x")),
    "png acTL short": lambda: png(chunk(b"acTL", b"")),
    "png tIME with another checksum": lambda: png(chunk(b"tIME", bytes(7), crc=1)),
    "png cut within the text after the pixels": lambda: png(after=text(b"x" * 99))[:-60],
    "webp EXIF of something else": lambda: saved("webp", exif=b"<x:xmpmeta/>"),
    "webp EXIF cut in the header": lambda: saved("webp", exif=TURNED[:6]),
    "webp XMP of no text": lambda: saved("webp", xmp=b"\xff\xfe\0"),
    "webp profile of nothing": lambda: saved("webp", icc_profile=b"none"),
    "jpeg EXIF of something else": lambda: jpeg((0xE1, b"Exif\0\0<x:xmpmeta/>")),
    "jpeg ICC without a number": lambda: jpeg((0xE2, b"ICC_PROFILE\0")),
    "jpeg ICC in pieces that are missing": lambda: jpeg((0xE2, b"ICC_PROFILE\0\1\5x")),
    "jpeg JFIF cut short": lambda: jpeg((0xE0, b"JFIF")),
    "jpeg Photoshop cut short": lambda: jpeg((0xED, b"Photoshop 3.0\x008BIM\3\xed")),
    "jpeg Adobe cut short": lambda: jpeg((0xEE, b"Adobe")),
    "jpeg MPF of nothing": lambda: jpeg((0xE2, b"MPF\0")),
    "jpeg MPF without a number": lambda: jpeg((0xE2, b"MPF\0II*\0\x08\0\0\0\0\0\0\0\0\0")),
    "gif comment of no text": lambda: saved("gif", comment=b"\xff\xfe"),
}
TURNED_BY: dict[str, Callable[[], bytes]] = {
    "png eXIf": lambda: png(chunk(b"eXIf", TURNED)),
    "png eXIf cut after the orientation": lambda: png(chunk(b"eXIf", LONG[:30])),
    "png eXIf beside a broken profile": lambda: png(chunk(b"iCCP", b""), chunk(b"eXIf", TURNED)),
    "png profile": lambda: png(packed(profile(TURNED))),
    "png profile cut after the orientation": lambda: png(text(profile(LONG)[: 15 + 2 * 24 + 1])),
    "png profile that is XMP": lambda: png(packed(profile(XMP))),
    "png profile beside a broken one": lambda: png(chunk(b"gAMA", b""), packed(profile(TURNED))),
    "png XMP": lambda: png(xmp_text()),
    "png XMP beside a broken EXIF": lambda: png(chunk(b"eXIf", b"none"), xmp_text()),
    "png XMP beside a broken profile": lambda: png(chunk(b"iCCP", b""), xmp_text(b"\1")),
    "webp EXIF": lambda: saved("webp", exif=exif()),
    "webp XMP beside a broken EXIF": lambda: saved("webp", exif=b"none", xmp=XMP),
    "avif EXIF": lambda: saved("avif", exif=exif(), quality=95),
    # An AVIF has the orientation twice.
    "avif EXIF of something else": lambda: avif(b"<x:xmpmeta/>"),
    "jpeg EXIF": lambda: jpeg((0xE1, exif())),
    "jpeg EXIF of a resolution that is text": lambda: jpeg(
        (0xE1, b"Exif\0\0" + ifd(SIX, (0x011A, 2, 2, b"7"), (0x0128, 3, 1, b"\2"))), header=False
    ),
    "jpeg EXIF beside a broken profile": lambda: jpeg(
        (0xE1, exif()), (0xE2, b"ICC_PROFILE\0"), (0xFE, b"comment")
    ),
    "jpeg XMP beside a broken EXIF": lambda: jpeg(
        (0xE1, b"Exif\0\0none"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)
    ),
    "tiff": lambda: saved("tiff", exif=exif()),
    "tiff EXIF beyond the end": lambda: tiff(34665, 4, 1, 2**32 - 1, there=34675),
    "tiff maker beyond any size": lambda: tiff(271, 1, 2**32 - 1, 8),
    "tiff resolution that is text": lambda: tiff(282, 2, 3, 0x373737),
    "tiff unit of no kind": lambda: tiff(296, 2, 1000, 8),
    "tiff compressed": lambda: tiff(271, 1, 2**32 - 1, 8, compression="tiff_lzw"),
    "tiff profile beyond the end": lambda: tiff(34675, 7, 2**31, 8),
    "tiff of 64 bits": lambda: tiff(282, 2, 3, 0x373737, big=True),
}


@pytest.mark.parametrize("name", UPRIGHT)
def test_metadata_that_cannot_be_read_are_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "image").write_bytes(UPRIGHT[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(tmp_path / "image")
    _assert_same(loaded, PICTURE)


@pytest.mark.parametrize("name", TURNED_BY)
def test_an_orientation_that_can_be_read_is_applied(tmp_path: Path, name: str) -> None:
    (tmp_path / "image").write_bytes(TURNED_BY[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(tmp_path / "image")
    _assert_same(loaded, PICTURE.transpose(Image.Transpose.ROTATE_270))


def _assert_same(one: Image.Image, two: Image.Image) -> None:
    assert (one.mode, one.size) == ("RGB", two.size)
    difference = np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int))
    assert np.median(difference) <= 8  # of what JPEG, AVIF and GIF lose


@pytest.mark.parametrize(
    "value",
    [(3, 1, b"\0"), (3, 1, b"\x09"), (2, 2, b"6"), (7, 1, b"\6")],
)
def test_an_orientation_that_is_none_turns_nothing(
    tmp_path: Path, value: tuple[int, int, bytes]
) -> None:
    (tmp_path / "image").write_bytes(saved("webp", exif=ifd((ORIENTATION, *value))))
    _assert_same(load_image(tmp_path / "image"), PICTURE)


def test_pixels_that_are_cut_are_unreadable_whatever_stands_beside_them(tmp_path: Path) -> None:
    for name, whole in [
        ("png", png(chunk(b"iCCP", b""))),
        ("jpeg", jpeg((0xE2, b"ICC_PROFILE\0"))),
        ("tiff", tiff(282, 2, 3, 0x373737)),
    ]:
        cut = whole[:-100] if name == "jpeg" else whole[:100]
        if name == "png":
            cut = whole[: whole.index(b"IDAT") + 12]
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(UnreadableImageError, match=name):
            load_image(tmp_path / name)


def test_a_few_bad_notes_do_not_refuse_a_set(tmp_path: Path) -> None:
    paths = []
    for number in range(60):
        broken = (png(chunk(b"eXIf", b"none")), saved("webp", exif=b"none"))
        content = broken[number] if number < 2 else saved("png")
        paths.append(tmp_path / f"{number}")
        paths[-1].write_bytes(content)
    assert readable(paths) == list(range(60))
