"""Image files of every kind become RGB, or an error that says which file and why."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from lnl_ext import BiasAdversary, Trainer
from lnl_ext.data import images as image_files
from lnl_ext.data.images import (
    ImageDataset,
    TooManyUnreadableError,
    UnreadableImageError,
    evaluation_transform,
    find_unreadable,
    load_image,
    read_images,
    readable,
    training_transform,
    typical_side,
)

RED, BLUE = (220, 20, 60), (10, 60, 200)


def halves() -> Image.Image:
    """Left half red, right half blue: (width 16, height 8)."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    return image


def palette_halves() -> Image.Image:
    """The same with a palette of these two colours."""
    return halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)


def assert_close(pixel: tuple[int, ...], expected: tuple[int, ...], tolerance: int = 0) -> None:
    assert max(abs(a - b) for a, b in zip(pixel, expected, strict=True)) <= tolerance, pixel


@pytest.mark.parametrize(
    ("suffix", "mode", "tolerance"),
    [
        ("png", "RGB", 0),
        ("png", "RGBA", 0),
        ("png", "P", 0),
        ("bmp", "RGB", 0),
        ("gif", "P", 0),
        ("webp", "RGB", 30),
        ("jpg", "RGB", 6),  # JPEG is lossy
        ("jpg", "CMYK", 6),
        ("tiff", "CMYK", 0),
        ("tiff", "YCbCr", 2),
        ("tiff", "LAB", 6),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, suffix, mode, tolerance):
    image = halves()
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    elif mode == "P":
        image = palette_halves()
    else:
        image = image.convert(mode)
    image.save(tmp_path / f"image.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
    with Image.open(tmp_path / f"image.{suffix}") as written:
        assert written.mode == mode
    loaded = load_image(tmp_path / f"image.{suffix}")
    assert (loaded.mode, loaded.size) == ("RGB", (16, 8))
    assert_close(loaded.getpixel((2, 4)), RED, tolerance)
    assert_close(loaded.getpixel((13, 4)), BLUE, tolerance)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"grey.{suffix}")
    loaded = np.asarray(load_image(tmp_path / f"grey.{suffix}"))
    np.testing.assert_array_equal(loaded, np.repeat([[[0], [0], [1], [128], [255]]], 3, axis=2))


def png_chunk(name: bytes, content: bytes) -> bytes:
    checked = name + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def test_sixteen_bits_a_channel_in_colour(tmp_path):
    row = b"\0" + np.array([65535, 32768, 255], dtype=">u2").tobytes()
    (tmp_path / "deep.png").write_bytes(png(1, 1, 16, 2, row))
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 128, 0)


def test_numbers_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)).save(tmp_path / "wide.tiff")
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "float.tiff")
    for name, reason in (("wide.tiff", "beyond 16 bits"), ("float.tiff", "floating-point")):
        with pytest.raises(UnreadableImageError, match=f"{name}: .*{reason}"):
            load_image(tmp_path / name)


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    palette = palette_halves()
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    loaded = load_image(tmp_path / "palette.png")
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((13, 4)) == BLUE


def test_the_orientation_in_the_exif_data_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    halves().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    loaded = load_image(tmp_path / "turned.jpg")
    assert loaded.size == (8, 16)
    assert_close(loaded.getpixel((4, 2)), RED, 6)
    assert_close(loaded.getpixel((4, 13)), BLUE, 6)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    for name in ("moving.gif", "moving.webp", "moving.png"):
        second = Image.new("RGB", (16, 8), (0, 255, 0))
        lossless = {"lossless": True} if name.endswith("webp") else {}
        halves().save(tmp_path / name, save_all=True, append_images=[second], **lossless)
        with Image.open(tmp_path / name) as written:
            assert written.n_frames == 2
        loaded = load_image(tmp_path / name)
        assert_close(loaded.getpixel((2, 4)), RED)
        assert_close(loaded.getpixel((13, 4)), BLUE)


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (60_000, 10), (20_000, 20_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, width, height):
    # The header alone: decoding it would fail with another reason.
    (tmp_path / "bomb.png").write_bytes(png(width, height, 8, 2, b""))
    with pytest.raises(UnreadableImageError, match=r"bomb\.png") as error:
        load_image(tmp_path / "bomb.png")
    assert "pixels" in str(error.value)


