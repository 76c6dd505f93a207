"""What a head is made of, as far as its first or last layer can be treated by itself."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from lnl_ext.adversary.loss_gradients import Operands
from lnl_ext.ops import bias_loss as ops
from lnl_ext.ops.linear_bias_loss import autocast

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
# For more outputs torch's own products in half precision are faster on the CPU
# (docs/performance.md). Without instructions for float16 torch's products of it are tens
# of times slower, whatever their width.
_BFLOAT16_OUTPUTS = 16
_FLOAT16_OUTPUTS = (
    16
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    else None
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LinearHead(NamedTuple):
    """A head taken apart."""

    before: list[nn.Module]
    """What runs before the layer, in this order."""
    layer: Layer

    @property
    def only_the_layer_trains(self) -> bool:
        """Whether nothing before the layer can have a gradient of its own.

        True where these are torch's modules without parameters. An own module may use tensors that
        it does not register.
        """
        return all(
            type(part).__module__.startswith("torch.nn.modules.")
            and next(part.parameters(), None) is None
            and not _is_watched(part)
            for module in self.before
            for part in module.modules()
        )

    def operands(self, hidden: Tensor, target: Tensor, heads: int) -> tuple[Operands, Tensor]:
        """Return the layer and its input as rows, and the target of these.

        Rows are the samples or, with a convolution, the positions of all samples.
        """
        rows = hidden.movedim(1, -1).reshape(-1, hidden.shape[1])
        operands = autocast(rows, self.layer.weight.flatten(1), self.layer.bias)
        if target.dim() > 1 and (target.is_floating_point() or heads > 1):
            target = target.movedim(1, -1).flatten(0, -2)
        else:
            target = target.reshape(len(rows))
        return Operands(*operands), target

    def fits(self, hidden: Tensor) -> bool:
        """Whether the layer's input can be taken as rows without a copy, in the layer's dtype.

        Maps can where they are channels_last; contiguous ones would have to be copied both ways.
        """
        weight = self.layer.weight
        if (
            type(hidden) is not Tensor
            or hidden.device != weight.device
            or not ops.has_kernel(hidden)
        ):
            return False
        if not (hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)):
            return False
        most = {torch.bfloat16: _BFLOAT16_OUTPUTS, torch.float16: _FLOAT16_OUTPUTS}.get(
            self.logits_stand_in(hidden).dtype
        )
        if hidden.device.type == "cpu" and most is not None and weight.shape[0] > most:
            return False
        if hidden.dim() != weight.dim() or hidden.shape[1] != weight.shape[1]:
            return False
        return isinstance(self.layer, nn.Linear) or hidden.movedim(1, -1).is_contiguous()

    def logits_stand_in(self, hidden: Tensor) -> Tensor:
        """Return a tensor of the logits' shape, dtype and device that holds a single element."""
        dtype, kind = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        shape = (hidden.shape[0], self.layer.weight.shape[0], *hidden.shape[2:])
        return hidden.new_empty((), dtype=dtype).expand(shape)


def steps(head: nn.Module) -> list[nn.Module]:
    """Return the modules of a head that run one after the other: of sequences their members.

    A module stays whole where skipping its own forward would be seen.
    """
    if not isinstance(head, nn.Sequential) or type(head).forward is not nn.Sequential.forward:
        return [head]
    if len(head) == 0 or _is_watched(head):
        return [head]
    return [step for member in head for step in steps(member)]


def take_apart(head: nn.Module) -> LinearHead | None:
    """Return a head that is, or as an `nn.Sequential` ends in, a linear layer or 1x1 convolution.

    None for every other head, and where skipping the layer's own forward would be seen: hooks,
    parametrizations, subclasses, a parameter that other parts of the head use as well.
    """
    *before, layer = steps(head)
    if not is_plain_layer(layer) or not _has_one_position(layer):
        return None
    own = {id(p) for p in layer.parameters()}
    if any(id(p) in own for module in before for p in module.parameters()):
        return None
    return LinearHead(before, layer)


def is_plain_layer(layer: nn.Module) -> TypeGuard[Layer]:
    """Whether the module is a linear layer or convolution of torch's and does nothing beside."""
    if type(layer) is not nn.Linear and type(layer) not in _CONVOLUTIONS:
        return False
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    plain = type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    return plain and "bias" in layer._parameters and not _is_watched(layer)


def is_first_layer(layer: nn.Module) -> TypeGuard[Layer]:
    """Whether `lnl_ext.adversary.two_gradients.enter_layer` knows the gradient of its input."""
    if not is_plain_layer(layer):
        return False
    if isinstance(layer, nn.Linear):
        return True
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _has_one_position(layer: Layer) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    ones = (1,) * len(layer.kernel_size)
    zeros = (0,) * len(ones)
    return (
        layer.kernel_size == layer.stride == ones
        and layer.padding in (zeros, "same", "valid")
        and layer.groups == 1
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return replaced or any(hooks)
