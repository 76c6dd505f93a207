"""The timings of benchmarks/gpu_check.py and their targets, on the CPU."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu import targets, timings
from timing import turns

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def a_row(**changes):
    ratios = {"copy": 0.9, "eager": 4.0, "compile": 1.3, "fused": 1.0}
    ratios |= {name: changes.pop(name) for name in list(changes) if name in ratios}
    row = {
        "case": "4x5 float32",
        "bytes": targets.LARGE,
        "classes": 5,
        "values": {"fused": {"median": 2.0}},
        "bandwidth": 0.9,
        "gigabytes_per_second": {"fused": 900.0},
        "ratios": {name: {"median": value} for name, value in ratios.items()},
    }
    return row | changes


def missed(judged) -> dict[str, float]:
    return {each["target"]: each["got"] for each in judged if not each["met"]}


def test_targets_are_met_or_missed_by_case_and_figure():
    good = targets.judge([a_row()], [])
    assert [each["met"] for each in good] == [True] * 3
    assert good[0] == {
        "case": "4x5 float32",
        "target": "bandwidth over a copy's",
        "wanted": 0.85,
        "got": 0.9,
        "met": True,
    }
    slow = a_row(bandwidth=0.5)
    assert missed(targets.judge([slow], [])) == {"bandwidth over a copy's": 0.5}
    assert missed(targets.judge([slow | {"bytes": 100}], [])) == {}
    alone = a_row(ratios={"copy": {"median": 0.9}, "fused": {"median": 1.0}})
    assert [each["target"] for each in targets.judge([alone], [])] == ["bandwidth over a copy's"]
    assert missed(targets.judge([a_row(eager=2.0, compile=1.0)], [])) == {
        "time of eager over ours": 2.0,
        "time of compile over ours": 1.0,
    }


def test_targets_of_the_linear_head():
    few = a_row(eager=0.98, compile=0.96, extra_bytes={"eager": 1, "fused": 1})
    assert missed(targets.judge([], [few])) == {"time of compile over ours": 0.96}
    many = a_row(classes=32000, extra_bytes={"eager": 700, "fused": 100})
    assert missed(targets.judge([], [many])) == {"extra memory of eager over ours": 7.0}


def test_report_prints_times_and_targets(capsys: pytest.CaptureFixture[str]):
    detail = {"rows": [a_row(eager=2.5)], "liger": "timed"}
    outcomes = [gpu_check.Outcome("loss timings", "killed", detail=detail)]
    report = gpu_check.report_of({"name": "x"}, outcomes, measured=True)
    gpu_check.print_report(report)
    printed = capsys.readouterr().out
    assert "target MISSED: 4x5 float32: time of eager over ours is 2.5, wanted 3.0" in printed
    assert "target met: 4x5 float32: bandwidth over a copy's is 0.9, wanted 0.85" in printed
    assert "900.0 GB/s, 0.90 of a copy's; over ours: 0.90 copy, 2.50 eager, 1.30 comp" in printed


def test_bandwidth_is_of_the_bytes_that_are_moved_by_the_kernels_time():
    logits, target = torch.empty(100, 12), torch.empty(100, dtype=torch.int64)
    moved = {
        variant: timings.moved_bytes(timings.LossCase((100, 12), variant=variant), logits, target)
        for variant in ("", timings.TWO, timings.FACTOR, timings.IGNORED)
    }
    assert moved == {
        "": (10400, 10400),
        timings.TWO: (15200, 15200),
        timings.FACTOR: (10400, 20000),
        timings.IGNORED: (10400, 20800),
    }
    values = {"fused": {"median": 3.0}, "fused, graph": {"median": 2.0}, "copy": {"median": 1.0}}
    row = timings.with_bandwidth({"values": values}, 4 * 10**9, 9 * 10**9, 10**10)
    assert row["gigabytes_per_second"] == {"fused": 5000.0, "copy": 8000.0}
    assert row["bandwidth"] == 0.625


def test_variants_give_the_gradients_that_they_name():
    torch.manual_seed(0)
    target = torch.randint(5, (6,))
    logits = torch.randn(6, 5, requires_grad=True)

    def gradients(variant: str) -> tuple[torch.Tensor, ...]:
        return timings.ours(timings.LossCase((6, 5), variant=variant), logits, target)()

    (plain,) = gradients("")
    torch.testing.assert_close(gradients(timings.FACTOR)[0], 2 * plain)
    torch.testing.assert_close(gradients(timings.SCALER)[0], timings.SCALE * plain)
    reversed_, of_head = gradients(timings.TWO)
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)
    torch.testing.assert_close(of_head, wanted)
    fused = timings.losses.fused_loss(logits, target, reversal=0.1)
    torch.testing.assert_close(reversed_, torch.autograd.grad(fused, logits)[0])


class Clock:
    """Stands in for CUDA's events and writes down what is done."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __call__(self, device: str, enable_timing: bool) -> Clock:
        assert (device, enable_timing) == ("cuda", True)
        return self

    def record(self) -> None:
        self.seen.append("record")

    def elapsed_time(self, end: Clock) -> float:
        return 2.0


