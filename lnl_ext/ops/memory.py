"""The memory that large results of the CPU kernels leave behind."""

from __future__ import annotations

from lnl_ext import _C


def release_memory() -> int:
    """Give the memory back that is kept for the next large results on the CPU.

    On Linux the tensors of 2 MiB and more that the losses make (gradients, chunks of logits) do not
    go back to the system when they are freed: up to four of their blocks stay for the next step,
    which then need not wait for new pages. The system takes those of more than 8 MiB by itself when
    it is short of memory, so that this is only for those who look at a process's resident size.

    Returns
    -------
    int
        The bytes that were kept.

    Examples
    --------
    >>> loss = lnl_ext.fused_linear_bias_loss(features, weight, target)
    >>> loss.backward()
    >>> features.grad = None
    >>> lnl_ext.release_memory()
    """
    return _C.release_kept_memory()
