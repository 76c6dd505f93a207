"""The ``lnl`` command on real JPEGs, as a user runs it."""

from __future__ import annotations

import csv
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from cli_data import IMAGES, SIZE, train_flags, write_images

import lnl_ext
from lnl_ext.cli.arguments import command_line
from lnl_ext.cli.leakage import audits
from lnl_ext.cli.main import main, parser
from lnl_ext.data.images import evaluation_transform, load_image
from lnl_ext.models.backbones import split_network

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("cli") / "images")


@pytest.fixture(scope="module")
def run(table: Path) -> Path:
    """A finished run."""
    output = table.parent.parent / "run"
    assert main(train_flags(table, output)) == 0
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return state


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def plain_model(run: Path) -> torch.nn.Module:
    """Load the weights as someone would who has torchvision alone."""
    model = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=2)
    model.load_state_dict(weights(run))
    module: torch.nn.Module = model.eval()
    return module


# ------------------------------------------------------------------ train


def test_a_run_reports_groups_and_leakage(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_flags(table, tmp_path / "run")) == 0
    text = capsys.readouterr().out
    assert "labels: healthy 24, ill 24" in text
    assert "bias age: [0, 30)" in text
    assert "missing 10" in text
    assert "worst group: label" in text
    assert "before unlearning" in text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    groups = report["bias"]["hospital"]["groups"]
    assert sum(group["samples"] for group in groups) == report["samples"]
    right = sum(group["accuracy"] * group["samples"] for group in groups)
    assert right / report["samples"] == pytest.approx(report["accuracy"])
    assert min(group["accuracy"] for group in groups) == pytest.approx(
        report["bias"]["hospital"]["worst_group_accuracy"]
    )
    for stage in ("leakage_before", "leakage_after"):
        assert report[stage].keys() == {"hospital", "age"}
        for leakage in report[stage].values():
            assert 0 <= leakage["accuracy"] <= 1


def test_a_run_has_a_page(table: Path, run: Path) -> None:
    page = (run / "report.html").read_text()
    figures = json.loads((run / "report.json").read_text())
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    assert f'<td class="number">{figures["accuracy"]:.3f} <small>({figures["samples"]})' in page
    assert f"{low:.3f} to {high:.3f}</small>" in page
    for leakage in figures["leakage_after"].values():
        assert f'<td class="number">{leakage["accuracy"]:.3f}</td>' in page
    for heading in ("disease and hospital", "disease and age"):
        assert f"<h2>Training images by {heading}</h2>" in page
        assert f"<h2>Accuracy by {heading}</h2>" in page
    assert "<h2>Mistakes in the worst group (disease " in page
    for confusion in ("validation images", "hospital: north", "age: [0, 30)"):
        assert f'alt="{confusion}"' in page
    assert f"lnl train --csv={table} --label-column=disease --bias-column=hospital" in page
    assert "<td>checkpoint_every</td>" in page
    assert "<td>trainer.bias heads.hospital</td>" in page


def test_the_same_configuration_gives_the_same_weights(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", f"--config={run}/config.toml", f"--output={again}"]) == 0
    assert same(weights(run), weights(again))
    first, second = (json.loads((r / "report.json").read_text()) for r in (run, again))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    for name in ("config.toml", "model.json", "split.csv"):
        assert (run / name).read_text() == (again / name).read_text()
    other = tmp_path / "other"
    assert main(["train", f"--config={run}/config.toml", f"--output={other}", "--seed=1"]) == 0
    assert not same(weights(run), weights(other))


def test_another_run_is_not_overwritten_or_mixed(
    table: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_flags(table, run)) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert main(["train", f"--output={run}", "--resume", "--epochs=3"]) == 2
    assert "epochs: 2.0, now 3.0" in capsys.readouterr().err
    assert main(["train", f"--output={run}", "--resume", "--threads=2"]) == 2
    assert "threads: 1, now 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method", ["baseline", "gray", "blindeye", "grl", "resample", "reweight", "groupdro"]
)
def test_every_method_trains(table: Path, tmp_path: Path, method: str) -> None:
    more = [f"--method={method}", "--warm-up=0", "--epochs=0.5"]
    assert main(train_flags(table, tmp_path / method, *more)) == 0
    assert json.loads((tmp_path / method / "report.json").read_text())["leakage_before"] == {}


