"""Each method's gradients are those of its table; two_step is the authors' procedure."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tiny_run import BATCH, BINS, CLASSES, tiny_data, tiny_heads, tiny_networks
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.image_transform import Grey
from lnl_ext.training.methods import METHODS, get_method
from lnl_ext.training.trainer import Trainer

# exact in float32, in which an adversary may keep them
REVERSAL, ENTROPY, CONFUSION = 0.25, 0.0625, 0.5
COEFFICIENTS = {  # (reversal, entropy_weight, confusion_weight) that each method leaves
    "blindeye": (0.0, 0.0, CONFUSION),
    "grl": (REVERSAL, 0.0, 0.0),
    "entropy": (0.0, ENTROPY, 0.0),
    "lnl": (REVERSAL, ENTROPY, 0.0),
}


def without_dropout(module: nn.Module) -> nn.Module:
    """Gradients of several passes are compared, which dropout would make different."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


def bias_terms(logits: Tensor, target: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """CE, H and CE(uniform, p), each a mean over sites and a sum over heads, textbook formulas."""
    logits = logits.unflatten(1, (heads, -1))
    target = target if heads > 1 else target.unsqueeze(1)
    cross_entropy = entropy = confusion = torch.zeros((), dtype=logits.dtype)
    for k in range(heads):
        log_p = F.log_softmax(logits[:, k], 1)
        cross_entropy = cross_entropy + F.nll_loss(log_p, target[:, k])
        entropy = entropy - (log_p.exp() * log_p).sum(1).mean()
        confusion = confusion - log_p.mean(1).mean()
    return cross_entropy, entropy, confusion


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def one_step(method: str) -> tuple[Trainer, list[nn.Module], tuple[Tensor, Tensor, dict]]:
    """A trainer after one joint step in float64, and copies of its modules from before."""
    features, classifier = (without_dropout(m) for m in tiny_networks(torch.float64))
    heads = {name: without_dropout(h) for name, h in tiny_heads(torch.float64).items()}
    before = [copy.deepcopy(m) for m in (features, classifier, heads["pixel"], heads["image"])]
    preset = get_method(method)
    adversaries = {}
    if preset.adversarial:
        adversaries = {
            name: preset.adversary(
                head,
                reversal=REVERSAL,
                entropy_weight=ENTROPY,
                confusion_weight=CONFUSION,
                heads=3 if name == "pixel" else 1,
            )
            for name, head in heads.items()
        }
    images, labels, bias = tiny_data()
    images = images.double()
    batches = TensorBatches(images, labels, bias, batch_size=len(images), shuffle=False)
    trainer = Trainer(
        features,
        classifier,
        adversaries,
        TrainerConfig(epochs=1),
        image_transform=preset.image_transform(),
    )
    trainer.fit(batches, progress=False)
    return trainer, before, (images, labels, bias)


@pytest.mark.parametrize("method", COEFFICIENTS)
def test_joint_gradients_are_those_of_three_separate_backwards(method: str) -> None:
    trainer, (f, g, pixel, image), (images, labels, bias) = one_step(method)
    reversal, entropy_weight, confusion_weight = COEFFICIENTS[method]
    hidden = f(images)
    label_loss = F.cross_entropy(g(hidden), labels)
    terms = {
        "pixel": bias_terms(pixel(hidden), bias["pixel"], 3),
        "image": bias_terms(image(hidden), bias["image"], 1),
    }
    fooling = sum(
        -reversal * ce - entropy_weight * h + confusion_weight * c for ce, h, c in terms.values()
    )
    expected = {
        trainer.classifier: gradients(label_loss, g),
        trainer.features: gradients(label_loss + fooling, f),
        trainer.adversaries["pixel"].head: gradients(terms["pixel"][0], pixel),
        trainer.adversaries["image"].head: gradients(terms["image"][0], image),
    }
    for module, wanted in expected.items():
        for parameter, gradient in zip(module.parameters(), wanted, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["baseline", "gray"])
def test_methods_without_adversary_see_the_task_loss_only(method: str) -> None:
    trainer, (f, g, *_), (images, labels, _) = one_step(method)
    assert not trainer.adversaries
    seen = Grey()(images) if method == "gray" else images
    label_loss = F.cross_entropy(g(f(seen)), labels)
    for module, copied in ((trainer.features, f), (trainer.classifier, g)):
        for parameter, gradient in zip(
            module.parameters(), gradients(label_loss, copied), strict=True
        ):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_grey_is_the_luma_of_the_image_before_normalisation() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    pixels = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    m, s = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (mean, std))
    grey = Grey(mean, std)((pixels - m) / s) * s + m
    luma = 0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2]
    for channel in range(3):
        # mean and std are kept in float32
        torch.testing.assert_close(grey[:, channel], luma, rtol=1e-6, atol=1e-6)


