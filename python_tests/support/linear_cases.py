"""Cases of the linear bias loss: those of bias_loss_cases.py, with features and a head."""

from __future__ import annotations

import dataclasses

import torch
from bias_loss_cases import UNIT_ROUNDOFF, Case, Inputs, make_inputs, oracle_terms, size_of_p
from hypothesis import strategies as st
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """A case of the loss, whose logits come from features of some width."""

    loss: Case
    width: int = 16
    biased: bool = True
    layout: str = "contiguous"  # of the features: or "transposed", "sliced"

    def __str__(self) -> str:
        return f"{self.loss},width={self.width},biased={self.biased},layout={self.layout}"


@dataclasses.dataclass
class LinearInputs:
    """The tensors of a case; `options` are the keywords that every version of the loss takes."""

    case: LinearCase
    features: Tensor
    head_weight: Tensor
    head_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    upstream: Tensor

    @property
    def options(self) -> dict:
        case = self.case.loss
        return {
            "entropy_weight": case.entropy_weight,
            "reversal": case.reversal,
            "ignore_index": case.ignore_index,
            "label_smoothing": case.label_smoothing,
            "reduction": case.reduction,
            "mask_entropy": case.mask_entropy,
            "heads": case.heads,
        }

    @property
    def differentiable(self) -> list[Tensor]:
        return [t for t in (self.features, self.head_weight, self.head_bias) if t is not None]


def make_linear_inputs(case: LinearCase) -> LinearInputs:
    """Draw the tensors of `case` from its seed, on the CPU."""
    loss = make_inputs(case.loss)  # for its target, weight and upstream factor
    generator = torch.Generator().manual_seed(case.loss.seed + 1)
    rows, outputs, width = case.loss.rows, case.loss.heads * case.loss.classes, case.width

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    features = draw(rows, width).to(case.loss.dtype)
    if case.layout == "transposed":
        features = features.t().contiguous().t()
    elif case.layout == "sliced":
        features = torch.stack([features, features], 2).flatten(1)[:, ::2]
    scale = case.loss.scale / max(1, width) ** 0.5
    head_weight = (draw(outputs, width) * scale).to(case.loss.dtype)
    head_bias = draw(outputs).to(case.loss.dtype) if case.biased else None
    return LinearInputs(
        case, features, head_weight, head_bias, loss.target, loss.weight, loss.upstream
    )


@dataclasses.dataclass
class LinearResults:
    """What a version of the loss returned, and the gradients of `LinearInputs.differentiable`."""

    loss: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    gradients: list[Tensor]


