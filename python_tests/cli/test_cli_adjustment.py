"""``lnl train`` with a label loss that is adjusted by the bias."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_data import train_flags, write_images

from lnl_ext import logit_adjustment
from lnl_ext.cli.main import main
from lnl_ext.cli.run_data import RunData, label_adjustment, predicted_by_the_bias
from lnl_ext.cli.samples import Samples
from lnl_ext.data.table import Table

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("cli") / "images")


def test_the_label_loss_is_told_the_bias(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--warm-up=0", "--epochs=0.5", "--reversal=0", "--entropy-weight=0"]
    trained = {}
    for name, more in (
        ("lnl", ["--no-balance"]),
        ("balanced", []),
        ("balanced and told", ["--logit-adjustment"]),
        ("told", ["--logit-adjustment", "--no-balance"]),
        ("baseline", ["--method=baseline"]),
        ("adjusted", ["--method=adjusted"]),
    ):
        assert main(train_flags(table, tmp_path / name, *short, *more)) == 0
        said = "the bias alone predicts the label of" in capsys.readouterr().out
        assert said == (name in ("told", "adjusted"))
        state = torch.load(tmp_path / name / "model.pt", weights_only=True)
        trained[name] = state["fc.weight"]
    assert not torch.equal(trained["told"], trained["lnl"])
    assert not torch.equal(trained["adjusted"], trained["baseline"])
    assert torch.equal(trained["balanced and told"], trained["balanced"])  # nothing to adjust for
    for name in ("told", "adjusted"):
        assert "logit_adjustment = true" in (tmp_path / name / "config.toml").read_text()


def test_columns_of_the_adjustment_are_one_bias() -> None:
    """That of two columns with the same values, and of missing values, is that of one column."""
    labels = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1]).repeat(50)
    column = torch.tensor([0, 0, 0, 0, 1, 1, 1, -100]).repeat(50)
    table = Table("", (), (), (), None, {}, None)

    def data(**bias: torch.Tensor) -> RunData:
        samples = Samples(table, tuple(range(len(labels))), labels, bias)
        return RunData(samples, samples, ["no", "yes"], {name: ["x", "y"] for name in bias}, "")

    expected = logit_adjustment(labels, column.where(column >= 0, 2))
    one, two = data(a=column), data(a=column, b=column)
    torch.testing.assert_close(label_adjustment(one), expected)
    torch.testing.assert_close(label_adjustment(two), expected)
    assert predicted_by_the_bias(one, expected) == (
        "the bias alone predicts the label of 300 of 400 training images, the most frequent label "
        "that of 200"
    )
    sure = data(a=labels)
    assert "determines every label" in predicted_by_the_bias(sure, label_adjustment(sure))


def test_an_adjustment_without_a_bias_is_refused(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", f"--csv={table}", "--label-column=disease", f"--output={tmp_path}/run"]
    for more in (["--method=adjusted"], ["--method=baseline", "--logit-adjustment"]):
        assert main([*command, *more]) == 2
        assert "give --bias-column NAME" in capsys.readouterr().err
    named = ["--method=adjusted", "--bias-column=logit_adjustment"]
    assert main([*command, *named]) == 2
    assert "give the column another name" in capsys.readouterr().err
