"""``lnl train``: data, network, heads, training, and what came of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..adversary import BiasAdversary
from ..backbones import Halves, build_network, output_layer, split_network, tap_shape
from ..batch_sampler import ShardedBatchSampler
from ..config import TrainerConfig
from ..data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Sample,
    evaluation_transform,
    training_transform,
)
from ..data.split import stratified_split
from ..data.table import IGNORE, BiasColumn, class_names
from ..distributed import Processes, gather_predictions
from ..errors import UserError
from ..evaluation import Predictions, predict
from ..heads import bias_head
from ..methods import get_method
from ..optimizers import OptimizerConfig
from ..schedules import Linear
from ..trainer import CHECKPOINT, Trainer
from .arguments import build, read_toml, saved_value, write_toml
from .files import write_whole
from .interruption import Interrupted, StoppableBatches, StopSignals
from .leakage import Leakage, collect_features, measure
from .options import TrainOptions
from .report import Report, leakage_text, write_json
from .run_folder import (
    CONFIG,
    MODEL,
    REPORT,
    SPLIT,
    ModelCard,
    load_weights,
    save_weights,
    split_text,
)
from .samples import Samples, bias_classes, counts, encoded, evaluation_batches, read_samples

__all__ = ["train"]

_PROBE_IMAGES = 10_000  # training images a probe learns from at most
_FREE_ON_RESUME = ("device", "checkpoint_every", "output", "config", "resume")


# ------------------------------------------------------------------ options


def train_options(flags: Mapping[str, Any]) -> TrainOptions:
    """Merge flags, the configuration file, and on resuming the configuration of the run.

    Raises
    ------
    UserError
        An option is wrong, or on resuming another than that of the run.
    """
    layers: list[Mapping[str, Any]] = []
    saved = None
    if flags.get("resume") and flags.get("output") is not None:
        path = Path(flags["output"]) / CONFIG
        if path.exists():
            layers.append(_from_file(path))
            saved = build(TrainOptions, *layers)
    if flags.get("config") is not None:
        layers.append(_from_file(Path(flags["config"])))
    # Sums over another number of threads round differently: it is part of what repeats a run.
    options = build(TrainOptions, {"threads": torch.get_num_threads()}, *layers, flags)
    options.check()
    if options.weights not in ("none", "imagenet"):
        options = dataclasses.replace(options, weights=os.path.abspath(options.weights))
    if saved is not None:
        changed = [
            f"{field.name}: {before!r}, now {now!r}"
            for field in dataclasses.fields(TrainOptions)
            if field.name not in _FREE_ON_RESUME
            and (before := saved_value(getattr(saved, field.name)))
            != (now := saved_value(getattr(options, field.name)))
        ]
        if changed:
            raise UserError(
                f"{options.output} holds a run with other options ({'; '.join(changed)}): give "
                "another --output, or leave them as they are"
            )
    return options


def _from_file(path: Path) -> dict[str, Any]:
    values = read_toml(path, TrainOptions)
    if values.get("weights", "none") not in ("none", "imagenet"):
        values["weights"] = str(path.parent / values["weights"])  # as every path of the file
    return values


# ------------------------------------------------------------------ data


@dataclasses.dataclass(frozen=True)
class _Data:
    train: Samples
    validation: Samples
    labels: list[str]
    bias: dict[str, list[str]]
    split: str
    """As a CSV file."""

    @classmethod
    def load(cls, options: TrainOptions) -> _Data:
        columns = [BiasColumn.parse(text) for text in options.bias_column]
        table = read_samples(options, columns, options.split_column)
        assert table.labels is not None
        label_column = options.label_column or "folder"
        labels = class_names(table.labels, label_column)
        if len(labels) < 2:
            raise UserError(
                f"{table.source}: only label {labels[0]!r} occurs, expected two or more"
            )
        if len(labels) == len(table):
            raise UserError(
                f"{table.source}, column {label_column!r}: {len(labels)} different labels of as "
                "many images, expected classes of several images each"
            )
        bias = bias_classes(table, columns)
        samples = encoded(table, label_column, labels, bias, workers=options.workers)
        train, validation, parts = _split(samples, options)
        data = cls(train, validation, labels, bias, split_text(samples, parts))
        data._check()
        return data

    def _check(self) -> None:
        for name, classes, target in [
            ("labels", self.labels, self.train.labels),
            *((name, classes, self.train.bias[name]) for name, classes in self.bias.items()),
        ]:
            unseen = [
                c for c, n in zip(classes, counts(target, len(classes)), strict=True) if not n
            ]
            if unseen and name == "labels":
                raise UserError(
                    f"no training image has label {', '.join(map(repr, unseen))}: it could not be "
                    "learned; put some into training or remove it"
                )
            if unseen:
                print(
                    f"Note: no training image has {name} {', '.join(map(repr, unseen))}; the "
                    "heads cannot know it"
                )

    def describe(self) -> str:
        """Say what there is."""
        lines = [
            f"{len(self.train)} training and {len(self.validation)} validation images; labels: "
            + _counted(self.labels, torch.cat([self.train.labels, self.validation.labels]))
        ]
        for name, classes in self.bias.items():
            target = torch.cat([self.train.bias[name], self.validation.bias[name]])
            missing = int((target == IGNORE).sum())
            lines.append(
                f"bias {name}: {_counted(classes, target)}"
                + (f"; missing {missing}" if missing else "")
            )
        return "\n".join(lines)


def _counted(classes: list[str], target: Tensor) -> str:
    sizes = zip(classes, counts(target, len(classes)), strict=True)
    return ", ".join(f"{name} {size}" for name, size in sizes)


def _split(samples: Samples, options: TrainOptions) -> tuple[Samples, Samples, list[str]]:
    table = samples.table
    if table.split is not None:
        parts = [table.split[row] for row in samples.rows]
    else:
        assert table.labels is not None
        _, held = stratified_split(
            [table.labels[row] for row in samples.rows],
            [[values[row] for row in samples.rows] for values in table.bias.values()],
            options.validation,
            options.seed,
        )
        inside = set(held)
        parts = ["validation" if n in inside else "train" for n in range(len(samples))]
    chosen = {
        part: [n for n, name in enumerate(parts) if name == part]
        for part in ("train", "validation")
    }
    for part, positions in chosen.items():
        if not positions:
            raise UserError(f"column {options.split_column!r} leaves no image for {part}")
    return samples.part(chosen["train"]), samples.part(chosen["validation"]), parts


def _training_batches(
    samples: Samples, options: TrainOptions, processes: Processes
) -> DataLoader[Sample]:
    if options.augment == "none":
        transform = evaluation_transform(options.image_size)
    elif options.augment == "flip":
        transform = training_transform(options.image_size, scale=(1.0, 1.0))
    else:
        transform = training_transform(options.image_size)
    sampler = ShardedBatchSampler(
        len(samples),
        options.batch_size,
        drop_last=len(samples) >= options.batch_size,  # batch norm cannot take a batch of one
        processes=processes,
    )
    return DataLoader(
        samples.dataset(transform),
        batch_sampler=sampler,
        num_workers=options.workers,
        generator=sampler.generator,
        pin_memory=torch.cuda.is_available(),
    )


# ------------------------------------------------------------------ network


def initial_network(options: TrainOptions, classes: int) -> nn.Module:
    """Make the network with the weights that the options name.

    Raises
    ------
    UserError
        The weights are not there or belong to another architecture.
    """
    torch.manual_seed(options.seed)
    network = build_network(options.arch, classes)
    if options.weights == "none":
        return network
    if options.weights == "imagenet":
        choice = torchvision.models.get_model_weights(options.arch).DEFAULT
        try:
            state = choice.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"weights imagenet: cannot download {choice.url} ({error}); download it elsewhere "
                "and give --weights FILE"
            ) from error
    else:
        state = load_weights(Path(options.weights))
    put_weights(network, state, options.weights, new_output=True)
    return network


def put_weights(
    network: nn.Module, state: dict[str, Tensor], source: str, *, new_output: bool
) -> None:
    """Load a state_dict; with ``new_output`` one whose last layer may have other classes."""
    own = network.state_dict()
    last = output_layer(network)
    skipped = [
        name
        for name in (f"{last}.weight", f"{last}.bias")
        if new_output and name in state and name in own and state[name].shape != own[name].shape
    ]
    # Auxiliary classifiers (GoogLeNet, Inception) are not trained: theirs do not matter.
    auxiliary = ("aux1.", "aux2.", "AuxLogits.")
    given = {n: v for n, v in state.items() if n not in skipped and not n.startswith(auxiliary)}
    missing = [
        n for n in own if n not in given and n not in skipped and not n.startswith(auxiliary)
    ]
    surplus = [name for name in given if name not in own]
    shapes = [n for n, v in given.items() if n in own and v.shape != own[n].shape]
    for what, names in (("lacks", missing), ("has unknown", surplus), ("has other shapes", shapes)):
        if names:
            raise UserError(
                f"weights {source} do not fit the network: the file {what} {', '.join(names[:4])}"
                + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            )
    network.load_state_dict(given, strict=False)
    if skipped:
        print(f"Weights from {source}; the last layer ({last}) is new")


def _trainer(
    options: TrainOptions, data: _Data, network: nn.Module, halves: Halves, device: torch.device
) -> Trainer:
    method = get_method(options.method)
    shape = tap_shape(halves.features, options.image_size)
    adversaries: dict[str, BiasAdversary] = {}
    for name, classes in data.bias.items() if method.adversarial else ():
        adversaries[name] = method.adversary(
            bias_head(shape, len(classes)),
            reversal=Linear(end=options.reversal),
            entropy_weight=Linear(end=options.entropy_weight),
            confusion_weight=Linear(end=options.confusion_weight),
            mask_entropy=bool((data.train.bias[name] == IGNORE).any()),
        )
    for module in (network, *adversaries.values()):
        module.to(device)
    config = TrainerConfig(
        epochs=options.epochs,
        pretrain_epochs=options.pretrain_epochs,
        update=options.update,  # type: ignore[arg-type]
        ramp_steps=None,
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            schedule="cosine",
        ),
        head_optimizer=OptimizerConfig(name="adamw", learning_rate=options.head_learning_rate),
        seed=options.seed,
        channels_last=True,
        amp=None if options.amp == "none" else options.amp,  # type: ignore[arg-type]
        compile=options.compile,
    )
    return Trainer(
        halves.features,
        halves.classifier,
        adversaries,
        config,
        image_transform=method.image_transform(IMAGENET_MEAN, IMAGENET_STD),
    )


# ------------------------------------------------------------------ a run


class _Run:
    """Evaluations of a trainer: at the end of epochs, and the whole at the end."""

    def __init__(self, options: TrainOptions, data: _Data, processes: Processes) -> None:
        self.options, self.data, self.processes = options, data, processes

    def predictions(self, trainer: Trainer) -> Predictions:
        model = nn.Sequential(*trainer.inference_modules())
        batches = evaluation_batches(self.data.validation, self.options.image_size, self.options)
        return gather_predictions(predict(model, batches))

    def report(self, trainer: Trainer) -> Report:
        return Report.of(
            self.predictions(trainer), self.data.validation.bias, self.data.bias, self.data.labels
        )

    def leakage(self, trainer: Trainer) -> dict[str, Leakage]:
        if not self.data.bias:
            return {}
        features = trainer.inference_modules()[0]
        order = torch.randperm(
            len(self.data.train), generator=torch.Generator().manual_seed(self.options.seed)
        )
        learned_from = self.data.train.part(order[:_PROBE_IMAGES].tolist())
        train, test = (
            collect_features(
                features, evaluation_batches(part, self.options.image_size, self.options)
            )
            for part in (learned_from, self.data.validation)
        )
        return measure(train, test, self.data.bias, self.options.seed)

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate an epoch; at the end of pretraining the leakage as well."""
        report = self.report(trainer)
        figures = {
            "validation_accuracy": report.accuracy,
            "worst_group_accuracy": report.worst,
        }
        assert trainer.steps_per_epoch is not None
        stages = trainer.config.stages(trainer.steps_per_epoch)
        if len(stages) > 1 and trainer.step == stages[0].steps:
            # In the record, so that a resumed run has it too.
            for name, leakage in self.leakage(trainer).items():
                figures |= {f"before:{name}:{k}": float(v) for k, v in leakage.to_dict().items()}
        if self.processes.is_main:
            stage = stages[0] if trainer.step <= stages[0].steps else stages[-1]
            passes = (trainer.step - stage.first) / trainer.steps_per_epoch
            length = stage.steps / trainer.steps_per_epoch
            tqdm.write(  # above the progress bar
                f"{stage.name} {passes:g}/{length:g}: validation accuracy {report.accuracy:.3f}"
                + (f", worst group {report.worst:.3f}" if report.columns else "")
            )
        return figures

    def before(self, trainer: Trainer) -> dict[str, Leakage]:
        """Return the leakage at the end of pretraining from the run's history."""
        found: dict[str, dict[str, Any]] = {}
        for record in trainer.history:
            for key, value in record.items():
                if key.startswith("before:"):
                    name, field = key.removeprefix("before:").rsplit(":", 1)
                    found.setdefault(name, {})[field] = value
        return {
            name: Leakage(**(fields | {"samples": int(fields["samples"])}))
            for name, fields in found.items()
        }


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
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not options.resume:
        raise UserError(f"{folder} holds a run: --resume goes on with it, or give another --output")
    assert options.threads is not None
    torch.set_num_threads(options.threads)
    device = processes.device if options.device == "auto" else torch.device(options.device)
    data = _Data.load(options)
    network = initial_network(options, len(data.labels))
    halves = split_network(network, options.tap)
    trainer = _trainer(options, data, network, halves, device)
    batches = _training_batches(data.train, options, processes)
    if checkpoint.exists():
        if (folder / SPLIT).read_text(encoding="utf-8") != data.split:
            raise UserError(
                f"the images, labels or bias values have changed since the run in {folder} began: "
                "give another --output"
            )
        trainer.load(checkpoint)
    elif processes.is_main:
        _prepare(folder, options, data, halves)
    if processes.is_main:
        print(data.describe())
        print(
            f"{options.arch}, bias heads at {halves.tap} "
            f"{tap_shape(halves.features, options.image_size)}, method {options.method}, {device}"
            + (f", {processes.world_size} processes" if processes.world_size > 1 else "")
            + (f"; going on at step {trainer.step}" if trainer.step else ""),
            flush=True,
        )
    run = _Run(options, data, processes)
    _fit(run, trainer, batches, folder)
    _finish(run, trainer, network, folder)


