"""The loss of a head that ends in a linear layer, whose logits never exist whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lnl_ext.adversary.linear_head import LinearHead
from lnl_ext.ops import bias_loss as ops
from lnl_ext.ops import linear_bias_loss as ops_linear
from lnl_ext.ops.given_denominators import divide_sums


class LinearCall(NamedTuple):
    """A forward pass of what is before the layer, and what the loss is made of.

    Rows are the samples or, with a convolution, the positions of all samples. It does for
    `lnl_ext.adversary.two_gradients.adversary_loss` what
    `lnl_ext.adversary.two_gradients.HeadCall` does, without
    logits.
    """

    inner: Tensor | None
    """What the head ran on: the features, cut from the outer graph."""
    tap: Tensor | None
    """The layer's input, with its graph."""
    rows: Tensor | None
    """``(N, D)``, the tap without graph, in the operator's dtype."""
    head_weight: Tensor | None
    """``(heads * C, D)``, likewise."""
    head_bias: Tensor | None
    target: Tensor | None
    """Class indices ``(N,)`` or ``(N, heads)``, or probabilities ``(N, heads * C)``."""
    weight: Tensor | None
    reversal: Tensor
    entropy_weight: Tensor | None
    """None where the term is left out, as for `confusion_weight`."""
    confusion_weight: Tensor | None
    denominators: Tensor | None
    """``(1, 2)``: what the sums of CE and H are divided by; None for the batch's own counts."""
    options: ops.Options
    tap_shape: torch.Size
    tap_dtype: torch.dtype
    early: bool
    """Whether the forward makes the gradients, see `lnl_ext.ops.bias_loss.bias_loss`."""
    for_features: bool
    """Whether the features need a gradient."""
    for_before: bool
    """Whether any parameter before the layer needs one."""
    for_layer: bool
    """Whether the layer's weight or bias needs one."""
    places: tuple[int | None, int | None]
    """Where the layer's weight and bias are among the parameters that need a gradient."""

    @property
    def tensors(self) -> int:
        """How many fields, the first ones, are tensors or None."""
        return 11

    @property
    def multiple(self) -> bool:
        """Whether the features' gradient is a multiple of the head's."""
        return self.entropy_weight is None and self.confusion_weight is None

    def calls(self) -> list[tuple[Sequence[Tensor | None], bool, bool]]:
        """Return, for each call of the operator, coefficients and which gradients it makes.

        The first call is the one whose values count. Parameters before the layer need dCE of its
        input, the features another gradient of it: one call cannot make both. Two calls make the
        logits twice, which for few classes takes no longer than the general path; for very many it
        takes longer, in a small part of its memory (``benchmarks/throughput.py adversary``).
        """
        coefficients = (self.reversal, self.entropy_weight, self.confusion_weight)
        if not self.for_before:
            return [(coefficients, self.for_features, self.for_layer)]
        honest = ((None, None, None), True, self.for_layer)
        return [honest] if self.multiple else [(coefficients, self.for_features, False), honest]

    def kept(self) -> LinearCall:
        """Return what the backward needs: no operands where the gradients are made already."""
        call = self
        if self.early:
            call = call._replace(
                rows=None, head_weight=None, head_bias=None, target=None, weight=None
            )
        if self.tap is self.inner:  # nothing to walk through
            call = call._replace(inner=None, tap=None)
        return call

    def values(self) -> Sequence[Tensor]:
        """Return loss, CE and H, and what `gradients` is to be given as `held`."""
        given = self.denominators is not None
        options = self.options._replace(reduction=ops.REDUCTIONS["none"]) if given else self.options
        calls = self.calls() if self.early else self.calls()[:1]
        results = [
            ops_linear.linear_bias_loss_values(
                self.rows,
                self.head_weight,
                self.head_bias,
                self.target,
                self.weight,
                *coefficients,
                *options,
                self.early and of_tap,
                self.early and of_layer,
            )
            for coefficients, of_tap, of_layer in calls
        ]
        loss, cross_entropy, entropy, own = results[0][:4]
        if self.denominators is not None:
            divided = divide_sums(loss, cross_entropy, entropy, self.denominators)
            return *divided, self.denominators
        if loss.dim() > 0:
            sites = (self.tap_shape[0], *self.tap_shape[2:])
            loss, cross_entropy, entropy = (
                value.reshape(sites) for value in (loss, cross_entropy, entropy)
            )
        if not self.early:
            return loss, cross_entropy, entropy, own
        made = [gradient for result in results for gradient in result[4:]]
        return loss, cross_entropy, entropy, *made

    def gradients(
        self, upstream: Tensor, held: Sequence[Tensor], parameters: Sequence[Tensor], keep: bool
    ) -> list[Tensor | None]:
        """Return the gradients of the features and of the parameters, None where there is none."""
        made = self._scaled(upstream, held, keep) if self.early else self._late(upstream, held)
        features: Tensor | None = None
        results: list[Tensor | None] = [None] * len(parameters)
        if self.for_before:
            features = self._walk_before(made, parameters, results, keep)
        elif self.for_features:
            features = self._maps(made[0])
            if self.tap is not None:
                (features,) = self._walk([self.inner], features, keep)
        for place, gradient in zip(self.places, made[-2:], strict=True):
            if place is not None:
                like = parameters[place]
                results[place] = gradient.to(like.dtype).reshape(like.shape)
        return [features, *results]

    def _walk_before(
        self,
        made: Sequence[Tensor],
        parameters: Sequence[Tensor],
        results: list[Tensor | None],
        keep: bool,
    ) -> Tensor | None:
        """Fill in the results of the parameters before the layer; return the features' gradient."""
        places = [i for i in range(len(parameters)) if i not in self.places]
        inputs: list[Tensor | None] = [parameters[i] for i in places]
        honest = self._maps(made[-3])
        features: Tensor | None = None
        if self.for_features and self.multiple:
            features, *walked = self._walk([self.inner, *inputs], honest, keep)
            features = None if features is None else features * -self.reversal
        else:
            walked = self._walk(inputs, honest, keep or self.for_features)
            if self.for_features:
                (features,) = self._walk([self.inner], self._maps(made[0]), keep)
        for i, gradient in zip(places, walked, strict=True):
            results[i] = gradient
        return features

    def _walk(
        self, inputs: Sequence[Tensor | None], start: Tensor, retain: bool
    ) -> list[Tensor | None]:
        """Take the tap's gradient through what is before the layer."""
        return list(
            torch.autograd.grad(
                self.tap,  # type: ignore[arg-type]
                inputs,  # type: ignore[arg-type]
                start,
                retain_graph=retain,
                allow_unused=True,
            )
        )

    def _scaled(self, upstream: Tensor, held: Sequence[Tensor], keep: bool) -> Sequence[Tensor]:
        """Return what the forward made, times the upstream factor."""
        if keep:
            held = [gradient.clone() for gradient in held]
        for gradient in held:
            if gradient.numel() > 0:
                torch.ops.lnl_ext.scale_gradient_(gradient, upstream)
        return held

    def _late(self, upstream: Tensor, held: Sequence[Tensor]) -> Sequence[Tensor]:
        """Make the gradients that the forward could not."""
        made: list[Tensor] = []
        for coefficients, of_tap, of_layer in self.calls():
            made += torch.ops.lnl_ext.linear_bias_loss_backward(
                upstream.reshape(-1) if upstream.dim() > 0 else upstream,
                self.rows,
                self.head_weight,
                self.head_bias,
                self.target,
                self.weight,
                held[0],
                *coefficients,
                *self.options,
                of_tap,
                of_layer,
            )
        return made

    def _maps(self, rows: Tensor) -> Tensor:
        """View a gradient of rows as one of the tap."""
        shape = self.tap_shape
        maps = rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return maps.to(self.tap_dtype)


