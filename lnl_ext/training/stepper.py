"""What moves the weights: optimisers, their learning rates, mixed precision, weight averaging."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lnl_ext.training.config import TrainerConfig


class Stepper:
    """The optimisers of a run and everything that goes with their steps.

    Parameters
    ----------
    network
        Features and classifier, one after the other.
    heads
        The parameters of the adversaries.
    config
        The configuration of the run.
    device_type
        ``"cpu"`` or ``"cuda"``.

    Attributes
    ----------
    optimizers : dict
        ``"model"`` for features and classifier, ``"heads"`` if any head learns.
    averaged : AveragedModel or None
        The moving average of `network`, buffers included.

    Raises
    ------
    ValueError
        If `network` has nothing to learn.
    """

    def __init__(
        self,
        network: nn.Sequential,
        heads: Iterable[nn.Parameter],
        config: TrainerConfig,
        device_type: str,
    ) -> None:
        self._network = network
        self._device_type = device_type
        self._amp = None if config.amp is None else cast(torch.dtype, getattr(torch, config.amp))
        self._configs = {"model": config.optimizer, "heads": config.head_optimizer}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        features, classifier = (_learning(module.parameters()) for module in network)
        classifier = [p for p in classifier if not any(p is shared for shared in features)]
        if features or classifier:
            self.optimizers["model"] = config.optimizer.build(
                features, classifier, rates=(1.0, config.classifier_rate)
            )
        if of_heads := _learning(heads):
            self.optimizers["heads"] = config.head_optimizer.build(of_heads)
        if "model" not in self.optimizers:
            raise ValueError("features and classifier have no parameter that requires a gradient")
        self._schedulers: dict[str, LRScheduler] = {}
        self._scaler = torch.amp.GradScaler(device_type, enabled=self._amp is torch.float16)
        self.averaged: AveragedModel | None = None
        if config.average_decay is not None:
            average = get_ema_multi_avg_fn(config.average_decay)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)

    def start(self, train_steps: int, steps_per_epoch: int) -> None:
        """Begin the learning rate schedules, which need the length of the training stage."""
        self._schedulers = {
            name: self._configs[name].build_scheduler(optimizer, train_steps, steps_per_epoch)
            for name, optimizer in self.optimizers.items()
        }

    def autocast(self) -> torch.autocast:
        """Return the context for a forward pass."""
        return torch.autocast(self._device_type, dtype=self._amp, enabled=self._amp is not None)

    def zero_gradients(self, *, set_to_none: bool) -> None:
        """Clear the gradients of all optimisers' parameters."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=set_to_none)

    def backward_and_step(self, loss: Tensor, names: Iterable[str]) -> None:
        """Back-propagate `loss`, scaled for float16, and step the optimisers called `names`."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for name in names:
            self._scaler.step(self.optimizers[name])
        self._scaler.update()

    def end_of_train_step(self) -> None:
        """Move the learning rates and the average; not called in the pretraining stage."""
        for scheduler in self._schedulers.values():
            scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self._network)

    def learning_rates(self) -> dict[str, float]:
        """Return the current learning rates as fields of a record."""
        fields = {"model": "learning_rate", "heads": "head_learning_rate"}
        return {
            fields[name]: optimizer.param_groups[0]["lr"]
            for name, optimizer in self.optimizers.items()
        }

    def parts(self) -> dict[str, Any]:
        """Return everything here that has a state_dict, by its name in a checkpoint."""
        parts: dict[str, Any] = {f"optimizer:{n}": part for n, part in self.optimizers.items()}
        parts |= {f"scheduler:{name}": part for name, part in self._schedulers.items()}
        if self.averaged is not None:
            parts["averaged"] = self.averaged
        if self._scaler.is_enabled():
            parts["scaler"] = self._scaler
        return parts


def _learning(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in dict.fromkeys(parameters) if p.requires_grad]
