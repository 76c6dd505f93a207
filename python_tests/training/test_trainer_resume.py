"""Runs that resume bit for bit, and checkpoints that do not fit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    CONFIG,
    differences,
    tiny_batches,
    tiny_data,
    tiny_heads,
    tiny_networks,
    tiny_trainer,
)
from torch import nn
from trainer_runs import STEPS, Kill, evaluate, killing, loader, metrics

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.checkpoint import CheckpointError, load_checkpoint
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.group_dro import GroupDRO
from lnl_ext.training.trainer import CHECKPOINT, Trainer

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


# 1: only the heads learn; 3: the features begin to; 6: between epochs; 11: before the last step
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 7, 11])
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
        {"clip_norm": 0.5},
        {"head_steps": 3},
        {"head_steps": 2, "accumulate": 2, "update": "two_step", "epochs": 4.0},
        # NumPy's numbers come from np.logspace, for instance.
        {
            "optimizer": OptimizerConfig(
                "adamw", np.float64(1e-3), np.float32(0.1), schedule="cosine"
            )
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_resume_is_exact_with_every_option(
    uninterrupted: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    check_resume(uninterrupted, tmp_path, 5, **changes)


@pytest.mark.parametrize("stop", [5, 6])
def test_resume_is_exact_with_balanced_batches(
    uninterrupted: Callable[..., Path], tmp_path: Path, stop: int
) -> None:
    check_resume(uninterrupted, tmp_path, stop, "balanced", balance=True)


def group_dro_trainer(**changes: Any) -> Trainer:
    return Trainer(
        *tiny_networks(),
        None,
        TrainerConfig(**{**CONFIG, **changes}),
        task_weights=GroupDRO(4, target="image", step_size=0.5),
    )


def test_resume_is_exact_with_group_dro(uninterrupted: Callable[..., Path], tmp_path: Path) -> None:
    check_resume(uninterrupted, tmp_path, 7, make=group_dro_trainer)


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
    other = tiny_trainer(epochs=3.0, optimizer=OptimizerConfig(learning_rate=0.02))
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint\.pt does not fit.*: .*epochs: 2\.0, now 3\.0; .*"
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
    with pytest.raises(ValueError, match="batches gives 11 steps an epoch, the run began with 6"):
        trainer.fit(TensorBatches(*tiny_data(), batch_size=2), progress=False)


def test_a_folder_with_another_run_is_not_overwritten(finished: Path) -> None:
    before = finished.read_bytes()
    with pytest.raises(FileExistsError, match="holds the checkpoint of another run"):
        tiny_trainer().fit(tiny_batches(), output=finished.parent, progress=False)
    assert finished.read_bytes() == before


def test_there_is_nothing_to_save_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing to save"):
        tiny_trainer().save(tmp_path / CHECKPOINT)
