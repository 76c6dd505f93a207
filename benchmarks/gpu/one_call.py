"""One forward and backward call, for a profiler: `ncu ... one_call.py N C [S ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import lnl_ext


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", type=int, nargs="+", help="of logits, N C [S ...]")
    parser.add_argument("--linear", action="store_true", help="a linear head; shape is N D C")
    parser.add_argument("--dtype", default="float32", help="of torch, as in bfloat16")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    if options.linear:
        n, d, c = options.shape
        leaves = [random(n, d), random(c, d)]
        target = torch.randint(c, (n,), device=device)
        loss = lnl_ext.fused_linear_bias_loss(leaves[0], leaves[1], target, entropy_weight=0.01)
    else:
        n, c, *positions = options.shape
        leaves = [random(n, c, *positions)]
        target = torch.randint(c, (n, *positions), device=device)
        loss = lnl_ext.fused_bias_loss(leaves[0], target, entropy_weight=0.01)
    torch.autograd.grad(loss, leaves)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
