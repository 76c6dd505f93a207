"""Schedules are functions of progress; their values live in the state_dict."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from lnl_ext import BiasAdversary, GradientReversal
from lnl_ext.schedules import SCHEDULES, Linear, Ramp, Schedule, as_schedule


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0])
def test_the_ramp_is_that_of_the_paper(t: float):
    assert Ramp()(t) == pytest.approx(2 / (1 + math.exp(-10 * t)) - 1, abs=1e-15)
    assert Ramp(0.3)(t) == pytest.approx(0.3 * Ramp()(t))


def test_linear_is_constant_outside_its_part_of_the_training():
    line = Linear(end=0.5, start=0.1, begin=0.2, finish=0.6)
    assert [line(t) for t in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.5])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_by_name_and_can_be_saved(name: str):
    schedule = as_schedule("reversal", name, 0.3)
    assert isinstance(schedule, Schedule)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert schedule(0.0) == 0
    assert schedule(1.0) == pytest.approx(0.3, abs=1e-4)


def test_by_name_a_schedule_rises_to_the_default_of_its_argument():
    constant = BiasAdversary(nn.Linear(2, 2))
    for name in SCHEDULES:
        scheduled = BiasAdversary(nn.Linear(2, 2), reversal=name, entropy_weight=name)
        assert scheduled.reversal == scheduled.entropy_weight == 0
        scheduled.set_progress(1.0)
        for coefficient in ("reversal", "entropy_weight"):
            found, default = (getattr(a, coefficient).item() for a in (scheduled, constant))
            assert found == pytest.approx(default, rel=1e-4)
    layer = GradientReversal("ramp")
    layer.set_progress(0.3)
    assert layer.scale.item() == pytest.approx(2 / (1 + math.exp(-3)) - 1)


def test_a_default_of_zero_is_nothing_to_rise_to():
    with pytest.raises(ValueError, match=r"confusion_weight is 'ramp', and has no default to rise"):
        BiasAdversary(nn.Linear(2, 2), confusion_weight="ramp")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"reversal is 'rampe', expected .*linear, ramp"):
        BiasAdversary(nn.Linear(2, 2), reversal="rampe")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ramp(-1.0),
        lambda: Linear(math.inf),
        lambda: Linear(begin=0.5, finish=0.5),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_is_between_0_and_1(progress: float):
    with pytest.raises(ValueError, match=r"progress is .*, expected a number in \[0, 1\]"):
        GradientReversal("ramp").set_progress(progress)


def test_a_schedule_that_turns_negative_is_refused_and_changes_nothing():
    adversary = BiasAdversary(nn.Linear(2, 2), reversal="ramp", entropy_weight=lambda t: 0.1 - t)
    with pytest.raises(ValueError, match=r"entropy_weight scheduled at progress 0.5 is -0.4"):
        adversary.set_progress(0.5)
    assert adversary.reversal == 0


def test_set_progress_evaluates_schedules_and_leaves_numbers():
    adversary = BiasAdversary(nn.Linear(2, 2), reversal=Ramp(0.5), entropy_weight=0.02)
    assert adversary.reversal == 0
    adversary.set_progress(0.3)
    assert adversary.reversal.item() == pytest.approx(0.5 * math.tanh(1.5))
    assert adversary.entropy_weight.item() == 0.02


def test_scheduled_values_survive_a_checkpoint(tmp_path):
    def build() -> BiasAdversary:
        return BiasAdversary(nn.Linear(2, 2), reversal="ramp", entropy_weight=Linear(0.2))

    trained, resumed = build(), build()
    trained.set_progress(0.37)
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name in ("reversal", "entropy_weight", "confusion_weight"):
        assert torch.equal(getattr(resumed, name), getattr(trained, name))
    assert resumed.reversal > 0


def test_coefficients_follow_the_module_but_keep_their_precision():
    adversary = BiasAdversary(nn.Linear(2, 2), reversal=0.1).half()
    assert adversary.head.weight.dtype == torch.float16
    assert adversary.reversal.dtype == torch.float64
    assert adversary.reversal.item() == 0.1
    assert adversary.to("meta").reversal.is_meta
