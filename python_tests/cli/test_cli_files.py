"""What ``lnl`` reads and writes: names of any kind, its own files, and those of the user."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from cli_data import train_flags, write_images
from PIL import Image
from safetensors.torch import save_file

from lnl_ext.cli.main import main
from lnl_ext.cli.options import ModelOptions, TrainOptions
from lnl_ext.cli.run_data import training_batches
from lnl_ext.cli.run_folder import SPLIT, ModelCard, split_text
from lnl_ext.cli.samples import Samples
from lnl_ext.cli.using import _held_out
from lnl_ext.data.images import evaluation_transform
from lnl_ext.data.table import Table
from lnl_ext.errors import UserError
from lnl_ext.files import replacing
from lnl_ext.models.backbones import build_network
from lnl_ext.training.distributed import Processes

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("files") / "images")


def card(**changes: object) -> ModelCard:
    values: dict[str, object] = {
        "arch": "squeezenet1_1",
        "classes": ["a", "b"],
        "image_size": 32,
        "feature_layer": "features",
        "grey": False,
        "image_column": "path",
        "label_column": None,
        "bias_columns": [],
        "bias_classes": {},
    }
    return ModelCard(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is enough to predict with."""
    folder = tmp_path_factory.mktemp("run")
    card().save(folder)
    torch.manual_seed(0)
    torch.save(build_network("squeezenet1_1", 2).state_dict(), folder / "model.pt")
    return folder


def samples(folder: Path, labels: list[str]) -> Samples:
    paths = [folder / f"{number}.jpg" for number in range(len(labels))]
    for path in paths:
        path.touch()
    names = tuple(path.name for path in paths)
    made = Table("images", tuple(paths), names, (0,) * len(paths), tuple(labels), {})
    return Samples(made, tuple(range(len(paths))), torch.zeros(len(paths), dtype=torch.int64), {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "it lacks arch, classes, image_size, feature_layer"),
        ("[]", "expected names and values"),
        ("{", "Expecting property name"),
        ({"weight": 1}, "it has unknown weight"),
        ({"classes": "a", "label_column": 3}, "of another type is classes, label_column"),
    ],
)
def test_a_model_json_of_something_else_is_named(
    tmp_path: Path, content: str | dict[str, object], message: str
) -> None:
    path = tmp_path / "model.json"
    if isinstance(content, dict):
        card().save(tmp_path)
        assert ModelCard.load(tmp_path) == card()
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    with pytest.raises(UserError, match=f"model.json is damaged: {message}"):
        ModelCard.load(tmp_path)


def test_a_model_json_says_how_inputs_are_normalised(tmp_path: Path) -> None:
    card().save(tmp_path)
    values = json.loads((tmp_path / "model.json").read_text())
    means, deviations = torch.tensor(values.pop("mean")), torch.tensor(values.pop("std"))
    image = evaluation_transform(8)(Image.new("RGB", (8, 8), (255, 0, 51)))
    seen = torch.tensor([1.0, 0.0, 0.2])
    torch.testing.assert_close(image[:, 0, 0], (seen - means) / deviations)
    (tmp_path / "model.json").write_text(json.dumps(values))  # of a run before they were written
    assert ModelCard.load(tmp_path) == card()


# ------------------------------------------------------------------ weights


