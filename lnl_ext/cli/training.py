"""``lnl train``: data, network, heads, training, and what came of it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lnl_ext.cli.arguments import command_line, write_toml
from lnl_ext.cli.best import BestEpoch, record_of
from lnl_ext.cli.data_summary import associations, hint, summarize
from lnl_ext.cli.interruption import Interrupted, StoppableBatches, StopSignals
from lnl_ext.cli.label_loss import label_loss
from lnl_ext.cli.leakage import Figures, audits, collect_features, figures, leakage_text
from lnl_ext.cli.options import GROUP, TrainOptions
from lnl_ext.cli.report import Report, write_json
from lnl_ext.cli.run_data import RunData, decided_by_the_data, draws_of, training_batches
from lnl_ext.cli.run_folder import (
    BEST,
    CONFIG,
    MODEL,
    REPORT,
    SPLIT,
    ModelCard,
    check_output,
)
from lnl_ext.cli.run_options import train_options
from lnl_ext.cli.run_summary import Found, run_summary
from lnl_ext.cli.samples import evaluation_batches
from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD, Sample
from lnl_ext.errors import UserError
from lnl_ext.files import write_whole
from lnl_ext.measuring.evaluation import Predictions, predict
from lnl_ext.models.backbones import (
    BackboneAndClassifier,
    build_network,
    feature_shape,
    split_network,
)
from lnl_ext.models.weights import load_weights, save_weights
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.reporting import PAGE, write_run_page
from lnl_ext.training.config import OptimizerConfig
from lnl_ext.training.distributed import Processes, gather_predictions, on_main
from lnl_ext.training.group_dro import GroupDRO
from lnl_ext.training.methods import get_method
from lnl_ext.training.recipe import Recipe
from lnl_ext.training.trainer import CHECKPOINT, Trainer

__all__ = ["train"]


def _trainer(
    options: TrainOptions,
    data: RunData,
    network: nn.Module,
    parts: BackboneAndClassifier,
    device: torch.device,
    targets: Mapping[str, Tensor],
    steps_per_epoch: int,
) -> Trainer:
    method = get_method(options.method)
    recipe = Recipe(
        **{
            name: getattr(options, name)
            for name in (
                *("reversal", "entropy_weight", "confusion_weight", "warm_up", "rise"),
                *("head_steps", "balance", "adjust", "head_learning_rate"),
            )
        }
    )
    assert options.image_size is not None
    shape = feature_shape(parts.features, options.image_size)
    columns = data.bias if method.adversarial else {}
    adversaries = recipe.adversaries(shape, {n: len(c) for n, c in columns.items()}, method=method)
    for name, adversary in adversaries.items():
        adversary.mask_entropy = bool((data.train.bias[name] == IGNORE_INDEX).any())
    for module in (network, *adversaries.values()):
        module.to(device)
    config = recipe.config(
        epochs=options.epochs or (options.steps or 0) / steps_per_epoch,
        update=options.update,
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            schedule="cosine",
        ),
        seed=options.seed,
        channels_last=True,
        amp=None if options.amp == "none" else options.amp,
        compile=options.compile,
    )
    task_weights: str | GroupDRO | None = GROUP if method.reweighted else None
    if method.group_dro:
        task_weights = GroupDRO(int(targets[GROUP].max()) + 1, target=GROUP).to(device)
    return Trainer(
        parts.features,
        parts.classifier,
        adversaries,
        config,
        task_loss=label_loss(options.class_weights, data.train.labels, len(data.labels), device),
        image_transform=method.image_transform(IMAGENET_MEAN, IMAGENET_STD),
        task_weights=task_weights,
    )


_POINTS = 100  # of the curves on the page


class _Run:
    """Evaluations of a trainer: at the end of epochs, and the whole at the end."""

    def __init__(
        self, options: TrainOptions, data: RunData, processes: Processes, best: BestEpoch
    ) -> None:
        self.options, self.data, self.processes = options, data, processes
        self.best = best
        self.associations = associations(data.train, data.labels, data.bias)
        assert options.image_size is not None
        self.batches = evaluation_batches(
            data.validation, options.image_size, options, cache=options.cache
        )

    def predictions(self, trainer: Trainer) -> Predictions:
        model = nn.Sequential(*trainer.inference_modules())
        return gather_predictions(predict(model, self.batches))

    def report(self, predictions: Predictions) -> Report:
        data = self.data
        return Report.of(
            predictions, data.validation.bias, data.bias, data.labels, self.associations
        )

    def leakage(self, trainer: Trainer) -> Figures:
        """Audit the features of the validation images: those of images trained on say less."""
        if not self.data.bias:
            return {}
        held_out = self.data.validation
        features = collect_features(trainer.inference_modules()[0], self.batches)
        return figures(audits(features, held_out, self.options.seed))

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate an epoch; at the end of the last one before unlearning the leakage as well."""
        report = self.report(self.predictions(trainer))
        record = record_of(report)
        better = self.best.note(trainer, report, is_main=self.processes.is_main)
        assert trainer.steps_per_epoch is not None
        steps = trainer.config.steps(trainer.steps_per_epoch)
        here, later = (
            trainer.config.strength_at(min(1.0, step / steps))
            for step in (trainer.step, trainer.step + trainer.steps_per_epoch)
        )
        if trainer.adversaries and here == 0.0 < later:
            # In the record, so that a resumed run has it too.
            for name, leakage in self.leakage(trainer).items():
                record |= {f"before:{name}:{k}": float(v) for k, v in leakage.items()}
        if self.processes.is_main:
            passes = trainer.step / trainer.steps_per_epoch
            tqdm.write(  # above the progress bar
                f"epoch {passes:.4g}/{steps / trainer.steps_per_epoch:.4g}: "
                f"validation accuracy {report.accuracy:.3f}"
                + (f", worst group {report.worst:.3f}" if report.columns else "")
                + (", the best so far" if better else "")
            )
        return record

    def before(self, trainer: Trainer) -> Figures:
        """Return the leakage before unlearning from the run's history."""
        found: dict[str, dict[str, float]] = {}
        for record in trainer.history:
            for key, value in record.items():
                if key.startswith("before:"):
                    name, field = key.removeprefix("before:").rsplit(":", 1)
                    found.setdefault(name, {})[field] = value
        return found


