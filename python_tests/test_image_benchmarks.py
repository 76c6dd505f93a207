"""The benchmarks on photographs run from files to a line of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from face_data import write_pets, write_utkface

from lnl_ext.data.memory import AugmentedBatches, normalize_imagenet

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import dogs_and_cats
import imdb_faces

FIELDS = ("benchmark", "method", "recipe", "train_split", "seed", "epoch")
FIELDS += ("test_accuracy", "leakage", "minutes")


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pets")
    write_pets(root, 12)
    return root


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faces")
    write_utkface(root / "UTKFace", 10)
    return root


def run(main, data: Path, folder: Path, *options: str) -> dict[str, object]:
    results = folder / "results.jsonl"
    given = ["--data", str(data), "--results", str(results), "--image-size", "40"]
    given += ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--no-progress"]
    main([*given, *options])
    *_, line = results.read_text().splitlines()
    return json.loads(line)


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "lnl"),
        ("--method", "gray", "--train-split", "TB2"),
        ("--method", "blindeye", "--heads", "tone"),
        ("--method", "grl", "--heads", "map", "--arch", "resnet18", "--tap", "layer1"),
    ],
    ids=" ".join,
)
def test_dogs_and_cats(pets, tmp_path, capsys, options):
    result = run(dogs_and_cats.main, pets, tmp_path, *options)
    assert all(field in result for field in FIELDS)
    assert result["method"] == options[1]
    assert result["train_samples"] == 24
    assert 0 <= result["opposite_accuracy"] <= 1
    assert f"{result['test_accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "lnl"),
        ("--method", "baseline", "--label", "age", "--train-split", "EB2"),
        ("--method", "lnl", "--label", "age", "--heads", "global"),
        ("--method", "grl", "--heads", "linear", "--arch", "resnet18", "--tap", "avgpool"),
    ],
    ids=" ".join,
)
def test_faces(faces, tmp_path, options):
    result = run(imdb_faces.main, faces, tmp_path, *options)
    assert all(field in result for field in FIELDS)
    assert result["benchmark"] == "imdb_faces"
    assert result["label"] == ("age" if "age" in options else "gender")


def test_a_run_repeats(faces, tmp_path):
    first, second = (run(imdb_faces.main, faces, tmp_path, "--method", "lnl") for _ in range(2))
    first.pop("minutes"), second.pop("minutes")
    assert first == second


def test_targets_by_label_leave_out_the_other():
    labels, bias = torch.tensor([0, 1, 1]), torch.tensor([3, 4, -100])
    assert imdb_faces.by_label(bias, labels).tolist() == [[3, -100], [-100, 4], [-100, -100]]
    images = torch.full((2, 3, 4, 4), 64, dtype=torch.uint8)
    targets = dogs_and_cats.mean_color_and_label(images, torch.tensor([0, 1]))
    assert targets.tolist() == [[2] * 6 + [-100] * 3, [2] * 3 + [-100] * 3 + [2] * 3]


def test_targets_follow_what_is_cut_out():
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(torch.uint8)
    batches = AugmentedBatches(
        images,
        torch.tensor([0, 1]),
        {"age": torch.tensor([5, 6])},
        image_bias={"seen": lambda cut, labels: cut.long()},
        batch_size=2,
        crop=5,
        training=True,
    )
    cuts = set()
    for _ in range(8):
        for seen, labels, bias in batches:
            torch.testing.assert_close(seen, normalize_imagenet(bias["seen"].to(torch.uint8)))
            assert torch.equal(bias["age"], labels + 5)
            cuts |= {tuple(cut.flatten().tolist()) for cut in bias["seen"]}
    assert len(cuts) > 8  # of 2 images, 16 places and 2 directions


def test_evaluation_sees_the_centre_in_order():
    images = torch.zeros(3, 3, 6, 6, dtype=torch.uint8)
    images[:, :, 1:5, 1:5] = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1, 1)
    batches = AugmentedBatches(images, torch.tensor([0, 1, 0]), batch_size=2, crop=4)
    assert len(batches) == 2
    seen = torch.cat([cut for cut, _, _ in batches])
    torch.testing.assert_close(seen, normalize_imagenet(images[:, :, 1:5, 1:5]))
