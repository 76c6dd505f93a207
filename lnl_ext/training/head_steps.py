"""Further steps of the heads: what they saw in the last steps, and which of it they see again.

A head that learns once a batch lags behind the features, which change to escape it. The features of
the last steps are there already, so that a further step costs a forward and backward of the head.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.denominators import Denominators

KEPT = 8
"""Steps of which the features are kept."""


class Seen(NamedTuple):
    """What the heads saw in a step."""

    parts: list[tuple[Tensor, dict[str, Tensor]]]
    """Detached features and the heads' targets, of every batch of the step."""
    denominators: Denominators


class HeadSteps:
    """The features of the last steps, of this process, and draws from them.

    Parameters
    ----------
    number
        Further head steps after every step; with 0 nothing is kept.
    config
        Of the run. Its seed seeds the draws, which are the same in all processes: each step is on
        the shares of one batch.
    """

    def __init__(self, number: int, config: TrainerConfig) -> None:
        self._number = number
        self._recent: deque[Seen] = deque(maxlen=KEPT)
        self._generator = torch.Generator().manual_seed(config.seed)

    def remember(self, seen: Seen) -> None:
        """Keep what the heads saw in the step that is done."""
        if self._number:
            self._recent.append(seen)

    def draws(self) -> Iterator[Seen]:
        """Draw as many of the last steps as there are to be head steps, with replacement."""
        for _ in range(self._number):
            yield self._recent[int(torch.randint(len(self._recent), (), generator=self._generator))]

    def state_dict(self) -> dict[str, Any]:
        """Return the features and the state of the draws."""
        recent = [
            {"parts": seen.parts, "denominators": tuple(seen.denominators)} for seen in self._recent
        ]
        return {"recent": recent, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Put back what `state_dict` returned, on ``device``."""
        self._generator.set_state(state["generator"])
        self._recent.clear()
        for seen in _moved(state["recent"], device):
            self._recent.append(Seen(seen["parts"], Denominators(*seen["denominators"])))


def _moved(state: Any, device: torch.device) -> Any:
    """Return nested containers with their tensors on ``device``."""
    if isinstance(state, Tensor):
        return state.to(device)
    if isinstance(state, Mapping):
        return {name: _moved(value, device) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_moved(value, device) for value in state)
    return state