def train(flags: Mapping[str, Any], processes: Processes) -> None:
    """Run ``lnl train``.

    Raises
    ------
    UserError
        Something that the user gave cannot be used.
    """
    options = train_options(flags)
    if options.batch_size < 2 * processes.world_size:  # batch norm cannot take a batch of one
        raise UserError(
            f"batch-size is {options.batch_size} for {processes.world_size} processes together, "
            f"expected at least {2 * processes.world_size}"
        )
    assert options.output is not None
    folder = options.output
    # Asked once for all processes, before one of them writes there.
    goes_on = on_main(functools.partial(check_output, folder, resume=options.resume))
    assert options.threads is not None
    torch.set_num_threads(options.threads)
    device = processes.device if options.device == "auto" else torch.device(options.device)
    data = RunData.load(options)
    options = decided_by_the_data(options, data)
    assert options.arch is not None
    assert options.image_size is not None
    torch.manual_seed(options.seed)
    network = build_network(options.arch, len(data.labels))
    new_layer = None if goes_on else load_weights(network, options.arch, options.weights)
    if new_layer is not None:
        print(f"Weights from {options.weights}; the last layer ({new_layer}) is new")
    parts = split_network(network, options.feature_layer)
    made = draws_of(data, options)
    batches = training_batches(data.train, options, processes, made)
    trainer = _trainer(options, data, network, parts, device, made.targets, len(batches))
    if goes_on:
        if (folder / SPLIT).read_text(encoding="utf-8") != data.split:
            raise UserError(
                f"the images, labels or bias values have changed since the run in {folder} began: "
                "give another --output"
            )
        trainer.load(folder / CHECKPOINT)
    elif processes.is_main:
        _prepare(folder, options, data, parts)
    if processes.is_main:
        print(data.describe())
        if told := hint(options):
            print(told)
        if data.bias:
            print(summarize(data, options), end="\n\n")
        shape = feature_shape(parts.features, options.image_size)
        print(
            f"{options.arch} on {options.image_size} x {options.image_size} pixels, bias heads at "
            f"{parts.feature_layer} {shape}, method {options.method}, "
            f"{trainer.config.steps(len(batches))} steps, {device}"
            + (f", {processes.world_size} processes" if processes.world_size > 1 else "")
            + (f"; resuming at step {trainer.step}" if trainer.step else ""),
            flush=True,
        )
    run = _Run(options, data, processes, BestEpoch(folder, network, options.keep, options.patience))
    _fit(run, trainer, batches, folder)
    _finish(run, trainer, network, folder, command_line("train", flags))


