"""The losses of a batch from images, of everything that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.adversary.refusals import check_classes
from lnl_ext.training.denominators import Denominators
from lnl_ext.training.group_dro import GroupDRO

Terms = dict[str, Tensor]
TaskLoss = Callable[..., Tensor]
Pass = Literal["joint", "detached", "fool", "predict"]
"""What a forward and backward pass is for; see `Objective`."""

_COEFFICIENTS = ("reversal", "entropy_weight", "confusion_weight")


class Objective(nn.Module):
    """The losses of a batch from images, as one module that can be compiled or wrapped.

    ======== ==================================================================================
    pass     loss
    ======== ==================================================================================
    joint    Task loss plus every adversary's loss, from one forward of f, g and the heads. Its
             backward gives the gradients of the method's table: g gets dLc, f gets
             ``dLc - reversal * dCE - entropy_weight * dH``, the heads get dCE (paper, eq. 9).
    detached The same with heads cut from the features: the features see the task loss only.
    fool     Step 1 of the authors' procedure: the task loss minus the weighted entropies.
    predict  Step 2: CE of heads that see the features through a reversal.
    ======== ==================================================================================

    Parameters
    ----------
    features : nn.Module
        f: images (N, ...) to features.
    classifier : nn.Module
        g: features to class logits (N, C).
    adversaries : mapping of str to BiasAdversary
        Heads on the features.
    task_loss : callable
        ``task_loss(logits, labels)``, a mean over the batch.
    sample_weights : mapping of str to str, optional
        For the adversaries whose samples do not all weigh alike: under which name their weights
        stand among the bias targets.
    logit_adjustment : str, optional
        Under which name the bias targets have what is added to the class logits in the task loss.
    two_step : bool
        Whether to train by the authors' procedure; without adversaries it is the joint update.
    task_weights : str or GroupDRO, optional
        The weights of the samples in the task loss: under which name they stand among the bias
        targets, or what makes them. ``task_loss`` then takes ``reduction="none"``.

    Raises
    ------
    ValueError
        If an adversary cannot be trained so; the message names it.
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        adversaries: Mapping[str, BiasAdversary],
        task_loss: TaskLoss,
        sample_weights: Mapping[str, str] | None = None,
        logit_adjustment: str | None = None,
        two_step: bool = False,
        task_weights: str | GroupDRO | None = None,
    ) -> None:
        super().__init__()
        self.task_weights = task_weights
        self.features = features
        self.classifier = classifier
        self.task_loss = task_loss
        self.sample_weights = dict(sample_weights or {})
        self.logit_adjustment = logit_adjustment
        if "label" in adversaries:
            raise ValueError("an adversary is called 'label', as the task is: use another name")
        if unknown := self.sample_weights.keys() - adversaries.keys():
            raise ValueError(f"sample_weights: there is no adversary {sorted(unknown)[0]!r}")
        for name, adversary in adversaries.items():
            if adversary.reduction == "none":  # a step needs one number
                raise ValueError(
                    f'adversary {name!r} has reduction="none", expected "mean" or "sum"'
                )
            if two_step and not adversary.known_zero("confusion_weight"):
                raise ValueError(
                    f"adversary {name!r} has a confusion_weight, which the authors' procedure does "
                    'not have: use update="joint"'
                )
        # Lists: names come from a user's table, and ModuleDict refuses names such as "a.b".
        self.names = list(adversaries)
        self.adversaries = nn.ModuleList(adversaries.values())
        self.fool, self.predict = nn.ModuleList(), nn.ModuleList()
        self.two_step = two_step and bool(self.names)
        if two_step:
            self.fool.extend(_without(a, "reversal") for a in adversaries.values())
            self.predict.extend(_without(a, "entropy_weight") for a in adversaries.values())

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return next((p.device for p in self.features.parameters()), torch.device("cpu"))

    @property
    def taken(self) -> dict[str, Any]:
        """What it takes from the batches, beside the targets of the adversaries."""
        return {
            "logit_adjustment": self.logit_adjustment,
            "sample_weights": self.sample_weights,
            "task_weights": self._task_target,
        }

    @property
    def _task_target(self) -> str | None:
        """Under which name the bias targets have the samples' weights or groups."""
        given = self.task_weights
        return given.target if isinstance(given, GroupDRO) else given

    @property
    def head_names(self) -> list[str]:
        """The names of the bias targets that the heads take."""
        return [*self.names, *self.sample_weights.values()]

    @property
    def bias_names(self) -> list[str]:
        """The names of the bias targets it takes."""
        of_task = [self.logit_adjustment, self._task_target]
        return [*self.head_names, *(name for name in of_task if name is not None)]

    def forward(
        self,
        which: Pass,
        images: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor],
        denominators: Denominators,
    ) -> tuple[Tensor, Terms, Tensor]:
        """Return the loss to back-propagate, the detached terms and the detached features.

        Where all targets of a head are ignored its terms are NaN, as means over nothing are, and
        their gradients 0. So the value of the loss may be NaN: nobody reads it.
        """
        hidden = self.features(images)
        # In "predict" the authors run the whole network, too, and do not use its prediction: batch
        # norm statistics of g move and dropout draws, which their procedure includes.
        logits = self.classifier(hidden)
        total, terms = hidden.new_zeros((), dtype=torch.float32), Terms()
        if which != "predict":
            total, terms = self._task(logits, labels, bias, denominators)
        seen = hidden.detach() if which == "detached" else hidden
        of_pass = {"fool": self.fool, "predict": self.predict}.get(which, self.adversaries)
        for name, adversary in zip(self.names, of_pass, strict=True):
            reduction = self._reduction(name, bias, denominators)
            result = adversary(seen, bias[name], return_terms=True, **reduction)
            total = total + result.loss
            if which != "fool":
                terms[f"{name}_cross_entropy"] = result.cross_entropy
            if which != "predict":
                terms[f"{name}_entropy"] = result.entropy
            if which in ("joint", "detached"):
                terms[f"{name}_loss"] = result.loss.detach()
        return total, terms, hidden.detach()

    def of_heads(
        self, seen: Tensor, bias: Mapping[str, Tensor], denominators: Denominators
    ) -> Tensor:
        """Return the loss of the heads alone on detached features."""
        total = seen.new_zeros((), dtype=torch.float32)
        for name, adversary in zip(self.names, self.adversaries, strict=True):
            total = total + adversary(
                seen, bias[name], return_terms=False, **self._reduction(name, bias, denominators)
            )
        return total

    def named_adversaries(self) -> dict[str, BiasAdversary]:
        """Return the adversaries by name."""
        pairs = zip(self.names, self.adversaries, strict=True)
        return {name: cast(BiasAdversary, adversary) for name, adversary in pairs}

    def _task(
        self,
        logits: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor],
        denominators: Denominators,
    ) -> tuple[Tensor, Terms]:
        if self.task_loss is F.cross_entropy:
            check_classes(
                logits,
                1,
                "the classifier's output",
                "Two labels have two outputs; for one output give a task_loss, such as binary "
                "cross-entropy",
            )
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
        loss = self._mean_task_loss(adjusted, labels, bias)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        if denominators.samples is not None:
            share = (len(labels) / denominators.samples).to(loss.dtype)
            loss, accuracy = loss * share, accuracy * share
        return loss, {"label_loss": loss.detach(), "label_accuracy": accuracy}

    def _mean_task_loss(self, logits: Tensor, labels: Tensor, bias: Mapping[str, Tensor]) -> Tensor:
        if self._task_target is None:
            return self.task_loss(logits, labels)
        losses = self.task_loss(logits, labels, reduction="none")
        weights = bias[self._task_target]
        if weights.shape != losses.shape:
            raise ValueError(
                f"task weights {self._task_target!r} have shape {tuple(weights.shape)}, expected "
                f"{tuple(losses.shape)}, one a sample"
            )
        if isinstance(self.task_weights, GroupDRO):
            weights = self.task_weights(losses, weights)
        return (weights.to(losses.dtype) * losses).mean()

    def _reduction(
        self, name: str, bias: Mapping[str, Tensor], denominators: Denominators
    ) -> dict[str, Tensor | None]:
        """Return the denominators or the sample weights for the adversary called `name`."""
        given = denominators.sites.get(name)
        if name not in self.sample_weights:
            return {"denominators": given}
        weight = bias[self.sample_weights[name]]
        if self.adversaries[self.names.index(name)].reduction == "sum":
            # Of a sum all denominators are the same number.
            return {"sample_weight": weight if given is None else weight / given[0, 0]}
        if denominators.samples is not None:
            weight = weight * (len(weight) / denominators.samples).to(weight.dtype)
        return {"sample_weight": weight}


def _without(adversary: BiasAdversary, name: str) -> BiasAdversary:
    """Return an adversary of the same head and the same buffers, but for one coefficient: 0."""
    coefficients: dict[str, Any] = {
        key: 0.0 if key == name or adversary.known_zero(key) else adversary.get_buffer(key)
        for key in _COEFFICIENTS
    }
    return BiasAdversary(
        adversary.head,
        **coefficients,
        heads=adversary.heads,
        weight=adversary.weight,
        ignore_index=adversary.ignore_index,
        label_smoothing=adversary.label_smoothing,
        reduction=adversary.reduction,
        mask_entropy=adversary.mask_entropy,
    )
