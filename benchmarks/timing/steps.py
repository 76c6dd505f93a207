"""A whole training step: the authors' procedure, and this package's two_step and joint updates."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.paper.networks import DigitNetwork, PixelColorHead, SeparatePixelColorHeads
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.objective import Objective
from lnl_ext.training.updates import Update

from .authors import ENTROPY_WEIGHT, REVERSAL, AuthorsProcedure
from .settings import Settings
from .turns import row, take_turns

TITLE = "A training step at equal batch"
NOTES = [
    "`authors` is their procedure in plain PyTorch (benchmarks/timing/authors.py): two forward "
    "and two backward passes, and a head per colour channel. `two_step` is the same procedure in "
    "this package: after steps from the same start the weights agree (tested). `joint` is the "
    "package's update with the same heads and memory layout: **the equal comparison is `joint` "
    "with `authors`, and `joint, channels_last` with `authors, channels_last`.** "
    "`joint, channels_last, grouped head` is how we recommend to run it: the three heads as one "
    "module of the same size and function (the third case has one head anyway). With `bfloat16` "
    "the forward passes run under autocast; all else is float32. "
    "All use the same fused SGD, network, batch and thread count; random images stand for data.",
    "`one pass` is plain PyTorch again: one forward of f, g and the same heads, label and bias "
    "loss added, one backward, no unlearning. It is what the joint step would take if unlearning "
    "cost nothing.",
    "The joint update is not the same algorithm step for step: f and g move once a batch, not "
    "twice. On coloured MNIST both gave the same losses per epoch to three digits.",
]
WORK = (
    "Operations (multiplications and additions) of the convolutions and linear layers in one step, "
    "in 1e9, counted by the formulas of `torch.utils.flop_counter`, and behind them the authors' "
    "over its own: the gain in time to expect from less work alone. It cannot reach 2 with equal "
    "heads where g is large: both procedures run g backward once."
)
OPTIMIZER = OptimizerConfig(name="sgd", learning_rate=0.001, momentum=0.9, weight_decay=5e-4)
BINS = 8
AGES = 12
BFLOAT16: Literal["bfloat16"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network cut at the feature layer, its bias heads, and a batch."""

    case: str
    features: nn.Module
    classifier: nn.Module
    head: nn.Module
    """As the authors have it: `SeparatePixelColorHeads`, or one head."""
    grouped: nn.Module | None
    """The same heads as one module, where there are several."""
    images: Tensor
    labels: Tensor
    bias: Tensor
    """(N, heads, *S) bias labels."""

    @property
    def heads(self) -> int:
        """Number of predictions a position."""
        return self.bias.shape[1]


def digits(batch: int, device: torch.device) -> Problem:
    """Coloured MNIST: the authors' network; four fifths of the positions are background."""
    torch.manual_seed(0)
    network = DigitNetwork()
    bias = torch.randint(BINS, (batch, 3, 14, 14))
    background = torch.rand(batch, 1, 14, 14) < 0.8
    return Problem(
        f"coloured MNIST network, batch {batch}",
        network.features,
        network.classifier,
        SeparatePixelColorHeads(32, BINS),
        PixelColorHead(32, BINS),
        torch.randn(batch, 3, 28, 28, device=device),
        torch.randint(10, (batch,), device=device),
        bias.masked_fill(background, IGNORE_INDEX).to(device),
    )


