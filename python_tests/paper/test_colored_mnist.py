"""Coloured MNIST: colours, labels, bias labels, sources, and the protocol of train and test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_idx import write_split
from torch.utils.data import DataLoader

from lnl_ext.data import ColoredMNIST
from lnl_ext.paper.colored_mnist import IMAGE_MEAN, IMAGE_STD, MEAN_COLORS

CARRIED = Path(__file__).parents[2] / "benchmarks" / "data" / "mnist"


@pytest.fixture(scope="module")
def test_set() -> ColoredMNIST:
    """The unbiased test set of real digits."""
    return ColoredMNIST(CARRIED, split="test", variance=0.02, seed=3)


@pytest.fixture(scope="module")
def train_set() -> ColoredMNIST:
    """20,000 real training digits."""
    return ColoredMNIST(CARRIED, variance=0.02, seed=3, indices=range(20_000))


def color_of(dataset: ColoredMNIST) -> np.ndarray:
    """Estimate every digit's colour (N, 3) in [0, 1] from its brightest pixels."""
    return dataset.colored.amax((2, 3)).numpy() / 255


def test_training_colours_are_gaussian_around_the_digits_mean(train_set):
    color, digits = color_of(train_set), train_set.labels.numpy()
    for digit, mean in enumerate(np.array(MEAN_COLORS) / 255):
        mine = color[digits == digit]
        # Far enough from 0 and 1, clipping does not show; the brightest pixel may be below 255.
        inner = (mean > 0.4) & (mean < 0.6)
        np.testing.assert_allclose(mine.mean(0)[inner], mean[inner], atol=0.02)
        np.testing.assert_allclose(mine.std(0)[inner], 0.02**0.5, atol=0.01)
        assert np.all(mine >= 0)
        assert np.all(mine <= 1)


def test_variance_zero_gives_exactly_mean_colour_times_grey():
    grey = ColoredMNIST(CARRIED, split="test", variance=0.0, biased=True, indices=range(50))
    from lnl_ext.data import read_mnist_split

    images, labels = read_mnist_split(CARRIED, "test")
    for index in range(50):
        expected = images[index][None] * (np.array(MEAN_COLORS)[labels[index], :, None, None] / 255)
        assert np.abs(grey.colored[index].numpy() - expected).max() <= 0.5 + 1e-4


def test_colour_tells_the_digit_in_training_and_nothing_in_the_test_set(train_set, test_set):
    means = np.array(MEAN_COLORS) / 255
    agreement = []
    for dataset in (train_set, test_set):
        distance = ((color_of(dataset)[:, None] - means) ** 2).sum(2)
        agreement.append((distance.argmin(1) == dataset.labels.numpy()).mean())
    assert agreement[0] > 0.8
    # 0.1 with a standard deviation of 0.003 for 10,000 digits.
    assert 0.085 < agreement[1] < 0.115


def test_the_same_seed_gives_the_same_set_and_another_one_does_not(test_set):
    again = ColoredMNIST(CARRIED, split="test", variance=0.02, seed=3)
    other = ColoredMNIST(CARRIED, split="test", variance=0.02, seed=4)
    assert torch.equal(again.colored, test_set.colored)
    assert not torch.equal(other.colored, test_set.colored)


def test_a_subset_keeps_the_colours_of_the_whole_set(test_set):
    subset = ColoredMNIST(CARRIED, split="test", variance=0.02, seed=3, indices=[17, 4, 9999])
    assert torch.equal(subset.colored, test_set.colored[[17, 4, 9999]])
    assert torch.equal(subset.labels, test_set.labels[[17, 4, 9999]])


def test_bias_labels_are_those_of_the_authors_code(test_set):
    for index in (0, 123, 4567):
        colored = test_set.colored[index].permute(1, 2, 0).numpy()
        small = np.array(Image.fromarray(colored).resize((14, 14), Image.Resampling.NEAREST), int)
        expected = np.where(small == 0, -100, small // 32).transpose(2, 0, 1)
        _, _, targets = test_set[index]
        np.testing.assert_array_equal(targets["pixel_color"].numpy(), expected)
        np.testing.assert_array_equal(targets["color"].numpy(), colored.max((0, 1)) // 32)


def test_heads_of_one_digit_see_that_digit_only(test_set):
    _, labels, targets = test_set.batch(range(200))
    both, color = targets["color_and_digit"], targets["color"]
    assert both.shape == (200, 33)
    assert torch.equal(both[:, :3], color)
    given = both[:, 3:].reshape(200, 10, 3)
    for digit in range(10):
        own = labels == digit
        assert torch.equal(given[own, digit], color[own])
        assert (given[~own, digit] == -100).all()


def test_a_sample_a_batch_and_a_loader_agree(test_set):
    images, labels, targets = test_set.batch([5, 2])
    assert images.shape == (2, 3, 28, 28)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == targets["color"].dtype == targets["pixel_color"].dtype == torch.int64
    assert targets["pixel_color"].shape == (2, 3, 14, 14)
    assert targets["color"].shape == (2, 3)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGE_MEAN, IMAGE_STD))
    for row, index in enumerate((5, 2)):
        image, label, target = test_set[index]
        torch.testing.assert_close(image * std + mean, test_set.colored[index] / 255)
        assert torch.equal(image, images[row])
        assert label == labels[row] == test_set.labels[index]
        for name, value in target.items():
            assert torch.equal(value, targets[name][row])
    loader = DataLoader(test_set, batch_size=2, sampler=[5, 2])
    (loaded,) = loader
    assert torch.equal(loaded[0], images)
    assert torch.equal(loaded[1], labels)
    assert torch.equal(loaded[2]["pixel_color"], targets["pixel_color"])