def test_a_round_on_a_gpu_waits_once_and_flushes_the_cache_before_each(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(torch, "Event", Clock(seen))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("wait"))
    monkeypatch.setattr(turns, "_flush_cache", lambda device: seen.append("flush"))
    runs = [lambda: seen.append("first"), lambda: seen.append("second")]
    assert turns.seconds_of(runs, torch.device("cuda")) == [0.002, 0.002]
    expected = "flush record first record flush record second record wait"
    assert seen == expected.split()


def test_no_time_left_leaves_cases_out_and_names_them(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 6.0, 6.0])  # the first case takes 6 of 10 seconds, so no other one fits
    monkeypatch.setattr(timings.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(timings, "time_loss", lambda *arguments: a_row())
    seen = []
    assert timings.measure(False, CPU, True, 10.0, lambda found: seen.append(found["left_out"][:]))
    assert seen[-1][0] == "16x12 bfloat16"
    assert "no time left for 16x12 bfloat16" in capsys.readouterr().out


def test_a_case_that_fails_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch):
    def fails(case, *arguments):
        if case == timings.QUICK_LOSS_CASES[0]:
            raise torch.OutOfMemoryError("too large")
        return a_row()

    monkeypatch.setattr(timings, "time_loss", fails)
    found = {}
    assert not timings.measure(False, CPU, True, 1000.0, found.update)
    assert len(found["rows"]) == len(timings.QUICK_LOSS_CASES) - 1
    ((name, lines),) = found["failed"].items()
    assert name == "4x8x3x3 float32"
    assert "too large" in lines[-1]


def test_liger_is_a_peer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    functional = types.ModuleType("liger_kernel.transformers.functional")

    def liger_cross_entropy(z, target):
        return torch.nn.functional.cross_entropy(z, target)

    def liger_fused_linear_cross_entropy(x, weight, target, bias=None):
        return torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(x, weight, bias), target
        )

    functional.liger_cross_entropy = liger_cross_entropy
    functional.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(timings, "liger_missing", lambda device: None)
    logits = torch.randn(5, 4, requires_grad=True)
    loss = timings.loss_candidates(timings.LossCase((5, 4)), logits, torch.randint(4, (5,)))
    linear = timings.linear_candidates(timings.linear.make_inputs(timings.QUICK_CASES[0], CPU))
    for candidates in (loss, linear):
        assert list(candidates).count("liger") == 1
        candidates["liger"]()
    sites = torch.randn(5, 4, 3, requires_grad=True)
    case = timings.LossCase((5, 4, 3))
    assert "liger" not in timings.loss_candidates(case, sites, torch.randint(4, (5, 3)))
