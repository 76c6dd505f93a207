"""What makes the operators differentiable: one class, for given logits and for a linear head.

An operator takes its inputs, which may need gradients, the `LossArguments`, and two booleans:
whether to make the gradient of the first input, and those of the others, together with the value.
It returns the loss, its two terms, the denominators ``(heads, 2)`` and the gradients. The operator
called ``..._backward`` makes the gradients alone.

The formulas serve two purposes: registered with the operators they make these differentiable for
``torch.compile`` and for whoever calls them directly; in autograd.Functions they work under
torch.func as well, which registered formulas do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lnl_ext.ops.loss_arguments import NONE, TENSORS, LossArguments

Inputs = Sequence[Any]
Gradients = Sequence[Tensor | None]
Products = Callable[[Gradients, Tensor, Inputs, LossArguments], Gradients]

Scale = Callable[[Tensor, Tensor], Tensor]
"""Multiplies a gradient that waits by the upstream factor."""

_NO_GRADIENTS = (None,) * len(LossArguments._fields)


class DifferentiableLoss:
    """A loss made of an operator, which autograd can differentiate twice.

    Parameters
    ----------
    name
        The operator's, in the namespace lnl_ext.
    inputs
        How many arguments, the first ones, may need gradients.
    products
        Takes the vectors that come back for the gradients, the upstream factor, the inputs and the
        arguments, with the denominators. Returns the derivatives of the sum of the products of
        vectors and gradients: by the upstream factor and by the inputs.
    """

    def __init__(self, name: str, inputs: int, products: Products) -> None:
        self._inputs = inputs
        self._products = products
        self.operator = getattr(torch.ops.lnl_ext, name).default
        self._backward_operator = getattr(torch.ops.lnl_ext, f"{name}_backward").default
        # Errors, profiles and `grad_fn` show the names: BiasLoss, BiasLossGradients, ...
        title = name.title().replace("_", "")
        fast, under_transforms, gradients = _functions(self)
        self._fast: Any = type(title, (fast,), {})
        self._under_transforms: Any = type(title, (under_transforms,), {})
        self._gradients: Any = type(f"{title}Gradients", (gradients,), {})
        self._register()

    def __call__(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, which is differentiable, and its two terms, which are not.

        Takes the inputs and `LossArguments`. The gradients are made together with the value, from
        one read of the logits, and wait for the backward pass. Two cases wait for the upstream
        factor instead and read (or make) the logits again: float16 gradients, since a mean's would
        underflow before a loss scaler could save them, and ``reduction="none"``, where there is a
        factor per site.
        """
        *inputs, arguments = given
        early = tuple([t is not None and t.requires_grad for t in inputs])
        transformed = torch._C._are_functorch_transforms_active()
        recorded = (
            transformed
            or (True in early and torch.is_grad_enabled())
            # The operator knows no tangents and would drop them; the autograd.Function refuses.
            or forward_ad._current_level >= 0
        )
        # A trace is replayed with and without gradients, which is no reason for another graph.
        tracing = not torch.compiler.is_compiling() and torch._C._is_tracing()
        late = tracing or arguments.reduction == NONE or inputs[0].dtype == torch.float16
        if late or not recorded:
            early = (False,) * self._inputs
        if transformed:
            result = self._under_transforms.apply(*inputs, arguments, early)
        elif torch.compiler.is_compiling() or tracing:
            result = self.operator(*inputs, *arguments, *_flags(early))
        elif recorded:
            result = self._fast.apply(*inputs, arguments, early)
        else:
            result = self.values(*inputs, *arguments, *_flags(early))
        return result[:3]  # type: ignore[no-any-return]

    def values(self, *given: Any) -> tuple[Tensor, ...]:
        """Call the operator where no derivative is to be recorded, or torch.compile records.

        Its registered formula is Python code that the dispatcher enters even when gradients are
        off, as they are inside an autograd.Function: going past it takes a sixth off a small
        loss's step.
        """
        if torch.compiler.is_compiling():  # the dispatcher's guards are not for tracing
            return self.operator(*given)  # type: ignore[no-any-return]
        try:
            with torch._C._AutoDispatchBelowAutograd():
                result: tuple[Tensor, ...] = self.operator(*given)
        except RuntimeError as error:
            raise _named(error) from None
        return result

    def gradients(
        self,
        grad_loss: Tensor,
        inputs: Inputs,
        arguments: LossArguments,
        needs: Sequence[bool],
        held: Gradients,
    ) -> Gradients:
        """Return what `finish` does, as differentiable functions of `grad_loss` and `inputs`."""
        result: Gradients = self._gradients.apply(grad_loss, *inputs, arguments, needs, held)
        return result

    def finish(
        self,
        grad_loss: Tensor,
        inputs: Inputs,
        arguments: LossArguments,
        needs: Sequence[bool],
        held: Gradients,
        scale: Scale,
    ) -> Gradients:
        """Return the gradients that the inputs need: those `held` scaled, the others made now.

        `arguments` hold the denominators of the loss.
        """
        late = _flags([need and g is None for need, g in zip(needs, held, strict=True)])
        made = held
        if True in late:
            try:
                made = self._backward_operator(grad_loss, *inputs, *arguments, *late)
            except RuntimeError as error:  # the target may have been changed since
                raise _named(error) from None
        return [
            None if not need else now if g is None else scale(g, grad_loss)
            for need, g, now in zip(needs, held, made, strict=False)
        ]

    # ---- what the autograd.Functions and the registered formulas are made of

    def save(
        self,
        ctx: Any,
        inputs: Inputs,
        arguments: LossArguments,
        early: Sequence[bool],
        output: Sequence[Tensor],
    ) -> None:
        """Keep what `backward` needs; `early`: which inputs' gradients the output holds."""
        ctx.set_materialize_grads(False)  # zeros of the logits' size for outputs without gradient
        target, weight, _, *coefficients = arguments[:TENSORS]
        denominators, *gradients = output[3 : 4 + self._inputs]
        ctx.save_for_backward(*inputs, target, weight, denominators, *coefficients, *gradients)
        ctx.options = arguments[TENSORS:]
        ctx.early = early
        # A saved-tensor hook may hold on to what is saved, which must then stay as it is.
        ctx.owns = torch._C._autograd._top_saved_tensors_default_hooks(True) is None

    def backward(self, ctx: Any, grad_loss: Tensor | None, scale: Scale) -> Gradients:
        """Return the inputs' gradients."""
        n = self._inputs
        if grad_loss is None:
            return (None,) * n
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:n]
        early: tuple[bool, ...] = ctx.early
        if not ctx.owns:
            scale = torch.mul
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if needs == early and not twice:  # by far the most frequent case, without any detour
            return [
                scale(g, grad_loss) if need else None
                for g, need in zip(saved[-n:], needs, strict=True)
            ]
        held = [
            gradient if need and made else None
            for gradient, need, made in zip(saved[-n:], needs, early, strict=True)
        ]
        arguments = LossArguments(*saved[n : n + TENSORS], *ctx.options)
        given = (grad_loss, saved[:n], arguments, needs, held)
        return self.gradients(*given) if twice else self.finish(*given, scale)

    def save_gradients(
        self,
        ctx: Any,
        grad_loss: Tensor,
        inputs: Inputs,
        arguments: LossArguments,
        wanted: Sequence[bool],
    ) -> None:
        """Keep what `gradients_backward` needs; `wanted`: which gradients were made."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_loss, *inputs, *arguments[:TENSORS])
        ctx.options = arguments[TENSORS:]
        ctx.wanted = wanted

    def gradients_backward(self, ctx: Any, vectors: Gradients) -> Gradients:
        """Return the derivatives of the gradients, multiplied by `vectors` and added.

        By the upstream factor and the inputs.
        """
        vectors = [v if wanted else None for v, wanted in zip(vectors, ctx.wanted, strict=True)]
        if all(vector is None for vector in vectors):
            return (None,) * (1 + self._inputs)
        grad_loss, *saved = ctx.saved_tensors
        arguments = LossArguments(*saved[self._inputs :], *ctx.options)
        return self._products(vectors, grad_loss, saved[: self._inputs], arguments)

    def _register(self) -> None:
        """Register the formulas with the operators, which take every argument by itself."""
        n = self._inputs

        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            *given, first, others = inputs
            ctx.mark_non_differentiable(*output[1:])
            early = (first, *[others] * (n - 1))
            self.save(ctx, given[:n], LossArguments(*given[n:]), early, output)

        def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
            # Whoever calls the operator has the gradients, too: they must stay as they were.
            return (*self.backward(ctx, grads[0], torch.mul), *_NO_GRADIENTS, None, None)

        def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
            grad_loss, *given, first, others = inputs
            wanted = (first, *[others] * (len(output) - 1))
            self.save_gradients(ctx, grad_loss, given[:n], LossArguments(*given[n:]), wanted)

        def gradients_backward(ctx: Any, *vectors: Tensor | None) -> Gradients:
            return (*self.gradients_backward(ctx, vectors), *_NO_GRADIENTS, None, None)

        torch.library.register_autograd(self.operator, backward, setup_context=save)
        torch.library.register_autograd(
            self._backward_operator, gradients_backward, setup_context=save_gradients
        )


_scale_in_place = torch.ops.lnl_ext.scale_gradient_.default


def scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return ``gradient * factor``, in place where nobody will ask for the gradient again."""
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    if (
        traced
        or torch._C._autograd._get_current_graph_task_keep_graph()
        # Several factors at once: is_grads_batched, and what is vectorised.
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._functorch.is_legacy_batchedtensor(factor)
    ):
        return gradient * factor
    _scale_in_place(gradient, factor)
    return gradient


