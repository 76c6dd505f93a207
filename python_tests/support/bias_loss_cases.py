"""What every backend of the bias loss is tested on: cases, their inputs, and the float64 oracle.

A backend is a function from `Inputs` to `Results`. The cases know nothing of it, so that one list
serves CPU tensors, CUDA tensors and emulated CUDA.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from lnl_ext.ops.formula import bias_terms
from lnl_ext.ops.loss_arguments import REDUCTIONS, LossArguments

# Rounding of one number in the dtype; half gradients are rounded once or, where a bfloat16 gradient
# made in the forward is scaled by the upstream factor, twice.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TOLERANCE = {  # relative, of values and of gradients' norms; what accumulates in float32 shares it
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 1e-6 + 2 * UNIT_ROUNDOFF[torch.float16],
    torch.bfloat16: 1e-6 + 2 * UNIT_ROUNDOFF[torch.bfloat16],
}
SUBNORMAL = {torch.float16: 2.0**-25}  # largest absolute rounding error below the normal numbers

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of one loss, small enough to print, from which `make_inputs` makes tensors."""

    rows: int = 4
    classes: int = 5
    space: tuple[int, ...] = ()
    heads: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    scale: float = 2.0  # standard deviation of the logits
    target: str = "index"  # or "probabilities"
    weighted: bool = False
    ignored: float = 0.0  # share of ignored targets
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    mask_entropy: bool = False
    entropy_weight: float = 0.0
    reversal: float | None = None
    confusion_weight: float | None = None
    upstream: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        changed = (
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )
        return ",".join(changed) or "default"


@dataclasses.dataclass
class Inputs:
    """The tensors of a case."""

    case: Case
    logits: Tensor
    target: Tensor
    weight: Tensor | None
    upstream: Tensor

    def to(self, device: torch.device) -> Inputs:
        """Return the inputs on `device`, strides as they are."""
        if device.type == "cpu":
            return self
        return Inputs(
            self.case,
            *(
                None if t is None else t.to(device, memory_format=torch.preserve_format)
                for t in (self.logits, self.target, self.weight, self.upstream)
            ),
        )


@dataclasses.dataclass
class Results:
    """What a backend returned. A gradient that it was not asked for is None."""

    loss: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    gradient: Tensor | None = None
    head_gradient: Tensor | None = None


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Return the values of a contiguous ``(N, C, *S)`` tensor in another memory layout."""
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # every second element of a larger tensor
        larger = values.new_full([2 * n + 1 for n in values.shape], math.nan)
        view = larger[tuple(slice(1, 2 * n + 1, 2) for n in values.shape)]
        return view.copy_(values)
    if layout == "transposed":  # dimensions stored in reverse order
        order = range(values.dim() - 1, -1, -1)
        return values.permute(*order).contiguous().permute(*order)
    if layout == "expanded":  # every row is the same memory
        return values[:1].expand(values.shape) if values.shape[0] else values
    assert layout == "contiguous"
    return values.contiguous()


def make_inputs(case: Case) -> Inputs:
    """Draw the tensors of `case` from its seed, on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    channels = case.heads * case.classes
    shape = (case.rows, channels, *case.space)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * case.scale
    logits = lay_out(logits.to(case.dtype), case.layout)
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
    if case.target == "probabilities":
        split = (case.rows, case.heads, case.classes, *case.space)
        target = torch.rand(split, generator=generator, dtype=torch.float64)
        target = (target / target.sum(2, keepdim=True)).reshape(shape).to(accumulate)
    else:
        sites = (case.rows, *((case.heads,) if case.heads > 1 else ()), *case.space)
        target = torch.randint(case.classes, sites, generator=generator)
        target[torch.rand(sites, generator=generator) < case.ignored] = case.ignore_index
    weight = None
    if case.weighted:
        weight = torch.rand(case.classes, generator=generator, dtype=accumulate) + 0.1
    upstream = torch.tensor(case.upstream, dtype=accumulate)
    if case.reduction == "none":
        each = torch.rand((case.rows, *case.space), generator=generator, dtype=accumulate)
        upstream = upstream * (each + 0.5)
    return Inputs(case, logits, target, weight, upstream)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, to which NaN for NaN and equal infinities add nothing."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return torch.where(same, 0.0, actual - expected).norm().item()