def _fit(run: _Run, trainer: Trainer, batches: DataLoader[Sample], folder: Path) -> None:
    """Train to the end, or to a signal; of one process then with a checkpoint of the last step.

    Raises
    ------
    Interrupted
        By a signal; the message says how to go on.
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
                progress=run.processes.is_main,
            )
        except Interrupted as stop:
            if not alone:
                raise Interrupted(
                    stop.signal,
                    f"process {run.processes.rank} of {run.processes.world_size} stopped by "
                    f"{stop.signal.name}; start all again with --resume to go on from the last "
                    f"checkpoint in {folder}",
                ) from None
            if trainer.step > began:  # else the checkpoint is there already, if there is any
                trainer.save(folder / CHECKPOINT)
            raise Interrupted(
                stop.signal,
                f"stopped by {stop.signal.name} at step {trainer.step}; go on with: "
                f"lnl train --output {folder} --resume",
            ) from None


def _prepare(folder: Path, options: TrainOptions, data: _Data, halves: Halves) -> None:
    write_toml(folder / CONFIG, options)
    write_whole(folder / SPLIT, data.split)
    ModelCard(
        arch=options.arch,
        classes=data.labels,
        image_size=options.image_size,
        tap=halves.tap,
        grey=get_method(options.method).grey,
        image_column=options.image_column,
        label_column=options.label_column,
        bias_columns=list(options.bias_column),
        bias_classes=data.bias,
    ).save(folder)


def _finish(run: _Run, trainer: Trainer, network: nn.Module, folder: Path) -> None:
    report = run.report(trainer)
    before, after = run.before(trainer), run.leakage(trainer)
    if not run.processes.is_main:
        return
    save_weights(folder / MODEL, network)
    print()
    print(report.text("validation images, last epoch"))
    if after:
        stages = {"before (end of pretraining)": before} if before else {}
        print()
        print(leakage_text(stages | {"after (end of training)": after}))
    write_json(
        folder / REPORT,
        {
            **report.to_dict(),
            "leakage_before": {name: leakage.to_dict() for name, leakage in before.items()},
            "leakage_after": {name: leakage.to_dict() for name, leakage in after.items()},
            "seconds": trainer.seconds,
        },
    )
    print(f"\nWrote {folder}: {MODEL} (weights of {run.options.arch}), {CONFIG}, {REPORT}, {SPLIT}")
