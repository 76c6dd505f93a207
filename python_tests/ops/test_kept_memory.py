"""Large results on the CPU use the memory of those that are gone, and only theirs."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from lnl_ext import fused_bias_loss, fused_linear_bias_loss, reference, release_memory

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is kept on Linux alone"
)
HUGE_PAGE = 2 << 20


@pytest.fixture(autouse=True)
def nothing_kept():
    release_memory()
    yield
    release_memory()


def gradient(rows: int = 2048, width: int = 512, dtype: torch.dtype = torch.float32):
    """The features' gradient and what it must be."""
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, width, generator=generator).to(dtype)
    target = torch.randint(3, (rows,), generator=generator)
    (found,) = torch.autograd.grad(fused_linear_bias_loss(features, weight, target), features)
    exact = features.detach().double().requires_grad_()
    loss = reference.fused_linear_bias_loss(exact, weight.double(), target)
    return found, torch.autograd.grad(loss, exact)[0]


def test_the_next_gradient_lies_where_the_last_one_was():
    first, expected = gradient()
    place = first.data_ptr()
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-7)
    assert place % HUGE_PAGE == 0
    del first
    second, expected = gradient()
    assert second.data_ptr() == place
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-7)
    third, expected = gradient()  # while the second lives
    assert third.data_ptr() != place
    torch.testing.assert_close(third.double(), expected, rtol=1e-4, atol=1e-7)
    del second, third
    assert release_memory() == 2 * 2 * HUGE_PAGE
    assert release_memory() == 0


def test_small_results_and_other_sizes():
    small, _ = gradient(rows=64)
    del small
    assert release_memory() == 0
    large, _ = gradient(rows=4096)
    place = large.data_ptr()
    del large
    quarter, _ = gradient(rows=1024)
    assert quarter.data_ptr() != place  # 2 MiB do not take the place of 8
    nearly, _ = gradient(rows=3600)
    assert nearly.data_ptr() == place
    del quarter, nearly
    assert release_memory() == (1 + 4) * HUGE_PAGE


def test_no_more_than_four_are_kept():
    living = [gradient(rows=1024)[0] for _ in range(6)]
    assert len({g.data_ptr() for g in living}) == 6
    living.clear()
    assert release_memory() == 4 * HUGE_PAGE


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_logits(memory_format):
    logits = torch.randn(384, 8, 14, 14).to(memory_format=memory_format).requires_grad_()
    target = torch.randint(8, (384, 14, 14))
    places = set()
    for _ in range(3):
        logits.grad = None
        fused_bias_loss(logits, target, entropy_weight=0.1).backward()
        assert logits.grad.stride() == logits.stride()
        places.add(logits.grad.data_ptr())
    assert len(places) == 1
    exact = logits.detach().double().requires_grad_()
    reference.fused_bias_loss(exact, target, entropy_weight=0.1).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-9)


def test_such_a_tensor_is_like_any_other():
    found, _ = gradient()
    before = found.clone()
    larger = found.resize_(4096, 512)
    assert torch.equal(larger[:2048], before)
    found.resize_(2, 3)
    assert torch.equal(found.reshape(-1), before.reshape(-1)[:6])
    shared, _ = gradient()
    before = shared.clone()
    shared.share_memory_()
    assert torch.equal(shared, before)
    with torch.inference_mode():
        assert torch.equal(shared * 1, before)


def test_threads_do_not_share_a_gradient():
    wrong = []

    def work(rows: int) -> None:
        for _ in range(8):
            found, expected = gradient(rows)
            if not torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-7):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(2048 + 8 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_has_its_own():
    torch.set_num_threads(1)  # the parent's pool of threads is not in the child
    found, _ = gradient()
    del found  # kept in both
    child = os.fork()
    if child == 0:
        filled, _ = gradient(2049)
        filled.fill_(7.0)
        os._exit(0)
    mine, expected = gradient()
    assert os.waitpid(child, 0)[1] == 0
    torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-7)
