"""The two ways to train on a batch: one joint step, or the two steps of the paper's authors.

Both read the coefficients of the adversaries as they stand; they differ in procedure only. In both
the entropy of an adversary is the sum over its heads, as everywhere in this package: the authors'
``0.01 * mean`` over three heads is ``entropy_weight=0.01 / 3``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lnl_ext.training.batches import Batch
from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.denominators import Counter, Denominators, Term
from lnl_ext.training.distributed import average_gradients, replicate
from lnl_ext.training.head_steps import HeadSteps, Seen
from lnl_ext.training.objective import Objective, Pass, Terms


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
        self._counter = Counter(self._adversaries, objective.sample_weights)
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
