"""Learning Not to Learn (Kim et al., CVPR 2019) in PyTorch: unlearn a known, labelled bias."""

from __future__ import annotations

from .build import build_info  # first: says what is wrong when torch is missing or does not fit

# isort: split
from . import reference
from ._version import __version__
from .adversary import BiasAdversary
from .auditing import AuditReport, audit
from .config import TrainerConfig
from .functional import fused_bias_loss, fused_linear_bias_loss
from .gradient_reversal import GradientReversal, grad_reverse
from .logit_adjustment import logit_adjustment
from .memory import release_memory
from .optimizers import OptimizerConfig
from .sample_weights import independence_weights
from .trainer import Trainer
from .types import BiasLoss

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
    "release_memory",
]
