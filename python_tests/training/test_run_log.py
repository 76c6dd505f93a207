"""Means, JSON lines that survive a kill, TensorBoard scalars, a bar that does not flood logs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lnl_ext.training.checkpoint import NonFiniteError
from lnl_ext.training.denominators import Term
from lnl_ext.training.run_log import JsonLines, LossMeter, Progress, TensorBoard


def lines(path: Path) -> list[dict]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------- LossMeter


def terms(weight: float, **means: float) -> dict[str, Term]:
    """Terms with these means over ``weight``."""
    return {
        name: Term(torch.tensor(mean * weight).double(), torch.tensor(weight).double())
        for name, mean in means.items()
    }


def test_means_are_over_samples_not_over_batches() -> None:
    meter = LossMeter()
    meter.add("step 1", terms(4, loss=1.0))
    meter.add("step 2", terms(1, loss=6.0))
    meter.flush()
    assert meter.means() == {"loss": 2.0}
    assert meter.last == {"loss": 6.0}
    meter.reset()
    assert meter.means() == {}


def test_flushing_more_often_changes_nothing() -> None:
    values = torch.rand(7).tolist()
    often, once = LossMeter(), LossMeter()
    for number, value in enumerate(values):
        for meter in (often, once):
            meter.add("", terms(3 + number, a=value, b=value * 2))
        often.flush()
    once.flush()
    assert often.means() == once.means()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error_with_term_and_place(bad: float) -> None:
    meter = LossMeter()
    meter.add("epoch 0, step 1", terms(2, label_loss=1.0, entropy=2.0))
    meter.add("epoch 0, step 2", terms(2, label_loss=1.5, entropy=bad))
    meter.add("epoch 0, step 3", terms(2, label_loss=bad, entropy=bad))
    with pytest.raises(
        NonFiniteError, match=rf"^entropy is {bad} at epoch 0, step 2 \(label_loss 1\.5\)$"
    ):
        meter.flush()


def test_the_state_of_a_meter_comes_back() -> None:
    meter, other = LossMeter(), LossMeter()
    meter.add("", terms(3, a=0.3))
    meter.flush()
    other.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    for m in (meter, other):
        m.add("", terms(2, a=0.7))
        m.flush()
    assert meter.means() == other.means()


def test_a_step_without_anything_to_average_counts_nothing() -> None:
    meter = LossMeter()
    for weight in (4, 0, 1):
        meter.add("", terms(weight, a=1.0 + weight) | terms(0, b=0.0))
        meter.flush()
        assert math.isnan(meter.last["a"]) == (weight == 0)
    assert meter.means()["a"] == (4 * 5 + 1 * 2) / 5
    assert math.isnan(meter.means()["b"])


# ---------------------------------------------------------------------- JsonLines


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    log = JsonLines(path, 0)
    log({"step": 1, "loss": 0.5, "stage": "train"})
    assert lines(path) == [{"step": 1, "loss": 0.5, "stage": "train"}]
    log.close()


def test_what_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl", 0)
    log({"step": 1, "worst_group_accuracy": math.nan, "x": math.inf})
    log.close()
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "worst_group_accuracy": None, "x": None}]


def test_a_resume_drops_the_lines_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = JsonLines(path, 0)
    for step in (2, 4, 6):
        first({"step": step})
    first.close()
    resumed = JsonLines(path, 4)
    resumed({"step": 6, "again": True})
    resumed.close()
    assert lines(path) == [{"step": 2}, {"step": 4}, {"step": 6, "again": True}]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 2}\n{"step": 4, "lo')
    log = JsonLines(path, 8)
    log({"step": 10})
    log.close()
    assert lines(path) == [{"step": 2}, {"step": 10}]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', '{"step": "two"}'])
def test_a_file_of_something_else_is_named_and_kept(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not a metrics line"):
        JsonLines(path, 0)
    assert path.read_text() == f'{{"step": 1}}\n{line}\n'


# ---------------------------------------------------------------------- TensorBoard


def test_scalars_can_be_read_by_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is missing"
    )
    scalars = TensorBoard(tmp_path)
    for step in (5, 10):
        scalars({"kind": "epoch", "stage": "train", "step": step, "label_loss": step / 4})
    scalars({"kind": "step", "step": 3, "label_loss": 9.0})
    scalars.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/label_loss")] == [(5, 1.25), (10, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("step/label_loss")] == [(3, 9.0)]
    assert sorted(events.Tags()["scalars"]) == ["epoch/label_loss", "step/label_loss"]


def test_a_resume_hides_the_scalars_it_will_write_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is missing"
    )
    first = TensorBoard(tmp_path)
    for step in (2, 4, 6):
        first({"kind": "epoch", "step": step, "loss": 1.0})
    first.close()
    resumed = TensorBoard(tmp_path)
    resumed({"kind": "epoch", "step": 6, "loss": 2.0})
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/loss")] == [(2, 1), (4, 1), (6, 2)]


@pytest.mark.parametrize(
    ("module", "make", "message"),
    [
        (
            "torch.utils.tensorboard",
            lambda: TensorBoard("."),
            "TensorBoard needs the package tensorboard",
        ),
        ("tqdm", lambda: Progress(3, 0), "progress=True needs the package tqdm.*progress=False"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, make: Callable[[], object], message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        make()


# ---------------------------------------------------------------------- progress bar


def test_the_bar_shows_losses_and_does_not_flood_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    bar, meter = Progress(3000, 1000), LossMeter()
    for _ in range(2000):
        meter.add("", terms(1, label_loss=0.25, pixel_entropy=2.0))
        meter.flush()
        bar.update(meter)
    bar.close()
    shown = capsys.readouterr().err
    assert shown.count("\r") < 10  # 2,000 steps in far less than the 30 seconds between lines
    assert "3000/3000" in shown
    assert "label_loss 0.250" in shown
    assert "entropy" not in shown