def pets(batch: int, size: int, device: torch.device) -> Problem:
    """ResNet-18 cut after layer1, whose map is the image subsampled by 4, as the paper's labels."""
    from torchvision.models import resnet18  # digits do without

    torch.manual_seed(0)
    network = resnet18(num_classes=2)
    features = nn.Sequential(
        network.conv1, network.bn1, network.relu, network.maxpool, network.layer1
    )
    classifier = nn.Sequential(
        network.layer2, network.layer3, network.layer4, network.avgpool, nn.Flatten(), network.fc
    )
    return Problem(
        f"ResNet-18 at {size} px, colour heads on layer1, batch {batch}",
        features,
        classifier,
        SeparatePixelColorHeads(64, BINS),
        PixelColorHead(64, BINS),
        torch.randn(batch, 3, size, size, device=device),
        torch.randint(2, (batch,), device=device),
        torch.randint(BINS, (batch, 3, size // 4, size // 4), device=device),
    )


def faces(batch: int, size: int, device: torch.device) -> Problem:
    """ResNet-18 with a linear age head on the pooled features, as the paper's for IMDB."""
    from torchvision.models import resnet18  # digits do without

    torch.manual_seed(0)
    network = resnet18(num_classes=2)
    *layers, classifier = network.children()
    return Problem(
        f"ResNet-18 at {size} px, linear age head on the pooled features, batch {batch}",
        nn.Sequential(*layers, nn.Flatten()),
        classifier,
        nn.Linear(512, AGES),
        None,
        torch.randn(batch, 3, size, size, device=device),
        torch.randint(2, (batch,), device=device),
        torch.randint(AGES, (batch, 1), device=device),
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


def authors(
    problem: Problem, modules: Modules, amp: Literal["bfloat16"] | None = None
) -> Callable[[], object]:
    """Return a step of the authors' procedure."""
    heads: list[nn.Module] = [modules.head]
    if isinstance(modules.head, SeparatePixelColorHeads):
        heads = list(modules.head.channels)
    network = itertools.chain(modules.features.parameters(), modules.classifier.parameters())
    procedure = AuthorsProcedure(
        modules.features,
        modules.classifier,
        heads,
        OPTIMIZER.build(network),
        [OPTIMIZER.build(head.parameters()) for head in heads],
        None if amp is None else getattr(torch, amp),
    )
    return lambda: procedure(modules.images, problem.labels, problem.bias)


def ours(
    problem: Problem, modules: Modules, update: str, amp: Literal["bfloat16"] | None = None
) -> Callable[[], object]:
    """Return a step of this package's trainer, joint or two_step."""
    adversaries = {
        "bias": BiasAdversary(
            modules.head,
            heads=problem.heads,
            reversal=REVERSAL,
            entropy_weight=ENTROPY_WEIGHT / problem.heads,  # their mean over heads, our sum
            ignore_index=IGNORE_INDEX,
        )
    }
    objective = Objective(
        modules.features,
        modules.classifier,
        adversaries,
        functional.cross_entropy,
        two_step=update == "two_step",
    )
    config = TrainerConfig(optimizer=OPTIMIZER, head_optimizer=OPTIMIZER, amp=amp)
    step = Update(objective, config)
    bias = {"bias": problem.bias if problem.heads > 1 else problem.bias[:, 0]}
    return lambda: step([(modules.images, problem.labels, bias)])


def one_pass(problem: Problem, modules: Modules) -> Callable[[], object]:
    """Return a step of plain PyTorch without unlearning: one forward, one backward, both losses."""
    parts = (modules.features, modules.classifier, modules.head)
    optimizer = OPTIMIZER.build(itertools.chain(*(part.parameters() for part in parts)))
    bias = problem.bias.flatten(0, 1)

    def step() -> None:
        optimizer.zero_grad()
        hidden = modules.features(modules.images)
        loss = functional.cross_entropy(modules.classifier(hidden), problem.labels)
        logits = modules.head(hidden).unflatten(1, (problem.heads, -1)).flatten(0, 1)
        loss = loss + functional.cross_entropy(logits, bias, ignore_index=IGNORE_INDEX)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def candidates(problem: Problem) -> dict[str, Callable[[], object]]:
    """Return all candidates, each with its own copy of the network and the heads."""
    best = problem.head if problem.grouped is None else problem.grouped
    best_name = "joint, channels_last" + ("" if problem.grouped is None else ", grouped head")

    def modules(head: nn.Module, channels_last: bool = False) -> Modules:
        return Modules.of(problem, copy.deepcopy(head), channels_last)

    return {
        "authors": authors(problem, modules(problem.head)),
        "authors, channels_last": authors(problem, modules(problem.head, True)),
        "authors, channels_last, bfloat16": authors(problem, modules(problem.head, True), BFLOAT16),
        "two_step": ours(problem, modules(problem.head), "two_step"),
        "joint": ours(problem, modules(problem.head), "joint"),
        "joint, channels_last": ours(problem, modules(problem.head, True), "joint"),
        best_name: ours(problem, modules(best, True), "joint"),
        f"{best_name}, bfloat16": ours(problem, modules(best, True), "joint", BFLOAT16),
        "one pass": one_pass(problem, modules(problem.head)),
    }


class _Operations(TorchDispatchMode):
    """Counts by torch's formulas; `FlopCounterMode` cannot, it hooks modules for its report.

    Its hooks fail where a backward pass runs a part of the graph by itself, as ours does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        elif func.overloadpacket is torch.ops.lnl_ext.linear_bias_loss:
            features, head_weight = args[:2]
            products = 1 + sum(args[-2:])  # the logits, and the gradients that are asked for
            self.count += products * 2 * features.numel() * len(head_weight)
        return result


def operations(step: Callable[[], object]) -> float:
    """Return the operations of the convolutions and linear layers in a step, in 1e9."""
    with _Operations() as counter:
        step()
    return float(counter.count) / 1e9


def measure(settings: Settings) -> dict[str, Any]:
    """Measure all networks."""
    device = settings.device
    if settings.quick:
        problems = [digits(8, device), faces(2, 32, device)]
    else:
        problems = [digits(128, device), pets(32, 96, device), faces(32, 96, device)]
    rows = []
    for problem in problems:
        steps = candidates(problem)
        work = {name: operations(step) for name, step in steps.items()}
        times = take_turns(
            steps,
            device,
            2 * settings.seconds,
            warm_up=1,  # and the counted step before
            min_rounds=2 if settings.quick else 5,
        )
        rows.append({"work": work} | row(problem.case, times, "authors", base_over=True))
    return {"title": TITLE, "base": "authors", "ratio": "the authors' time over its own"} | {
        "rows": rows,
        "unit": "ms",
        "notes": NOTES,
        "work": WORK,
    }
