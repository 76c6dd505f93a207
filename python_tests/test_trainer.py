"""The training loop: its stages and schedules, its errors, and runs that resume bit for bit."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    BATCH,
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
from torch.utils.data import DataLoader, Dataset

from lnl_ext.adversary import BiasAdversary
from lnl_ext.batches import TensorBatches
from lnl_ext.checkpoint import CheckpointError, load_checkpoint
from lnl_ext.config import TrainerConfig
from lnl_ext.evaluation import predict
from lnl_ext.metrics import NonFiniteError
from lnl_ext.optimizers import OptimizerConfig
from lnl_ext.trainer import CHECKPOINT, Trainer

PRETRAIN_STEPS = 3  # of the tiny run: half an epoch
TRAIN_STEPS = 9  # one and a half
STEPS = PRETRAIN_STEPS + TRAIN_STEPS


# Adam would turn the rounding noise of a gradient that is zero (a bias before batch norm) to steps.
SGD = OptimizerConfig("sgd", learning_rate=0.05)


class Kill(Exception):  # noqa: N818 - it is no error
    """Ends a run from within."""


class Watched:
    """Batches that call ``before`` each time the trainer asks for one."""

    def __init__(self, batches: Any, before: Callable[[], None]) -> None:
        self.batches, self.before = batches, before
        self.generator = getattr(batches, "generator", None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.before()
            yield batch


def killing(batches: Any, trainer: Trainer, step: int) -> Watched:
    """Batches that kill the run when it asks for one after ``step`` steps."""

    def kill() -> None:
        if trainer.step >= step:
            raise Kill

    return Watched(batches, kill)


class Augmented(Dataset):
    """Samples that draw from every global generator, as augmentations do."""

    def __init__(self) -> None:
        self.images, self.labels, self.bias = tiny_data()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        bias = {name: target[index] for name, target in self.bias.items()}
        return self.images[index] + noise, self.labels[index], bias


def loader(kind: str) -> Any:
    """Batches of the tiny data from a source of some kind."""
    if kind == "tensors":
        return tiny_batches()
    if kind == "list":
        return list(tiny_batches(shuffle=False))
    options: dict[str, Any] = {"batch_size": BATCH, "shuffle": True}
    if kind == "loader with generator":
        options["generator"] = torch.Generator()
    if kind == "loader with workers":
        options["num_workers"] = 1
    return DataLoader(Augmented(), **options)


def evaluate(trainer: Trainer) -> dict[str, float]:
    """An evaluation that draws random numbers, as a probe would."""
    model = nn.Sequential(*trainer.inference_modules())
    test = tiny_batches(shuffle=False)
    return {"accuracy": predict(model, test).accuracy, "draw": torch.rand(()).item()}


def without_dropout(trainer: Trainer) -> Trainer:
    """Take out what draws other numbers in another layout, precision or compilation."""
    for module in (trainer.features, *trainer.adversaries.values()):
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    return trainer


def metrics(folder: Path) -> list[dict]:
    """Records of a run without their clocks."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


# ---------------------------------------------------------------------- exact resume


