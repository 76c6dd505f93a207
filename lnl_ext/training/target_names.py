"""What the trainer asks for among the bias targets of batches, besides those of the adversaries.

Importing this does not import torch: the command refuses columns of these names.
"""

from __future__ import annotations

ADJUSTMENT = "logit_adjustment"
"""What is added to the class logits in the label loss."""


def head_weight(name: str) -> str:
    """Return the name of the sample weights of the adversary ``name``."""
    return f"head_weight:{name}"
