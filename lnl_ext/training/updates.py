"""The two ways to train on a batch: one joint step, or the two steps of the paper's authors.

Both read the coefficients of the adversaries as they stand; they differ in procedure only. In both
the entropy of an adversary is the sum over its heads, as everywhere in this package: the authors'
``0.01 * mean`` over three heads is ``entropy_weight=0.01 / 3``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.adversary.reweighting import weigh_samples
from lnl_ext.functional import bias_loss
from lnl_ext.gradient_reversal import grad_reverse
from lnl_ext.ops.arguments import MEAN, NONE
from lnl_ext.ops.checks import loss_arguments
from lnl_ext.ops.types import BiasLoss
from lnl_ext.training.batch_counts import Shares
from lnl_ext.training.stepper import Stepper

Terms = dict[str, Tensor]
TaskLoss = Callable[[Tensor, Tensor], Tensor]
Compute = Callable[..., tuple[Tensor, Terms]]
"""An `Objective`, by itself or as a part of a module that was wrapped."""


class Objective(nn.Module):
    """The losses of a batch from images, as a module that can be compiled or wrapped.

    Parameters
    ----------
    features : nn.Module
        f: images (N, ...) to the tap.
    classifier : nn.Module
        g: tap to class logits (N, C).
    adversaries : mapping of str to BiasAdversary
        Heads on the tap.
    task_loss : callable
        ``task_loss(logits, labels)``, a mean over the batch.
    sample_weights : mapping of str to str
        For the adversaries whose samples do not all weigh alike: under which name their weights
        stand among the bias targets.
    logit_adjustment : str, optional
        Under which name the bias targets have what is added to the class logits in the task loss.
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        adversaries: Mapping[str, BiasAdversary],
        task_loss: TaskLoss,
        sample_weights: Mapping[str, str] | None = None,
        logit_adjustment: str | None = None,
    ) -> None:
        super().__init__()
        sample_weights = {} if sample_weights is None else sample_weights
        for name in sample_weights:
            if adversaries[name].reduction != "sum":
                raise ValueError(
                    f"adversary {name!r} has sample weights and "
                    f'reduction="{adversaries[name].reduction}", expected "sum"'
                )
        self.features = features
        self.classifier = classifier
        for name, adversary in adversaries.items():
            if adversary.reduction == "none":
                raise ValueError(
                    f'adversary {name!r} has reduction="none", expected "mean" or "sum": a step '
                    "needs one number"
                )
        # A list: names come from a user's table, and ModuleDict refuses names such as "a.b".
        self.adversaries = nn.ModuleList(adversaries.values())
        self.names = list(adversaries)
        self.task_loss = task_loss
        self.sample_weights = dict(sample_weights)
        self.logit_adjustment = logit_adjustment

    def named_adversaries(self) -> Iterator[tuple[str, BiasAdversary]]:
        """Pairs of name and adversary."""
        for name, adversary in zip(self.names, self.adversaries, strict=True):
            assert isinstance(adversary, BiasAdversary)
            yield name, adversary

    def _reduction(
        self, name: str, bias: Mapping[str, Tensor], shares: Shares | None
    ) -> dict[str, Tensor | None]:
        """Return the denominators or the sample weights for the adversary called `name`."""
        given = None if shares is None else shares.denominators.get(name)
        if name not in self.sample_weights:
            return {"denominators": given}
        weight = bias[self.sample_weights[name]]
        # Of a sum all denominators are the same number.
        return {"sample_weight": weight if given is None else weight / given[0, 0]}

    def _task(
        self,
        tap: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor],
        shares: Shares | None,
    ) -> tuple[Tensor, Terms]:
        logits = self.classifier(tap)
        adjusted = logits
        if self.logit_adjustment is not None:
            added = bias[self.logit_adjustment]
            if added.shape != logits.shape or not added.is_floating_point():
                raise ValueError(
                    f"logit adjustment {self.logit_adjustment!r} is {tuple(added.shape)} "
                    f"{added.dtype}, expected floating point {tuple(logits.shape)}, the shape of "
                    "the class logits"
                )
            adjusted = logits + added
        loss = self.task_loss(adjusted, labels)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        terms = {"label_loss": loss.detach(), "label_accuracy": accuracy}
        return loss if shares is None else loss * shares.task.to(loss.dtype), terms


class JointObjective(Objective):
    """Task loss plus every adversary's loss, from one forward of f, g and the heads.

    Its backward gives the gradients of the method's table: g gets dLc, f gets
    ``dLc - reversal * dCE - entropy_weight * dH``, the heads get dCE (paper, eq. 9).
    """

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor],
        detached: bool,
        shares: Shares | None = None,
    ) -> tuple[Tensor, Terms]:
        """Return the loss to back-propagate, and the detached terms.

        ``detached`` cuts the heads from the features: the heads still learn, the features see the
        task loss only.

        Where all targets of a head are ignored its terms are NaN, as means over nothing are, and
        their gradients 0. So the value of the loss may be NaN: nobody reads it.
        """
        tap = self.features(images)
        total, terms = self._task(tap, labels, bias, shares)
        seen = tap.detach() if detached else tap
        for name, adversary in self.named_adversaries():
            reduction = self._reduction(name, bias, shares)
            result = adversary(seen, bias[name], return_terms=True, **reduction)
            total = total + result.loss
            terms[f"{name}_cross_entropy"] = result.cross_entropy
            terms[f"{name}_entropy"] = result.entropy
            terms[f"{name}_loss"] = result.loss.detach()
        return total, terms