def test_grey_refuses_images_that_are_not_three_channels() -> None:
    with pytest.raises(ValueError, match=r"images has shape \(2, 1, 4, 4\)"):
        Grey()(torch.zeros(2, 1, 4, 4))


def test_the_networks_of_gray_see_grey_images_when_they_are_evaluated() -> None:
    trainer, _, (images, _, _) = one_step("gray")
    features, _ = trainer.inference_modules()
    features.eval()
    with torch.no_grad():
        assert torch.equal(features(images), trainer.features.eval()(Grey()(images)))
        assert not torch.equal(features(images), trainer.features(images))


def test_unknown_method_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"baseline, gray, blindeye, grl, entropy, lnl.*'dann'"):
        get_method("dann")


@pytest.mark.parametrize("method", ["baseline", "gray"])
def test_a_method_without_adversary_gives_none(method: str) -> None:
    with pytest.raises(ValueError, match=f"method '{method}' trains without an adversary"):
        METHODS[method].adversary(nn.Linear(2, 2))


# ---------------------------------------------------------------------- two_step


class _AuthorsReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.neg() * 0.1


def authors_procedure(
    net: tuple[nn.Module, nn.Module],
    heads: list[nn.Module],
    batches: list[tuple[Tensor, Tensor, list[Tensor]]],
    rate: float,
) -> None:
    """The published training step (feidfoe/learning-not-to-learn, trainer.py), restated.

    One optimiser for the network, one per head; every zero_grad fills with zeros, as PyTorch did
    when it was written.
    """
    f, g = net
    settings = {"lr": rate, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD([*f.parameters(), *g.parameters()], **settings)
    head_optimizers = [torch.optim.SGD(head.parameters(), **settings) for head in heads]

    def zero_grad() -> None:
        for o in (optimizer, *head_optimizers):
            o.zero_grad(set_to_none=False)

    for images, labels, colours in batches:
        zero_grad()
        features = f(images)
        prediction = g(features)
        entropies = []
        for head in heads:
            p = F.softmax(head(features), 1)
            entropies.append(torch.mean(torch.sum(p * torch.log(p), 1)))
        loss = F.cross_entropy(prediction, labels) + 0.01 * sum(entropies) / len(heads)
        loss.backward()
        optimizer.step()

        zero_grad()
        features = f(images)
        g(features)  # the network returns both; its prediction is not used here
        reversed_features = _AuthorsReversal.apply(features)
        loss = sum(
            F.cross_entropy(head(reversed_features), colour, ignore_index=255)
            for head, colour in zip(heads, colours, strict=True)
        )
        loss.backward()
        optimizer.step()
        for o in head_optimizers:
            o.step()


def colour_head(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, BINS, 3, padding=1),
    ).to(dtype)


