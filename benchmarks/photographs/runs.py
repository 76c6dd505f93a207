"""What the benchmarks on photographs share: a run's options, its training and its measurement."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lnl_ext import BiasAdversary, OptimizerConfig, Trainer, TrainerConfig
from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD, read_images
from lnl_ext.measuring import BiasAudit, audit
from lnl_ext.measuring.evaluation import Predictions, predict
from lnl_ext.paper.augmented_batches import AugmentedBatches, ImageTarget
from lnl_ext.paper.image_networks import ARCHITECTURES, GlobalHead, SplitNetwork, photo_network
from lnl_ext.schedules import Linear
from lnl_ext.training.batches import Batch
from lnl_ext.training.methods import Method, get_method

CROP = 5 / 6  # side of the part of an image that the network sees


@dataclasses.dataclass(frozen=True)
class Images:
    """A set in memory."""

    images: Tensor
    """(N, 3, size, size) uint8."""
    labels: Tensor
    bias: dict[str, Tensor]

    @classmethod
    def read(
        cls,
        paths: Sequence[Path],
        labels: Tensor,
        bias: Mapping[str, Tensor],
        size: int,
        workers: int,
    ) -> Images:
        """Decode the files; unreadable ones are left out."""
        images, kept = read_images(paths, size, workers=workers)
        return cls(images, labels[kept], {name: target[kept] for name, target in bias.items()})

    def halves(self, seed: int = 0) -> tuple[Images, Images]:
        """Split at random into two halves, the same ones for the same seed."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        middle = len(order) // 2
        return self.rows(order[:middle]), self.rows(order[middle:])

    def rows(self, rows: Tensor) -> Images:
        """Return the given samples."""
        bias = {name: target[rows] for name, target in self.bias.items()}
        return Images(self.images[rows], self.labels[rows], bias)


@dataclasses.dataclass(frozen=True)
class Sets:
    """The sets of one run. Settings are chosen on two of them and judged by two others."""

    train: Images
    """Biased."""
    opposite: Images
    """Half of the set that is biased the other way round, to be judged by."""
    test: Images
    """Half of the unbiased set, to be judged by."""
    opposite_validation: Images
    """The other half of the opposite set, to choose settings on."""
    test_validation: Images
    """The other half of the unbiased set, to choose settings on."""

    @classmethod
    def halved(cls, train: Images, opposite: Images, test: Images) -> Sets:
        """Halve the sets that are not trained on, always in the same way."""
        opposite_validation, opposite_judged = opposite.halves()
        test_validation, test_judged = test.halves()
        return cls(train, opposite_judged, test_judged, opposite_validation, test_validation)


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A bias head: its target, its module and its adversarial strength."""

    target: str
    build: Callable[[SplitNetwork], nn.Module]
    heads: int
    reversal: float
    """Per prediction of a sample, as the other coefficients."""
    entropy_weight: float
    image_target: ImageTarget | None = None
    """Makes the target from what the network sees; None: `Images.bias` has it."""

    def adversary(
        self, method: Method, network: SplitNetwork, scale: float, batch_size: int
    ) -> BiasAdversary:
        """Make the adversary with the terms that the method has."""
        # Sums over the batch's size: a head of one label only is not to weigh each of its samples
        # the more, the fewer they are.
        factor = scale / batch_size
        return method.adversary(
            self.build(network),
            heads=self.heads,
            reversal=factor * self.reversal,
            entropy_weight=factor * self.entropy_weight,
            confusion_weight=factor * self.reversal,
            reduction="sum",
            mask_entropy=True,
        )


@dataclasses.dataclass(frozen=True)
class Probe:
    """What leakage means: the accuracy of a fresh head for this target on the unbiased set."""

    name: str
    """What it is to name."""
    target: str
    classes: int
    heads: int = 1
    image_target: ImageTarget | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """What a command trains on and what it measures."""

    label: str
    """What the label is."""
    classes: Sequence[str]
    """Names of the labels."""
    groups: Mapping[str, Sequence[str]]
    """Names of the bias' classes, by target with one class a sample."""
    sets: Sets
    adversaries: Sequence[Adversary]
    probe: Probe


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run measured; the fields of a line of the results file."""

    benchmark: str
    method: str
    recipe: str
    train_split: str
    label: str
    seed: int
    epoch: float
    test_accuracy: float
    """On `Sets.test`, of the last epoch's averaged weights, as the others."""
    opposite_accuracy: float
    """On `Sets.opposite`."""
    test_validation_accuracy: float
    opposite_validation_accuracy: float
    leakage: float
    """Accuracy of a fresh probe for the bias on frozen features, on unbiased images."""
    leakage_chance: float
    """The same of predicting the most frequent class."""
    information: float
    """The probe's information about the bias, in nats: H(bias) - CE(probe)."""
    minutes: float
    """Of training, without probes."""
    train_samples: int
    arch: str
    feature_layer: str
    weights: str
    image_size: int
    batch_size: int
    strength: float
    heads: list[str]
    """Names of the bias heads; none for a method without."""
    threads: int


class Measured(NamedTuple):
    """A run, and what it was measured on."""

    run: Run
    trainer: Trainer
    test: Predictions
    """On `Sets.test`."""
    opposite: Predictions
    """On `Sets.opposite`."""
    probe_samples: int