OPTIONS: dict[str, Any] = {"evaluate": evaluate, "log_every": 2, "progress": False}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run that was left alone, for a configuration and a source of batches."""
    folders: dict[str, Path] = {}

    def run(trainer: Callable[[], Trainer], kind: str, key: str) -> Path:
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole")
            trainer().fit(loader(kind), output=folders[key], **OPTIONS)
        return folders[key]

    return run


def check_resume(
    uninterrupted: Callable[..., Path],
    folder: Path,
    stop: int,
    kind: str = "tensors",
    make: Callable[..., Trainer] = tiny_trainer,
    **changes: Any,
) -> None:
    """Compare a run killed after ``stop`` steps and resumed with one that was left alone."""

    def build() -> Trainer:
        return make(**changes)

    whole = uninterrupted(build, kind, f"{kind} {make.__name__} {changes}")
    doomed = build()
    with pytest.raises(Kill):
        doomed.fit(
            killing(loader(kind), doomed, stop), output=folder, checkpoint_every=1, **OPTIONS
        )
    # Nothing of the old process is left: other random states, other weights.
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global generator is what must come back
    resumed = build()
    with torch.no_grad():
        for parameter in resumed.features.parameters():
            parameter.fill_(7.0)
    resumed.load(folder / CHECKPOINT)
    assert resumed.step == stop
    torch.rand(5)  # what a program does between load and fit does not matter either
    history = resumed.fit(loader(kind), output=folder, **OPTIONS)

    expected, found = load_checkpoint(whole / CHECKPOINT), load_checkpoint(folder / CHECKPOINT)
    assert expected["step"] == STEPS
    assert differences(expected, found) == []
    assert differences(expected["history"], history) == []
    assert metrics(whole) == metrics(folder)


# 1: in the pretraining stage; 3: between the stages; 4: first step of training;
# 9: between epochs; 11: in the last, shorter epoch
@pytest.mark.parametrize("stop", [1, 3, 4, 7, 9, 11])
@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    uninterrupted: Callable[..., Path], tmp_path: Path, update: str, stop: int
) -> None:
    check_resume(uninterrupted, tmp_path, stop, update=update)


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        ("list", 5),
        ("loader", 2),
        ("loader", 5),
        ("loader", 9),
        ("loader with generator", 5),
        ("loader with workers", 5),
    ],
)
def test_resume_is_exact_with_any_source_of_batches(
    uninterrupted: Callable[..., Path], tmp_path: Path, kind: str, stop: int
) -> None:
    check_resume(uninterrupted, tmp_path, stop, kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_last": True},
        {"amp": "bfloat16"},
        {"average_decay": None},
        {"optimizer": OptimizerConfig("adamw", weight_decay=0.1, schedule="cosine")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_resume_is_exact_with_every_option(
    uninterrupted: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    check_resume(uninterrupted, tmp_path, 5, **changes)


@pytest.mark.parametrize("coefficient", ["reversal", "entropy_weight", "confusion_weight"])
def test_resume_is_exact_for_methods_with_one_term(
    uninterrupted: Callable[..., Path], tmp_path: Path, coefficient: str
) -> None:
    def one_term(head: nn.Module, **options: Any) -> BiasAdversary:
        terms = dict.fromkeys(("reversal", "entropy_weight", "confusion_weight"), 0.0)
        return BiasAdversary(head, heads=options.get("heads", 1), **(terms | {coefficient: 0.5}))

    def make() -> Trainer:
        return tiny_trainer(one_term)

    make.__name__ = f"only {coefficient}"
    check_resume(uninterrupted, tmp_path, 5, make=make)


def test_a_run_can_be_killed_many_times(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tiny_trainer().fit(tiny_batches(), output=whole, progress=False)
    for last in range(2, STEPS, 2):
        trainer = tiny_trainer()
        if last > 2:
            trainer.load(killed / CHECKPOINT)
        with pytest.raises(Kill):
            trainer.fit(
                killing(tiny_batches(), trainer, last),
                output=killed,
                checkpoint_every=2,
                progress=False,
            )
    trainer = tiny_trainer()
    trainer.load(killed / CHECKPOINT)
    trainer.fit(tiny_batches(), output=killed, progress=False)
    assert (
        differences(load_checkpoint(whole / CHECKPOINT), load_checkpoint(killed / CHECKPOINT)) == []
    )
    assert metrics(whole) == metrics(killed)


def test_a_run_can_go_on_in_the_same_process() -> None:
    whole, stopped = tiny_trainer(), tiny_trainer()
    whole.fit(tiny_batches(), progress=False)
    with pytest.raises(Kill):
        stopped.fit(killing(tiny_batches(), stopped, 5), progress=False)
    stopped.fit(tiny_batches(), progress=False)
    assert differences(whole.features.state_dict(), stopped.features.state_dict()) == []
    assert differences(whole.history, stopped.history) == []


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    history = trainer.fit(tiny_batches(), output=tmp_path, progress=False)
    again = tiny_trainer()
    again.load(tmp_path / CHECKPOINT)
    before = copy.deepcopy(again.features.state_dict())
    assert again.fit(tiny_batches(), output=tmp_path, progress=False) == history
    assert differences(before, again.features.state_dict()) == []


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    weights = []
    for seed in (3, 3, 4):
        trainer = tiny_trainer(seed=seed)
        trainer.fit(tiny_batches(), progress=False)
        weights.append(trainer.classifier.state_dict())
    assert differences(weights[0], weights[1]) == []
    assert differences(weights[0], weights[2]) != []


# ---------------------------------------------------------------------- checkpoints that do not fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a finished tiny run."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_trainer().fit(tiny_batches(), output=folder, progress=False)
    return folder / CHECKPOINT


def test_another_configuration_is_refused_by_field(finished: Path) -> None:
    other = tiny_trainer(epochs=2.0, optimizer=OptimizerConfig(learning_rate=0.02))
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint\.pt does not fit.*: .*epochs: 1\.5, now 2\.0; .*"
        r"optimizer\.learning_rate: 0\.01, now 0\.02",
    ):
        other.load(finished)


def test_other_modules_are_refused_by_name(finished: Path) -> None:
    config = TrainerConfig(**CONFIG)
    pixel = BiasAdversary(tiny_heads()["pixel"], heads=3)
    with pytest.raises(CheckpointError, match=r"\['adversary:image'\] that this trainer lacks"):
        Trainer(*tiny_networks(), {"pixel": pixel}, config).load(finished)
    wide = nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9))
    heads = {"pixel": pixel, "image": BiasAdversary(tiny_heads()["image"])}
    trainer = Trainer(wide, tiny_networks()[1], heads, config)
    with pytest.raises(CheckpointError, match=r"(?s)checkpoint\.pt does not fit.*size mismatch"):
        trainer.load(finished)


def test_other_batches_are_refused(finished: Path) -> None:
    trainer = tiny_trainer()
    trainer.load(finished)
    with pytest.raises(ValueError, match="batches has 11 batches, the run began with 6"):
        trainer.fit(TensorBatches(*tiny_data(), batch_size=2), progress=False)


def test_a_folder_with_another_run_is_not_overwritten(finished: Path) -> None:
    before = finished.read_bytes()
    with pytest.raises(FileExistsError, match="holds the checkpoint of another run"):
        tiny_trainer().fit(tiny_batches(), output=finished.parent, progress=False)
    assert finished.read_bytes() == before


def test_there_is_nothing_to_save_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing to save"):
        tiny_trainer().save(tmp_path / CHECKPOINT)


# ---------------------------------------------------------------------- stages and schedules


def test_in_pretraining_the_features_see_the_task_loss_only() -> None:
    """Features and classifier end as if there were no heads, and the heads have learned."""
    results = []
    for with_heads in (True, False):
        f, g = tiny_networks()
        f[3].p = 0.0
        heads = tiny_heads()
        heads["image"][2].p = 0.0  # dropout would draw, and so change what f draws
        before = copy.deepcopy(heads["image"].state_dict())
        adversaries = {"image": BiasAdversary(heads["image"], reversal=5.0, entropy_weight=5.0)}
        config = TrainerConfig(epochs=1e-9, pretrain_epochs=2)
        trainer = Trainer(f, g, adversaries if with_heads else {}, config)
        with pytest.raises(Kill):
            trainer.fit(killing(tiny_batches(), trainer, 2 * STEPS_PER_EPOCH), progress=False)
        results.append({"f": f.state_dict(), "g": g.state_dict()})
        assert (differences(before, heads["image"].state_dict()) != []) == with_heads
    assert differences(*results) == []


def test_in_pretraining_the_heads_learn_from_dce() -> None:
    f, g = tiny_networks(torch.float64)
    f[3].p = 0.0
    head = nn.Conv2d(8, 4, 1).double()
    images, labels, bias = tiny_data()
    images, target = images.double(), bias["pixel"][:, 0]
    loss = F.cross_entropy(head(f(images).detach()), target)
    expected = torch.autograd.grad(loss, list(head.parameters()))
    config = TrainerConfig(epochs=1, pretrain_epochs=1)
    batches = TensorBatches(images, labels, {"c": target}, batch_size=SAMPLES, shuffle=False)
    adversary = BiasAdversary(head, reversal=5.0, entropy_weight=5.0)
    trainer = Trainer(f, g, {"c": adversary}, config)
    with pytest.raises(Kill):
        trainer.fit(killing(batches, trainer, 1), progress=False)
    for parameter, gradient in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("ramp_steps", "expected"),
    [(None, [t / 9 for t in range(9)]), (4, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])],
)
def test_the_trainer_drives_the_progress_of_the_adversaries(
    ramp_steps: int | None, expected: list[float]
) -> None:
    seen = []

    class Recording(BiasAdversary):
        def set_progress(self, progress: float) -> None:
            super().set_progress(progress)
            seen.append((progress, self.reversal.item()))

    head = nn.Conv2d(8, 12, 1)
    adversary = Recording(head, heads=3, reversal=lambda t: 2 * t, entropy_weight=0.1)
    config = TrainerConfig(**{**CONFIG, "ramp_steps": ramp_steps})
    Trainer(*tiny_networks(), {"pixel": adversary}, config).fit(tiny_batches(), progress=False)
    wanted = [0.0] * PRETRAIN_STEPS + expected
    assert [t for t, _ in seen] == pytest.approx(wanted)
    assert [value for _, value in seen] == pytest.approx([2 * t for t in wanted])


def rates(**optimizer: Any) -> list[float]:
    """Learning rates of the model at the steps of a tiny run."""
    trainer = tiny_trainer(optimizer=OptimizerConfig("sgd", learning_rate=0.1, **optimizer))
    seen = []
    group = trainer.stepper.optimizers["model"].param_groups[0]
    trainer.stepper.optimizers["model"].register_step_pre_hook(lambda *_: seen.append(group["lr"]))
    trainer.fit(tiny_batches(), progress=False)
    return seen


def test_learning_rates_follow_their_schedule_in_the_training_stage() -> None:
    before = [0.1] * PRETRAIN_STEPS
    assert rates() == pytest.approx(before + [0.1] * TRAIN_STEPS)
    cosine = [0.01 + 0.09 * (1 + np.cos(np.pi * t / 9)) / 2 for t in range(TRAIN_STEPS)]
    assert rates(schedule="cosine", final_rate=0.01) == pytest.approx(before + cosine)
    step = [0.1 * 0.5 ** (t // 3) for t in range(TRAIN_STEPS)]
    assert rates(schedule="step", decay_epochs=0.5, decay_factor=0.5) == pytest.approx(
        before + step
    )


def test_averages_are_those_of_the_weights_and_buffers_of_the_training_stage() -> None:
    trainer = tiny_trainer()
    snapshots: list[dict[str, Tensor]] = []

    def after_step(*_: Any) -> None:
        if trainer.step >= PRETRAIN_STEPS:  # not yet counted: this is the step before its end
            snapshots.append(copy.deepcopy(trainer.features.state_dict()))

    features, classifier = trainer.inference_modules()
    assert features is trainer.features
    assert classifier is trainer.classifier
    trainer.stepper.optimizers["model"].register_step_post_hook(after_step)
    trainer.fit(tiny_batches(), progress=False)
    features, _ = trainer.inference_modules()
    assert features is not trainer.features
    assert len(snapshots) == TRAIN_STEPS
    average = snapshots[0]
    for snapshot in snapshots[1:]:
        average = {k: 0.8 * v + 0.2 * snapshot[k] for k, v in average.items()}
    for name, value in features.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


def test_records_say_what_happened(tmp_path: Path) -> None:
    history = tiny_trainer().fit(
        tiny_batches(), output=tmp_path, evaluate=evaluate, log_every=5, progress=False
    )
    assert [(r["stage"], r["epoch"], r["step"]) for r in history] == [
        ("pretrain", 0, 3),
        ("train", 0, 9),
        ("train", 1, 12),
    ]
    fields = {"kind", "stage", "epoch", "step", "seconds", "learning_rate", "head_learning_rate"}
    fields |= {"label_loss", "label_accuracy", "accuracy", "draw"}
    fields |= {f"{n}_{t}" for n in ("pixel", "image") for t in ("loss", "cross_entropy", "entropy")}
    assert all(set(record) == fields for record in history)
    written = metrics(tmp_path)
    assert [(r["kind"], r["step"]) for r in written] == [
        ("epoch", 3), ("step", 5), ("epoch", 9), ("step", 10), ("epoch", 12)
    ]  # fmt: skip
    assert written[-1]["label_loss"] == history[-1]["label_loss"]


def test_tensorboard_gets_the_records(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is missing"
    )
    history = tiny_trainer().fit(tiny_batches(), output=tmp_path, tensorboard=True, progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("epoch/label_loss")]
    assert found == [(r["step"], pytest.approx(r["label_loss"])) for r in history]


def test_evaluation_leaves_the_networks_in_training_mode() -> None:
    trainer = tiny_trainer(average_decay=None)
    modes = []
    trainer.features.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trainer.fit(tiny_batches(), evaluate=evaluate, progress=False)
    assert modes.count(True) == STEPS
    assert modes.count(False) == 3 * STEPS_PER_EPOCH


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


def test_compiled_losses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
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
        trainer = without_dropout(
            tiny_trainer(compile=flag, pretrain_epochs=0.0, epochs=1.0, optimizer=SGD)
        )
        trainer.fit(batches, progress=False)
        results.append([p.detach() for p in trainer.classifier.parameters()])
    assert len(compiled) == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # two steps in float32
    tiny_trainer(compile=True, update="two_step")
    assert len(compiled) == 1 + 3  # and the two objectives of the two steps


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("term", "poison"),
    [("label_loss", "classifier"), ("image_(cross_)?entropy", "image")],
)
@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_a_loss_that_is_not_finite_names_term_epoch_and_step(
    tmp_path: Path, update: str, term: str, poison: str
) -> None:
    trainer = tiny_trainer(update=update)
    module = trainer.classifier if poison == "classifier" else trainer.adversaries["image"].head

    def poison_step_11() -> None:
        if trainer.step == 10:
            with torch.no_grad():
                next(module.parameters()).fill_(torch.nan)

    with pytest.raises(
        NonFiniteError,
        match=rf"{term} is nan at stage train, epoch 1, step 11 \(batch 2 of 6\)",
    ):
        trainer.fit(
            Watched(tiny_batches(), poison_step_11),
            output=tmp_path,
            checkpoint_every=1,
            progress=False,
        )
    saved = load_checkpoint(tmp_path / CHECKPOINT)
    assert saved["step"] == 10
    assert all(t.isfinite().all() for t in saved["classifier"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Step 10 has a finite loss and an infinite gradient."""
    trainer = tiny_trainer(optimizer=SGD)
    bias = trainer.classifier[3].bias
    bias.register_hook(lambda grad: grad * torch.inf if trainer.step == 9 else grad)
    with pytest.raises(NonFiniteError, match=r"^3\.bias of classifier is not finite after step 10"):
        trainer.fit(tiny_batches(), output=tmp_path, checkpoint_every=1, progress=False)
    assert load_checkpoint(tmp_path / CHECKPOINT)["step"] == 9


