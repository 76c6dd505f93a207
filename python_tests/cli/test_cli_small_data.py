"""What the images decide for ``lnl train``, how long it trains, and images kept in memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_data import SIZE, train_flags, write_images
from PIL import Image

from lnl_ext.cli.arguments import read_toml
from lnl_ext.cli.main import main
from lnl_ext.cli.options import EPOCHS, STEPS, TrainOptions
from lnl_ext.cli.run_data import decided_by_the_data
from lnl_ext.cli.run_options import train_options
from lnl_ext.errors import UserError

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("small") / "images")


class _Images(list[Path]):
    @property
    def paths(self) -> list[Path]:
        return self


@pytest.mark.parametrize(
    ("side", "given", "arch", "size"),
    [
        (48, {}, "small", 48),
        (96, {}, "small", 48),
        (97, {}, "resnet18", 97),
        (500, {}, "resnet18", 224),
        (500, {"image_size": 96}, "small", 96),
        (48, {"image_size": 224}, "resnet18", 224),
        (48, {"weights": "imagenet"}, "resnet18", 48),
        (48, {"arch": "resnet50"}, "resnet50", 48),
        (500, {"arch": "small"}, "small", 48),
    ],
)
def test_the_images_decide_network_and_size(
    tmp_path: Path, side: int, given: dict[str, Any], arch: str, size: int
) -> None:
    Image.new("RGB", (2 * side, side)).save(tmp_path / "image.png")
    data: Any = SimpleNamespace(train=_Images([tmp_path / "image.png"] * 10))
    decided = decided_by_the_data(TrainOptions(**given), data)
    assert (decided.arch, decided.image_size) == (arch, size)


@pytest.mark.parametrize(
    ("images", "given", "steps"),
    [
        (10, {}, STEPS),
        (1000, {}, STEPS),
        (50_000, {}, EPOCHS * 1562),  # 1562 whole batches of 32
        (50_000, {"steps": 10}, 10),
        (50_000, {"epochs": 2.0}, None),
    ],
)
def test_few_images_are_seen_more_often(images: int, given: dict[str, Any], steps: int) -> None:
    data: Any = SimpleNamespace(train=_Images([Path()] * images))
    decided = decided_by_the_data(TrainOptions(image_size=32, **given), data)
    assert (decided.steps, decided.epochs) == (steps, given.get("epochs"))


@pytest.mark.parametrize(
    ("file", "flags"),
    [({"steps": 5}, {"epochs": 2.0}), ({"epochs": 2.0}, {"steps": 5}), ({"steps": 9}, {})],
)
def test_flags_say_how_long_in_either_way(
    tmp_path: Path, file: dict[str, Any], flags: dict[str, Any]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("".join(f"{name} = {value}\n" for name, value in file.items()))
    data = {"csv": Path("a.csv"), "output": Path("run"), "label_column": "y", "method": "baseline"}
    options = train_options({**data, "config": config, **flags})
    expected = flags or file
    assert {n: getattr(options, n) for n in ("epochs", "steps")} == {
        "epochs": None,
        "steps": None,
        **expected,
    }


def test_both_lengths_are_too_many() -> None:
    data = {"csv": Path("a.csv"), "output": Path("run"), "label_column": "y", "method": "baseline"}
    with pytest.raises(UserError, match="leave out one of them"):
        train_options({**data, "epochs": 2.0, "steps": 5})


def test_a_run_of_steps_by_default_writes_what_was_decided(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = ("--arch", "--image-size", "--epochs", "--warm-up")
    flags = [f for f in train_flags(table, run) if not f.startswith(given)]
    assert main([*flags, "--steps=7"]) == 0
    assert f"small on {SIZE} x {SIZE} pixels" in capsys.readouterr().out
    config = read_toml(run / "config.toml", TrainOptions)
    assert (config["arch"], config["image_size"], config["steps"]) == ("small", SIZE, 7)
    assert "epochs" not in config
    card = json.loads((run / "model.json").read_text())
    assert (card["arch"], card["image_size"]) == ("small", SIZE)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 7
    assert main(["train", f"--output={run}", "--resume"]) == 0
    assert main([*flags, "--steps=7", "--resume"]) == 0
    assert main([*flags, "--epochs=3", "--resume"]) == 2
    assert "steps: 7, now None" in capsys.readouterr().err


@pytest.mark.parametrize("augment", ["shift", "crop"])
def test_images_in_memory_give_the_same_weights(table: Path, tmp_path: Path, augment: str) -> None:
    weights = []
    for cache in ("0", "1"):
        run = tmp_path / cache
        more = [f"--augment={augment}", f"--cache={cache}", "--workers=1", "--method=baseline"]
        assert main([*train_flags(table, run), "--arch=small", *more]) == 0
        weights.append(torch.load(run / "model.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