def test_two_step_is_the_authors_procedure() -> None:
    torch.manual_seed(2)
    dtype, rate, steps = torch.float64, 0.05, 3
    f, g = tiny_networks(dtype)
    g = nn.Sequential(nn.Dropout(0.3), g)  # draws in the second forward as well
    heads = [colour_head(dtype) for _ in range(3)]
    theirs = copy.deepcopy(((f, g), heads))
    images, labels, bias = tiny_data()
    images, labels, colours = (
        images[: steps * BATCH].double(),
        labels[: steps * BATCH],
        bias["pixel"],
    )
    colours = colours[: steps * BATCH].masked_fill(torch.rand(steps * BATCH, 3, 4, 4) < 0.3, 255)

    lnl = get_method("lnl")
    adversaries = {
        name: lnl.adversary(head, reversal=0.1, entropy_weight=0.01 / 3, ignore_index=255)
        for name, head in zip("rgb", heads, strict=True)
    }
    sgd = OptimizerConfig(name="sgd", learning_rate=rate, momentum=0.9, weight_decay=5e-4)
    config = TrainerConfig(epochs=1, update="two_step", optimizer=sgd, head_optimizer=sgd)
    batches = TensorBatches(
        images,
        labels,
        {name: colours[:, channel] for channel, name in enumerate("rgb")},
        batch_size=BATCH,
        shuffle=False,
    )
    Trainer(f, g, adversaries, config).fit(batches, progress=False)

    torch.manual_seed(config.seed)  # what fit seeds, for the dropouts
    slices = [slice(i, i + BATCH) for i in range(0, steps * BATCH, BATCH)]
    authors_procedure(
        *theirs,
        [(images[s], labels[s], list(colours[s].unbind(1))) for s in slices],
        rate,
    )
    for ours, other in zip((f, g, *heads), (*theirs[0], *theirs[1]), strict=True):
        for (name, a), b in zip(
            ours.state_dict().items(), other.state_dict().values(), strict=True
        ):
            # An adversary may keep its coefficients in float32, where 0.1 is off by 1.5e-8 of it.
            torch.testing.assert_close(
                a, b, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_two_step_with_heads_side_by_side_is_the_same_as_with_separate_heads() -> None:
    """One adversary of three heads (a grouped convolution) against three adversaries."""
    sgd = OptimizerConfig(name="sgd", learning_rate=0.05, momentum=0.9)
    config = TrainerConfig(epochs=0.5, update="two_step", optimizer=sgd, head_optimizer=sgd)
    images, labels, bias = tiny_data()
    images, colours = images.double(), bias["pixel"]
    lnl = get_method("lnl")
    results = []
    for together in (True, False):
        f, g = tiny_networks(torch.float64)
        torch.manual_seed(9)
        weights = [nn.Conv2d(8, BINS, 1).double() for _ in range(3)]
        if together:
            head = nn.Conv2d(8, 3 * BINS, 1).double()
            for part in ("weight", "bias"):
                getattr(head, part).data = torch.cat([getattr(w, part).data for w in weights])
            adversaries = {"rgb": lnl.adversary(head, heads=3)}
            targets = {"rgb": colours}
        else:
            adversaries = {str(i): lnl.adversary(head) for i, head in enumerate(weights)}
            targets = {str(i): colours[:, i] for i in range(3)}
        batches = TensorBatches(images, labels, targets, batch_size=BATCH, shuffle=False)
        Trainer(f, g, adversaries, config).fit(batches, progress=False)
        results.append([*f.state_dict().values(), *g.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_second_step_moves_the_classifier_by_momentum_and_weight_decay_alone() -> None:
    f, g = (without_dropout(m) for m in tiny_networks(torch.float64))
    g = nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES).double())
    head = nn.Conv2d(8, BINS, 1).double()
    start, rate, momentum, decay = copy.deepcopy((f, g)), 0.1, 0.9, 0.01
    sgd = OptimizerConfig("sgd", learning_rate=rate, momentum=momentum, weight_decay=decay)
    config = TrainerConfig(epochs=1, update="two_step", optimizer=sgd)
    images, labels, bias = tiny_data()
    images = images.double()
    adversary = get_method("grl").adversary(head)
    batches = TensorBatches(
        images, labels, {"c": bias["pixel"][:, 0]}, batch_size=len(images), shuffle=False
    )
    Trainer(f, g, {"c": adversary}, config).fit(batches, progress=False)
    f0, g0 = start
    task = gradients(F.cross_entropy(g0(f0(images)), labels), g0)
    for after, before, gradient in zip(g.parameters(), g0.parameters(), task, strict=True):
        velocity = gradient + decay * before
        middle = before - rate * velocity
        expected = middle - rate * (momentum * velocity + decay * middle)
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-12)
        assert after.grad is not None
        assert not after.grad.any()


def test_two_step_refuses_a_confusion_loss() -> None:
    adversary = get_method("blindeye").adversary(nn.Conv2d(8, BINS, 1))
    with pytest.raises(ValueError, match=r"adversary 'c' has a confusion_weight.*update=\"joint\""):
        Trainer(*tiny_networks(), {"c": adversary}, TrainerConfig(update="two_step"))


def test_two_step_without_adversaries_is_plain_training() -> None:
    results = []
    for update in ("joint", "two_step"):
        f, g = tiny_networks()
        batches = TensorBatches(*tiny_data()[:2], batch_size=BATCH)
        Trainer(f, g, config=TrainerConfig(update=update)).fit(batches, progress=False)
        results.append([*itertools.chain(f.parameters(), g.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
