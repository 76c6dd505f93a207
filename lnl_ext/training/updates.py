"""The two ways to train on a batch: one joint step, or the two steps of the paper's authors.

Both read the coefficients of the adversaries as they stand; they differ in procedure only. In both
the entropy of an adversary is the sum over its heads, as everywhere in this package: the authors'
``0.01 * mean`` over three heads is ``entropy_weight=0.01 / 3``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.adversary.refusals import check_classes
from lnl_ext.training.batches import Batch
from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.denominators import Counter, Denominators, Term
from lnl_ext.training.distributed import average_gradients, replicate
from lnl_ext.training.group_dro import GroupDRO
from lnl_ext.training.head_steps import HeadSteps, Seen

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
            has = f'reduction="{adversary.reduction}"'
            if name in self.sample_weights and adversary.reduction != "sum":
                raise ValueError(f'adversary {name!r} has sample weights and {has}, expected "sum"')
            if adversary.reduction == "none":  # a step needs one number
                raise ValueError(f'adversary {name!r} has {has}, expected "mean" or "sum"')
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
        # Of a sum all denominators are the same number.
        return {"sample_weight": weight if given is None else weight / given[0, 0]}


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


class Update:
    """What moves the weights: a step from the batches that it accumulates.

    Parameters
    ----------
    objective
        The losses. With several processes each must make its update, and the networks of process 0
        become everybody's.
    config
        The configuration of the run.

    Attributes
    ----------
    optimizers : dict
        ``"model"`` for features and classifier, ``"heads"`` if any head learns.
    averaged : AveragedModel or None
        The moving average of features and classifier, one after the other, buffers included.

    Raises
    ------
    ValueError
        If features and classifier have nothing to learn.
    """

    def __init__(self, objective: Objective, config: TrainerConfig) -> None:
        self._network = nn.Sequential(objective.features, objective.classifier)
        self._device_type = objective.device.type
        self._amp = None if config.amp is None else cast(torch.dtype, getattr(torch, config.amp))
        self._clip_norm = config.clip_norm
        self._configs = {"model": config.optimizer, "heads": config.head_optimizer}
        self._parameters = {
            name: [p for p in module.parameters() if p.requires_grad]
            for name, module in (("model", self._network), ("heads", objective.adversaries))
        }
        if not self._parameters["model"]:
            raise ValueError("features and classifier have no parameter that requires a gradient")
        self.optimizers = {
            name: self._configs[name].build(group)
            for name, group in self._parameters.items()
            if group
        }
        self._schedulers: dict[str, LRScheduler] = {}
        self._scaler = torch.amp.GradScaler(self._device_type, enabled=self._amp is torch.float16)
        self.averaged: AveragedModel | None = None
        if config.average_decay is not None:
            average = get_ema_multi_avg_fn(config.average_decay)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self._network, multi_avg_fn=average, use_buffers=True)
        self._adversaries = objective.named_adversaries()
        self._counter = Counter(self._adversaries)
        self._two_step = objective.two_step
        if config.compile:
            objective.compile()
        # Step 2 of the authors' procedure has no gradient for the classifier, step 1 for the heads.
        self._objective = replicate(objective, unused=self._two_step)
        self._losses = objective
        self._head_steps = HeadSteps(config.head_steps if "heads" in self.optimizers else 0, config)

    def start(self, train_steps: int, steps_per_epoch: int) -> None:
        """Begin the learning rate schedules, which need the length of the training stage."""
        self._schedulers = {
            name: self._configs[name].build_scheduler(optimizer, train_steps, steps_per_epoch)
            for name, optimizer in self.optimizers.items()
        }

    def __call__(self, batches: Sequence[Batch], *, heads_only: bool = False) -> dict[str, Term]:
        """Train on the batches of a step and return its loss terms.

        The joint update is one forward of f, g and the heads, one backward, one step of both
        optimisers. The authors' procedure is two forwards, two backwards, f and g stepped twice:

        1. ``Lc - entropy_weight * H``, step f and g only.
        2. A fresh forward, features through a reversal layer, CE summed over heads; step f, g and
           the heads. g's gradient is zero there, not None, so that its momentum and weight decay
           still move it, as they do in the authors' code (their zero_grad filled with zeros).

        With ``heads_only`` both are one joint step with heads cut from the features. Further steps
        of the heads follow, if there are to be any.
        """
        counts = self._counter.count(batches)
        denominators = self._counter.denominators(counts)
        two_step = self._two_step and not heads_only
        self._zero_gradients(set_to_none=not two_step)
        if two_step:
            with _frozen(self._parameters["heads"]):  # this step does not move them
                terms, _ = self._backward("fool", batches, denominators)
            self._step(["model"])
            self._zero_gradients(set_to_none=False)
            predicted, seen = self._backward("predict", batches, denominators)
            terms |= predicted
        else:
            which: Pass = "detached" if heads_only else "joint"
            terms, seen = self._backward(which, batches, denominators)
        self._step(self.optimizers)
        self._head_steps.remember(seen)
        for recent in self._head_steps.draws():
            self._step_heads(recent)
        for scheduler in self._schedulers.values():
            scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self._network)
        return self._counter.terms(counts, terms)

    def _zero_gradients(self, *, set_to_none: bool) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=set_to_none)

    def _backward(
        self, which: Pass, batches: Sequence[Batch], denominators: Denominators
    ) -> tuple[Terms, Seen]:
        """Add up the gradients and the terms of the batches; return these and what heads saw."""
        sums: Terms = {}
        seen = Seen([], denominators)
        for number, batch in enumerate(batches, 1):
            with self._transfer(last=number == len(batches)):
                with self._autocast():
                    loss, terms, hidden = self._objective(which, *batch, denominators)
                self._scaler.scale(loss).backward()
            sums = {name: sums[name] + term if sums else term for name, term in terms.items()}
            bias = batch[2]
            seen.parts.append((hidden, {name: bias[name] for name in self._losses.head_names}))
        return sums, seen

    def _step_heads(self, seen: Seen) -> None:
        """Step the heads alone on what they saw in one of the last steps."""
        self.optimizers["heads"].zero_grad()
        for hidden, bias in seen.parts:
            with self._autocast():
                loss = self._losses.of_heads(hidden, bias, seen.denominators)
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        average_gradients(self._parameters["heads"])
        self._step(["heads"])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, self._amp, self._amp is not None)

    def _transfer(self, *, last: bool) -> AbstractContextManager[None]:
        """Average gradients over the processes in the last backward only, which has the sums."""
        if isinstance(self._objective, DistributedDataParallel) and not last:
            return self._objective.no_sync()
        return nullcontext()

    def _step(self, names: Iterable[str]) -> None:
        for name in names:
            if self._clip_norm is not None:
                self._scaler.unscale_(self.optimizers[name])
                clip_grad_norm_(self._parameters[name], self._clip_norm)
            self._scaler.step(self.optimizers[name])
        self._scaler.update()

    def inference_modules(self) -> tuple[nn.Module, nn.Module]:
        """Return features and classifier, the averaged ones once averaging has begun."""
        network = self._network
        if self.averaged is not None and self.averaged.n_averaged > 0:
            network = cast(nn.Sequential, self.averaged.module)
        features, classifier = network
        return features, classifier

    def learning_rates(self) -> dict[str, float]:
        """Return the current learning rates as fields of a record."""
        fields = {"model": "learning_rate", "heads": "head_learning_rate"}
        return {fields[n]: part.param_groups[0]["lr"] for n, part in self.optimizers.items()}

    def recent_state(self) -> dict[str, Any]:
        """Return what further head steps draw from; each process has its own."""
        return self._head_steps.state_dict()

    def load_recent_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `recent_state` returned."""
        self._head_steps.load_state_dict(state, self._losses.device)

    def parts(self) -> dict[str, Any]:
        """Return everything that has a state_dict, by its name in a checkpoint."""
        features, classifier = self._network
        parts: dict[str, Any] = {"features": features, "classifier": classifier}
        parts |= {f"adversary:{name}": part for name, part in self._adversaries.items()}
        parts |= {f"optimizer:{name}": part for name, part in self.optimizers.items()}
        parts |= {f"scheduler:{name}": part for name, part in self._schedulers.items()}
        if isinstance(self._losses.task_weights, nn.Module):
            parts["task_weights"] = self._losses.task_weights
        if self.averaged is not None:
            parts["averaged"] = self.averaged
        if self._scaler.is_enabled():
            parts["scaler"] = self._scaler
        return parts


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
