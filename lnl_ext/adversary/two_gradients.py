"""The loss of a head that has run already, and its two gradients: the head's and the features'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lnl_ext.ops import bias_loss as ops
from lnl_ext.ops.formula import BiasTerms, bias_terms, combine, is_zero
from lnl_ext.ops.given_denominators import divide_sums, divide_terms, fold_heads
from lnl_ext.ops.types import BiasLoss

_REDUCTION_NAMES = {number: name for name, number in ops.REDUCTIONS.items()}


class Call(Protocol):
    """A forward pass of a head, which knows its loss and the gradients of it.

    A named tuple.
    """

    @property
    def tensors(self) -> int:
        """How many fields, the first ones, are tensors or None."""

    @property
    def for_features(self) -> bool:
        """Whether the features need a gradient."""

    def kept(self) -> Any:
        """Return the call without what the backward does not need."""

    def values(self) -> Sequence[Tensor]:
        """Return loss, CE and H, and what `gradients` is to be given as `held`."""

    def gradients(
        self, upstream: Tensor, held: Sequence[Tensor], parameters: Sequence[Tensor], keep: bool
    ) -> list[Tensor | None]:
        """Return the gradients of the features and of the parameters, None where there is none.

        `keep` tells that the backward may be asked for again.
        """


class HeadCall(NamedTuple):
    """A forward pass of any head, up to its logits."""

    inner: Tensor
    """What the head ran on: the features, cut from the outer graph."""
    logits: Tensor
    """What it returned, ``(N, heads * C, *S)``, with the head's graph."""
    target: Tensor
    weight: Tensor | None
    reversal: Tensor
    entropy_weight: Tensor | None
    """None where the term is left out, as for `confusion_weight`."""
    confusion_weight: Tensor | None
    denominators: Tensor | None
    """``(heads, 2)``: what the sums of CE and H are divided by; None for the batch's own counts."""
    options: ops.Options
    for_features: bool
    """Whether the features need a gradient."""
    for_head: bool
    """Whether any parameter of the head needs one."""

    @property
    def tensors(self) -> int:
        """How many fields, the first ones, are tensors or None."""
        return 8

    @property
    def one_walk(self) -> bool:
        """Whether the features' gradient is a multiple of what the head sends back for its own."""
        multiple = self.entropy_weight is None and self.confusion_weight is None
        return multiple and self.for_features and self.for_head

    @property
    def logit_gradients(self) -> tuple[bool, bool]:
        """Which gradients for the logits are needed: the features' and the head's."""
        return self.for_features and not self.one_walk, self.for_head

    def kept(self) -> HeadCall:
        """Return everything: the logits carry the head's graph."""
        return self

    def values(self) -> Sequence[Tensor]:
        """Return loss, CE and H, and what `gradients` is to be given as `held`."""
        return _kernel_forward(self) if ops.has_kernel(self.logits) else _plain_forward(self)

    def gradients(
        self, upstream: Tensor, held: Sequence[Tensor], parameters: Sequence[Tensor], keep: bool
    ) -> list[Tensor | None]:
        """Return the gradients of the features and of the parameters, None where there is none."""
        compute = _kernel_backward if ops.has_kernel(self.logits) else _plain_backward
        gradient, head_gradient = compute(self, upstream, held, keep)
        return _walk_head(self, parameters, gradient, head_gradient, keep)


def adversary_loss(call: Call, features: Tensor, parameters: Sequence[Tensor]) -> BiasLoss:
    """Return the loss, whose backward gives the head and the features their gradients.

    The head gets dCE; the features get ``-reversal * dCE - entropy_weight * dH`` and the confusion
    term's (Kim et al., CVPR 2019, eq. 9).

    Parameters
    ----------
    call
        The head's forward pass.
    features
        The features with their graph.
    parameters
        The head's parameters that require a gradient.
    """
    seen = features if call.for_features else features.detach()
    return BiasLoss(*_AdversaryLoss.apply(call, seen, *parameters))