def size(parts: list[Tensor]) -> float:
    """Return the sum of the norms of the finite elements."""
    return sum(torch.where(part.isfinite(), part, 0.0).norm().item() for part in parts)


def oracle_terms(inputs: Inputs, logits: Tensor):
    """Return the reference's terms of float64 `logits`, each of which is to be differentiated."""
    case, target = inputs.case, inputs.target
    one = torch.ones(())  # a term of weight 0 would have no gradient
    arguments = LossArguments(
        target.double() if target.is_floating_point() else target,
        None if inputs.weight is None else inputs.weight.double(),
        entropy_weight=one,
        confusion_weight=None if case.confusion_weight is None else one,
        ignore_index=case.ignore_index,
        label_smoothing=case.label_smoothing,
        reduction=REDUCTIONS.index(case.reduction),
        mask_entropy=case.mask_entropy,
        heads=case.heads,
    )
    return bias_terms(logits, arguments)


def size_of_p(inputs: Inputs) -> tuple[float, float]:
    """Return the norms of the parts of dCE and of the confusion's gradient that p has in them.

    Both are a difference, ``p W - y`` and ``p - 1/C``. Where it is small, because p is near the
    target, the rounding of p is left: it is what the difference can be accurate to.
    """
    case = inputs.case
    split = (case.rows, case.heads, case.classes, *case.space)
    p = torch.softmax(inputs.logits.detach().double().reshape(split), 2)
    weight = torch.ones(case.classes) if inputs.weight is None else inputs.weight
    weight = weight.double()
    per_class = weight.reshape(-1, *(1,) * len(case.space))
    sites = [i for i in range(p.dim() - 1) if i != 1]
    upstream = inputs.upstream.double().abs()
    if upstream.dim():
        upstream = upstream.unsqueeze(1)
    if case.target == "probabilities":
        y = inputs.target.double().reshape(split)
        total, valid = (y * per_class).sum(2), torch.ones_like(y[:, :, 0])
        counted = valid
    else:
        index = inputs.target.reshape(case.rows, case.heads, *case.space)
        valid = (index != case.ignore_index).double()
        total = counted = valid * weight[torch.where(valid.bool(), index, 0)]
    smooth = weight.mean() * valid
    total = (1 - case.label_smoothing) * total + case.label_smoothing * smooth
    seen = valid if case.mask_entropy else torch.ones_like(valid)
    if case.reduction == "mean":
        total = total / counted.sum(sites, keepdim=True).clamp(min=1e-300)
        seen = seen / seen.sum(sites, keepdim=True).clamp(min=1e-300)
    factors = (upstream * total, upstream * seen)
    first, second = (size([p * factor.unsqueeze(2)]) for factor in factors)
    return first, second


def moved_by_rounding(inputs: Inputs, gradient: Tensor) -> Tensor:
    """Return how far the rounding of ``d = z - max z`` and of exp's argument moves each p_c.

    Both are exact to a half unit in the last place of d, so e^d is to |d| times that: 2e-6 at
    d = -20. `gradient` is what a change of each logit does; the result is ``(N, K, C, *S)``.
    """
    case = inputs.case
    split = (case.rows, case.heads, case.classes, *case.space)
    z = inputs.logits.detach().double().reshape(split)
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
    moved = (gradient.reshape(split) * (z - z.amax(2, keepdim=True))).abs()
    return 2 * UNIT_ROUNDOFF[accumulate] * torch.where(moved.isfinite(), moved, 0.0)