def test_an_evaluation_cannot_replace_what_a_record_has() -> None:
    with pytest.raises(ValueError, match="evaluate gave label_loss, step, which the record has"):
        tiny_trainer().fit(
            tiny_batches(), evaluate=lambda _: {"step": 1.0, "label_loss": 1.0}, progress=False
        )


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ((b for b in ()), TypeError, "batches must have a length.*generator"),
        ([], ValueError, "batches is empty"),
        ([torch.zeros(4, 3, 8, 8)], TypeError, r"a batch must be \(images, labels, \{"),
        (
            [(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), {"pixel": torch.zeros(4)})],
            KeyError,
            "no bias target for 'image' .*it has 'pixel'",
        ),
        ([(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), {})], KeyError, "it has none"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(
    batches: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny_trainer().fit(batches, progress=False)


def test_batches_shorter_than_they_say_are_refused() -> None:
    class Short(list):
        def __iter__(self) -> Iterator[Any]:
            return iter(self[:2])

    with pytest.raises(ValueError, match="batches ended after 2 batches, its length promises 6"):
        tiny_trainer().fit(Short(tiny_batches()), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1, got 0"),
        ({"log_every": -1}, "log_every must be >= 1, got -1"),
        ({"checkpoint_every": 5}, "checkpoint_every needs output"),
        ({"tensorboard": True}, "tensorboard=True needs output"),
    ],
)
def test_arguments_of_fit_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer().fit(tiny_batches(), progress=False, **arguments)


