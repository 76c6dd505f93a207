"""Dogs and cats: who is in which split, and what is refused."""

from __future__ import annotations

import pytest
import torch
from face_data import write_pets

from lnl_ext.paper.dogs_and_cats import BRIGHT, CAT, DARK, DOG, color_map, list_pets


@pytest.fixture
def pets(tmp_path):
    write_pets(tmp_path, 2)
    return tmp_path


@pytest.mark.parametrize(
    ("split", "cats", "dogs"),
    [("TB1", (DARK, [0, 1]), (BRIGHT, [2, 3])), ("TB2", (BRIGHT, [2, 3]), (DARK, [0, 1]))],
)
def test_training_splits(pets, split, cats, dogs):
    files = list_pets(pets, split)
    expected = [f"cat.{n}.jpg" for n in cats[1]] + [f"dog.{n}.jpg" for n in dogs[1]]
    assert [path.name for path in files.paths] == expected
    assert files.labels.tolist() == [CAT, CAT, DOG, DOG]
    assert files.tone.tolist() == [cats[0]] * 2 + [dogs[0]] * 2


def test_the_test_set_is_in_neither_list(pets):
    files = list_pets(pets, "test")
    assert [path.name for path in files.paths] == [
        "cat.4.jpg",
        "cat.5.jpg",
        "dog.4.jpg",
        "dog.5.jpg",
    ]
    assert files.tone.tolist() == [-100] * 4


def test_lists_may_lie_in_the_folder(pets):
    expected = list_pets(pets, "TB1").paths
    for tone in ("bright", "dark"):
        (pets / f"list_{tone}.txt").rename(pets / "train" / f"list_{tone}.txt")
    assert list_pets(pets, "TB1").paths == expected


def test_what_is_refused(pets):
    with pytest.raises(ValueError, match="split is 'TB3', expected one of TB1, TB2, test"):
        list_pets(pets, "TB3")
    with pytest.raises(FileNotFoundError, match="train: no such folder"):
        list_pets(pets / "nowhere", "TB1")
    with (pets / "list_dark.txt").open("a") as stream:
        stream.write("cat.2.jpg\n")
    with pytest.raises(ValueError, match=r"1 names are in both lists, such as cat\.2\.jpg"):
        list_pets(pets, "TB1")
    (pets / "list_dark.txt").write_text("cat.1.jpg\n../secret\n")
    with pytest.raises(ValueError, match=r"list_dark\.txt: 1 of 2 entries .* '\.\./secret'"):
        list_pets(pets, "TB1")
    (pets / "list_bright.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"list_bright\.txt: no such file"):
        list_pets(pets, "TB1")


def test_an_empty_split_is_an_error(pets):
    for number in (4, 5):
        for species in ("cat", "dog"):
            (pets / "train" / f"{species}.{number}.jpg").unlink()
    with pytest.raises(ValueError, match="no image belongs to split test"):
        list_pets(pets, "test")


def test_the_colour_map_is_the_bin_of_every_fourth_pixel_black_included():
    images = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    images[0, :, 2, 6] = torch.tensor([31, 32, 255], dtype=torch.uint8)
    images[0, :, 6, 10] = 200
    expected = torch.zeros(1, 3, 2, 3, dtype=torch.int64)
    expected[0, :, 0, 1] = torch.tensor([0, 1, 7])
    expected[0, :, 1, 2] = 6
    assert torch.equal(color_map(images), expected)


def test_the_colour_map_wants_whole_cells_of_bytes():
    with pytest.raises(ValueError, match=r"height and width \(8, 10\), expected multiples of 4"):
        color_map(torch.zeros(1, 3, 8, 10, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        color_map(torch.zeros(1, 3, 8, 8))