@pytest.fixture
def bad(tmp_path) -> dict[str, Path]:
    """Files that cannot be read, and a word of the reason."""
    halves().resize((160, 80)).save(tmp_path / "whole.jpg")
    halves().resize((160, 80)).save(tmp_path / "whole.png")
    for kind in ("jpg", "png"):
        content = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not found")
    (tmp_path / "folder.jpg").mkdir()
    return {
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "cut.jpg": "truncated",
        "cut.png": "",  # how the decoder says it depends on its release
        "missing.jpg": "No such file",
        "folder.jpg": "directory",
    }


def test_unreadable_files_are_named_with_the_reason(tmp_path, bad):
    for name, reason in bad.items():
        with pytest.raises(UnreadableImageError, match=f"{name}: .*{reason}"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_listed(tmp_path, bad, workers):
    paths = [tmp_path / "whole.jpg"] * 70 + [tmp_path / name for name in bad]
    found = find_unreadable(paths, workers=workers)
    assert list(found) == list(range(70, 70 + len(bad)))
    assert all(word in reason for word, reason in zip(bad.values(), found.values(), strict=True))
    with pytest.raises(TooManyUnreadableError, match=f"6 of 76 .*1%(.|\n)*{tmp_path}/empty.jpg"):
        readable(paths, workers=workers)


def test_one_in_a_hundred_is_left_out_with_a_warning(tmp_path, bad):
    paths = [tmp_path / "whole.jpg"] * 99
    paths.insert(5, tmp_path / "empty.jpg")
    with pytest.warns(UserWarning, match="1 of 100 .*left out:\n.*empty.jpg: the file is empty"):
        kept = readable(paths)
    assert kept == [*range(5), *range(6, 100)]
    with pytest.warns(UserWarning, match="1 of 100"):
        images, kept = read_images(paths, 12)
    assert images.shape == (99, 3, 12, 12)
    assert images.dtype == torch.uint8
    assert kept == [*range(5), *range(6, 100)]
    assert (images == images[0]).all()
    with pytest.raises(TooManyUnreadableError, match="1 of 99"):
        readable(paths[:-1])


def test_images_in_memory_are_the_scaled_centres(tmp_path):
    wide = Image.new("RGB", (30, 10), BLUE)
    wide.paste(RED, (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    images, _ = read_images([tmp_path / "wide.png"], 10)
    assert_close(tuple(images[0, :, 5, 5].tolist()), RED)
    assert (images[0] == images[0, :, :1, :1]).all()


def test_a_data_set_trains_through_a_data_loader_with_workers(tmp_path):
    for number in range(6):
        halves().save(tmp_path / f"{number}.png")
    dataset = ImageDataset(
        [tmp_path / f"{number}.png" for number in range(6)],
        np.array([0, 1] * 3, dtype=np.int32),
        {"site": [2, 0, 1, 2, -100, 1]},
        training_transform(8),
    )
    dataset = pickle.loads(pickle.dumps(dataset))
    images, labels, bias = next(iter(DataLoader(dataset, batch_size=6, num_workers=2)))
    assert images.shape == (6, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1] * 3
    assert bias["site"].tolist() == [2, 0, 1, 2, -100, 1]
    assert labels.dtype == bias["site"].dtype == torch.int64
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    trainer = Trainer(features, nn.Linear(4, 2), {"site": BiasAdversary(nn.Linear(4, 3))})
    (record,) = trainer.fit(DataLoader(dataset, batch_size=2, shuffle=True), progress=False)
    assert record["step"] == 3


@pytest.mark.parametrize("augment", ["shift", "crop", "flip", "none"])
def test_kept_images_give_the_same_samples_without_their_files(tmp_path, augment):
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    generator = np.random.default_rng(0)
    for path in paths:
        pixels = generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    dataset = ImageDataset(paths, range(6), {}, training_transform(8, augment))

    def batches():
        loader = DataLoader(
            dataset, batch_size=4, num_workers=2, generator=torch.Generator().manual_seed(1)
        )
        return torch.cat([images for images, _, _ in loader])

    decoded = batches()
    before = torch.get_rng_state()
    dataset.keep_decoded(workers=1)
    assert torch.equal(torch.get_rng_state(), before)
    for path in paths:
        path.unlink()
    assert torch.equal(batches(), decoded)
    dataset = pickle.loads(pickle.dumps(dataset))  # as workers get it that are not forked
    assert torch.equal(batches(), decoded)


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"gone.png: No such file"):
        ImageDataset([tmp_path / "gone.png"], [0], {}, evaluation_transform(8)).keep_decoded()
    with pytest.raises(TypeError, match="expected a SquareTransform"):
        ImageDataset([tmp_path / "gone.png"], [0]).keep_decoded()


def test_the_typical_side_is_that_of_most_images(tmp_path):
    for number, size in enumerate([(50, 40), (40, 60), (900, 1200)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    assert typical_side(paths) == 40
    assert typical_side(paths[:2] * 300) == 40


def test_a_file_that_vanishes_is_named_from_the_worker(tmp_path):
    dataset = ImageDataset([tmp_path / "gone.png"], [0])
    with pytest.raises(UnreadableImageError, match=r"gone.png: No such file"):
        next(iter(DataLoader(dataset, num_workers=1)))


def test_targets_must_fit_the_paths(tmp_path):
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), expected 2 rows"):
        ImageDataset(["a", "b"], [0, 1, 0])
    with pytest.raises(ValueError, match=r"bias\['age'\] has shape \(1, 2\), expected 2 rows"):
        ImageDataset(["a", "b"], [0, 1], {"age": [[0.5, 0.5]]})


@pytest.mark.parametrize("size", [(3, 999), (999, 3)])
def test_a_strip_is_not_scaled_as_a_whole(monkeypatch, size):
    # One by 32,768 pixels scaled to 224 would be five GB.
    wide, high = size
    strip = Image.new("RGB", size, BLUE)
    middle = (
        (wide // 2 - 5, 0, wide // 2 + 6, 3) if wide > 3 else (0, high // 2 - 5, 3, high // 2 + 6)
    )
    strip.paste(RED, middle)
    scaled = []
    resize = image_files.transforms.resize

    def noted(image, *given, **options):
        scaled.append(image.size)
        return resize(image, *given, **options)

    monkeypatch.setattr(image_files.transforms, "resize", noted)
    transform = evaluation_transform(8)
    assert torch.equal(transform(strip), transform(Image.new("RGB", (8, 8), RED)))
    assert max(scaled[0]) == 12


def test_evaluation_is_normalised_and_not_random():
    transform = evaluation_transform(8)
    image = Image.new("RGB", (12, 8), (124, 116, 104))  # ImageNet's mean, rounded
    assert transform(image).abs().max() < 0.01
    assert torch.equal(transform(halves()), transform(halves()))
    assert not torch.equal(training_transform(8)(halves()), training_transform(8)(halves()))


def test_augmentations_are_what_they_are_called():
    pixels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32, 1) // 8
    image = Image.fromarray(np.repeat(pixels.astype(np.uint8), 3, 2))
    plain = evaluation_transform(32)(image)
    assert torch.equal(training_transform(32, "none")(image), plain)

    def seen(augment):
        return [training_transform(32, augment)(image) for _ in range(60)]

    for one in seen("flip"):
        assert torch.equal(one, plain) or torch.equal(one, plain.flip(2))
    edges = nn.functional.pad(plain[None], [2] * 4, mode="replicate")[0]
    places = [
        whole[:, y : y + 32, x : x + 32]
        for whole in (edges, edges.flip(2))
        for y in range(5)
        for x in range(5)
    ]
    found = [[torch.allclose(one, place) for place in places] for one in seen("shift")]
    assert all(any(one) for one in found)
    assert len({one.index(True) for one in found}) > 10
    spans = [float(one.max() - one.min()) for one in seen("crop")]
    assert all(span <= float(plain.max() - plain.min()) + 1e-5 for span in spans)
    assert min(spans) < 0.9 * float(plain.max() - plain.min())
