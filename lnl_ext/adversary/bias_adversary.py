"""The bias head with its loss: the unscaled gradient for the head, unlearning for the features."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from lnl_ext.adversary.linear_head import LinearHead, is_first_layer, steps, take_apart
from lnl_ext.adversary.loss_gradients import Operands, Wanted
from lnl_ext.adversary.refusals import check_classes, check_probabilities, misfit
from lnl_ext.adversary.reweighting import check_sample_weight, weigh_samples
from lnl_ext.adversary.two_gradients import Boundary, adversary_loss, enter_head, enter_layer
from lnl_ext.coefficients import ScheduledCoefficients
from lnl_ext.ops.checks import (
    check_denominators,
    check_has_shape,
    check_logits,
    check_options,
    check_target,
    check_weight,
    reduction_number,
)
from lnl_ext.ops.loss_arguments import Coefficient, LossArguments
from lnl_ext.ops.scale_gradient import scale_gradient
from lnl_ext.ops.types import BiasLoss
from lnl_ext.schedules import Schedule


class BiasAdversary(ScheduledCoefficients):
    """A bias head and its loss, from which the head and the features get different gradients.

    The value is ``CE - entropy_weight * H + confusion_weight * CE(uniform, p)`` of the head's
    prediction p of the bias. The backward pass gives (Kim et al., CVPR 2019, eq. 9):

    * the head: dCE, unscaled, so that it learns to predict the bias;
    * the features: ``-reversal * dCE - entropy_weight * dH`` plus
      ``confusion_weight * dCE(uniform, p)``.

    The head runs forward once. The head's gradient goes to everything that its logits depend on
    beside the features: its parameters, weights that another module owns, a second input of a
    conditional head. The head's backward runs twice, once for each gradient, or once if
    `entropy_weight` and `confusion_weight` are the number 0. With ``reversal=0``,
    ``entropy_weight=0`` and ``confusion_weight=1`` this is BlindEye (Alvi et al. 2018).

    Parameters
    ----------
    head
        Any module from features to bias logits ``(N, heads * C, *S)``. It is trained by whatever
        optimiser holds its parameters; frozen parameters get nothing.
    reversal
        The paper's mu, >= 0: a number, a 0-dim tensor, a schedule or its name
        (`lnl_ext.schedules`), with which it rises to the default. The default is that of the
        authors' code.
    entropy_weight
        The paper's lambda, likewise.
    confusion_weight
        Weight of the confusion loss, likewise. It is counted over the sites of the entropy.
    heads
        Number of independent heads side by side in the logits; CE and H are summed over them.
    weight
        Class weights ``(C,)`` of CE, or None.
    ignore_index
        As in `torch.nn.functional.cross_entropy`.
    label_smoothing
        Likewise.
    reduction
        Likewise: ``"mean"``, ``"sum"`` or ``"none"``.
    mask_entropy
        Whether H leaves out the sites whose target is `ignore_index`.
    return_terms
        Whether to return `BiasLoss`, ``(loss, cross_entropy, entropy)``, instead of the loss.

    Attributes
    ----------
    reversal, entropy_weight, confusion_weight : Tensor
        0-dim persistent buffers. `set_progress` writes the scheduled ones. Write to them to change
        a value by hand (``adversary.reversal.fill_(0.3)``). A write between forward and backward
        does not change the gradients of that forward. A value that was given as the number 0 is
        absent from the computation, and stays 0: it is in the state_dict, another value is not
        loaded, and a write raises at the next forward (not inside a compiled graph). Give
        ``torch.tensor(0.0)`` for a 0 that is to change.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type, negative, not finite or out of its range.

    Notes
    -----
    If the head is, or as an `nn.Sequential` ends in, an `nn.Linear` or a convolution of one
    position, that layer and the loss run as one operation, as in `lnl_ext.fused_linear_bias_loss`:
    the logits never exist as a whole. This holds for rows ``(N, D)`` and channels_last maps, on CPU
    and CUDA; on the CPU in bfloat16 for up to 16 logits, in float16 likewise where the processor
    has arithmetic for it. All other heads run as they are. So does a layer that does more than its
    product (hooks, parametrizations, a subclass, a wrapper, ``layer.compile()``) or whose weight
    the head uses twice. With terms beside CE, and
    layers before the last that may train, the last layer's product is computed twice, because
    these layers and the features need different gradients of its input.

    DistributedDataParallel, both FSDPs, DataParallel, checkpoints (non-reentrant ones inside the
    head) and ``torch.func.functional_call`` work as for any module. Backward hooks of modules
    inside the head are called once per backward of the head, hooks of parameters once, with dCE.
    A head that works in place on its input gets a copy of the features.

    With `entropy_weight` and `confusion_weight` the number 0 a step compiles to one graph. With
    other terms the adversary runs eagerly between two graphs, and a head that is compiled by itself
    needs ``torch._functorch.config.donated_buffer = False`` (the error says so), because its
    backward runs twice. Double backward and ``torch.func`` transforms are errors:
    `lnl_ext.fused_bias_loss` has them.

    Examples
    --------
    >>> adversary = BiasAdversary(nn.Linear(512, 12), reversal="ramp", entropy_weight=0.01)
    >>> features = network(images)
    >>> loss = task_loss(classifier(features), labels) + adversary(features, bias)
    >>> loss.backward()
    """

    reversal: Tensor
    entropy_weight: Tensor
    confusion_weight: Tensor
    weight: Tensor | None

    def __init__(
        self,
        head: nn.Module,
        *,
        reversal: Coefficient | Schedule | str = 0.1,
        entropy_weight: Coefficient | Schedule | str = 0.01,
        confusion_weight: Coefficient | Schedule | str = 0.0,
        heads: int = 1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        mask_entropy: bool = False,
        return_terms: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise TypeError(f"head: expected a torch.nn.Module, got {type(head).__name__}")
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ValueError(f"heads is {heads!r}, expected an int of at least 1")
        check_options(label_smoothing, reduction)
        self.head = head
        self.register_coefficient("reversal", reversal, full=0.1, absent_if_zero=True)
        self.register_coefficient("entropy_weight", entropy_weight, full=0.01, absent_if_zero=True)
        self.register_coefficient("confusion_weight", confusion_weight, absent_if_zero=True)
        self.register_buffer("weight", weight)
        self.heads = heads
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.mask_entropy = mask_entropy
        self.return_terms = return_terms

    def forward(
        self,
        features: Tensor,
        target: Tensor,
        return_terms: bool | None = None,
        *,
        denominators: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor | BiasLoss:
        """Return the loss of the head's prediction from `features`.

        Parameters
        ----------
        features
            What the head takes. They need no gradient: then only the head learns.
        target
            The bias: class indices ``(N, *S)`` (``(N, heads, *S)`` for several heads), int64; or
            probabilities of the logits' shape.
        return_terms
            Overrides the `return_terms` of the constructor.
        denominators
            Shape ``(heads, 2)``: what each head's sums of CE and of H (and of the confusion term)
            are divided by, with the reductions mean and sum alike. For a batch that is computed in
            parts, in several processes or one after the other, whose parts have different numbers
            of targets that are not ignored (`lnl_ext.training.denominators.count_sites`).
        sample_weight
            Shape ``(N,)``, floating point: a factor of each sample's terms, for the head as for the
            features. A mean is then over all sites, also those whose target is ignored. Not
            with `denominators`. With the weights of
            `lnl_ext.independence_weights` the head predicts a bias that is independent of the
            label, so that unlearning it does not unlearn the label.

        Returns
        -------
        Tensor or BiasLoss
            A scalar, or ``(N, *S)`` with ``reduction="none"``; float32, or float64 for float64
            logits. With `return_terms` also CE and H, detached.

        Raises
        ------
        TypeError, ValueError
            The head's output or the target has the wrong type, dtype or shape, the head has a
            single class or does not take the features, or probabilities on the CPU are negative or
            do not sum to 1 within 1e-3.
        IndexError
            A class is out of range (CPU).
        RuntimeError
            The features are on another device than the head, or a ``torch.func`` transform is
            active.
        """
        self.check_absent()
        compute = self._loss
        if torch.compiler.is_compiling() and not self._is_cross_entropy:
            compute = self._loss_outside_of_graphs
        result = compute(features, target, denominators, sample_weight)
        if return_terms is None:
            return_terms = self.return_terms
        return result if return_terms else result.loss

    @property
    def _is_cross_entropy(self) -> bool:
        """Whether CE is the only term, so that the features' gradient is a multiple of it."""
        return self.known_zero("entropy_weight") and self.known_zero("confusion_weight")

    def _loss(
        self,
        features: Tensor,
        target: Tensor,
        denominators: Tensor | None,
        sample_weight: Tensor | None,
    ) -> BiasLoss:
        self._check_features(features)
        run = self._run_head if torch.compiler.is_compiling() else self._run_head_or_say_why_not
        first, linear, boundary = run(features)
        logits = first if linear is None else linear.logits_stand_in(first)
        check_logits(logits, self.heads, "the head's output")
        check_classes(logits, self.heads, "the head's output", "A bias of two values has two")
        check_target(target, logits, self.heads, self.ignore_index, "the head's output")
        if target.is_floating_point():
            check_probabilities(target, self.heads)
        check_weight(self.weight, logits, self.heads)
        reduction = self.reduction
        if sample_weight is not None:
            check_sample_weight(sample_weight, len(logits), denominators)
            reduction = "none"
        if denominators is not None:
            check_denominators(denominators, self.heads, reduction)
            reduction = "mean"

        operands, for_layer = Operands(first), False
        if linear is not None:
            operands, target = linear.operands(first, target, self.heads)
            for_layer = any(p.requires_grad for p in linear.layer.parameters())
        grad = torch.is_grad_enabled()
        for_first = grad and first.requires_grad
        # The layer's input may get the features' gradient at once, if nothing else needs another.
        direct = linear is not None and linear.only_the_layer_trains
        arguments = LossArguments(
            target,
            self.weight,
            denominators,
            self.reversal,
            None if self.known_zero("entropy_weight") else self.entropy_weight,
            None if self.known_zero("confusion_weight") else self.confusion_weight,
            self.ignore_index,
            self.label_smoothing,
            reduction_number(reduction),
            self.mask_entropy,
            self.heads,
        )
        wanted = Wanted(
            for_features=for_first and (direct or boundary is not None),
            for_head=for_first and not direct,
            for_layer=grad and for_layer,
        )
        result = adversary_loss(operands, arguments, wanted, boundary if for_first else None)
        if reduction == "none" and linear is not None:
            result = BiasLoss(*(t.reshape(len(logits), *logits.shape[2:]) for t in result))
        if sample_weight is not None:
            result = weigh_samples(result, sample_weight, self.reduction)
        return result

    # Autograd is called by hand in the backward, which torch.compile cannot trace.
    _loss_outside_of_graphs = torch.compiler.disable(_loss)  # type: ignore[no-untyped-call]

    def _run_head_or_say_why_not(
        self, features: Tensor
    ) -> tuple[Tensor, LinearHead | None, Boundary | None]:
        try:
            return self._run_head(features)
        except (RuntimeError, ValueError) as error:
            if told := misfit(steps(self.head), features):
                raise ValueError(told) from error
            raise

    def _run_head(self, features: Tensor) -> tuple[Tensor, LinearHead | None, Boundary | None]:
        """Run the head to its logits, or to the input of a last layer that is one with the loss.

        Return that, the head taken apart in the second case, and the boundary of the features, if
        they need another gradient than the head.
        """
        linear = take_apart(self.head)
        if linear is None:
            logits, boundary = self._enter(steps(self.head), features)
            return logits, None, boundary
        if linear.only_the_layer_trains:
            hidden = _run(linear.before, _writable(self.head, features))
            if linear.fits(hidden):
                return hidden, linear, None
            logits, boundary = self._enter([linear.layer], hidden)
            return logits, None, boundary
        hidden, boundary = self._enter(linear.before, features)
        if linear.fits(hidden):
            return hidden, linear, boundary
        return linear.layer(hidden), None, boundary

    def _enter(self, modules: list[nn.Module], features: Tensor) -> tuple[Tensor, Boundary | None]:
        """Run modules one after the other; return the result, and the boundary of two gradients."""
        boundary = None
        if features.requires_grad and torch.is_grad_enabled():
            if self._is_cross_entropy:
                features = scale_gradient(features, -self.reversal)
            elif type(features) is Tensor and is_first_layer(modules[0]):
                output, boundary = enter_layer(modules[0], features, self.reversal)
                return _run(modules[1:], output), boundary
            else:
                features, boundary = enter_head(features, self.reversal)
        return _run(modules, _writable(modules[0], features)), boundary

    def _check_features(self, features: Tensor) -> None:
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a Tensor, got {type(features).__name__}")
        check_has_shape("features", features)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "BiasAdversary does not work under torch.func transforms: use "
                "lnl_ext.fused_bias_loss under grad and vjp, "
                "lnl_ext.reference.fused_bias_loss under vmap as well"
            )
        devices = [t.device for t in chain(self.head.parameters(), self.head.buffers())]
        if devices and features.device not in devices:
            raise RuntimeError(
                f"features are on {features.device}, but the head is on {devices[0]}: "
                "move one of them"
            )


def _run(modules: Iterable[nn.Module], features: Tensor) -> Tensor:
    for module in modules:
        features = module(features)
    return features


def _writable(head: nn.Module, features: Tensor) -> Tensor:
    """Return a copy of the features, unless the head is known not to write into its input.

    A layer of torch's own with parameters makes a new tensor. Anything else may work in place, and
    so may what a layer consists of.
    """
    first = steps(head)[0]
    is_layer = type(first).__module__.startswith("torch.nn.modules.") and not first._modules
    return features if is_layer and first._parameters else features.clone()
