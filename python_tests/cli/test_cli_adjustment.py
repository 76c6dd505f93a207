"""``lnl train`` with losses that are told what the bias says about the label."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_data import train_flags, write_images

from lnl_ext.cli.main import main
from lnl_ext.training.recipe import LNL

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("cli") / "images")


def test_the_losses_are_told_the_bias(table: Path, tmp_path: Path) -> None:
    short = ["--warm-up=0", "--epochs=0.5", "--reversal=0", "--entropy-weight=0"]
    trained = {}
    for name, more in (
        ("balanced", ["--balance=1", "--no-adjust"]),
        ("told", ["--balance=0"]),
        ("adjusted, partly balanced", ["--method=adjusted", f"--balance={LNL.balance}"]),
        ("partly", []),
        ("baseline", ["--method=baseline"]),
        ("adjusted", ["--method=adjusted"]),
    ):
        assert main(train_flags(table, tmp_path / name, *short, *more)) == 0
        state = torch.load(tmp_path / name / "model.pt", weights_only=True)
        trained[name] = state["fc.weight"]
        adjust = name not in ("balanced", "baseline")
        assert f"adjust = {adjust}".lower() in (tmp_path / name / "config.toml").read_text()
    assert not torch.equal(trained["told"], trained["partly"])
    assert not torch.equal(trained["adjusted"], trained["baseline"])
    # Without strength the heads do not move the network: what is left is the label loss.
    assert torch.equal(trained["adjusted, partly balanced"], trained["partly"])
    assert not torch.equal(trained["balanced"], trained["partly"])


def test_an_adjustment_without_a_bias_is_refused(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", f"--csv={table}", "--label-column=disease", f"--output={tmp_path}/run"]
    for more in (["--method=adjusted"], ["--method=baseline", "--adjust"]):
        assert main([*command, *more]) == 2
        assert "give --bias-column NAME" in capsys.readouterr().err
    named = ["--method=adjusted", "--bias-column=logit_adjustment"]
    assert main([*command, *named]) == 2
    assert "give the column another name" in capsys.readouterr().err
