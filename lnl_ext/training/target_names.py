"""Names of biases, and of what the trainer asks for among the bias targets of batches besides.

Importing this does not import torch: the command refuses columns of these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

ADJUSTMENT = "logit_adjustment"
"""What is added to the class logits in the label loss."""


def head_weight(name: str) -> str:
    """Return the name of the sample weights of the adversary ``name``."""
    return f"head_weight:{name}"


def by_name(argument: str, given: Mapping[str, T] | None) -> dict[str, T]:
    """Return what is given for each bias by its name; TypeError names an argument without names."""
    if given is None:
        return {}
    if not hasattr(given, "keys"):  # an nn.ModuleDict has keys, and is no Mapping
        raise TypeError(
            f"{argument} is a {type(given).__name__}, expected a dictionary with a name for each "
            f'bias, such as {argument}={{"colour": ...}}'
        )
    return dict(given)
