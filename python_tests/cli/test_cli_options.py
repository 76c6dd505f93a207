"""Options of the ``lnl`` command: the configuration file, and mistakes of a user in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from cli_data import train_flags, write_images

from lnl_ext.cli.arguments import build, read_toml, write_toml
from lnl_ext.cli.main import main
from lnl_ext.cli.options import TrainOptions
from lnl_ext.cli.run_options import train_options
from lnl_ext.errors import UserError

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("cli") / "images")


def test_configuration_comes_back_from_toml(tmp_path: Path) -> None:
    options = build(
        TrainOptions,
        {"csv": Path('/a/ü "x".csv'), "bias_column": ("a", "b:bins=0,1"), "amp": "none"},
    )
    write_toml(tmp_path / "config.toml", options)
    assert build(TrainOptions, read_toml(tmp_path / "config.toml", TrainOptions)) == options


def test_flags_win_over_the_file_and_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('csv = "data.csv"\nepochs = 3\nbias_column = ["age"]\n')
    layer = read_toml(tmp_path / "c.toml", TrainOptions)
    options = build(TrainOptions, layer, {"epochs": 5.0})
    assert options.csv == tmp_path / "data.csv"
    assert (options.epochs, options.bias_column) == (5.0, ("age",))
    # Weights are a path only where they are not a name.
    named = [(name, name) for name in ("imagenet", "efficientnet-lite0")]
    for weights, expected in (("w.pt", str(tmp_path / "w.pt")), *named):
        (tmp_path / "c.toml").write_text(f'csv = "d.csv"\nweights = "{weights}"\n')
        flags = {"config": tmp_path / "c.toml", "output": tmp_path, "label_column": "y"}
        assert train_options(flags | {"method": "baseline"}).weights == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "no option is called 'epoch'; did you mean epochs"),
        ('epochs = "3"', "epochs is '3', expected float"),
        ("bias_column = [1]", r"bias_column is \[1\], expected a list of str"),
        ("compile = 1", "compile is 1, expected bool"),
        ("seed = true", "seed is True, expected int"),
        ('output = "x"', "no option is called 'output'"),
        ("epochs =", "is not TOML"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        read_toml(tmp_path / "c.toml", TrainOptions)


def _damage(table: Path, count: int) -> Path:
    """Copy the images and empty some of the files."""
    folder = table.parent.parent / f"damaged{count}"
    if not folder.exists():
        folder.mkdir()
        for number, path in enumerate(sorted(table.parent.iterdir())):
            empty = path.suffix == ".jpg" and number < count
            (folder / path.name).write_bytes(b"" if empty else path.read_bytes())
    return folder / table.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--label-column=illness"], "has no column 'illness'; it has 'path', 'disease'"),
        (["--bias-column=disease"], "column 'disease' is named for two purposes"),
        (["--arch=resnet19"], "such as resnet18"),
        (["--feature-layer=layer5"], "feature layer 'layer5': no such layer"),
        (["--weights=missing.pt"], "no weights at"),
        (["--method=lnl2"], "expected one of baseline"),
        (["--epochs=0"], "epochs is 0.0, expected more than 0"),
        (["--validation=1"], "expected a share between 0 and 1"),
        (["--device=gpu"], "device is 'gpu', expected auto, cpu, cuda"),
        (["--device=cuda:7"], "device is 'cuda:7', but torch sees"),
        (["--csv=none.csv"], "no CSV file at none.csv"),
        (["--config=none.toml"], "cannot read configuration none.toml"),
    ],
)
def test_a_users_mistake_is_one_line(
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    try:
        code = main(train_flags(table, tmp_path / "run", *changes))
    except SystemExit as exit_code:  # argparse's own
        code = int(str(exit_code.code))
        message = "invalid choice: 'lnl2'"
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_counted_and_named(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_flags(_damage(table, 3), tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "lnl: error: 3 of 48 images cannot be read, expected at most 1%" in error
    assert "00.jpg: the file is empty" in error


def test_weights_of_another_network_are_named(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "w.pt")
    assert main(train_flags(table, tmp_path / "run", f"--weights={tmp_path}/w.pt")) == 2
    assert "do not fit the network: the file lacks" in capsys.readouterr().err
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    assert main(train_flags(table, tmp_path / "run", f"--weights={tmp_path}/bad.pt")) == 2
    message = f"{tmp_path}/bad.pt cannot be loaded as a state_dict: torch.save did not write it"
    assert message in capsys.readouterr().err


def test_imagenet_weights_without_network_are_a_clear_error(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    assert main(train_flags(table, tmp_path / "run", "--weights=imagenet")) == 2
    error = capsys.readouterr().err
    assert "weights imagenet: cannot download https://download.pytorch.org/" in error
    assert "give --weights FILE" in error
