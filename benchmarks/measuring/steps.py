"""A whole training step: the authors' procedure, and this package's two_step and joint updates."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from lnl_ext.adversary import BiasAdversary
from lnl_ext.config import TrainerConfig
from lnl_ext.models import DigitNetwork, PixelColorHead, SeparatePixelColorHeads
from lnl_ext.optimizers import OptimizerConfig
from lnl_ext.stepper import Stepper
from lnl_ext.updates import (
    FoolObjective,
    JointObjective,
    JointUpdate,
    PredictObjective,
    TwoStepUpdate,
)

from .authors import ENTROPY_WEIGHT, REVERSAL, AuthorsProcedure
from .settings import Settings
from .turns import row, take_turns

TITLE = "A training step at equal batch, float32"
NOTES = [
    "`authors` is their procedure in plain PyTorch (benchmarks/measuring/authors.py): two "
    "forward and two backward passes, three separate heads. `two_step` is the same procedure in "
    "this package, with the same heads: after one step from the same start the weights agree "
    "(tested). `joint, separate heads` has the same three heads and one pass; `joint, grouped "
    "head` has one head of the same size and function as the three side by side. "
    "All use the same fused SGD, network, batch and thread count; random images stand for data. "
    "`channels_last` is shown for both sides, since plain PyTorch gains by it, too.",
    "The joint update is not the same algorithm step for step: f and g move once a batch, not "
    "twice. On coloured MNIST both gave the same losses per epoch to three digits.",
]
IGNORED = -100
OPTIMIZER = OptimizerConfig(name="sgd", learning_rate=0.001, momentum=0.9, weight_decay=5e-4)
HEADS = 3
BINS = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network cut at the tap, with a batch."""

    case: str
    features: nn.Module
    classifier: nn.Module
    tap_channels: int
    images: Tensor
    labels: Tensor
    bias: Tensor
    """(N, 3, H, W) colour bins at the tap's resolution."""


def digits(batch: int, device: torch.device) -> Problem:
    """Coloured MNIST: the authors' network; four fifths of the positions are background."""
    torch.manual_seed(0)
    network = DigitNetwork()
    bias = torch.randint(BINS, (batch, HEADS, 14, 14))
    background = torch.rand(batch, 1, 14, 14) < 0.8
    return Problem(
        f"coloured MNIST network, batch {batch}",
        network.features.to(device),
        network.classifier.to(device),
        32,
        torch.randn(batch, 3, 28, 28, device=device),
        torch.randint(10, (batch,), device=device),
        bias.masked_fill(background, IGNORED).to(device),
    )


def pets(batch: int, size: int, device: torch.device) -> Problem:
    """ResNet-18 cut after layer1, whose map is the image subsampled by 4, as the paper's labels."""
    torch.manual_seed(0)
    network = resnet18(num_classes=2).to(device)
    features = nn.Sequential(
        network.conv1, network.bn1, network.relu, network.maxpool, network.layer1
    )
    classifier = nn.Sequential(
        network.layer2, network.layer3, network.layer4, network.avgpool, nn.Flatten(), network.fc
    )
    return Problem(
        f"ResNet-18, {size} px, batch {batch}",
        features,
        classifier,
        64,
        torch.randn(batch, 3, size, size, device=device),
        torch.randint(2, (batch,), device=device),
        torch.randint(BINS, (batch, HEADS, size // 4, size // 4), device=device),
    )


@dataclasses.dataclass(frozen=True)
class Modules:
    """Copies of a problem's modules that a candidate trains, and its batch."""

    features: nn.Module
    classifier: nn.Module
    head: nn.Module
    images: Tensor

    @classmethod
    def of(cls, problem: Problem, head: nn.Module, channels_last: bool) -> Modules:
        """Copy the network, and put all in the memory format."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        features, classifier = copy.deepcopy((problem.features, problem.classifier))
        for module in (features, classifier, head):
            module.to(problem.images.device)
            module.to(memory_format=layout)
        return cls(features, classifier, head, problem.images.contiguous(memory_format=layout))


def authors(problem: Problem, modules: Modules) -> Callable[[], object]:
    """Return a step of the authors' procedure."""
    assert isinstance(modules.head, SeparatePixelColorHeads)
    heads = list(modules.head.channels)
    network = itertools.chain(modules.features.parameters(), modules.classifier.parameters())
    procedure = AuthorsProcedure(
        modules.features,
        modules.classifier,
        heads,
        OPTIMIZER.build(network),
        [OPTIMIZER.build(head.parameters()) for head in heads],
    )
    return lambda: procedure(modules.images, problem.labels, problem.bias)


def ours(problem: Problem, modules: Modules, update: str) -> Callable[[], object]:
    """Return a step of this package's trainer, joint or two_step."""
    adversaries = {
        "color": BiasAdversary(
            modules.head,
            heads=HEADS,
            reversal=REVERSAL,
            entropy_weight=ENTROPY_WEIGHT / HEADS,  # their mean over heads, our sum
            ignore_index=IGNORED,
        )
    }
    stepper = Stepper(
        nn.Sequential(modules.features, modules.classifier),
        modules.head.parameters(),
        TrainerConfig(optimizer=OPTIMIZER, head_optimizer=OPTIMIZER),
        problem.images.device.type,
    )
    parts = (modules.features, modules.classifier, adversaries, functional.cross_entropy)
    joint = JointUpdate(JointObjective(*parts), stepper)
    step: JointUpdate | TwoStepUpdate = joint
    if update == "two_step":
        step = TwoStepUpdate(joint, FoolObjective(*parts), PredictObjective(*parts), stepper)
    bias = {"color": problem.bias}
    return lambda: step(modules.images, problem.labels, bias, detached=False)


def candidates(problem: Problem) -> dict[str, Callable[[], object]]:
    """Return all candidates, each with its own copy of the network and its own heads."""
    separate = SeparatePixelColorHeads(problem.tap_channels, BINS)
    grouped = PixelColorHead(problem.tap_channels, BINS)

    def modules(head: nn.Module, channels_last: bool = False) -> Modules:
        return Modules.of(problem, copy.deepcopy(head), channels_last)

    return {
        "authors": authors(problem, modules(separate)),
        "authors, channels_last": authors(problem, modules(separate, True)),
        "two_step": ours(problem, modules(separate), "two_step"),
        "joint, separate heads": ours(problem, modules(separate), "joint"),
        "joint, separate heads, channels_last": ours(problem, modules(separate, True), "joint"),
        "joint, grouped head": ours(problem, modules(grouped), "joint"),
        "joint, grouped head, channels_last": ours(problem, modules(grouped, True), "joint"),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Measure both networks."""
    if settings.quick:
        problems = [digits(8, settings.device), pets(2, 32, settings.device)]
    else:
        problems = [digits(128, settings.device), pets(32, 96, settings.device)]
    rows = []
    for problem in problems:
        times = take_turns(
            candidates(problem),
            settings.device,
            2 * settings.seconds,
            warm_up=1 if settings.quick else 3,
            min_rounds=2 if settings.quick else 5,
        )
        rows.append(row(problem.case, times, "authors", base_over=True))
    return {"title": TITLE, "base": "authors", "ratio": "the authors' time over its own"} | {
        "rows": rows,
        "unit": "ms",
        "notes": NOTES,
    }
