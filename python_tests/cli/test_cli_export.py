"""``lnl export``: what is loaded from each format gives the outputs of the run's network."""

from __future__ import annotations

import builtins
import csv
import json
from pathlib import Path

import pytest
import torch
from cli_data import SIZE, train_flags, write_images
from torch import Tensor

from lnl_ext.cli.main import main
from lnl_ext.cli.options import ModelOptions
from lnl_ext.cli.using import _Model as Model
from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD
from lnl_ext.models.backbones import build_network
from lnl_ext.training.image_transform import Grey

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("export") / "images")


@pytest.fixture(scope="module", params=["baseline", "gray"])
def run(table: Path, request: pytest.FixtureRequest) -> Path:
    output = table.parent.parent / request.param
    flags = [f"--method={request.param}"]
    assert main(train_flags(table, output, *flags)) == 0
    return output


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def expected(run: Path, x: Tensor, use: str = "model") -> Tensor:
    """The logits as ``lnl evaluate`` computes them."""
    model = Model.load(ModelOptions(run=run, use=use)).whole(torch.device("cpu")).eval()
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits


def test_safetensors(run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    assert main(["export", f"{run}", "--format=safetensors", f"--output={path}"]) == 0
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.offset_keys()}
    assert json.loads(metadata["classes"]) == ["healthy", "ill"]
    network = build_network(metadata["arch"], 2)
    network.load_state_dict(state)
    x = images()
    if run.name == "gray":  # the weights are of the network alone
        x = Grey(IMAGENET_MEAN, IMAGENET_STD)(x)
    with torch.no_grad():
        found = network.eval()(x)
    torch.testing.assert_close(found, expected(run, images()), rtol=1e-4, atol=1e-4)


def test_pt2(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    assert main(["export", f"{run}", "--format=pt2", f"--output={path}"]) == 0
    extra = {"classes": ""}
    program = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["classes"]) == ["healthy", "ill"]
    for count in (1, 3, 8):  # any number of images
        with torch.no_grad():
            found = program(images(count))
        torch.testing.assert_close(found, expected(run, images(count)), rtol=1e-4, atol=1e-5)


def test_onnx(run: Path, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'lnl_ext[onnx]'")
    import onnx
    import onnxruntime

    path = tmp_path / "model.onnx"
    assert main(["export", f"{run}", "--format=onnx", f"--output={path}"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(properties["classes"]) == ["healthy", "ill"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3, 8):
        (found,) = session.run(["logits"], {"images": images(count).numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found), expected(run, images(count)), rtol=1e-3, atol=1e-4
        )


def test_the_best_weights_and_the_default_place(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"{run}", "--use=best"]) == 0
    text = capsys.readouterr().out
    assert f"Wrote {run}/model.safetensors, from {run}/best.pt" in text
    assert f"images (N, 3, {SIZE}, {SIZE}) float32, RGB in [0, 1]" in text
    assert "Output: logits of healthy, ill" in text
    assert ("grey images" in text) == (run.name == "gray")
    state = torch.load(run / "best.pt", weights_only=True)
    options = ModelOptions(weights=run / "model.safetensors", arch="shufflenet_v2_x0_5")
    loaded = Model.load(options)
    assert all(torch.equal(v, state[n]) for n, v in loaded.network.state_dict().items())


def test_files_of_the_run_and_missing_packages(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "model.pt").read_bytes()
    assert main(["export", f"{run}", "--format=pt2", f"--output={run}/model.pt"]) == 2
    assert "model.pt is a file of the run: give another --output" in capsys.readouterr().err
    assert (run / "model.pt").read_bytes() == before
    assert main(["export"]) == 2
    assert "expected a model: the folder of a run" in capsys.readouterr().err
    original = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.partition(".")[0] == "onnxscript":
            raise ImportError("No module named 'onnxscript'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["export", f"{run}", "--format=onnx"]) == 2
    assert "it needs: pip install 'lnl_ext[onnx]'" in capsys.readouterr().err


def test_predictions_carry_the_columns_of_the_table(table: Path, run: Path, tmp_path: Path) -> None:
    other = table.with_name(f"{run.name}.csv")
    with table.open(newline="") as stream:
        rows = [row | {"prediction": "x"} for row in csv.DictReader(stream)][::-3]
    rows = [{"file" if name == "path" else name: v for name, v in row.items()} for row in rows]
    with other.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    output = tmp_path / "predictions.csv"
    flags = [f"--csv={other}", "--image-column=file", f"--output={output}", "--workers=0"]
    assert main(["predict", f"{run}", *flags]) == 0
    with output.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert len(found) == len(rows)
    for row, given in zip(found, rows, strict=True):
        assert row["path"] == row["file"] == given["file"]
        assert [row[name] for name in ("disease", "hospital", "age")] == [
            given[name] for name in ("disease", "hospital", "age")
        ]
        assert row["table:prediction"] == "x"
        assert row["prediction"] in ("healthy", "ill")