def run(function, inputs: LinearInputs, dtype: torch.dtype | None = None) -> LinearResults:
    """Run a version of the loss and its backward, in another dtype if one is given."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype or tensor.dtype).detach()

    tensors = [leaf(t) for t in (inputs.features, inputs.head_weight, inputs.head_bias)]
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    weight = inputs.weight if dtype is None else leaf(inputs.weight)
    target = inputs.target
    if dtype is not None and target.is_floating_point():
        target = target.to(dtype)
    result = function(
        tensors[0], tensors[1], target, tensors[2], weight, **inputs.options, return_terms=True
    )
    gradients = torch.autograd.grad(result.loss, leaves, inputs.upstream.to(result.loss.dtype))
    return LinearResults(*(t.detach() for t in result), list(gradients))


def magnitude(inputs: LinearInputs) -> list[float]:
    """Return the norms of the sums of absolute products that the gradients are the small rest of.

    In float64, with the logits' gradients G of each term: ``|G| |W|``, ``|G|^T |X|`` and the column
    sums of ``|G|``. A product accumulated in float32 is accurate to a small multiple of its units.
    """
    x, w = inputs.features.double(), inputs.head_weight.double()
    b = 0.0 if inputs.head_bias is None else inputs.head_bias.double()
    logits = (x @ w.t() + b).requires_grad_()
    case = inputs.case.loss
    loss = Inputs(case, logits, inputs.target, inputs.weight, inputs.upstream)
    terms = oracle_terms(loss, logits)
    upstream = inputs.upstream.double()
    ce, h = (torch.autograd.grad(t, logits, upstream, True)[0].abs() for t in terms[:2])
    # where dCE = p W - y is small, the rounding of p is left
    p_size = size_of_p(loss)[0]
    for_features = (1.0 if case.reversal is None else case.reversal) * ce + case.entropy_weight * h
    for_head = ce + (case.entropy_weight * h if case.reversal is None else 0.0)
    norms = [
        (for_features @ w.abs()).norm().item() + p_size * w.norm().item(),
        (for_head.t() @ x.abs()).norm().item() + p_size * x.norm().item(),
        for_head.sum(0).norm().item() + p_size * len(x) ** 0.5,
    ]
    return norms[: len(inputs.differentiable)]


def assert_linear_matches(
    inputs: LinearInputs,
    results: LinearResults,
    expected: LinearResults,
    roundings: float = 8.0,
    rounded_factors: bool = False,
) -> None:
    """Hold results against those of the float64 reference.

    Values within 1e-6 of the size of their terms, gradients within `roundings` units of the
    accumulation dtype of what they are sums of (more for more rows, by their square root), and one
    rounding, or for a bfloat16 gradient that is scaled afterwards two, of the tensors' own dtype.
    With `rounded_factors` the logits' gradients have been rounded to that dtype before they were
    multiplied, as those of torch's own linear layer are.
    """
    case = inputs.case.loss
    dtype = case.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    unit = UNIT_ROUNDOFF[accumulate]
    spread = roundings * (1 + max(case.rows, inputs.case.width) ** 0.5) * (1 + case.scale)

    def finite(tensor: Tensor) -> Tensor:
        return torch.where(tensor.isfinite(), tensor, 0.0)

    def difference(actual: Tensor, wanted: Tensor) -> float:
        actual = actual.double()
        same = (actual == wanted) | (actual.isnan() & wanted.isnan())
        return torch.where(same, 0.0, actual - wanted).norm().item()

    size = (
        finite(expected.cross_entropy).norm()
        + case.entropy_weight * finite(expected.entropy).norm()
    )
    for name in ("loss", "cross_entropy", "entropy"):
        actual, wanted = getattr(results, name), getattr(expected, name)
        assert actual.dtype == accumulate, name
        assert actual.shape == wanted.shape, name
        bound = spread * unit * (size.item() + finite(wanted).norm().item() + 1.0)
        assert difference(actual, wanted) <= bound, (name, str(inputs.case))
    names = ("features", "head_weight", "head_bias")
    floor = 2.0**-24 if dtype == torch.float16 else 0.0
    x, w = (tensor.double().abs() for tensor in inputs.differentiable[:2])
    # What one least number in every factor comes to.
    least = (w.sum(0).norm() * len(x) ** 0.5, x.sum(0).norm() * len(w) ** 0.5, 0.0)
    for name, actual, wanted, size_, least_, tensor in zip(
        names, results.gradients, expected.gradients, magnitude(inputs), least,
        inputs.differentiable, strict=False,
    ):  # fmt: skip
        assert actual.dtype == dtype, name
        assert actual.shape == tensor.shape, name
        bound = spread * unit * size_ + floor * actual.numel() ** 0.5
        if dtype != accumulate:
            bound += 2 * UNIT_ROUNDOFF[dtype] * finite(wanted).norm().item()
            if rounded_factors and name != "head_bias":
                bound += UNIT_ROUNDOFF[dtype] * size_ + floor * float(least_)
        assert difference(actual, wanted) <= bound, (
            f"{name} is off by {difference(actual, wanted):.3g}, bound {bound:.3g}, norm "
            f"{wanted.norm():.3g}, in case {inputs.case}"
        )


@st.composite
def linear_cases(draw: st.DrawFn) -> LinearCase:
    """Any case of up to some ten thousand products."""
    target = draw(st.sampled_from(("index", "index", "probabilities")))
    classes = draw(st.one_of(st.integers(1, 20), st.sampled_from((31, 32, 33, 64, 65, 130))))
    some_class = st.integers(0, classes - 1)
    ignore_index = st.one_of(st.just(-100), st.just(-1), some_class, st.just(255))
    loss = Case(
        rows=draw(st.one_of(st.integers(0, 9), st.sampled_from((17, 33, 66, 130)))),
        classes=classes,
        heads=draw(st.sampled_from((1, 1, 1, 2, 3))),
        dtype=draw(
            st.sampled_from(
                (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
            )
        ),
        scale=draw(st.sampled_from((0.01, 1.0, 5.0))),
        target=target,
        weighted=draw(st.booleans()),
        ignored=draw(st.sampled_from((0.0, 0.3, 0.9))) if target == "index" else 0.0,
        ignore_index=draw(ignore_index) if target == "index" else -100,
        label_smoothing=draw(st.sampled_from((0.0, 0.0, 0.1, 1.0))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        mask_entropy=draw(st.booleans()),
        entropy_weight=draw(st.sampled_from((0.0, 0.01, 1.5))),
        reversal=draw(st.sampled_from((None, 0.0, 0.1, 2.0))),
        upstream=draw(st.sampled_from((1.0, 0.3, -2.0))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return LinearCase(
        loss,
        width=draw(st.one_of(st.integers(0, 40), st.sampled_from((64, 100, 515, 1056)))),
        biased=draw(st.booleans()),
        layout=draw(st.sampled_from(("contiguous", "transposed", "sliced"))),
    )
