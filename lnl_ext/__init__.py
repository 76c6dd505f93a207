"""Learning Not to Learn (Kim et al., CVPR 2019) in PyTorch: unlearn a known, labelled bias.

Importing this imports torch and registers the operators, so that a saved program with them loads.
The names below are imported from their modules at their first use. In the ``lnl`` command the
operators wait for that too, so that ``lnl --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any

from lnl_ext._version import __version__

if TYPE_CHECKING:
    from lnl_ext import reference
    from lnl_ext.adversary.bias_adversary import BiasAdversary
    from lnl_ext.adversary.reweighting import independence_weights, logit_adjustment
    from lnl_ext.build import build_info
    from lnl_ext.estimators.classifier import AdversarialClassifier
    from lnl_ext.functional import fused_bias_loss, fused_linear_bias_loss
    from lnl_ext.gradient_reversal import GradientReversal, grad_reverse
    from lnl_ext.measuring.audit import audit
    from lnl_ext.measuring.audit_report import AuditReport
    from lnl_ext.ops.types import BiasLoss
    from lnl_ext.training.config import OptimizerConfig, TrainerConfig
    from lnl_ext.training.trainer import Trainer

__all__ = [
    "AdversarialClassifier",
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

_MODULES = {
    "AdversarialClassifier": "estimators.classifier",
    "AuditReport": "measuring.audit_report",
    "BiasAdversary": "adversary.bias_adversary",
    "BiasLoss": "ops.types",
    "GradientReversal": "gradient_reversal",
    "OptimizerConfig": "training.config",
    "Trainer": "training.trainer",
    "TrainerConfig": "training.config",
    "audit": "measuring.audit",
    "build_info": "build",
    "fused_bias_loss": "functional",
    "fused_linear_bias_loss": "functional",
    "grad_reverse": "gradient_reversal",
    "independence_weights": "adversary.reweighting",
    "logit_adjustment": "adversary.reweighting",
}
_SUBMODULES = {
    *(
        "adversary",
        "build",
        "data",
        "estimators",
        "functional",
        "gradient_reversal",
        "measuring",
        "models",
    ),
    *("ops", "reference", "reporting", "schedules", "training"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"lnl_ext.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"lnl_ext.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _is_the_command() -> bool:
    """Whether this process is ``lnl`` or ``python -m lnl_ext``, as far as its arguments tell."""
    as_module = ("-m", "lnl_ext") in itertools.pairwise(sys.orig_argv)
    return as_module or os.path.basename(next(iter(sys.argv), "")) in ("lnl", "lnl.exe")


# A program that another saved looks its operators up by name, whether or not a name of this package
# is used. Only an import hook could wait for an `import torch` that comes later.
if "torch" in sys.modules or not _is_the_command():
    importlib.import_module("lnl_ext.build")  # first: says what is wrong with torch
    importlib.import_module("lnl_ext.ops.linear_bias_loss")
