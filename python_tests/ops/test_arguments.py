"""A bad argument is a clear error before any work, in the fused loss and in the reference alike."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from nested import nested

import lnl_ext
from lnl_ext.ops.types import LossOptions

LOGITS = torch.zeros(8, 5)
MAP = torch.zeros(8, 6, 3, 2)
TARGET = torch.zeros(8, dtype=torch.int64)
GRAD = {"requires_grad": True}


@pytest.fixture(params=["fused", "reference"])
def loss(request):
    return (
        lnl_ext.fused_bias_loss if request.param == "fused" else lnl_ext.reference.fused_bias_loss
    )


BAD = {
    "logits: no tensor": (TypeError, r"logits: expected a Tensor, got list", [[[0.0]], TARGET], {}),
    "logits: integers": (
        TypeError,
        r"logits has dtype torch.int64, expected float32, float64, float16 or bfloat16",
        [LOGITS.long(), TARGET],
        {},
    ),
    "logits: complex": (TypeError, r"logits has dtype torch.complex64", [LOGITS + 0j, TARGET], {}),
    "logits: sparse": (TypeError, r"logits has layout", [LOGITS.to_sparse(), TARGET], {}),
    "logits: one row": (
        ValueError,
        r"logits has shape \(5,\), expected \(N, C\) or \(N, C, \*S\)",
        [LOGITS[0], TARGET[0]],
        {},
    ),
    "logits: no classes": (
        ValueError,
        r"\(8, 0\), which has no classes",
        [LOGITS[:, :0], TARGET],
        {},
    ),
    "target: no tensor": (TypeError, r"target: expected a Tensor, got int", [LOGITS, 3], {}),
    "target: columns": (
        ValueError,
        r"target has shape \(8, 5\), expected \(8,\) for logits of shape \(8, 5\)",
        [LOGITS, LOGITS.long()],
        {},
    ),
    "target: rows": (
        ValueError,
        r"target has shape \(7,\), expected \(8,\) for logits of shape \(8, 5\)",
        [LOGITS, TARGET[:7]],
        {},
    ),
    "target: positions": (
        ValueError,
        r"target has shape \(8, 2, 3\), expected \(8, 3, 2\) for logits",
        [MAP, torch.zeros(8, 2, 3, dtype=torch.int64)],
        {},
    ),
    "target: heads": (
        ValueError,
        r"target has shape \(8, 3, 2\), expected \(8, 2, 3, 2\) .* and heads=2",
        [MAP, torch.zeros(8, 3, 2, dtype=torch.int64)],
        {"heads": 2},
    ),
    "target: float indices": (
        TypeError,
        r"target of class indices has dtype torch.float32, expected torch.int64",
        [LOGITS, TARGET.float()],
        {},
    ),
    "target: int32": (
        TypeError,
        r"target has dtype torch.int32, expected torch.int64",
        [LOGITS, TARGET.int()],
        {},
    ),
    "target: bool": (TypeError, r"target has dtype torch.bool", [LOGITS, TARGET.bool()], {}),
    "target: probabilities of another shape": (
        ValueError,
        r"target has shape \(8, 4\), expected probabilities of shape \(8, 5\)",
        [LOGITS, LOGITS[:, :4]],
        {},
    ),
    "target: requires grad": (
        ValueError,
        r"target requires grad, but the loss has no gradient for it",
        [LOGITS, torch.zeros(8, 5, **GRAD)],
        {},
    ),
    "target: ignored probabilities": (
        ValueError,
        r"ignore_index is 0, but a target of probabilities cannot be ignored",
        [LOGITS, torch.zeros(8, 5)],
        {"ignore_index": 0},
    ),
    "target: device": (
        RuntimeError,
        r"target is on meta, expected cpu",
        [LOGITS, TARGET.to("meta")],
        {},
    ),
    "weight: no tensor": (
        TypeError,
        r"weight: expected a Tensor or None",
        [LOGITS, TARGET, 2.0],
        {},
    ),
    "weight: length": (
        ValueError,
        r"weight has shape \(4,\), expected \(5,\)",
        [LOGITS, TARGET, torch.ones(4)],
        {},
    ),
    "weight: rank": (
        ValueError,
        r"weight has shape \(1, 5\), expected \(5,\)",
        [LOGITS, TARGET, torch.ones(1, 5)],
        {},
    ),
    "weight: per channel instead of per class": (
        ValueError,
        r"weight has shape \(6,\), expected \(3,\)",
        [MAP, torch.zeros(8, 2, 3, 2, dtype=torch.int64), torch.ones(6)],
        {"heads": 2},
    ),
    "weight: dtype": (
        TypeError,
        r"weight has dtype torch.float64, expected torch.float32 for logits of torch.float32",
        [LOGITS, TARGET, torch.ones(5, dtype=torch.float64)],
        {},
    ),
    "weight: device": (
        RuntimeError,
        r"weight is on meta, expected cpu",
        [LOGITS, TARGET, torch.ones(5, device="meta")],
        {},
    ),
    "weight: requires grad": (
        ValueError,
        r"weight requires grad",
        [LOGITS, TARGET, torch.ones(5, **GRAD)],
        {},
    ),
    "label_smoothing: above 1": (
        ValueError,
        r"label_smoothing is 1.5, expected a number in \[0, 1\]",
        [LOGITS, TARGET],
        {"label_smoothing": 1.5},
    ),
    "label_smoothing: negative": (
        ValueError,
        r"label_smoothing is -0.1",
        [LOGITS, TARGET],
        {"label_smoothing": -0.1},
    ),
    "label_smoothing: NaN": (
        ValueError,
        r"label_smoothing is nan",
        [LOGITS, TARGET],
        {"label_smoothing": math.nan},
    ),
    "label_smoothing: a tensor": (
        TypeError,
        r"label_smoothing is tensor",
        [LOGITS, TARGET],
        {"label_smoothing": torch.tensor(0.1)},
    ),
    "reduction: unknown": (
        ValueError,
        r"reduction is 'average', expected 'none', 'mean' or 'sum'",
        [LOGITS, TARGET],
        {"reduction": "average"},
    ),
    "ignore_index: a float": (
        TypeError,
        r"ignore_index is 1.0, expected an int",
        [LOGITS, TARGET],
        {"ignore_index": 1.0},
    ),
    "ignore_index: too large": (
        ValueError,
        r"ignore_index is 9223372036854775808, expected an int of 64 bits",
        [LOGITS, TARGET],
        {"ignore_index": 2**63},
    ),
    "ignore_index: too small": (
        ValueError,
        r"ignore_index is -9223372036854775809, expected an int of 64 bits",
        [LOGITS, TARGET],
        {"ignore_index": -(2**63) - 1},
    ),
    "heads: none": (ValueError, r"heads is 0, expected at least 1", [LOGITS, TARGET], {"heads": 0}),
    "heads: a float": (
        TypeError,
        r"heads is 1.0, expected an int",
        [LOGITS, TARGET],
        {"heads": 1.0},
    ),
    "heads: no divisor": (
        ValueError,
        r"heads is 2, which does not divide the 5 channels of logits of shape \(8, 5\)",
        [LOGITS, TARGET],
        {"heads": 2},
    ),
}
for _name in ("reversal", "entropy_weight"):
    BAD |= {
        f"{_name}: {kind}": (error, message.format(_name), [LOGITS, TARGET], {_name: value})
        for kind, error, message, value in (
            ("negative", ValueError, r"{} is -0.5, expected a finite number >= 0", -0.5),
            ("infinite", ValueError, r"{} is inf, expected a finite number >= 0", math.inf),
            ("NaN", ValueError, r"{} is nan, expected a finite number >= 0", math.nan),
            ("text", TypeError, r"{} is 'ramp', expected a number", "ramp"),
            ("bool", TypeError, r"{} is True, expected a number", True),
            ("a vector", ValueError, r"{} has shape \(1,\), expected a 0-dim", torch.ones(1)),
            ("an integer tensor", TypeError, r"{} has dtype torch.int64", torch.tensor(1)),
            ("requires grad", ValueError, r"{} requires grad", torch.tensor(1.0, **GRAD)),
            ("device", RuntimeError, r"{} is on meta, expected cpu", torch.ones((), device="meta")),
        )
    }


for _layout in (torch.strided, torch.jagged):
    BAD |= {
        f"{name}: nested, {_layout}": (
            TypeError,
            f"{name} is a nested tensor, expected a dense tensor",
            arguments,
            {},
        )
        for name, arguments in {
            "logits": [nested(LOGITS, _layout), TARGET],
            "target": [LOGITS, nested(TARGET, _layout)],
            "weight": [LOGITS, TARGET, nested(torch.ones(5), _layout)],
        }.items()
    }


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(loss, name: str):
    error, message, arguments, options = BAD[name]
    with pytest.raises(error, match=message):
        loss(*arguments, **options)


@pytest.mark.parametrize("value", [-1, 5, -101, 2**40])
@pytest.mark.parametrize("shape", [(8,), (8, 3, 2), (8, 2, 3, 2)])
def test_a_class_out_of_range_is_named_with_its_place(value: int, shape: tuple[int, ...]):
    heads = 2 if len(shape) == 4 else 1
    space = shape[1:] if heads == 1 else shape[2:]
    target = torch.zeros(shape, dtype=torch.int64)
    target[0] = -100
    place = (6, *(n - 1 for n in shape[1:]))
    target[place] = value
    where = ", ".join(map(str, place))
    logits = torch.zeros(8, 5 * heads, *space, requires_grad=True)
    with pytest.raises(
        IndexError, match=rf"target\[{where}\] is {value}, expected a class in \[0, 5\)"
    ):
        lnl_ext.fused_bias_loss(logits, target, heads=heads)


def test_an_ignored_class_may_be_out_of_range_or_in_it(loss):
    for ignore_index in (-1, 255, 2):
        target = torch.tensor([0, ignore_index, 1])
        assert loss(torch.zeros(3, 5), target, ignore_index=ignore_index).isfinite()


def test_numbers_of_any_kind_are_coefficients(loss):
    import numpy as np

    for value in (1, 0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert loss(LOGITS, TARGET, entropy_weight=value, reversal=value).isfinite()


def test_numbers_do_not_follow_the_default_device(loss):
    expected = loss(LOGITS, TARGET, entropy_weight=0.5, reversal=0.1)
    with torch.device("meta"):
        assert torch.equal(loss(LOGITS, TARGET, entropy_weight=0.5, reversal=0.1), expected)


@pytest.mark.parametrize("name", ["fused_bias_loss", "fused_linear_bias_loss"])
def test_type_checkers_know_the_keywords_that_the_functions_have(name):
    signature = inspect.signature(getattr(lnl_ext, name))
    keywords = {p.name for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY}
    assert keywords == LossOptions.__annotations__.keys() | {"return_terms"}
    assert inspect.signature(getattr(lnl_ext.reference, name)) == signature


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["features", "head_weight", "head_bias"])
@pytest.mark.parametrize("module", [lnl_ext, lnl_ext.reference], ids=["fused", "reference"])
def test_nested_tensors_of_a_linear_head_are_named(module, name, layout):
    given = {"features": torch.zeros(8, 5), "head_weight": torch.zeros(3, 5)}
    given |= {"head_bias": torch.zeros(3), "target": TARGET}
    given[name] = nested(given[name], layout)
    with pytest.raises(TypeError, match=f"{name} is a nested tensor, expected a dense tensor"):
        module.fused_linear_bias_loss(**given)


def test_one_class_and_any_probabilities_mean_what_they_do_in_cross_entropy(loss):
    assert loss(torch.randn(4, 1), torch.zeros(4).long()) == 0
    logits, target = torch.randn(4, 3), torch.randn(4, 3)
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(loss(logits, target), expected)