def _fit(run: _Run, trainer: Trainer, batches: DataLoader[Sample], folder: Path) -> None:
    """Train to the end, or to a signal; of one process then with a checkpoint of the last step.

    Raises
    ------
    Interrupted
        By a signal; the message says how to resume.
    """
    began = trainer.step
    # Many processes would not note a signal at the same step, and none can step alone: they end at
    # once, and the last checkpoint is there.
    alone = run.processes.world_size == 1
    with StopSignals(at_once=not alone) as signals:
        try:
            trainer.fit(
                StoppableBatches(batches, signals) if alone else batches,
                output=folder,
                evaluate=run.evaluate,
                checkpoint_every=run.options.checkpoint_every,
                log_every=max(1, trainer.config.steps(len(batches)) // _POINTS),
                progress=run.processes.is_main,
                stop=run.best.stop,
            )
        except Interrupted as stop:
            if not alone:
                raise Interrupted(
                    stop.signal,
                    f"process {run.processes.rank} of {run.processes.world_size} stopped by "
                    f"{stop.signal.name}; start all again with --resume to continue from the last "
                    f"checkpoint in {folder}",
                ) from None
            if trainer.step > began:  # else the checkpoint is there already, if there is any
                trainer.save(folder / CHECKPOINT)
            raise Interrupted(
                stop.signal,
                f"stopped by {stop.signal.name} at step {trainer.step}; resume with: "
                f"lnl train --output {folder} --resume",
            ) from None


def _prepare(
    folder: Path, options: TrainOptions, data: RunData, parts: BackboneAndClassifier
) -> None:
    write_whole(folder / SPLIT, data.split)
    assert options.arch is not None
    assert options.image_size is not None
    ModelCard(
        arch=options.arch,
        classes=data.labels,
        image_size=options.image_size,
        feature_layer=parts.feature_layer,
        grey=get_method(options.method).grey,
        image_column=options.image_column,
        label_column=options.label_column,
        bias_columns=list(options.bias_column),
        bias_classes=data.bias,
        keep=options.keep,
    ).save(folder)
    write_toml(folder / CONFIG, options)  # last: with it there is a run to resume


def _finish(run: _Run, trainer: Trainer, network: nn.Module, folder: Path, command: str) -> None:
    keep, which = run.options.keep, "last epoch"
    if keep == "best":
        run.best.load()
        which = f"best epoch ({run.best.epoch(trainer)} of {len(trainer.history)})"
    predictions = run.predictions(trainer)
    report = run.report(predictions)
    before, after = run.before(trainer), run.leakage(trainer)
    if run.processes.is_main:
        save_weights(folder / MODEL, network)
        if keep == "best":
            (folder / BEST).unlink(missing_ok=True)
    best: dict[str, Any] = {}
    if keep == "both":
        run.best.load()
        chosen = run.report(run.predictions(trainer))
        best = {"best": {"epoch": run.best.epoch(trainer), **chosen.to_dict()}}
    if not run.processes.is_main:
        return
    print()
    if best:
        print(
            f"Best epoch by the worst group ({run.best.epoch(trainer)} of {len(trainer.history)}): "
            f"accuracy {chosen.accuracy:.3f}, worst group {chosen.worst:.3f}, in {BEST}. The "
            "validation images chose it: on others it will be lower\n"
        )
    print(report.text(f"validation images, {which}"))
    if after:
        stages = {"before unlearning": before} if before else {}
        print()
        print(leakage_text(stages | {"after (end of training)": after}))
    write_json(
        folder / REPORT,
        {
            **report.to_dict(),
            "epoch": run.best.epoch(trainer) if keep == "best" else len(trainer.history),
            **best,
            "leakage_before": before,
            "leakage_after": after,
            "seconds": trainer.seconds,
        },
    )
    found = Found(predictions, report, before, after, which)
    told = write_run_page(
        folder / PAGE,
        run_summary(run.options, run.data, trainer, found, command, run.processes),
    )
    if told:
        warnings.warn(told, stacklevel=1)
    names = ", ".join(
        name for name in (BEST, CONFIG, REPORT, PAGE, SPLIT) if (folder / name).exists()
    )
    print(f"\nWrote {folder}: {MODEL} (weights of {run.options.arch}), {names}")
