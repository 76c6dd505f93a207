"""Batches from tensors in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lnl_ext.training.batches import TensorBatches


def test_tensor_batches_are_every_sample_once_in_a_new_order() -> None:
    labels = torch.arange(10, dtype=torch.uint8)
    batches = TensorBatches(torch.arange(10.0), labels, {"b": labels}, batch_size=4)
    passes = [torch.cat([y for _, y, _ in batches]) for _ in range(2)]
    assert [len(x) for x, _, _ in batches] == [4, 4, 2]
    for order in passes:
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(10))
    assert passes[0].tolist() != passes[1].tolist()
    for x, y, bias in batches:
        assert torch.equal(x, y.float())
        assert torch.equal(bias["b"], y)


def test_tensor_batches_prepare_and_drop() -> None:
    images = torch.arange(10, dtype=torch.uint8)
    batches = TensorBatches(
        images, images, batch_size=4, shuffle=False, drop_last=True, prepare=lambda x: x / 2
    )
    assert len(batches) == 2
    assert [x.tolist() for x, _, _ in batches] == [[0, 0.5, 1, 1.5], [2, 2.5, 3, 3.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 11, "drop_last": True}, "batch_size 11 with drop_last leaves no batch"),
        ({"labels": torch.zeros(9)}, r"labels has shape \(9,\), expected 10 rows as images"),
        ({"bias": {"b": torch.zeros(9)}}, r"bias\['b'\] has shape \(9,\), expected 10 rows"),
    ],
)
def test_tensor_batches_are_checked(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"labels": torch.zeros(10), "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        TensorBatches(torch.zeros(10, 3), **{**good, **arguments})
