"""The training loop: its schedules, its records, the options of the computation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    CONFIG,
    SAMPLES,
    STEPS_PER_EPOCH,
    differences,
    tiny_batches,
    tiny_data,
    tiny_heads,
    tiny_networks,
    tiny_trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from trainer_runs import (
    SGD,
    STEPS,
    Kill,
    evaluate,
    killing,
    metrics,
    without_dropout,
)

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.schedules import Linear
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.run_log import TensorBoard
from lnl_ext.training.trainer import Trainer

# ---------------------------------------------------------------------- schedules


def test_at_strength_0_the_features_see_the_task_loss_only() -> None:
    """Features and classifier end as if there were no heads, and the heads have learned."""
    results = []
    for with_heads in (True, False):
        f, g = tiny_networks()
        f[3].p = 0.0
        heads = tiny_heads()
        heads["image"][2].p = 0.0  # dropout would draw, and so change what f draws
        before = copy.deepcopy(heads["image"].state_dict())
        adversaries = {"image": BiasAdversary(heads["image"], reversal=5.0, entropy_weight=5.0)}
        config = TrainerConfig(epochs=3, strength=Linear(begin=2 / 3))
        trainer = Trainer(f, g, adversaries if with_heads else {}, config)
        with pytest.raises(Kill):
            trainer.fit(killing(tiny_batches(), trainer, 2 * STEPS_PER_EPOCH), progress=False)
        results.append({"f": f.state_dict(), "g": g.state_dict()})
        assert (differences(before, heads["image"].state_dict()) != []) == with_heads
    assert differences(*results) == []


def test_at_strength_0_the_heads_learn_from_dce() -> None:
    f, g = tiny_networks(torch.float64)
    f[3].p = 0.0
    head = nn.Conv2d(8, 4, 1).double()
    images, labels, bias = tiny_data()
    images, target = images.double(), bias["pixel"][:, 0]
    loss = F.cross_entropy(head(f(images).detach()), target)
    expected = torch.autograd.grad(loss, list(head.parameters()))
    config = TrainerConfig(epochs=2, strength=Linear(begin=0.5))
    batches = TensorBatches(images, labels, {"c": target}, batch_size=SAMPLES, shuffle=False)
    adversary = BiasAdversary(head, reversal=5.0, entropy_weight=5.0)
    trainer = Trainer(f, g, {"c": adversary}, config)
    with pytest.raises(Kill):
        trainer.fit(killing(batches, trainer, 1), progress=False)
    for parameter, gradient in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("strength", "factors"),
    [
        (1.0, [1.0] * STEPS),
        (0.5, [0.5] * STEPS),
        ("linear", [t / STEPS for t in range(STEPS)]),
        (Linear(begin=0.25, finish=0.75), [min(max(t / 6 - 0.5, 0), 1) for t in range(STEPS)]),
    ],
)
def test_strength_scales_schedules_and_numbers_and_leaves_the_callers_tensors(
    strength: Any, factors: list[float]
) -> None:
    head = nn.Conv2d(8, 12, 1)
    own = torch.tensor(0.2)
    adversary = BiasAdversary(
        head, heads=3, reversal=lambda t: 2 * t, entropy_weight=0.1, confusion_weight=own
    )
    seen = []
    adversary.register_forward_hook(
        lambda *_: seen.append([adversary.reversal.item(), adversary.entropy_weight.item()])
    )
    config = TrainerConfig(**{**CONFIG, "strength": strength})
    trainer = Trainer(*tiny_networks(), {"pixel": adversary}, config)
    history = trainer.fit(tiny_batches(), progress=False)
    for step, (found, factor) in enumerate(zip(seen, factors, strict=True)):
        assert found == pytest.approx([factor * 2 * step / STEPS, factor * 0.1])
    assert [record["strength"] for record in history] == pytest.approx([factors[5], factors[11]])
    assert own.item() == pytest.approx(0.2)


def rates(**optimizer: Any) -> list[float]:
    """Learning rates of the model at the steps of a tiny run."""
    trainer = tiny_trainer(optimizer=OptimizerConfig("sgd", learning_rate=0.1, **optimizer))
    seen = []
    group = trainer.update.optimizers["model"].param_groups[0]
    trainer.update.optimizers["model"].register_step_pre_hook(lambda *_: seen.append(group["lr"]))
    trainer.fit(tiny_batches(), progress=False)
    return seen


def test_learning_rates_follow_their_schedule() -> None:
    assert rates() == pytest.approx([0.1] * STEPS)
    cosine = [0.01 + 0.09 * (1 + np.cos(np.pi * t / STEPS)) / 2 for t in range(STEPS)]
    assert rates(schedule="cosine", final_rate=0.01) == pytest.approx(cosine)
    step = [0.1 * 0.5 ** (t // 3) for t in range(STEPS)]
    assert rates(schedule="step", decay_epochs=0.5, decay_factor=0.5) == pytest.approx(step)


def test_averages_are_those_of_the_weights_and_buffers() -> None:
    trainer = tiny_trainer()
    snapshots: list[dict[str, Tensor]] = []

    def after_step(*_: Any) -> None:
        snapshots.append(copy.deepcopy(trainer.features.state_dict()))

    features, classifier = trainer.inference_modules()
    assert features is trainer.features
    assert classifier is trainer.classifier
    trainer.update.optimizers["model"].register_step_post_hook(after_step)
    trainer.fit(tiny_batches(), progress=False)
    features, _ = trainer.inference_modules()
    assert features is not trainer.features
    assert len(snapshots) == STEPS
    average = snapshots[0]
    for snapshot in snapshots[1:]:
        average = {k: 0.8 * v + 0.2 * snapshot[k] for k, v in average.items()}
    for name, value in features.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


def test_records_say_what_happened(tmp_path: Path) -> None:
    tracked: list[dict[str, Any]] = []
    options: dict[str, Any] = {"evaluate": evaluate, "log_every": 5, "tracker": tracked.append}
    history = tiny_trainer().fit(tiny_batches(), output=tmp_path, progress=False, **options)
    assert [(r["epoch"], r["step"]) for r in history] == [(0, 6), (1, 12)]
    fields = {"kind", "epoch", "step", "seconds", "learning_rate", "head_learning_rate"}
    fields |= {"strength", "label_loss", "label_accuracy", "accuracy", "draw"}
    fields |= {f"{n}_{t}" for n in ("pixel", "image") for t in ("loss", "cross_entropy", "entropy")}
    assert all(set(record) == fields for record in history)
    written = metrics(tmp_path)
    assert [(r["kind"], r["step"]) for r in written] == [
        ("step", 5), ("epoch", 6), ("step", 10), ("epoch", 12)
    ]  # fmt: skip
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in tracked] == written
    assert [record for record in tracked if record["kind"] == "epoch"] == history


def test_tensorboard_gets_the_records(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is missing"
    )
    tracker = TensorBoard(tmp_path)
    history = tiny_trainer().fit(tiny_batches(), tracker=tracker, progress=False)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("epoch/label_loss")]
    assert found == [(r["step"], pytest.approx(r["label_loss"])) for r in history]


def test_evaluation_leaves_the_networks_in_training_mode() -> None:
    trainer = tiny_trainer(average_decay=None)
    modes = []
    trainer.features.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trainer.fit(tiny_batches(), evaluate=evaluate, progress=False)
    assert modes.count(True) == STEPS
    assert modes.count(False) == 2 * STEPS_PER_EPOCH


# ---------------------------------------------------------------------- options of the computation


@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_channels_last_changes_the_layout_and_not_the_result(update: str) -> None:
    results = []
    for channels_last in (False, True):
        trainer = without_dropout(
            tiny_trainer(channels_last=channels_last, update=update, optimizer=SGD)
        )
        layouts = []
        trainer.features.register_forward_pre_hook(
            lambda _, inputs, seen=layouts: seen.append(
                inputs[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
        trainer.fit(tiny_batches(), progress=False)
        assert set(layouts) == {channels_last}
        results.append([p.detach() for p in trainer.classifier.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # 12 steps in float32


@pytest.mark.parametrize("update", ["joint", "two_step"])
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_trains(tmp_path: Path, update: str, amp: str) -> None:
    trainer = tiny_trainer(amp=amp, update=update)
    dtypes = set()
    trainer.features[0].register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    before = copy.deepcopy(trainer.features.state_dict())
    trainer.fit(tiny_batches(), output=tmp_path / "amp", log_every=1, progress=False)
    assert dtypes == {getattr(torch, amp)}
    assert all(p.dtype == torch.float32 for p in trainer.features.parameters())
    assert differences(before, trainer.features.state_dict()) != []
    plain = tiny_trainer(update=update)
    plain.fit(tiny_batches(), output=tmp_path / "plain", log_every=1, progress=False)
    first = [metrics(tmp_path / name)[0] for name in ("amp", "plain")]
    for term in ("label_loss", "pixel_cross_entropy", "image_entropy"):
        assert first[0][term] == pytest.approx(first[1][term], rel=0.02)  # bfloat16 has 8 bits


@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_compiled_losses_are_the_same(monkeypatch: pytest.MonkeyPatch, update: str) -> None:
    """One graph break per adversary is expected; what comes out is not."""
    compiled = []

    def without_code_generation(module: nn.Module) -> None:  # which takes a minute
        compiled.append(module)
        real(module, backend="aot_eager")

    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", without_code_generation)
    images, labels, bias = tiny_data()
    batches = TensorBatches(images, labels, bias, batch_size=SAMPLES // 2)
    results = []
    for flag in (False, True):
        config = {"strength": 1.0, "epochs": 1.0, "optimizer": SGD, "update": update}
        trainer = without_dropout(tiny_trainer(compile=flag, **config))
        trainer.fit(batches, progress=False)
        results.append([p.detach() for p in trainer.classifier.parameters()])
    assert len(compiled) == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # two steps in float32


def test_a_run_ends_where_it_is_asked_to_and_may_go_on() -> None:
    trainer, whole = tiny_trainer(epochs=3), tiny_trainer(epochs=3)
    history = trainer.fit(
        tiny_batches(), stop=lambda trainer: len(trainer.history) == 2, progress=False
    )
    assert len(history) == 2
    assert trainer.step == 2 * trainer.steps_per_epoch
    trainer.fit(tiny_batches(), progress=False)
    whole.fit(tiny_batches(), progress=False)
    assert trainer.step == whole.step
    assert differences(trainer.features.state_dict(), whole.features.state_dict()) == []
