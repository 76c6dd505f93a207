"""The loss costs one gradient tensor of memory, a second one only to keep the graph and scale."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lnl_ext import fused_bias_loss


class Allocations(TorchDispatchMode):
    """Adds up the bytes that operators return in storages that were not there before."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(values):
            leaves, _ = torch.utils._pytree.tree_flatten(values)
            return [v.untyped_storage() for v in leaves if isinstance(v, torch.Tensor)]

        self.seen |= {storage.data_ptr() for storage in storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
        return result


@pytest.mark.parametrize("shape", [(64, 8, 14, 14), (256, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("upstream", "keep", "copies"), [(1, False, 1), (3, False, 1), (3, True, 2)]
)
def test_peak_is_one_gradient(shape, dtype, memory_format, upstream, keep, copies):
    if len(shape) == 2 and memory_format == torch.channels_last:
        pytest.skip("a matrix has no channels_last format")
    z = torch.randn(shape).to(dtype=dtype, memory_format=memory_format).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    size = z.numel() * z.element_size()
    with Allocations() as allocations:
        loss = fused_bias_loss(z, target, entropy_weight=0.1, reversal=0.5)
        torch.autograd.grad(loss, z, torch.tensor(float(upstream)), retain_graph=keep)
    assert allocations.bytes >= size
    # the target's copies and the scalars are small beside another tensor of the logits' size
    assert allocations.bytes < (copies + 0.5) * size
