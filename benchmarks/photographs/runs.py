"""What the benchmarks on photographs share: a run's options, its training and its measurement."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lnl_ext import BiasAdversary, OptimizerConfig, Trainer, TrainerConfig
from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD, read_images
from lnl_ext.measuring import BiasAudit, audit
from lnl_ext.measuring.evaluation import Predictions, predict
from lnl_ext.paper.augmented_batches import AugmentedBatches, ImageTarget
from lnl_ext.paper.image_networks import ARCHITECTURES, GlobalHead, SplitNetwork, photo_network
from lnl_ext.schedules import Linear
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.methods import Method, get_method
from photographs import pretrained
from photographs.options import PRETRAINED

Batches = AugmentedBatches | TensorBatches
CROP = 5 / 6  # side of the part of an image that the network sees


@dataclasses.dataclass(frozen=True)
class Images:
    """A set in memory."""

    images: Tensor
    """(N, 3, size, size) uint8; or what frozen blocks gave of them, (N, C, H, W) float16."""
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


Target = Adversary | Probe
"""What has the name of a target, and perhaps makes it from what the network sees."""


class Views(Protocol):
    """How batches are made of a set."""

    def training(self, images: Images, targets: Iterable[Target], size: int) -> Batches:
        """Return batches of this size in random order."""

    def evaluation(self, images: Images, targets: Iterable[Target] = ()) -> Batches:
        """Return batches in order."""


class Cuts(NamedTuple):
    """Random parts of the images in training, their centres in evaluation."""

    crop: int
    """Side of what the network sees."""
    smallest_part: float
    """As `AugmentedBatches` takes it."""

    def training(self, images: Images, targets: Iterable[Target], size: int) -> AugmentedBatches:
        """Return batches of this size in random order."""
        return self._batches(
            images, targets, batch_size=size, smallest_part=self.smallest_part, training=True
        )

    def evaluation(self, images: Images, targets: Iterable[Target] = ()) -> AugmentedBatches:
        """Return batches in order."""
        return self._batches(images, targets, batch_size=250)

    def _batches(
        self, images: Images, targets: Iterable[Target], **options: Any
    ) -> AugmentedBatches:
        given, made = {}, {}
        for target in targets:
            if target.image_target is None:
                given[target.target] = images.bias[target.target]
            else:
                made[target.target] = target.image_target
        return AugmentedBatches(
            images.images, images.labels, given, image_bias=made, crop=self.crop, **options
        )


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


def ready(options: argparse.Namespace, task: Task) -> Task:
    """Return the task as `measure` and `choose` take it: frozen blocks have run."""
    if options.weights != PRETRAINED:
        return task
    return pretrained.frozen_task(task, _cuts(options), get_method(options.method))


def _cuts(options: argparse.Namespace) -> Cuts:
    network = photo_network(options.arch, 2, feature_layer=options.feature_layer)
    return Cuts(crop_of(options.image_size, network), options.smallest_part)


def train(options: argparse.Namespace, task: Task) -> tuple[Trainer, Views]:
    """Train one method from the weights named; return the trainer and how it sees a set."""
    method = get_method(options.method)
    torch.manual_seed(options.seed)
    views: Views
    if options.weights == PRETRAINED:
        _, network = pretrained.network(len(task.classes))
        settings = pretrained.config(options.seed, options.epochs)
        views, transform = pretrained.Outputs(), None
    else:
        network = photo_network(
            options.arch,
            len(task.classes),
            feature_layer=options.feature_layer,
            weights=options.weights,
        )
        settings = config(options.seed, options.epochs)
        views = Cuts(crop_of(options.image_size, network), options.smallest_part)
        transform = method.image_transform(IMAGENET_MEAN, IMAGENET_STD)
    used = task.adversaries if method.adversarial else ()
    built = {
        a.target: a.adversary(method, network, options.strength, options.batch_size) for a in used
    }
    trainer = Trainer(
        network.features, network.classifier, built, settings, image_transform=transform
    )
    batches = views.training(task.sets.train, used, options.batch_size)
    trainer.fit(batches, output=options.output, progress=not options.no_progress)
    return trainer, views


def crop_of(size: int, network: SplitNetwork) -> int:
    """Return the side that the network sees: about `CROP`, a multiple of the features' stride."""
    return max(network.stride, int(size * CROP) // network.stride * network.stride)


def accuracy(trainer: Trainer, images: Images, views: Views) -> float:
    """Return the accuracy of what was trained on a set."""
    return predictions(trainer, images, views).accuracy


def predictions(trainer: Trainer, images: Images, views: Views) -> Predictions:
    """Run what was trained over a set."""
    return predict(nn.Sequential(*trainer.inference_modules()), views.evaluation(images))


def leakage(trainer: Trainer, sets: Sets, probe: Probe, views: Views, seed: int) -> BiasAudit:
    """Probe the features of the unbiased set: one half to learn from, the other to be measured."""
    learn = len(sets.test_validation.labels)
    both = [
        batch
        for images in (sets.test_validation, sets.test)
        for batch in views.evaluation(images, [probe])
    ]
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
    trainer, views = train(options, task)
    sets = task.sets
    probed = leakage(trainer, sets, task.probe, views, options.seed)
    test = predictions(trainer, sets.test, views)
    opposite = predictions(trainer, sets.opposite, views)
    run = Run(
        benchmark=benchmark,
        method=options.method,
        train_split=options.train_split,
        label=task.label,
        seed=options.seed,
        epoch=options.epochs,
        test_accuracy=round(test.accuracy, 4),
        opposite_accuracy=round(opposite.accuracy, 4),
        test_validation_accuracy=round(accuracy(trainer, sets.test_validation, views), 4),
        opposite_validation_accuracy=round(accuracy(trainer, sets.opposite_validation, views), 4),
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
    trainer, views = train(options, task)
    sets = task.sets
    test = accuracy(trainer, sets.test_validation, views)
    opposite = accuracy(trainer, sets.opposite_validation, views)
    return (
        f"{options.method}, seed {options.seed}: validation halves: {test:.4f} unbiased, "
        f"{opposite:.4f} of the opposite bias; {trainer.seconds / 60:.1f} minutes"
    )