def test_a_model_without_anything_to_learn_is_refused() -> None:
    f, g = tiny_networks()
    f.requires_grad_(False)
    g.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Trainer(f, g)


def test_frozen_heads_are_left_alone() -> None:
    head = nn.Conv2d(8, 12, 1).requires_grad_(False)
    before = copy.deepcopy(head.state_dict())
    trainer = Trainer(*tiny_networks(), {"pixel": BiasAdversary(head, heads=3)})
    trainer.fit(tiny_batches(), progress=False)
    assert differences(before, head.state_dict()) == []


def test_an_adversary_must_reduce_to_a_number() -> None:
    adversary = BiasAdversary(nn.Conv2d(8, 12, 1), heads=3, reduction="none")
    with pytest.raises(ValueError, match="adversary 'pixel' has reduction=\"none\""):
        Trainer(*tiny_networks(), {"pixel": adversary})


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [
        (TrainerConfig, {"epochs": 0}, ValueError, "epochs must be finite and > 0, got 0"),
        (TrainerConfig, {"epochs": "3"}, TypeError, "epochs must be a number, got '3'"),
        (TrainerConfig, {"pretrain_epochs": -1}, ValueError, "pretrain_epochs must be .* >= 0"),
        (
            TrainerConfig,
            {"update": "three_step"},
            ValueError,
            "update must be one of 'joint', 'two",
        ),
        (TrainerConfig, {"ramp_steps": 0}, ValueError, "ramp_steps must be >= 1, got 0"),
        (TrainerConfig, {"ramp_steps": 2.5}, TypeError, "ramp_steps must be an integer, got 2.5"),
        (TrainerConfig, {"optimizer": "adam"}, TypeError, "optimizer must be an OptimizerConfig"),
        (TrainerConfig, {"average_decay": 1.0}, ValueError, "average_decay must be < 1, got 1.0"),
        (TrainerConfig, {"average_decay": np.nan}, ValueError, "average_decay must be finite"),
        (TrainerConfig, {"seed": 2**32}, ValueError, r"seed must be < 2\*\*32"),
        (TrainerConfig, {"seed": True}, TypeError, "seed must be an integer, got True"),
        (TrainerConfig, {"amp": "float64"}, ValueError, "amp must be one of None, 'bfloat16'"),
        (TrainerConfig, {"compile": 1}, TypeError, "compile must be True or False, got 1"),
        (OptimizerConfig, {"name": "adagrad"}, ValueError, "name must be one of 'adam', 'adamw'"),
        (OptimizerConfig, {"learning_rate": 0.0}, ValueError, "learning_rate must be .* > 0"),
        (OptimizerConfig, {"momentum": 0.9}, ValueError, 'momentum is for name="sgd"'),
        (OptimizerConfig, {"name": "sgd", "momentum": 1}, ValueError, "momentum must be < 1"),
        (OptimizerConfig, {"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, ValueError, "betas must be < 1"),
        (OptimizerConfig, {"schedule": "linear"}, ValueError, "schedule must be one of 'constant'"),
    ],
)
def test_configurations_are_checked(
    cls: type, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cls(**arguments)


def test_a_configuration_survives_json() -> None:
    config = TrainerConfig(**CONFIG)
    assert TrainerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(
        ValueError, match=r"no such configuration field: optimizer\.rate \(there are"
    ):
        TrainerConfig.from_dict({"optimizer": {"rate": 1.0}})


# ---------------------------------------------------------------------- batches


def test_tensor_batches_are_every_sample_once_in_a_new_order() -> None:
    labels = torch.arange(10, dtype=torch.uint8)
    batches = TensorBatches(torch.arange(10.0), labels, {"b": labels}, batch_size=4)
    passes = [torch.cat([y for _, y, _ in batches]) for _ in range(2)]
    assert [len(x) for x, _, _ in batches] == [4, 4, 2]
    for order in passes:
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(10))
    assert passes[0].tolist() != passes[1].tolist()
    for x, y, bias in batches:
        assert torch.equal(x, y.float())
        assert torch.equal(bias["b"], y)


def test_tensor_batches_prepare_and_drop() -> None:
    images = torch.arange(10, dtype=torch.uint8)
    batches = TensorBatches(
        images, images, batch_size=4, shuffle=False, drop_last=True, prepare=lambda x: x / 2
    )
    assert len(batches) == 2
    assert [x.tolist() for x, _, _ in batches] == [[0, 0.5, 1, 1.5], [2, 2.5, 3, 3.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 11, "drop_last": True}, "batch_size 11 with drop_last leaves no batch"),
        ({"labels": torch.zeros(9)}, r"labels has shape \(9,\), expected 10 rows as images"),
        ({"bias": {"b": torch.zeros(9)}}, r"bias\['b'\] has shape \(9,\), expected 10 rows"),
    ],
)
def test_tensor_batches_are_checked(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"labels": torch.zeros(10), "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        TensorBatches(torch.zeros(10, 3), **{**good, **arguments})