class _AdversaryLoss(torch.autograd.Function):
    """Joins the head's graph, which it walks by itself, to the outer one.

    `features` and `parameters` only tell autograd where the gradients go.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, features: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, cross_entropy, entropy, *held = call.values()
        ctx.mark_non_differentiable(cross_entropy, entropy)
        kept = call.kept()
        ctx.save_for_backward(*kept[: call.tensors], features, *held)
        ctx.make, ctx.tensors, ctx.rest = kept._make, call.tensors, kept[call.tensors :]
        # Not saved: writing to a parameter before the backward is an error only where the head's
        # own graph needs its old value.
        ctx.parameters = parameters
        return loss, cross_entropy, entropy

    @staticmethod
    # Else torch.compile traces it where a compiled step calls backward.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Read first: the walks below are graph tasks of their own.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        twice = torch.is_grad_enabled()
        saved = ctx.saved_tensors
        call: Call = ctx.make([*saved[: ctx.tensors], *ctx.rest])
        features, *held = saved[ctx.tensors :]
        with torch.no_grad():
            results = call.gradients(grads[0], held, ctx.parameters, keep)
        if twice:
            results = [
                None if g is None else _NoSecondDerivative.apply(g, features, *ctx.parameters)
                for g in results
            ]
        return None, *results


def _kernel_forward(call: HeadCall) -> Sequence[Tensor]:
    if call.denominators is not None:
        # The operator divides by its own counts where it makes gradients: those wait as well.
        logits, target = fold_heads(call.logits.detach(), call.target, call.options.heads)
        loss, cross_entropy, entropy, *_ = torch.ops.lnl_ext.bias_loss(
            logits,
            target,
            call.weight,
            call.reversal,
            call.entropy_weight,
            call.confusion_weight,
            *call.options._replace(reduction=ops.REDUCTIONS["none"], heads=1),
            False,
            False,
        )
        divided = divide_sums(loss, cross_entropy, entropy, call.denominators)
        return *divided, call.denominators
    # A mean's gradient in float16 would underflow before the upstream factor of a loss scaler can
    # save it, and without a reduction there is a factor per site: those gradients wait for it.
    early = call.logits.dtype != torch.float16 and call.options.reduction != ops.REDUCTIONS["none"]
    for_features, for_head = call.logit_gradients
    result = ops.bias_loss_values(
        call.logits.detach(),
        call.target,
        call.weight,
        call.reversal,
        call.entropy_weight,
        call.confusion_weight,
        *call.options,
        early and for_features,
        early and for_head,
    )
    return result if early else result[:4]


def _kernel_backward(
    call: HeadCall, upstream: Tensor, held: Sequence[Tensor], keep: bool
) -> Sequence[Tensor]:
    denominators, *gradients = held
    if not gradients:
        result: Sequence[Tensor] = torch.ops.lnl_ext.bias_loss_backward(
            upstream,
            call.logits.detach(),
            call.target,
            call.weight,
            denominators,
            call.reversal,
            call.entropy_weight,
            call.confusion_weight,
            *call.options,
            *call.logit_gradients,
        )
        return result
    if keep:
        gradients = [gradient.clone() for gradient in gradients]
    for gradient in gradients:
        torch.ops.lnl_ext.scale_gradient_(gradient, upstream)
    return gradients


def _plain_terms(call: HeadCall, logits: Tensor, unregularised: bool | Tensor = False) -> BiasTerms:
    options, target = call.options, call.target
    if call.denominators is not None:
        logits, target = fold_heads(logits, target, options.heads)
        options = options._replace(reduction=ops.REDUCTIONS["none"], heads=1)
    terms = bias_terms(
        logits,
        target,
        call.weight,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        reduction=_REDUCTION_NAMES[options.reduction],
        mask_entropy=options.mask_entropy,
        heads=options.heads,
        confusion=call.confusion_weight is not None,
        unregularised=unregularised,
    )
    return terms if call.denominators is None else divide_terms(terms, call.denominators)


def _plain_forward(call: HeadCall) -> Sequence[Tensor]:
    terms = _plain_terms(call, call.logits.detach())
    loss = combine(
        terms,
        reversal=None,
        entropy_weight=call.entropy_weight,
        confusion_weight=call.confusion_weight,
    )
    # A copy, because an autograd.Function must not return one tensor twice.
    return loss.clone(), terms.cross_entropy, terms.entropy


def _plain_backward(
    call: HeadCall, upstream: Tensor, held: Sequence[Tensor], keep: bool
) -> Sequence[Tensor | None]:
    gradient = head_gradient = None
    for_features, for_head = call.logit_gradients
    with torch.enable_grad():
        logits = call.logits.detach().requires_grad_()
        if for_head:
            cross_entropy = _plain_terms(call, logits, True).cross_entropy
            (head_gradient,) = torch.autograd.grad(cross_entropy, logits, upstream)
        if for_features:
            zero = is_zero(call.entropy_weight) & is_zero(call.confusion_weight)
            loss = combine(
                _plain_terms(call, logits, zero),
                reversal=call.reversal,
                entropy_weight=call.entropy_weight,
                confusion_weight=call.confusion_weight,
            )
            (gradient,) = torch.autograd.grad(loss, logits, upstream)
    return gradient, head_gradient


def _walk_head(
    call: HeadCall,
    parameters: Sequence[Tensor],
    gradient: Tensor | None,
    head_gradient: Tensor | None,
    keep: bool,
) -> list[Tensor | None]:
    """Take the logits' gradients through the head; return those of the features and parameters."""

    def walk(
        inputs: Sequence[Tensor], start: Tensor | None, retain: bool
    ) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            call.logits, inputs, start, retain_graph=retain, allow_unused=True
        )

    if call.one_walk:
        first, *others = walk([call.inner, *parameters], head_gradient, keep)
        return [None if first is None else first * -call.reversal, *others]
    results: list[Tensor | None] = []
    if call.for_head:
        results += walk(parameters, head_gradient, keep or call.for_features)
    if call.for_features:
        return [*walk([call.inner], gradient, keep), *results]
    return [None, *results]


class _NoSecondDerivative(torch.autograd.Function):
    """Marks a gradient that has no derivative, so that asking for one is a clear error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "BiasAdversary has no second derivative: for a gradient penalty or another double "
            "backward use lnl_ext.fused_bias_loss on the head's logits"
        )