class FoolObjective(Objective):
    """Step 1 of the authors' procedure: the task loss minus the weighted entropies.

    Raises
    ------
    ValueError
        If an adversary has a confusion_weight.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        for name, adversary in self.named_adversaries():
            if not adversary.known_zero("confusion_weight"):
                raise ValueError(
                    f"adversary {name!r} has a confusion_weight, which the authors' procedure does "
                    'not have: use update="joint"'
                )

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor],
        shares: Shares | None = None,
    ) -> tuple[Tensor, Terms]:
        """Return ``Lc - sum of entropy_weight * H`` (its gradient, at least) and the terms."""
        tap = self.features(images)
        total, terms = self._task(tap, labels, bias, shares)
        for name, adversary in self.named_adversaries():
            # reversal=0 leaves the entropy as the only part with a gradient.
            result = _head_loss(
                adversary,
                adversary.head(tap),
                bias[name],
                {"entropy_weight": adversary.entropy_weight, "reversal": 0.0},
                **self._reduction(name, bias, shares),
            )
            total = total + result.loss
            terms[f"{name}_entropy"] = result.entropy
        return total, terms


class PredictObjective(Objective):
    """Step 2 of the authors' procedure: CE of heads that see the features through a reversal."""

    def forward(
        self, images: Tensor, bias: Mapping[str, Tensor], shares: Shares | None = None
    ) -> tuple[Tensor, Terms]:
        """Return the sum of the heads' CE, and the terms."""
        tap = self.features(images)
        # The authors run the whole network here and do not use its prediction: batch norm
        # statistics of g move and dropout draws, which their procedure includes.
        self.classifier(tap)
        total = tap.new_zeros((), dtype=torch.float32)
        terms: Terms = {}
        for name, adversary in self.named_adversaries():
            logits = adversary.head(grad_reverse(tap, adversary.reversal))
            reduction = self._reduction(name, bias, shares)
            result = _head_loss(adversary, logits, bias[name], None, **reduction)
            total = total + result.loss
            terms[f"{name}_cross_entropy"] = result.cross_entropy
        return total, terms


class JointUpdate:
    """One forward of f, g and the heads, one backward, one step of both optimisers."""

    def __init__(self, objective: Compute, stepper: Stepper) -> None:
        self.objective = objective
        self.stepper = stepper

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor],
        *,
        detached: bool,
        shares: Shares | None = None,
    ) -> Terms:
        """Train on a batch and return its detached loss terms."""
        self.stepper.zero_gradients(set_to_none=True)
        with self.stepper.autocast():
            loss, terms = self.objective(images, labels, bias, detached, shares)
        self.stepper.backward_and_step(loss, self.stepper.optimizers)
        return terms


class TwoStepUpdate:
    """The authors' procedure: two forwards, two backwards, f and g stepped twice.

    1. ``Lc - entropy_weight * H``, step f and g only; what the heads got is thrown away.
    2. A fresh forward, features through a reversal layer, CE summed over heads; step f, g and the
       heads. g's gradient is zero there, not None, so that its momentum and weight decay still
       move it, as they do in the authors' code (their zero_grad filled with zeros).

    In the pretraining stage, which the authors do not have, it is the joint update.
    """

    def __init__(
        self,
        pretraining: JointUpdate,
        fool: Compute,
        predict: Compute,
        stepper: Stepper,
    ) -> None:
        self.pretraining = pretraining
        self.fool = fool
        self.predict = predict
        self.stepper = stepper

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor],
        *,
        detached: bool,
        shares: Shares | None = None,
    ) -> Terms:
        """Train on a batch and return its detached loss terms, CE as of the second step."""
        if detached:
            return self.pretraining(images, labels, bias, detached=True, shares=shares)
        self.stepper.zero_gradients(set_to_none=False)
        with self.stepper.autocast():
            loss, terms = self.fool(images, labels, bias, shares)
        self.stepper.backward_and_step(loss, ["model"])
        self.stepper.zero_gradients(set_to_none=False)
        with self.stepper.autocast():
            loss, predicted = self.predict(images, bias, shares)
        self.stepper.backward_and_step(loss, self.stepper.optimizers)
        return terms | predicted


def _head_loss(
    adversary: BiasAdversary,
    logits: Tensor,
    target: Tensor,
    coefficients: Mapping[str, Tensor | float] | None,
    *,
    denominators: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> BiasLoss:
    """Return the loss of an adversary's logits with its options and other coefficients.

    It has the gradient of one term: of CE without `reversal`, of the entropy with ``reversal=0``.
    """
    coefficients = {} if coefficients is None else coefficients
    arguments = loss_arguments(
        target,
        adversary.weight,
        coefficients.get("reversal"),
        coefficients.get("entropy_weight", 0.0),
        adversary.ignore_index,
        adversary.label_smoothing,
        adversary.reduction,
        adversary.mask_entropy,
        adversary.heads,
    )
    if denominators is not None:
        arguments = arguments._replace(denominators=denominators, reduction=MEAN)
    if sample_weight is None:
        return bias_loss(logits, arguments)
    sites = bias_loss(logits, arguments._replace(reduction=NONE))
    return weigh_samples(sites, sample_weight, adversary.reduction)
