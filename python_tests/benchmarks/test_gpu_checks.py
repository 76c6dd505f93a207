"""The checks of benchmarks/gpu_check.py and its tensors' devices, on the CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import gpu_check
import pytest
import torch
from gpu import checks, one_call, timings
from torch._subclasses.fake_tensor import FakeTensorMode

import lnl_ext
from lnl_ext.ops import bias_loss as ops

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def replaying(gradients):
    """Stand in for checks.capture: a replay runs the call again, into the same tensors."""
    outputs = gradients()

    def replay() -> None:
        for old, new in zip(outputs, gradients(), strict=True):
            old.copy_(new)

    return replay, outputs


def test_graph_capture_compares_the_replay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "capture", replaying)
    for name in checks.CAPTURED:
        assert checks.graph_capture(CPU, name) == "the replayed gradients are right"


def test_a_replay_of_old_numbers_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "capture", lambda call: (lambda: None, call()))
    with pytest.raises(RuntimeError, match="the replayed graph gives other gradients"):
        checks.graph_capture(CPU, "adversary")


def test_capture_warms_up_on_a_side_stream_and_captures_once(monkeypatch: pytest.MonkeyPatch):
    events = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            events.append(f"enter {self.name}")

        def __exit__(self, *error: object) -> None:
            events.append(f"exit {self.name}")

        def wait_stream(self, other: Recorder) -> None:
            events.append(f"{self.name} waits for {other.name}")

        def replay(self) -> None:
            events.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Recorder("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Recorder("main"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Recorder("graph"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    replay, outputs = checks.capture(lambda: events.append("call") or (torch.ones(1),))
    replay()
    assert len(outputs) == 1
    assert events == [
        "side waits for main",
        "enter side",
        *["call"] * 3,
        "exit side",
        "main waits for side",
        "enter graph",
        "call",
        "exit graph",
        "replay",
    ]


def test_wrong_numbers_of_a_kernel_fail(monkeypatch: pytest.MonkeyPatch):
    right = checks.lnl_ext.fused_bias_loss
    monkeypatch.setattr(
        checks.lnl_ext,
        "fused_bias_loss",
        lambda *tensors, **options: right(*tensors, **options) * 1.001,
    )
    found = checks.calls(CPU, "rows_small")
    assert len(found["failed"]) == 2  # of float32: bfloat16 cannot tell
    assert all("not close" in "".join(lines) for lines in found["failed"].values())
    assert checks.calls(CPU, "rows_small", compare=False)["failed"] == {}


def test_a_sanitizer_sees_the_kernels_alone(monkeypatch: pytest.MonkeyPatch):
    for name in ("fused_bias_loss", "fused_linear_bias_loss"):
        monkeypatch.delattr(checks.lnl_ext.reference, name)
    for family in checks.FAMILIES:
        assert checks.calls(CPU, family, compare=False)["failed"] == {}


def test_a_call_that_fails_does_not_cost_the_others(tmp_path: Path, monkeypatch, capsys):
    right = checks.lnl_ext.fused_bias_loss

    def fails(logits, *tensors, **options):
        if logits.shape == (5, 100):
            raise RuntimeError("CUDA error: misaligned address")
        return right(logits, *tensors, **options)

    monkeypatch.setattr(checks.lnl_ext, "fused_bias_loss", fails)
    result = tmp_path / "result.json"
    assert gpu_check.run_own_step("calls", "rows_medium", "cpu", True, 9.0, result) == 1
    found = json.loads(result.read_text())
    assert found["calls"] == 8
    assert {name.split(")")[0] for name in found["failed"]} == {"(5, 100"}
    assert len(found["failed"]) == 4
    assert "misaligned address" in capsys.readouterr().out


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
def test_families_get_their_kernels():
    for family, shapes in checks.FAMILIES.items():
        for rows, classes, *space in shapes if "linear" not in family else ():
            for dtype in (torch.float32, torch.bfloat16):
                kernel = emulated_cuda.kernel(dtype, rows, classes, math.prod(space))
                assert kernel.startswith(family), (family, rows, classes, space)


def test_too_little_memory_for_large_tensors_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "free_memory", lambda device: 11 * 2**30)
    results = {name: checks.large_tensors(CPU, name, quick=True) for name in checks.LARGE}
    assert results["logits"] == "skipped: 11 GiB free, 12 needed"
    assert "skipped" not in results["features"] + results["logits in chunks"]


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """CUDA tensors without numbers: what mixes devices is an error. They have no backward."""

    def no_gradients(loss, inputs, *rest):
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        assert loss.device.type == "cuda"
        return tuple(torch.empty_like(tensor) for tensor in inputs)

    monkeypatch.setattr(ops, "_built_with_cuda", lambda: True)
    monkeypatch.setattr(torch.autograd, "grad", no_gradients)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: no_gradients(loss, []))
    with FakeTensorMode():
        yield torch.device("cuda", 0)


def test_all_tensors_of_the_checks_are_on_the_device(fake_cuda, monkeypatch: pytest.MonkeyPatch):
    for family, shapes in checks.FAMILIES.items():
        for shape in shapes:
            linear = family.startswith("linear")
            leaves, target = checks.make_inputs(shape, linear, torch.bfloat16, fake_cuda)
            for module in (lnl_ext, lnl_ext.reference):
                results = checks.losses_of(module, leaves, target, {})
                assert {tensor.device.type for tensor in results} == {"cuda"}
    for make in checks.CAPTURED.values():
        assert {gradient.device.type for gradient in make(fake_cuda).gradients()} == {"cuda"}
    compared = []
    monkeypatch.setattr(
        checks,
        "_close",
        lambda got, wanted: compared.append(
            (got.shape == wanted.shape, got.device == wanted.device)
        ),
    )
    checks.large_logits(fake_cuda, 2**28 + 3)
    checks.large_features(fake_cuda, 2**22 + 3)
    checks.large_head(fake_cuda, 2**16 + 3, 2**15 + 3)
    assert compared == [(True, True)] * 5


def test_all_tensors_of_the_timings_are_on_the_device(fake_cuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    logits = torch.randn(16, 12, device=fake_cuda).to(torch.bfloat16).requires_grad_()
    target = torch.randint(12, (16,), device=fake_cuda)
    inputs = timings.linear.make_inputs(timings.QUICK_CASES[1], fake_cuda)
    monkeypatch.setattr(checks, "capture", lambda run: (run, ()))
    for candidates in (
        *(
            timings.loss_candidates(timings.LossCase((16, 12), variant=variant), logits, target)
            for variant in ("", timings.TWO, timings.FACTOR)
        ),
        timings.linear_candidates(inputs),
    ):
        for run in candidates.values():
            run()


@pytest.mark.parametrize("call", ["5 12", "2 8 3 3 --dtype bfloat16", "--linear 5 8 12"])
def test_the_call_for_a_profiler(call: str):
    assert one_call.main([*call.split(), "--device", "cpu"]) == 0
