"""The backends that the cases of bias_loss_cases.py run on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import emulated_cuda
import torch
from bias_loss_cases import Inputs, Results

import lnl_ext

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as the operators number them


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute the loss with both of its gradients: the operators or an emulation."""

    name: str
    device: torch.device
    """Where its tensors live."""
    run: Callable[[Inputs], Results]
    missing: Callable[[], str | None] = lambda: None
    """Says why it cannot run here, if it cannot."""


def scalar(value: float | None, device: torch.device) -> torch.Tensor | None:
    return None if value is None else torch.tensor(value, dtype=torch.float64, device=device)


def run_operators(inputs: Inputs, operators: Any = torch.ops.lnl_ext) -> Results:
    """Values from the forward operator, gradients from where the package takes them."""
    case = inputs.case
    device = inputs.logits.device
    arguments = (
        scalar(case.reversal, device),
        scalar(case.entropy_weight, device),
        scalar(case.confusion_weight, device),
        case.ignore_index,
        case.label_smoothing,
        REDUCTIONS[case.reduction],
        case.mask_entropy,
        case.heads,
    )
    early = case.dtype != torch.float16 and case.reduction != "none"
    tensors = (inputs.logits, inputs.target, inputs.weight)
    *values, denominators, gradient, head_gradient = operators.bias_loss(
        *tensors, None, *arguments, early, early
    )
    if early:
        for each in (gradient, head_gradient):
            operators.scale_gradient_(each, inputs.upstream)
    else:
        gradient, head_gradient = operators.bias_loss_backward(
            inputs.upstream, *tensors, denominators, *arguments, True, True
        )
    return Results(*values, gradient, head_gradient)


def cuda_missing() -> str | None:
    """Say why CUDA tensors cannot be tested here, or return None if they can.

    Raises
    ------
    RuntimeError
        There is a CUDA device and the package has nothing for it: not a reason to pass its tests.
    """
    if not torch.cuda.is_available():
        return "this machine has no CUDA device that torch can use"
    if not lnl_ext.build_info()["cuda"]:
        raise RuntimeError(
            "this machine has a CUDA device, and lnl_ext was built without CUDA: reinstall it with "
            "LNL_EXT_CUDA=1, or leave these tests out with -m 'not cuda and not slow'"
        )
    return None


BACKENDS = {
    "cpu": Backend("cpu", torch.device("cpu"), run_operators),
    "cuda": Backend("cuda", torch.device("cuda"), run_operators, cuda_missing),
    "emulated CUDA": Backend(
        "emulated CUDA",
        torch.device("cpu"),
        functools.partial(run_operators, operators=emulated_cuda),
        emulated_cuda.missing,
    ),
}
