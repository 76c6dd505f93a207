"""Devices and builds without kernels: the plain path, an error that helps, no driver needed."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lnl_ext
from lnl_ext.ops import bias_loss as ops


def test_the_plain_path_is_announced_once():
    ops._announce_plain_path.cache_clear()
    logits = torch.zeros(2, 3, device="meta")
    with pytest.warns(UserWarning, match=r"no kernels for 'meta' devices"):
        assert not ops.has_kernel(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops.has_kernel(logits)


@pytest.mark.parametrize("way", ["loss", "linear", "adversary"])
def test_a_cuda_tensor_without_cuda_kernels_is_told_how_to_get_them(way: str, monkeypatch):
    if way == "adversary" and torch.version.cuda is None:
        pytest.skip("this torch has no CUDA, and no autograd on its tensors")
    monkeypatch.setattr(ops, "_built_with_cuda", lambda: False)
    # Tensors of a device that is not there, without numbers.
    with FakeTensorMode(), torch.device("cuda", 0):
        features, target = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, dtype=torch.int64)
        call = {
            "loss": lambda: lnl_ext.fused_bias_loss(features, target),
            "linear": lambda: lnl_ext.fused_linear_bias_loss(features, torch.zeros(2, 3), target),
            "adversary": lambda: lnl_ext.BiasAdversary(torch.nn.Linear(3, 2))(features, target),
        }[way]
        with pytest.raises(
            RuntimeError, match=r"no CUDA kernels: reinstall .*LNL_EXT_CUDA=1 pip install"
        ):
            call()


@pytest.mark.skipif(
    not lnl_ext.build_info()["cuda"], reason="lnl_ext was built without CUDA: nothing to import"
)
def test_a_cuda_build_works_without_a_driver():
    (library,) = Path(lnl_ext.__file__).parent.glob("_cuda.*")
    operators = library.read_bytes()
    assert b"libcudart.so" in operators
    assert (
        b"libcuda.so" not in operators
    )  # the driver's library: a machine without it cannot load it
    code = (
        "import torch, lnl_ext\n"
        "assert not torch.cuda.is_available()\n"
        "logits = torch.zeros(2, 3, requires_grad=True)\n"
        "lnl_ext.fused_bias_loss(logits, torch.tensor([0, 2])).backward()\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(lnl_ext.build_info()['cuda_arch_list'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "sm_" in run.stdout