def test_iteration_ends_and_negative_positions_count_from_the_end():
    dataset = ColoredMNIST(CARRIED, split="test", indices=range(5))
    assert len(list(dataset)) == len(dataset) == 5
    assert torch.equal(dataset[-1][0], dataset[4][0])
    assert [len(labels) for _, labels, _ in dataset.batches(2)] == [2, 2, 1]


def authors_file(path: Path, **changes: object) -> dict[str, object]:
    """Write a small file in the authors' format and return what it holds."""
    generator = np.random.default_rng(1)
    content: dict[str, object] = {}
    for split, count in (("train", 6), ("test", 4)):
        content[f"{split}_image"] = generator.integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
        content[f"{split}_label"] = np.arange(count, dtype=np.int64)
    content.update(changes)
    np.save(path, content, allow_pickle=True)
    return content


@pytest.mark.parametrize("whole_folder", [True, False])
def test_the_authors_file_is_read_as_it_is(tmp_path, whole_folder):
    path = tmp_path / "mnist_10color_jitter_var_0.020.npy"
    content = authors_file(path)
    for split, count in (("train", 6), ("test", 4)):
        root = tmp_path if whole_folder else path
        dataset = ColoredMNIST(root, split=split, variance=0.02)
        assert dataset.source == path
        expected = content[f"{split}_image"].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(dataset.colored.numpy(), expected)
        assert dataset.labels.tolist() == list(range(count))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_image": np.zeros((6, 3, 28, 28), np.uint8)}, "train_image is uint8 of shape"),
        ({"train_image": np.zeros((6, 28, 28, 3))}, "train_image is float64 of shape"),
        ({"train_label": np.zeros(5, int)}, "train_label is int64 of shape"),
        ({"train_label": np.full(6, 10)}, "train_label goes from 10 to 10, expected 0 to 9"),
    ],
)
def test_an_unusable_authors_file_is_refused(tmp_path, changes, message):
    path = tmp_path / "mnist_10color_jitter_var_0.020.npy"
    authors_file(path, **changes)
    with pytest.raises(ValueError, match=rf"var_0\.020\.npy: {message}"):
        ColoredMNIST(path)


def test_an_authors_file_without_the_split_is_refused(tmp_path):
    path = tmp_path / "other.npy"
    np.save(path, {"image": np.zeros(3)}, allow_pickle=True)
    with pytest.raises(ValueError, match="expected a dictionary with train_image and train_label"):
        ColoredMNIST(path)


def test_an_authors_file_cannot_be_recoloured(tmp_path):
    path = tmp_path / "mnist_10color_jitter_var_0.020.npy"
    authors_file(path)
    with pytest.raises(ValueError, match="is coloured already"):
        ColoredMNIST(path, biased=False)


def test_idx_files_of_a_user_are_read(tmp_path):
    images = write_split(tmp_path / "MNIST" / "raw", compress=True)
    dataset = ColoredMNIST(tmp_path, variance=0.0)
    assert dataset.source == tmp_path
    # Digit 2 is nearly as red and green as possible: its channels are nearly the grey values.
    red = np.rint(images[2] * (253 / 255))
    np.testing.assert_allclose(dataset.colored[2, 0].numpy(), red, atol=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split is 'validation', expected 'train' or 'test'"),
        ({"variance": -0.1}, "variance is -0.1, expected a finite number >= 0"),
        ({"variance": float("nan")}, "variance is nan"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ColoredMNIST(CARRIED, **arguments)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        ColoredMNIST(tmp_path / "nowhere")


def test_mean_color_says_whose_colour_a_digit_has() -> None:
    mnist = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "mnist"
    train = ColoredMNIST(mnist, variance=0.0, indices=range(50))
    assert torch.equal(train.mean_color, train.labels)
    test = ColoredMNIST(mnist, split="test", variance=0.0, indices=range(400))
    assert (test.mean_color == test.labels).float().mean() < 0.2
    brightest = test.colored.flatten(2).amax(2)
    expected = torch.tensor(MEAN_COLORS)[test.mean_color]
    assert (brightest.long() - expected).abs().max() <= 1
