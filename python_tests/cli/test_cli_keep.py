"""Which weights a run keeps, when it stops, and how its validation images and its loss weigh."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from cli_data import train_flags, write_images
from torch.nn import functional as F  # noqa: N812

from lnl_ext.cli.label_loss import label_loss
from lnl_ext.cli.main import main
from lnl_ext.data.split import balanced_split
from lnl_ext.errors import UserError

pytestmark = pytest.mark.usefixtures("threads_kept")

LONG = ("--method=baseline", "--epochs=4", "--learning-rate=0.01")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("keep") / "images")


@pytest.fixture(scope="module")
def runs(table: Path) -> dict[str, Path]:
    """The same training with every choice of what to keep."""
    found = {keep: table.parent.parent / keep for keep in ("both", "last", "best")}
    for keep, folder in found.items():
        assert main([*train_flags(table, folder, *LONG), f"--keep={keep}"]) == 0
    return found


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state


def same(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return all(torch.equal(value, second[name]) for name, value in first.items())


def epochs(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "epoch"]


def evaluated(folder: Path, tmp_path: Path, *more: str) -> dict:
    figures = tmp_path / "figures.json"
    assert main(["evaluate", f"{folder}", f"--json={figures}", "--workers=0", *more]) == 0
    found: dict = json.loads(figures.read_text())
    return found


def test_the_best_and_the_last_epoch_are_kept(runs, tmp_path):
    records = epochs(runs["both"])
    ranks = [
        (r["worst_group_accuracy"], r["balanced_accuracy"], r["validation_accuracy"])
        for r in records
    ]
    best = ranks.index(max(ranks))
    assert best != len(ranks) - 1  # else this shows nothing
    for folder in (runs["both"], runs["last"]):
        last = evaluated(folder, tmp_path)
        assert last["accuracy"] == records[-1]["validation_accuracy"]
    for found in (
        evaluated(runs["both"], tmp_path, "--use=best"),
        evaluated(runs["best"], tmp_path),
        evaluated(runs["best"], tmp_path, "--use=best"),
    ):
        assert found["worst_group_accuracy"] == records[best]["worst_group_accuracy"]
        assert found["accuracy"] == records[best]["validation_accuracy"]
    assert same(runs["both"] / "model.pt", runs["last"] / "model.pt")
    assert same(runs["both"] / "best.pt", runs["best"] / "model.pt")
    assert not (runs["last"] / "best.pt").exists()
    assert not (runs["best"] / "best.pt").exists()
    reports = {k: json.loads((folder / "report.json").read_text()) for k, folder in runs.items()}
    assert reports["both"]["best"]["epoch"] == best + 1
    assert reports["both"]["best"]["accuracy"] == records[best]["validation_accuracy"]
    assert reports["best"]["epoch"] == best + 1
    assert reports["best"]["accuracy"] == records[best]["validation_accuracy"]
    assert reports["last"]["epoch"] == reports["both"]["epoch"] == 4


def test_best_weights_that_were_not_kept_are_named(runs, capsys):
    assert main(["evaluate", f"{runs['last']}", "--use=best", "--workers=0"]) == 2
    assert "has no best.pt: it was trained with --keep last" in capsys.readouterr().err


def test_a_killed_run_keeps_the_same_best(table, runs, tmp_path):
    output = tmp_path / "killed"
    flags = train_flags(table, output, *LONG, "--keep=both")
    process = subprocess.Popen(
        [sys.executable, "-m", "lnl_ext", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (output / "best.pt").exists():  # then there is no checkpoint yet, most often
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["train", f"--output={output}", "--resume"]) == 0
    for name in ("model.pt", "best.pt"):
        assert same(output / name, runs["both"] / name)


def test_a_run_stops_when_nothing_gets_better(table, runs, tmp_path, capsys):
    records = epochs(runs["both"])
    ranks = [
        (r["worst_group_accuracy"], r["balanced_accuracy"], r["validation_accuracy"])
        for r in records
    ]
    stopped = next(n for n in range(1, len(ranks)) if ranks[n] <= max(ranks[:n]))
    output = tmp_path / "patience"
    flags = train_flags(table, output, *LONG)
    assert main([*flags, "--patience=1"]) == 0
    assert len(epochs(output)) == stopped + 1 < len(records)
    before = weights(output / "model.pt")
    assert main(["train", f"--output={output}", "--resume"]) == 0  # and stays so
    assert all(torch.equal(v, before[n]) for n, v in weights(output / "model.pt").items())


def test_validation_images_balanced_over_groups(table, tmp_path):
    output = tmp_path / "balanced"
    flags = train_flags(table, output, "--method=baseline", "--epochs=0.2")
    flags = [flag for flag in flags if not flag.startswith("--bias-column=age")]
    assert main([*flags, "--balance-validation", "--validation=0.3"]) == 0
    with (output / "split.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    groups = Counter((row["label"], row["bias:hospital"]) for row in rows)
    held = Counter(
        (row["label"], row["bias:hospital"]) for row in rows if row["part"] == "validation"
    )
    assert held == {group: min(round(0.3 * 48 / 4), size // 2) for group, size in groups.items()}


def test_a_balanced_split_repeats_and_needs_a_group_of_two():
    labels, bias = [0] * 10 + [1] * 5, [["a"] * 14 + [None]]
    one, two = (balanced_split(labels, bias, 0.4, seed=3) for _ in range(2))
    assert one == two
    train, held = one
    assert sorted(train + held) == list(range(15))
    assert sum(row < 10 for row in held) == 2
    assert sum(10 <= row < 14 for row in held) == 2
    assert 14 in train
    assert balanced_split(labels, bias, 0.4, seed=4) != one
    with pytest.raises(UserError, match="no group of label and bias has two"):
        balanced_split([0, 1], [["a", "a"]], 0.5, 0)
    with pytest.raises(UserError, match="expected a fraction between 0 and 1"):
        balanced_split([0, 0], [], 1.5, 0)


def test_class_weights_make_labels_equally_frequent():
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    loss = label_loss("balanced", labels, 2, torch.device("cpu"))
    per_class = [F.cross_entropy(logits[labels == c], labels[labels == c]) for c in (0, 1)]
    torch.testing.assert_close(loss(logits, labels), sum(per_class) / 2)
    # Over parts of a batch it adds up to that of the whole.
    parts = [loss(logits[a:b], labels[a:b]) * (b - a) / 100 for a, b in ((0, 30), (30, 100))]
    torch.testing.assert_close(sum(parts), loss(logits, labels))
    torch.testing.assert_close(loss(logits, labels, reduction="none").mean(), loss(logits, labels))
    assert label_loss("none", labels, 2, torch.device("cpu")) is F.cross_entropy


def test_class_weights_of_a_run(table, tmp_path):
    output = tmp_path / "weighed"
    assert main([*train_flags(table, output, *LONG), "--class-weights=balanced"]) == 0
    assert 'class_weights = "balanced"' in (output / "config.toml").read_text()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "device is 'mps', which this machine or this torch does not have"),
        ("tpu", "device is 'tpu', expected auto, cpu, cuda, cuda:N or mps"),
        ("meta", "device is 'meta', expected auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_devices_that_cannot_be_used_are_named(table, tmp_path, capsys, device, message):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has an MPS device")
    assert main([*train_flags(table, tmp_path / "run"), f"--device={device}"]) == 2
    assert message in capsys.readouterr().err
