"""``torchrun ... -m lnl_ext train``: one run in two processes, one of which may be lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_data import IMAGES, train_flags, write_images
from processes import needs_gloo

from lnl_ext.cli.main import main
from lnl_ext.training.checkpoint import load_checkpoint

pytestmark = needs_gloo

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
COMMAND = ["-m", "lnl_ext"]
TROUBLE = [str(Path(__file__).parents[1] / "support" / "trouble_in_rank.py")]


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TORCHRUN, *command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("processes") / "images")


def flags(table: Path, output: Path, *more: str) -> list[str]:
    return train_flags(table, output, "--checkpoint-every=1", *more)


def messages(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command itself printed as errors."""
    lines = result.stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("lnl: ")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return state


def test_a_run_that_lost_a_process_goes_on_and_counts_every_image_once(
    table: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    lost = torchrun(*TROUBLE, "kill", "3", *flags(table, output))
    assert lost.returncode != 0
    (message,) = messages(lost)  # of the other process: it may see the loss, or torchrun's signal
    assert "process 0 of 2 " in message
    assert " lost another one" in message or " stopped by SIGTERM" in message
    assert "continue from the last checkpoint" in message
    assert lost.stderr.count("Traceback") == 1  # torchrun's
    assert load_checkpoint(output / "checkpoint.pt")["step"] == 2
    assert not (output / "model.pt").exists()

    result = torchrun(*COMMAND, "train", f"--output={output}", "--resume")
    assert result.returncode == 0, result.stderr
    assert "steps, cpu, 2 processes; resuming at step 2" in result.stdout
    assert result.stdout.count("Wrote ") == 1  # process 0 alone
    records = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    places = [(record["kind"], record["step"]) for record in records]
    assert len(places) == len(set(places))
    assert [kind for kind, _ in places].count("epoch") == 2
    # One process, the same images: what was counted in shares is the same.
    figures = tmp_path / "figures.json"
    assert main(["evaluate", f"{output}", f"--json={figures}", "--workers=0"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["samples"] == 13 < IMAGES  # odd: the shares differ by one
    for name, value in json.loads(figures.read_text()).items():
        assert report[name] == value


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["kill", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_a_run_that_lost_a_process_ends_at_the_weights_of_one_that_did_not(
    table: Path, tmp_path: Path, update: str, trouble: str
) -> None:
    given = f"--update={update}"
    whole = torchrun(*COMMAND, *flags(table, tmp_path / "whole", given))
    assert whole.returncode == 0, whole.stderr
    lost = torchrun(*TROUBLE, trouble, "4", *flags(table, tmp_path / "lost", given))
    assert lost.returncode != 0
    assert messages(lost)
    assert lost.stderr.count("Traceback") == 1  # torchrun's
    resumed = torchrun(*COMMAND, "train", f"--output={tmp_path}/lost", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "lost")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable], TORCHRUN])
def test_compiled_losses_are_the_same(table: Path, tmp_path: Path, launcher: list[str]) -> None:
    # Weights that stand still, as Adam makes whole steps of the rounding of gradients near zero;
    # and a network without dropout, which uses a different random sequence when it is compiled.
    still = ["--learning-rate=1e-9", "--head-learning-rate=1e-9", "--arch=resnet18"]
    more = [*still, "--augment=none", "--warm-up=0", "--checkpoint-every=100"]
    records = []
    for name in ("plain", "compiled"):
        compiled = ["--compile"] if name == "compiled" else []
        command = [*launcher, *COMMAND, *flags(table, tmp_path / name, *more, *compiled)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        *_, line = (tmp_path / name / "metrics.jsonl").read_text().splitlines()  # the epoch's
        records.append(json.loads(line))
    plain, compiled = records
    for loss in ("label_loss", "hospital_cross_entropy", "age_cross_entropy", "age_entropy"):
        assert compiled[loss] == pytest.approx(plain[loss], rel=1e-4)
