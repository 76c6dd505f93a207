"""Learning Not to Learn (Kim et al., CVPR 2019) in PyTorch: unlearn a known, labelled bias."""

from __future__ import annotations

from lnl_ext.build import (
    build_info,  # first: says what is wrong when torch is missing or does not fit
)

# isort: split
from lnl_ext import reference
from lnl_ext._version import __version__
from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.adversary.reweighting import independence_weights, logit_adjustment
from lnl_ext.functional import fused_bias_loss, fused_linear_bias_loss
from lnl_ext.gradient_reversal import GradientReversal, grad_reverse
from lnl_ext.measuring import AuditReport, audit
from lnl_ext.ops.types import BiasLoss
from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.optimizers import OptimizerConfig
from lnl_ext.training.trainer import Trainer

__all__ = [
    "AuditReport",
    "BiasAdversary",
    "BiasLoss",
    "GradientReversal",
    "OptimizerConfig",
    "Trainer",
    "TrainerConfig",
    "__version__",
    "audit",
    "build_info",
    "fused_bias_loss",
    "fused_linear_bias_loss",
    "grad_reverse",
    "independence_weights",
    "logit_adjustment",
    "reference",
]
