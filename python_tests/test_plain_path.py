"""Devices without kernels take the plain path, which is said once."""

from __future__ import annotations

import warnings

import pytest
import torch

from lnl_ext import ops


def test_the_plain_path_is_announced_once():
    ops._announce_plain_path.cache_clear()
    logits = torch.zeros(2, 3, device="meta")
    with pytest.warns(UserWarning, match=r"no kernels for 'meta' devices"):
        assert not ops.has_kernel(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops.has_kernel(logits)
