"""The benchmarks on photographs run from files to a line of results."""

from __future__ import annotations

import json
from pathlib import Path

import dogs_and_cats
import imdb_faces
import photographs.faces
import photographs.options
import photographs.pets
import photographs.runs
import pytest
import torch
from face_data import write_pets, write_utkface

from lnl_ext.paper.augmented_batches import AugmentedBatches, normalize_imagenet
from lnl_ext.paper.image_networks import ARCHITECTURES
from lnl_ext.training.methods import METHODS

FIELDS = ("benchmark", "method", "train_split", "seed", "epoch")
FIELDS += ("test_accuracy", "leakage", "minutes")


def test_names_are_the_packages():
    assert tuple(ARCHITECTURES) == photographs.options.ARCHITECTURES
    methods = {*dogs_and_cats.METHODS, *imdb_faces.METHODS}
    assert methods <= METHODS.keys()


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


def page(folder: Path, result: dict[str, object]) -> str:
    """Return the page of a run, which tells what its line of results does."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    for name in ("test_accuracy", "opposite_accuracy", "leakage", "leakage_chance"):
        assert f'<td class="number">{result[name]:.3f}</td>' in text
    assert f"python benchmarks/{result['benchmark']}.py --data" in text
    return text


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "lnl"),
        ("--method", "gray", "--train-split", "TB2"),
        ("--method", "blindeye", "--heads", "tone"),
        ("--method", "grl", "--heads", "map", "--arch", "resnet18", "--feature-layer", "layer1"),
    ],
    ids=" ".join,
)
def test_dogs_and_cats(pets, tmp_path, capsys, options):
    result = run(dogs_and_cats.main, pets, tmp_path, *options, f"--output={tmp_path}/run")
    assert "<h2>Accuracy by species and tone: opposite bias</h2>" in page(tmp_path / "run", result)
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
        ("--method", "lnl", "--label", "age", "--heads", "global", "by_label"),
        (
            "--method",
            "grl",
            "--heads",
            "linear",
            "--arch",
            "resnet18",
            "--feature-layer",
            "avgpool",
        ),
    ],
    ids=" ".join,
)
def test_faces(faces, tmp_path, options):
    result = run(imdb_faces.main, faces, tmp_path, *options, f"--output={tmp_path}/run")
    heading = f"<h2>Accuracy by {result['label']} and bias: unbiased set</h2>"
    assert heading in page(tmp_path / "run", result)
    assert all(field in result for field in FIELDS)
    assert result["benchmark"] == "imdb_faces"
    assert result["label"] == ("age" if "age" in options else "gender")


def test_a_run_repeats(faces, tmp_path):
    first, second = (run(imdb_faces.main, faces, tmp_path, "--method", "lnl") for _ in range(2))
    first.pop("minutes"), second.pop("minutes")
    assert first == second


def test_settings_are_chosen_without_the_sets_a_run_is_judged_by(
    pets, tmp_path, monkeypatch, capsys
):
    seen = []

    def accuracy(trainer, images, crop):
        seen.append(images)
        return 0.5

    sets = []
    read = photographs.pets.read
    monkeypatch.setattr(photographs.runs, "accuracy", accuracy)
    monkeypatch.setattr(photographs.runs, "leakage", None)  # would look at the unbiased set
    monkeypatch.setattr(photographs.pets, "read", lambda o: sets.append(read(o)) or sets[0])
    results = tmp_path / "results.jsonl"
    given = ["--data", str(pets), "--results", str(results), "--image-size", "40", "--choose"]
    given += ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--no-progress"]
    dogs_and_cats.main([*given, f"--output={tmp_path}/run"])
    assert not results.exists()
    assert not (tmp_path / "run" / "report.html").exists()
    assert "0.5000 unbiased" in capsys.readouterr().out

    def keys(images):
        return {image.numpy().tobytes() for image in images.images}

    (known,) = sets
    assert [keys(images) for images in seen] == [
        keys(known.test_validation),
        keys(known.opposite_validation),
    ]
    judged = keys(known.test) | keys(known.opposite)
    assert judged
    for images in (known.train, known.test_validation, known.opposite_validation):
        assert not keys(images) & judged


def test_targets_by_label_leave_out_the_other():
    labels, bias = torch.tensor([0, 1, 1]), torch.tensor([3, 4, -100])
    assert photographs.faces.by_label(bias, labels).tolist() == [[3, -100], [-100, 4], [-100, -100]]
    images = torch.full((2, 3, 4, 4), 64, dtype=torch.uint8)
    targets = photographs.pets.mean_color_and_label(images, torch.tensor([0, 1]))
    assert targets.tolist() == [[2] * 6 + [-100] * 3, [2] * 3 + [-100] * 3 + [2] * 3]
    images[:, :, :2] = 0
    targets = photographs.pets.colors_and_label(2, images, torch.tensor([0, 1]))
    cats, dogs = targets.unbind()
    assert targets.shape == (2, 9, 2, 2)
    assert cats[0].tolist() == cats[5].tolist() == dogs[8].tolist() == [[0, 0], [2, 2]]
    assert (cats[6:] == -100).all()
    assert (dogs[3:6] == -100).all()


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


def test_parts_of_an_image_hold_its_own_pixels():
    # Columns count up, and rows in another channel: what is seen is a part, perhaps mirrored.
    side = 8 * torch.arange(32)  # in eighths, since what is seen is rounded
    image = torch.stack([side.expand(32, 32), side.view(32, 1).expand(32, 32), side.expand(32, 32)])
    batches = AugmentedBatches(
        image.to(torch.uint8).expand(64, 3, 32, 32),
        torch.zeros(64),
        image_bias={"seen": lambda cut, labels: cut.long()},
        batch_size=64,
        crop=16,
        smallest_part=0.25,
        training=True,
    )
    ((_, _, bias),) = batches
    columns, rows = bias["seen"][:, 0], bias["seen"][:, 1]
    assert ((columns - columns[:, :1]).abs() <= 1).all()
    assert ((rows - rows[:, :, :1]).abs() <= 1).all()
    step = columns[:, 0].diff(dim=1)
    mirrored = (step <= 0).all(1)
    assert (mirrored | (step >= 0).all(1)).all()
    assert 16 < mirrored.sum() < 48
    assert (rows[:, :, 0].diff(dim=1) >= 0).all()
    width = columns[:, 0].amax(1) - columns[:, 0].amin(1)
    height = rows[:, :, 0].amax(1) - rows[:, :, 0].amin(1)
    # What is seen of a side ends half of its 16 pixels' width inside, hence 16 / 15.
    share = (width * height) * (16 / 15 / 8 / 32) ** 2
    assert 0.2 < share.min() < 0.4
    assert 0.8 < share.max() <= 1
    with pytest.raises(ValueError, match=r"smallest_part is 0, expected one in \(0, 1\]"):
        AugmentedBatches(image[None], torch.zeros(1), batch_size=1, crop=8, smallest_part=0)


def test_evaluation_sees_the_centre_in_order():
    images = torch.zeros(3, 3, 6, 6, dtype=torch.uint8)
    images[:, :, 1:5, 1:5] = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1, 1)
    batches = AugmentedBatches(images, torch.tensor([0, 1, 0]), batch_size=2, crop=4)
    assert len(batches) == 2
    seen = torch.cat([cut for cut, _, _ in batches])
    torch.testing.assert_close(seen, normalize_imagenet(images[:, :, 1:5, 1:5]))


def test_the_table_compares_runs_of_the_same_seed(tmp_path, capsys):
    shared = {"arch": "small", "train_split": "TB1", "label": "species", "image_size": 48}
    shared |= {"epoch": 15, "batch_size": 32, "leakage": 0.5, "minutes": 1.0, "heads": ["map"]}
    runs = [
        {"method": method, "seed": seed, "opposite_accuracy": opposite, "test_accuracy": test}
        for method, seed, opposite, test in (
            ("lnl", 1, 0.5, 0.61),
            ("baseline", 1, 0.25, 0.625),
            ("baseline", 0, 0.1, 0.9),
            ("lnl", 2, 0.3, 0.3),
            ("baseline", 2, 0.2, 0.275),
            ("lnl", 3, 0.7, 0.7),
        )
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(shared | run) + "\n" for run in runs))
    dogs_and_cats.main(["--table", f"--results={results}"])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("*")] == [
        "* small, map, seed 1: +25.0 points on the opposite set, -1.5 on the unbiased one",
        "* small, map, seed 2: +10.0 points on the opposite set, +2.5 on the unbiased one",
        "* small, map, mean of 2 seeds: +17.5 (standard error 7.5) points on the opposite "
        "set, +0.5 (standard error 2.0) on the unbiased one",
    ]
    assert "| lnl | map | small | 48 | 15 | 1 | 0.5000 | 0.6100 | 0.500 | 1.0 |" in printed
    assert sum(line.startswith("|") for line in printed) == 2 + len(runs)