def test_weights_of_a_wrapped_network_predict_the_same(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(run / "model.pt", weights_only=True)
    averaged = {f"module._orig_mod.{name}": value for name, value in state.items()}
    averaged["n_averaged"] = torch.tensor(3)
    torch.save(averaged, tmp_path / "averaged.pt")
    save_file(averaged, tmp_path / "averaged.safetensors")
    torch.save(
        {f"net.{n}": v for n, v in state.items()} | {"x": state["classifier.1.bias"]},
        tmp_path / "part.pt",
    )
    images = [f"--images={table.parent}", "--workers=0", "--image-size=32"]
    commands = {"run": [f"{run}"]}
    for name in ("averaged.pt", "averaged.safetensors", "part.pt"):
        commands[name] = [f"--weights={tmp_path / name}", "--arch=squeezenet1_1", "--classes=a,b"]
    tables = []
    for name, model in commands.items():
        output = tmp_path / f"{name}.csv"
        if main(["predict", *model, *images, f"--output={output}"]) == 0:
            tables.append(output.read_text())
    assert len(tables) == 3
    assert tables[0] == tables[1] == tables[2]
    assert "names of the network begin with 'net.', beside others (x)" in capsys.readouterr().err


# ------------------------------------------------------------------ names


def test_classes_of_any_name_come_back_from_a_run(tmp_path: Path) -> None:
    labels = ["NA", " a", "b ", "null", 'x, "y"', "NA"]
    text = split_text(samples(tmp_path, labels), ["validation"] * 5 + ["train"])
    (tmp_path / SPLIT).write_text(text, encoding="utf-8")
    held = _held_out(ModelOptions(run=tmp_path), card(classes=sorted(set(labels))))
    assert held.labels == tuple(labels[:5])


def _with_a_name_that_is_not_utf8(table: Path, folder: Path) -> None:
    for number, path in enumerate(sorted(table.parent.glob("*.jpg"))[:8]):
        name = os.fsdecode(b"0\xe4.jpg") if number == 2 else path.name
        target = folder / "ab"[number % 2] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.write_bytes(path.read_bytes())
        except OSError:
            pytest.skip("this file system has names in UTF-8 only")


def test_names_that_are_not_utf8_are_refused_before_any_work(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    _with_a_name_that_is_not_utf8(table, images)
    common = [f"--images={images}", f"--output={output}", "--workers=0"]
    for command in (["train", "--method=baseline", *common], ["predict", f"{run}", *common]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "/0\\xe4.jpg is not UTF-8 and could not be written into a table: rename it" in error
        assert error.count("\n") == 1
    assert not output.exists()


def test_an_output_of_such_a_name_is_written_and_told(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_a_name_that_is_not_utf8(table, tmp_path / "try")
    output = tmp_path / os.fsdecode(b"0\xe4.csv")
    assert main(["predict", f"{run}", f"--csv={table}", f"--output={output}", "--workers=0"]) == 0
    assert "predictions to " in capsys.readouterr().out
    assert len(output.read_text().splitlines()) == 49


# ------------------------------------------------------------------ files of the user


def test_predictions_and_figures_do_not_replace_what_they_come_from(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.csv").symlink_to(table)
    common = [f"{run}", f"--csv={table}", "--workers=0"]
    labelled = [*common, "--label-column=disease", "--bias-column=hospital"]
    before = {path: path.read_bytes() for path in (table, run / "model.json", run / "model.pt")}
    for command in (
        ["predict", *common, f"--output={table}"],
        ["predict", *common, f"--output={tmp_path}/link.csv"],
        ["evaluate", *labelled, f"--json={run}/model.json"],
        ["probe", *labelled, f"--json={run}/model.pt"],
    ):
        assert main(command) == 2
        assert "is a file of the data or the model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["config.toml", "model.pt", "report.json"])
def test_a_new_run_does_not_replace_files_of_the_user(
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    resume: list[str],
) -> None:
    mine = tmp_path / name
    mine.write_text(f'csv = "{table}"\n' if name == "config.toml" else "mine")
    before = mine.read_bytes()
    more = resume if name != "config.toml" else [f"--config={mine}"]
    assert main(train_flags(table, tmp_path, *more)) == 2
    message = f"{tmp_path} holds {name} and no checkpoint: give another --output"
    assert message in capsys.readouterr().err
    assert mine.read_bytes() == before
    assert list(tmp_path.iterdir()) == [mine]


def test_an_empty_path_is_not_the_current_folder(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*train_flags(table, table), "--output="])
    assert "argument --output: is empty, expected a path" in capsys.readouterr().err


# ------------------------------------------------------------------ going on


def test_resuming_where_there_is_no_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"--output={tmp_path}/nowhere", "--resume"]) == 2
    message = f"{tmp_path}/nowhere holds no run to resume: it has no config.toml"
    assert message in capsys.readouterr().err
    assert main(["train", "--resume"]) == 2
    assert "no output: give --output DIR, the folder of the run" in capsys.readouterr().err


def test_resuming_does_not_read_the_first_weights_again(table: Path, tmp_path: Path) -> None:
    given, output = tmp_path / "given.pt", tmp_path / "run"
    torch.manual_seed(3)
    torch.save(build_network("shufflenet_v2_x0_5", 2).state_dict(), given)
    more = [f"--weights={given}", "--epochs=0.2", "--warm-up=0"]
    assert main(train_flags(table, output, *more)) == 0
    weights = torch.load(output / "model.pt", weights_only=True)
    given.unlink()
    (output / "model.pt").unlink()
    assert main(["train", f"--output={output}", "--resume"]) == 0
    again = torch.load(output / "model.pt", weights_only=True)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(("images", "processes"), [(1, 1), (2, 2), (3, 2), (7, 4)])
def test_fewer_than_two_training_images_a_process_are_refused(
    tmp_path: Path, images: int, processes: int
) -> None:
    message = f"{images} training images for {processes} processes, expected at least two for each"
    with pytest.raises(UserError, match=message):
        training_batches(
            samples(tmp_path, ["a"] * images),
            TrainOptions(batch_size=8, workers=0),
            Processes(0, processes),
            {},
        )


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # as /dev/stdout may be
    os.mkfifo(pipe)
    with replacing(pipe) as given:
        assert given == pipe
    assert pipe.is_fifo()