def linear_call(
    head: LinearHead,
    inner: Tensor,
    tap: Tensor,
    target: Tensor,
    weight: Tensor | None,
    coefficients: tuple[Tensor, Tensor | None, Tensor | None],
    denominators: Tensor | None,
    options: ops.Options,
    parameters: Sequence[Tensor],
) -> LinearCall:
    """Return the call for a tap that `LinearHead.fits`.

    Parameters
    ----------
    head
        The head.
    inner, tap
        The features cut from the outer graph, and what came of them before the layer.
    target, weight
        As `lnl_ext.BiasAdversary` takes them.
    coefficients
        reversal, entropy_weight and confusion_weight.
    denominators
        As `lnl_ext.BiasAdversary` takes them; None with several heads.
    options
        Everything else.
    parameters
        Those parameters of the head that need a gradient.
    """
    layer = head.layer
    grad = torch.is_grad_enabled() and tap.requires_grad
    place = {id(p): i for i, p in enumerate(parameters)}
    places = (place.get(id(layer.weight)), place.get(id(layer.bias)))
    for_layer = any(each is not None for each in places)
    with torch.no_grad():
        rows = tap.detach().movedim(1, -1).reshape(-1, tap.shape[1])
        matrix = layer.weight.detach().flatten(1)
        bias = None if layer.bias is None else layer.bias.detach()
        rows, matrix, bias = ops_linear.autocast(rows, matrix, bias)
        if target.dim() > 1 and (target.is_floating_point() or options.heads > 1):
            target = target.movedim(1, -1).reshape(len(rows), -1)
        else:
            target = target.reshape(len(rows))
    return LinearCall(
        inner,
        tap,
        rows,
        matrix,
        bias,
        target,
        weight,
        *coefficients,
        denominators,
        options,
        tap.shape,
        tap.dtype,
        early=(
            rows.dtype != torch.float16
            and options.reduction != ops.REDUCTIONS["none"]
            and denominators is None
        ),
        for_features=grad and inner.requires_grad,
        for_before=grad and len(parameters) > sum(each is not None for each in places),
        for_layer=for_layer,
        places=places,
    )
