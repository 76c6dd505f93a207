"""The bias head with its loss: honest training for the head, unlearning for the features."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from lnl_ext.adversary.linear_call import linear_call
from lnl_ext.adversary.linear_head import take_apart
from lnl_ext.adversary.reweighting import check_sample_weight, weigh_samples
from lnl_ext.adversary.two_gradients import Call, HeadCall, adversary_loss
from lnl_ext.coefficients import ScheduledCoefficients
from lnl_ext.ops import bias_loss as ops
from lnl_ext.ops.checks import (
    Coefficient,
    check_logits,
    check_options,
    check_target,
    check_weight,
)
from lnl_ext.ops.given_denominators import check_denominators
from lnl_ext.ops.types import BiasLoss
from lnl_ext.schedules import Schedule


class BiasAdversary(ScheduledCoefficients):
    """A bias head and its loss, from which the head and the features get different gradients.

    The value is ``CE - entropy_weight * H + confusion_weight * CE(uniform, p)`` of the head's
    prediction p of the bias. On the way back (Kim et al., CVPR 2019, eq. 9):

    ========================  ==========================================================
    the head's parameters     dCE, unscaled: the head is an honest predictor
    the features              ``-reversal * dCE - entropy_weight * dH``
                              ``+ confusion_weight * dCE(uniform, p)``
    ========================  ==========================================================

    The head runs forward once. Its backward runs twice, once for each gradient, or once if
    `entropy_weight` and `confusion_weight` are the number 0. With ``reversal=0``,
    ``entropy_weight=0`` and ``confusion_weight=1`` this is BlindEye (Alvi et al. 2018).

    Parameters
    ----------
    head
        Any module from features to bias logits ``(N, heads * C, *S)``. It is trained by whatever
        optimiser holds its parameters; frozen parameters get nothing.
    reversal
        The paper's mu, >= 0: a number, a 0-dim tensor, a schedule or its name
        (`lnl_ext.schedules`). The default is that of the authors' code.
    entropy_weight
        The paper's lambda, likewise.
    confusion_weight
        Weight of the confusion loss, likewise. It is counted over the sites of the entropy.
    heads
        Number of independent heads side by side in the logits; CE and H are summed over them.
    weight
        Class weights ``(C,)`` of CE, or None.
    ignore_index, label_smoothing, reduction
        As in `torch.nn.functional.cross_entropy`.
    mask_entropy
        Whether H leaves out the sites whose target is `ignore_index`.
    return_terms
        Whether to return `BiasLoss`, ``(loss, cross_entropy, entropy)``, instead of the loss.

    Attributes
    ----------
    reversal, entropy_weight, confusion_weight : Tensor
        0-dim persistent buffers. `set_progress` writes the scheduled ones; do so, too, to change a
        value by hand (``adversary.reversal.fill_(0.3)``). A write between forward and backward
        does not change the gradients of that forward.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type, negative, not finite or out of its range.

    Notes
    -----
    Of a head that is, or as an `nn.Sequential` ends in, an `nn.Linear` or a convolution of one
    position, that layer and the loss run as one operation, as in `lnl_ext.fused_linear_bias_loss`:
    the logits never exist whole. It is so for rows ``(N, D)`` and channels_last maps, on CPU and
    CUDA; in bfloat16 on the CPU for up to 32 logits (16 where the processor does not multiply it;
    likewise float16 where it does). Every other head runs as it is, and so
    does a layer that does more than its product (hooks, parametrizations, a subclass, a weight that
    the head uses twice, ``layer.compile()``),
    and several heads with given denominators. Where layers before the last one train and
    `entropy_weight` or `confusion_weight` is not the number 0, the last layer's product is made
    twice, because these layers and the features need different gradients of its input.

    Under ``torch.compile`` the adversary runs eagerly, between two graphs. A head that is compiled
    itself needs ``torch._functorch.config.donated_buffer = False``, as every graph that is walked
    twice does (torch says so), unless one walk is enough. Backward hooks on
    modules inside the head are called once per backward of the head. Double backward and
    ``torch.func`` transforms are errors: `lnl_ext.fused_bias_loss` has them.

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
        self.register_coefficient("reversal", reversal)
        self.register_coefficient("entropy_weight", entropy_weight)
        self.register_coefficient("confusion_weight", confusion_weight)
        self.register_buffer("weight", weight)
        self.heads = heads
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.mask_entropy = mask_entropy
        self.return_terms = return_terms

    # The head's graph is walked by hand in the backward, which torch.compile cannot trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
            are divided by, whatever `reduction` says. For a batch that is computed in parts, in
            several processes or one after the other, whose parts have different numbers of targets
            that are not ignored (`lnl_ext.training.batch_counts.count_sites`). The logits are read
            twice.
        sample_weight
            Shape ``(N,)``, floating point: a factor of each sample's terms, for the head as for the
            features. Not with ``reduction="mean"``, nor with `denominators`. With the weights of
            `lnl_ext.independence_weights` the head is to predict a bias that tells nothing about
            the label, so that features need not forget the label to fool it.

        Returns
        -------
        Tensor or BiasLoss
            A scalar, or ``(N, *S)`` with ``reduction="none"``; float32, or float64 for float64
            logits. With `return_terms` also CE and H, detached.

        Raises
        ------
        TypeError, ValueError
            The head's output or the target has the wrong type, dtype or shape, or a class is out
            of range.
        RuntimeError
            The features are on another device than the head, or a ``torch.func`` transform is
            active.
        """
        self._check_features(features)
        grad = torch.is_grad_enabled()
        inner = features.detach().requires_grad_(grad and features.requires_grad)
        parts = take_apart(self.head)
        tap = inner
        for module in () if parts is None else parts.before:
            tap = module(tap)
        # Sums per head, which given denominators need, are not what the linear operator returns.
        linear = parts is not None and parts.fits(tap) and (denominators is None or self.heads == 1)
        if parts is not None and linear:
            logits = parts.logits_stand_in(tap)
            requires_grad = any(t.requires_grad for t in (tap, *parts.layer.parameters()))
        else:
            logits = self.head(inner) if parts is None else parts.layer(tap)
            requires_grad = isinstance(logits, Tensor) and logits.requires_grad
        check_logits(logits, self.heads, "the head's output")
        check_target(target, logits, self.heads, self.ignore_index, "the head's output")
        check_weight(self.weight, logits, self.heads)
        reduction = self.reduction
        if sample_weight is not None:
            check_sample_weight(sample_weight, len(logits), reduction, denominators)
            reduction = "none"
        if denominators is not None:
            check_denominators(denominators, self.heads, reduction)
            reduction = "mean"

        differentiable = grad and requires_grad
        parameters = [p for p in self.head.parameters() if p.requires_grad and differentiable]
        # Copies, so that set_progress between forward and backward changes nothing.
        coefficients = (
            self.reversal.clone(),
            None if self.known_zero("entropy_weight") else self.entropy_weight.clone(),
            None if self.known_zero("confusion_weight") else self.confusion_weight.clone(),
        )
        options = ops.Options(
            self.ignore_index,
            self.label_smoothing,
            ops.REDUCTIONS[reduction],
            self.mask_entropy,
            self.heads,
        )
        call: Call
        if parts is not None and linear:
            call = linear_call(
                parts,
                inner,
                tap,
                target,
                self.weight,
                coefficients,
                denominators,
                options,
                parameters,
            )
        else:
            call = HeadCall(
                inner,
                logits,
                target,
                self.weight,
                *coefficients,
                denominators,
                options,
                for_features=differentiable and inner.requires_grad,
                for_head=bool(parameters),
            )
        result = adversary_loss(call, features, parameters)
        if sample_weight is not None:
            result = weigh_samples(result, sample_weight, self.reduction)
        if return_terms is None:
            return_terms = self.return_terms
        return result if return_terms else result.loss

    def extra_repr(self) -> str:
        """Show the coefficients, and the options that are not the default."""
        parts = [super().extra_repr()]
        defaults = {
            "heads": 1,
            "ignore_index": -100,
            "label_smoothing": 0.0,
            "reduction": "mean",
            "mask_entropy": False,
            "return_terms": False,
        }
        parts += [
            f"{name}={getattr(self, name)!r}"
            for name, default in defaults.items()
            if getattr(self, name) != default
        ]
        return ", ".join(parts)

    def _check_features(self, features: Tensor) -> None:
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a Tensor, got {type(features).__name__}")
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "BiasAdversary does not work under torch.func transforms (grad, vmap, jvp, ...): "
                "use lnl_ext.fused_bias_loss there"
            )
        devices = [t.device for t in chain(self.head.parameters(), self.head.buffers())]
        if devices and features.device not in devices:
            raise RuntimeError(
                f"features are on {features.device}, but the head is on {devices[0]}: "
                "move one of them"
            )