def assert_matches_oracle(inputs: Inputs, results: Results) -> None:
    """Hold `results`, on any device, against the float64 reference on the same logits, on the CPU.

    Values and gradients are compared norm by norm, relative to the norms of the terms that they
    are made of: between the terms, which the coefficients may set against each other, there is no
    relative accuracy to be had. Nor is there any beyond what the logits' own rounding leaves.
    """
    case = inputs.case
    logits = inputs.logits.detach().double().requires_grad_()
    terms = oracle_terms(inputs, logits)
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[accumulate]
    coefficients = (1.0, -case.entropy_weight, case.confusion_weight or 0.0)

    def derivative(term: Tensor | None, upstream: Tensor) -> Tensor | None:
        return None if term is None else torch.autograd.grad(term, logits, upstream, True)[0]

    def close(name: str, actual: Tensor, parts: list[Tensor], moved: list[float]):
        expected = sum(parts)
        assert actual.dtype == accumulate, name
        assert actual.shape == expected.shape, name
        difference = distance(actual.cpu().double(), expected)
        assert difference <= tolerance * size(parts) + sum(moved), (
            f"{name} is off by {difference:.3g}, norm {expected.norm():.6g}, in case {case}"
        )

    values: list[Tensor] = []
    moved: list[float] = []
    for term in terms:
        if term is not None:
            change = moved_by_rounding(inputs, derivative(term, torch.ones_like(term)))
            change = change.sum((1, 2)) if case.reduction == "none" else change.sum()
            values.append(term.detach())
            moved.append(change.norm().item())
    close("cross_entropy", results.cross_entropy, values[:1], moved[:1])
    close("entropy", results.entropy, values[1:2], moved[1:2])
    # zip ends where there is no confusion term
    values = [c * value for c, value in zip(coefficients, values, strict=False)]
    moved = [abs(c) * each for c, each in zip(coefficients, moved, strict=False)]
    close("loss", results.loss, values, moved)

    gradients = [derivative(term, inputs.upstream.double()) for term in terms]
    p_size = size_of_p(inputs)
    # With one class as the target the difference is made of the other classes' p, which is exact.
    one_hot = case.target == "index" and case.label_smoothing == 0
    # The absolute part is float16's rounding of numbers too small for relative accuracy.
    floor = SUBNORMAL.get(case.dtype, 0.0) * math.sqrt(logits.numel())

    def close_gradient(name: str, actual: Tensor, parts: list[Tensor], p_size: float):
        assert actual.dtype == case.dtype, name
        expected = sum(parts)
        assert actual.shape == expected.shape, name
        difference = distance(actual.cpu().double(), expected)
        bound = TOLERANCE[case.dtype] * size(parts) + tolerance * p_size + floor
        for part in parts:
            change = moved_by_rounding(inputs, part)
            bound += change.norm().item() + change.sum(2).norm().item()
        assert difference <= bound, (
            f"{name} is off by {difference:.3g}, norm {expected.norm():.6g}, in case {case}"
        )

    if results.head_gradient is not None:
        near = 0.0 if one_hot else p_size[0]
        close_gradient("head_gradient", results.head_gradient, [gradients[0]], near)
    if results.gradient is not None:
        first = 1.0 if case.reversal is None else -case.reversal
        factors = (first, *coefficients[1:])
        parts = [f * g for f, g in zip(factors, gradients, strict=True) if g is not None]
        near = 0.0 if one_hot else abs(first) * p_size[0]
        near += abs(coefficients[2]) * p_size[1]
        close_gradient("gradient", results.gradient, parts, near)


@st.composite
def cases(draw: st.DrawFn, confusion: bool = False) -> Case:
    """Any case of up to some thousand elements; `confusion` admits the adversary's third term."""
    space = draw(
        st.one_of(
            st.just(()),
            st.tuples(st.integers(0, 70)),
            st.tuples(st.integers(1, 9), st.integers(1, 9)),
            st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
        )
    )
    target = draw(st.sampled_from(("index", "index", "probabilities")))
    classes = draw(st.one_of(st.integers(1, 20), st.sampled_from((31, 32, 33, 64, 65, 130))))
    some_class = st.integers(0, classes - 1)
    ignore_index = st.one_of(st.just(-100), st.just(-1), some_class, st.just(255))
    return Case(
        rows=draw(st.one_of(st.integers(0, 9), st.sampled_from((17, 33, 66)))),
        classes=classes,
        space=space,
        heads=draw(st.sampled_from((1, 1, 1, 2, 3))),
        dtype=draw(
            st.sampled_from(
                (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
            )
        ),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from((0.01, 1.0, 5.0, 30.0))),
        target=target,
        weighted=draw(st.booleans()),
        ignored=draw(st.sampled_from((0.0, 0.3, 0.9))) if target == "index" else 0.0,
        ignore_index=draw(ignore_index) if target == "index" else -100,
        label_smoothing=draw(st.sampled_from((0.0, 0.0, 0.1, 1.0))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        mask_entropy=draw(st.booleans()),
        entropy_weight=draw(st.sampled_from((0.0, 0.01, 1.5))),
        reversal=draw(st.sampled_from((None, 0.0, 0.1, 2.0))),
        confusion_weight=draw(st.sampled_from((None, 0.5))) if confusion else None,
        upstream=draw(st.sampled_from((1.0, 0.3, -2.0))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