def _named(error: RuntimeError) -> Exception:
    """Return the error of a wrong class index as what it is; the operators know RuntimeErrors."""
    text = str(error)
    return IndexError(text) if text.startswith("target[") else error


def _flags(of_inputs: Sequence[bool]) -> tuple[bool, bool]:
    """Return what the operators take: for the first input, and for any of the others."""
    return of_inputs[0], True in of_inputs[1:]


def _functions(loss: DifferentiableLoss) -> tuple[Any, Any, Any]:
    """Make the autograd.Functions of a loss: the fast one, that for torch.func, the gradients'."""

    class Fast(torch.autograd.Function):
        """The loss and its terms, of the inputs, the arguments and whose gradients to make."""

        @staticmethod
        def forward(ctx: Any, *given: Any) -> Sequence[Tensor]:
            *inputs, arguments, early = given
            output = loss.values(*inputs, *arguments, early[0], True in early[1:])
            value, cross_entropy, entropy = output[:3]
            ctx.mark_non_differentiable(cross_entropy, entropy)
            loss.save(ctx, inputs, arguments, early, output)
            # A hook may hold on to what is saved, which must then stay as it is.
            ctx.owns = torch._C._autograd._top_saved_tensors_default_hooks(False) is None
            return value, cross_entropy, entropy

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
            scale = scaled_gradient if ctx.owns else torch.mul
            return (*loss.backward(ctx, grads[0], scale), None, None)

    class UnderTransforms(torch.autograd.Function):
        """The same in the form that torch.func needs, whose every call costs 50 microseconds more.

        It returns all that the operator does, because only that can be saved.
        """

        @staticmethod
        def forward(*given: Any) -> Sequence[Tensor]:
            *inputs, arguments, early = given
            try:
                output: Sequence[Tensor] = loss.operator(*inputs, *arguments, *_flags(early))
            except RuntimeError as error:
                raise _named(error) from None
            return output

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
            *tensors, arguments, early = inputs
            ctx.mark_non_differentiable(*output[1:])
            loss.save(ctx, tensors, arguments, early, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
            return (*loss.backward(ctx, grads[0], torch.mul), None, None)

    class Gradient(torch.autograd.Function):
        """The gradients of the loss as differentiable functions; takes what `finish` takes."""

        @staticmethod
        def forward(grad_loss: Tensor, *given: Any) -> Gradients:
            *inputs, arguments, needs, held = given
            return tuple(loss.finish(grad_loss, inputs, arguments, needs, held, torch.mul))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
            grad_loss, *tensors, arguments, needs, _ = inputs
            loss.save_gradients(ctx, grad_loss, tensors, arguments, needs)

        @staticmethod
        def backward(ctx: Any, *vectors: Tensor | None) -> Gradients:
            return (*loss.gradients_backward(ctx, vectors), *[None] * 3)

    return Fast, UnderTransforms, Gradient