def test_a_folder_of_classes_and_a_table_of_bias(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader(table.open()))
    lines = ["path,hospital"]
    for number, row in enumerate(rows):
        target = tmp_path / "images" / row["disease"] / row["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((table.parent / row["path"]).read_bytes())
        if number % 4:
            lines.append(f"{row['disease']}/{row['path']},{row['hospital']}")
    (tmp_path / "bias.csv").write_text("\n".join(lines) + "\n")
    command = [
        "train",
        f"--images={tmp_path}/images",
        f"--csv={tmp_path}/bias.csv",
        "--bias-column=hospital",
        f"--output={tmp_path}/run",
        "--arch=shufflenet_v2_x0_5",
        f"--image-size={SIZE}",
        "--batch-size=8",
        "--epochs=0.5",
        "--warm-up=0",
        "--workers=0",
    ]
    assert main(command) == 0
    assert "labels: healthy 24, ill 24\nbias hospital:" in capsys.readouterr().out
    assert main(["evaluate", f"{tmp_path}/run"]) == 0
    assert main(["evaluate", f"{tmp_path}/run", f"--images={tmp_path}/images", "--workers=0"]) == 2
    assert "bias and split columns need a CSV" in capsys.readouterr().err


def test_the_command_line_of_a_page_gives_the_same_flags() -> None:
    given = ["train", "--csv=my data.csv", "--bias-column=a", "--bias-column=b:bins=0,1"]
    flags = vars(parser().parse_args([*given, "--output=it's", "--no-compile", "--epochs=0.5"]))
    command = flags.pop("command")
    program, *words = shlex.split(command_line(command, flags))
    assert program == "lnl"
    assert vars(parser().parse_args(words)) == {"command": command, **flags}


# ------------------------------------------------------------------ what a run is used for


def test_the_weights_load_without_this_package_and_predict_the_same(
    table: Path, run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "predictions.csv"
    command = ["predict", f"{run}", f"--csv={table}", f"--output={output}", "--workers=0"]
    assert main(command) == 0
    predictions = list(csv.DictReader(output.open()))
    assert len(predictions) == IMAGES
    model, transform = plain_model(run), evaluation_transform(SIZE)
    for row in predictions[::6]:
        image = transform(load_image(table.parent / row["path"]))[None]
        with torch.no_grad():
            expected = model(image).softmax(1)[0]
        for name, probability in zip(("healthy", "ill"), expected.tolist(), strict=True):
            # Six digits are written; batches of other sizes round differently.
            assert float(row[f"probability:{name}"]) == pytest.approx(probability, abs=2e-5)
        assert row["prediction"] == ("healthy", "ill")[int(expected.argmax())]


def test_evaluate_agrees_with_the_run(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    assert main(["evaluate", f"{run}", f"--json={figures}", "--workers=0"]) == 0
    report = json.loads((run / "report.json").read_text())
    found = json.loads(figures.read_text())
    assert found == {name: report[name] for name in found}
    assert {"accuracy_low", "auc", "auc_high", "balanced_accuracy", "bias"} <= found.keys()
    assert "conflicting_low" in found["bias"]["hospital"]
    # All images of the table; and a state_dict with the order of its classes.
    common = [f"--csv={table}", "--label-column=disease", "--workers=0", f"--json={figures}"]
    assert main(["evaluate", f"{run}", *common]) == 0
    by_run = json.loads(figures.read_text())
    assert by_run["samples"] == IMAGES
    plain = [f"--weights={run}/model.pt", "--arch=shufflenet_v2_x0_5", f"--image-size={SIZE}"]
    bias = ["--bias-column=hospital", "--bias-column=age:bins=0,30,60"]
    assert main(["evaluate", *plain, *common, *bias]) == 0
    without = json.loads(figures.read_text())
    for column, found in by_run["bias"].items():  # of a run it is known what it was trained on
        sides = {n: v for n, v in found.items() if n.startswith(("aligned", "conflicting"))}
        assert sides["aligned_samples"] + sides["conflicting_samples"] == sum(
            group["samples"] for group in found["groups"]
        )
        assert without["bias"][column] == {n: v for n, v in found.items() if n not in sides}
    assert {**without, "bias": {}} == {**by_run, "bias": {}}
    assert "the outputs are taken for healthy, ill; --classes names" in capsys.readouterr().out
    assert main(["evaluate", *plain, *common, "--classes=ill,healthy"]) == 0
    swapped = json.loads(figures.read_text())
    assert swapped["accuracy"] == pytest.approx(1 - by_run["accuracy"])


def test_probe_reads_runs_state_dicts_and_exported_programs(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = torch.export.export(plain_model(run), (torch.zeros(5, 3, SIZE, SIZE),))
    torch.export.save(program, tmp_path / "model.pt2")
    common = [
        f"--csv={table}",
        "--label-column=disease",
        "--bias-column=hospital",
        "--workers=0",
        f"--json={tmp_path}/figures.json",
    ]
    plain = [f"--weights={run}/model.pt", "--arch=shufflenet_v2_x0_5", f"--image-size={SIZE}"]

    def probe(*command: str) -> dict[str, float]:
        assert main(["probe", *command]) == 0
        figures: dict[str, dict[str, float]] = json.loads((tmp_path / "figures.json").read_text())
        return figures["hospital"]

    # A run is not probed on the images that it was trained on.
    rows = list(csv.DictReader((run / "split.csv").open()))
    unseen = {Path(row["path"]).name for row in rows if row["part"] == "validation"}
    lines = table.read_text().splitlines()
    for name, wanted in (("unseen", True), ("seen", False)):
        kept = [line for line in lines[1:] if (line.split(",")[0] in unseen) == wanted]
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *kept]) + "\n")
    elsewhere = [f"--images={table.parent}", *common[1:]]
    capsys.readouterr()
    of_run = probe(f"{run}", *common)
    assert f"Left out: {IMAGES - len(unseen)} images" in capsys.readouterr().out
    assert of_run == probe(*plain, f"--csv={tmp_path}/unseen.csv", *elsewhere)
    assert main(["probe", f"{run}", f"--csv={tmp_path}/seen.csv", *elsewhere]) == 2
    assert "was trained on every image of" in capsys.readouterr().err

    of_weights = probe(*plain, *common)
    of_program = probe(f"--weights={tmp_path}/model.pt2", *common)
    # The exported program computes the same in batches of another size, with other rounding.
    assert of_program["accuracy"] == pytest.approx(of_weights["accuracy"], abs=2 / IMAGES)
    assert of_program["label_only"] == of_weights["label_only"]
    # Red or blue is still plain in the first layer of any network.
    capsys.readouterr()
    assert main(["probe", *plain, *common, "--feature-layer=conv1"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["hospital"]
    assert figures["accuracy"] > figures["label_only"]
    assert "at conv1 (24, 16, 16)" in capsys.readouterr().out
    assert main(["probe", f"--weights={tmp_path}/model.pt2", *common, "--feature-layer=conv1"]) == 0
    again = json.loads((tmp_path / "figures.json").read_text())["hospital"]
    assert again["accuracy"] == pytest.approx(figures["accuracy"], abs=2 / IMAGES)
    assert main(["probe", f"--weights={tmp_path}/model.pt2", *common, "--feature-layer=conv9"]) == 2
    assert "feature layer 'conv9': no such layer. Near it: conv5, conv1" in capsys.readouterr().err


def test_train_probe_and_audit_print_the_same_leakage(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same features and seed: the audit's figure, with its interval."""
    figures = tmp_path / "figures.json"
    common = ["--workers=0", "--threads=1", "--batch-size=8", f"--json={figures}"]
    assert main(["probe", f"{run}", *common]) == 0
    of_run = json.loads(figures.read_text())
    report = json.loads((run / "report.json").read_text())
    assert of_run == report["leakage_after"]  # both are of the validation images

    plain = [f"--weights={run}/model.pt", "--arch=shufflenet_v2_x0_5", f"--image-size={SIZE}"]
    flags = [f"--csv={table}", "--label-column=disease", "--bias-column=hospital", *common]
    capsys.readouterr()
    assert main(["probe", *plain, "--feature-layer=conv1", *flags]) == 0
    text = capsys.readouterr().out
    found = json.loads(figures.read_text())["hospital"]

    rows = list(csv.DictReader(table.open()))
    labels = torch.tensor([row["disease"] == "ill" for row in rows]).long()
    bias = torch.tensor([row["hospital"] == "south" for row in rows]).long()
    images = torch.stack(
        [evaluation_transform(SIZE)(load_image(table.parent / row["path"])) for row in rows]
    )
    network = split_network(plain_model(run), "conv1").features
    audit = lnl_ext.audit(network, labels, {"hospital": bias}, inputs=images.split(8))
    hospital = audit.biases["hospital"]
    probe = hospital.leakage
    assert probe.information > 0.1
    assert found["accuracy"] == probe.accuracy
    assert found["information"] == probe.information
    ends = (found["information_low"], found["information_high"])
    assert ends == tuple(probe.information_interval)
    assert (found["label_only"], found["majority"]) == (hospital.label_only, hospital.majority)
    low, high = probe.information_interval
    assert f"{probe.information:.3f} ({low:.3f} to {high:.3f})" in text
    for leakage in (found, *of_run.values()):
        assert min(leakage.values()) >= 0  # no probe knows less than nothing


def test_what_cannot_be_probed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    labels, features = torch.arange(60) % 2, torch.randn(60, 4)
    bias = {"site": labels.roll(7), "age": torch.full((60,), -100)}
    samples: Any = SimpleNamespace(labels=labels, bias=bias)
    assert list(audits(features, samples, 0)) == ["site"]
    assert "Leakage of age is not measured: bias['age']" in capsys.readouterr().out
    assert audits(features * torch.nan, samples, 0) == {}
    assert "the features are not finite" in capsys.readouterr().out


# ------------------------------------------------------------------ what is missing or new


def test_weights_with_other_classes_keep_all_but_the_last_layer(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = torchvision.models.shufflenet_v2_x0_5(num_classes=5).state_dict()
    torch.save(given, tmp_path / "w.pt")
    more = [f"--weights={tmp_path}/w.pt", "--learning-rate=1e-12", "--epochs=0.2"]
    assert main(train_flags(table, tmp_path / "run", *more)) == 0
    assert "the last layer (fc) is new" in capsys.readouterr().out
    trained = weights(tmp_path / "run")
    torch.testing.assert_close(trained["conv1.0.weight"], given["conv1.0.weight"])
    assert trained["fc.weight"].shape[0] == 2


def test_commands_without_a_model_or_data_say_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, message in [
        (["evaluate"], "expected a model: the folder of a run, or --weights FILE"),
        (["evaluate", f"{tmp_path}"], "is not a run folder: it has no model.json"),
        (["probe", f"--weights={run}/model.pt"], "no data: give --csv FILE"),
        (["predict", f"{run}"], "no output: give --output FILE"),
        (["train"], "no data: give --csv FILE"),
    ]:
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error(run: Path) -> None:
    command = [sys.executable, "-m", "lnl_ext", "evaluate", f"{run}", "--workers=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_importing_the_package_does_not_import_torchvision_or_pandas() -> None:
    code = (
        "import sys, lnl_ext; "
        "print([m for m in ('torchvision', 'pandas', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
