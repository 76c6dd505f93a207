"""``torchrun ... -m lnl_ext train``: one run in two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cli_data import IMAGES, train_flags, write_images

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_two_processes_train_one_model_and_count_every_image_once(tmp_path: Path) -> None:
    table = write_images(tmp_path / "images")
    output = tmp_path / "run"
    result = subprocess.run(
        [*TORCHRUN, "-m", "lnl_ext", *train_flags(table, output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "method lnl, cpu, 2 processes" in result.stdout
    assert result.stdout.count("Wrote ") == 1  # process 0 alone
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert len(steps) == len(set(steps)) == 2
    # One process, the same images: what was counted in shares is the same.
    figures = tmp_path / "figures.json"
    command = ["evaluate", f"{output}", f"--json={figures}", "--workers=0", "--threads=1"]
    evaluated = subprocess.run(
        [sys.executable, "-m", "lnl_ext", *command], capture_output=True, text=True, timeout=300
    )
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads((output / "report.json").read_text())
    assert report["samples"] == 13 < IMAGES  # odd: the shares differ by one
    for name, value in json.loads(figures.read_text()).items():
        assert report[name] == value
