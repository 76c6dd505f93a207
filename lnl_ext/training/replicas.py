"""The same networks in several processes: one module of all losses, whose gradients are averaged.

`torch.nn.parallel.DistributedDataParallel` averages gradients over the processes, and lets the
buffers of process 0 (the statistics of batch norm) be everybody's at every forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.coefficients import ScheduledCoefficients
from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.distributed import current
from lnl_ext.training.stepper import Stepper
from lnl_ext.training.updates import (
    FoolObjective,
    JointObjective,
    JointUpdate,
    Objective,
    PredictObjective,
    TaskLoss,
    Terms,
    TwoStepUpdate,
)


class Objectives(nn.Module):
    """Several objectives of the same networks as one module, which is what can be wrapped."""

    def __init__(self, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.objectives = nn.ModuleDict(objectives)

    def forward(self, name: str, *arguments: object) -> tuple[Tensor, Terms]:
        """Run the objective called ``name``."""
        result: tuple[Tensor, Terms] = self.objectives[name](*arguments)
        return result


def build_update(
    features: nn.Module,
    classifier: nn.Module,
    adversaries: Mapping[str, BiasAdversary],
    task_loss: TaskLoss,
    config: TrainerConfig,
    stepper: Stepper,
    sample_weights: Mapping[str, str],
    logit_adjustment: str | None,
) -> JointUpdate | TwoStepUpdate:
    """Return the update of `config`, over all connected processes.

    With several processes each must call it, and the networks of process 0 become everybody's.
    """
    parts = (features, classifier, adversaries, task_loss, sample_weights, logit_adjustment)
    objectives: dict[str, Objective] = {"joint": JointObjective(*parts)}
    two_step = config.update == "two_step" and bool(adversaries)
    if two_step:
        objectives |= {"fool": FoolObjective(*parts), "predict": PredictObjective(*parts)}
    if config.compile:
        for objective in objectives.values():
            objective.compile()
    run: dict[str, Callable[..., tuple[Tensor, Terms]]] = dict(objectives)
    if current().world_size > 1:
        # Step 2 of the authors' procedure has no gradient for the classifier.
        replica = _replicate(Objectives(objectives), unused=two_step)
        run = {name: functools.partial(replica, name) for name in objectives}
    joint = JointUpdate(run["joint"], stepper)
    return TwoStepUpdate(joint, run["fool"], run["predict"], stepper) if two_step else joint


def _replicate(objectives: Objectives, *, unused: bool) -> DistributedDataParallel:
    # A broadcast is a write, after which a coefficient is not known to be 0 any more.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        objectives, coefficient_buffers(objectives)
    )
    device = next(objectives.parameters()).device
    on_cpu = device.type == "cpu"
    # The replica lives as long as its trainer and keeps its group with it. Were that the group of
    # everything else, its threads could outlive `from_environment` and abort a process that ends.
    return DistributedDataParallel(
        objectives,
        device_ids=None if on_cpu else [device],
        process_group=dist.new_group(backend="gloo") if on_cpu else None,
        find_unused_parameters=unused,
    )


def coefficient_buffers(module: nn.Module) -> set[str]:
    """Return the names of the buffers in ``module`` that hold coefficients of losses."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, ScheduledCoefficients)
        for name in part.coefficient_names()
    }


def broadcast_buffers(modules: Iterable[nn.Module]) -> None:
    """Give every process the buffers of process 0, as its next forward in training would.

    For before an evaluation or a checkpoint. Coefficients are left out: the progress of the run
    sets them, alike in all processes.
    """
    if current().world_size == 1:
        return
    for module in modules:
        coefficients = coefficient_buffers(module)
        for name, buffer in module.named_buffers():
            if name not in coefficients:
                _broadcast(buffer)


def _broadcast(buffer: Tensor) -> None:
    whole = buffer.contiguous()
    dist.broadcast(whole, src=0)
    if whole is not buffer:
        with torch.no_grad():
            buffer.copy_(whole)