def config(seed: int, epochs: float) -> TrainerConfig:
    """Return how all methods train; what the adversaries add is in `Adversary`."""
    return TrainerConfig(
        epochs=epochs,
        strength=Linear(finish=min(1.0, 2 / epochs)),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-3,
            betas=(0.5, 0.999),
            weight_decay=0.01,
            schedule="cosine",
            final_rate=2e-5,
        ),
        head_optimizer=OptimizerConfig(name="adam", learning_rate=3e-3, betas=(0.5, 0.999)),
        average_decay=0.99,
        seed=seed,
        channels_last=True,
    )


def train(options: argparse.Namespace, task: Task) -> tuple[Trainer, int]:
    """Train one method from the weights named; return the trainer and the crop it saw."""
    method = get_method(options.method)
    torch.manual_seed(options.seed)
    network = photo_network(
        options.arch,
        len(task.classes),
        feature_layer=options.feature_layer or None,
        weights=options.weights,
    )
    crop = crop_of(options.image_size, network)
    used = task.adversaries if method.adversarial else ()
    built = {
        a.target: a.adversary(method, network, options.strength, options.batch_size) for a in used
    }
    trainer = Trainer(
        network.features,
        network.classifier,
        built,
        config(options.seed, options.epochs),
        image_transform=method.image_transform(IMAGENET_MEAN, IMAGENET_STD),
    )
    batches = AugmentedBatches(
        task.sets.train.images,
        task.sets.train.labels,
        {a.target: task.sets.train.bias[a.target] for a in used if a.image_target is None},
        image_bias={a.target: a.image_target for a in used if a.image_target is not None},
        batch_size=options.batch_size,
        crop=crop,
        smallest_part=options.smallest_part,
        training=True,
    )
    trainer.fit(batches, output=options.output, progress=not options.no_progress)
    return trainer, crop


def crop_of(size: int, network: SplitNetwork) -> int:
    """Return the side that the network sees: about `CROP`, a multiple of the features' stride."""
    return max(network.stride, int(size * CROP) // network.stride * network.stride)


def accuracy(trainer: Trainer, images: Images, crop: int) -> float:
    """Return the accuracy of what was trained on the centres of the images."""
    return predictions(trainer, images, crop).accuracy


def predictions(trainer: Trainer, images: Images, crop: int) -> Predictions:
    """Run what was trained over the centres of the images."""
    batches = AugmentedBatches(images.images, images.labels, batch_size=250, crop=crop)
    return predict(nn.Sequential(*trainer.inference_modules()), batches)


def leakage(trainer: Trainer, sets: Sets, probe: Probe, crop: int, seed: int) -> BiasAudit:
    """Probe the features of the unbiased set: one half to learn from, the other to be measured."""

    def batches(images: Images) -> list[Batch]:
        made = {} if probe.image_target is None else {probe.target: probe.image_target}
        given = {probe.target: images.bias[probe.target]} if probe.image_target is None else {}
        return list(
            AugmentedBatches(
                images.images, images.labels, given, image_bias=made, batch_size=250, crop=crop
            )
        )

    learn = len(sets.test_validation.labels)
    both = [*batches(sets.test_validation), *batches(sets.test)]
    features = trainer.inference_modules()[0]
    with torch.no_grad():
        channels = features.eval()(both[0][0][:1]).shape[1]
    labels = torch.cat([batch[1] for batch in both])
    return audit(
        features,
        labels,
        {probe.target: torch.cat([batch[2][probe.target] for batch in both])},
        inputs=both,
        test=torch.arange(len(labels)) >= learn,
        probes=(),
        head=GlobalHead(channels, probe.classes, probe.heads),
        heads=probe.heads,
        seed=seed,
    ).biases[probe.target]


def measure(benchmark: str, options: argparse.Namespace, task: Task) -> Measured:
    """Train one method and measure it."""
    trainer, crop = train(options, task)
    sets = task.sets
    probed = leakage(trainer, sets, task.probe, crop, options.seed)
    test = predictions(trainer, sets.test, crop)
    opposite = predictions(trainer, sets.opposite, crop)
    run = Run(
        benchmark=benchmark,
        method=options.method,
        recipe="default",
        train_split=options.train_split,
        label=task.label,
        seed=options.seed,
        epoch=options.epochs,
        test_accuracy=round(test.accuracy, 4),
        opposite_accuracy=round(opposite.accuracy, 4),
        test_validation_accuracy=round(accuracy(trainer, sets.test_validation, crop), 4),
        opposite_validation_accuracy=round(accuracy(trainer, sets.opposite_validation, crop), 4),
        leakage=round(probed.leakage.accuracy, 4),
        leakage_chance=round(probed.majority, 4),
        information=round(probed.leakage.information, 4),
        minutes=round(trainer.seconds / 60, 2),
        train_samples=len(sets.train.labels),
        arch=options.arch,
        feature_layer=options.feature_layer or ARCHITECTURES[options.arch],
        weights=options.weights,
        image_size=options.image_size,
        batch_size=options.batch_size,
        strength=options.strength,
        heads=options.heads if get_method(options.method).adversarial else [],
        threads=torch.get_num_threads(),
    )
    return Measured(run, trainer, test, opposite, len(sets.test.labels))


def choose(options: argparse.Namespace, task: Task) -> str:
    """Train one method and return what settings may be chosen by."""
    trainer, crop = train(options, task)
    sets = task.sets
    test = accuracy(trainer, sets.test_validation, crop)
    opposite = accuracy(trainer, sets.opposite_validation, crop)
    return (
        f"{options.method}, seed {options.seed}: validation halves: {test:.4f} unbiased, "
        f"{opposite:.4f} of the opposite bias; {trainer.seconds / 60:.1f} minutes"
    )
