"""Everything in a run that has a state_dict, by its name in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.run_log import NonFiniteError
from lnl_ext.training.stepper import Stepper


class RunState:
    """The networks of a run and what steps them.

    Parameters
    ----------
    features, classifier, adversaries
        The networks.
    stepper
        Its parts depend on whether the run has begun (`Stepper.start`).
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        adversaries: Mapping[str, BiasAdversary],
        stepper: Stepper,
    ) -> None:
        self._networks: dict[str, nn.Module] = {"features": features, "classifier": classifier}
        self._networks |= {f"adversary:{name}": part for name, part in adversaries.items()}
        self._stepper = stepper

    def modules(self) -> list[nn.Module]:
        """Return the networks, the average of features and classifier included."""
        return [part for part in self._parts().values() if isinstance(part, nn.Module)]

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state of every part.

        Raises
        ------
        NonFiniteError
            If a weight is not finite, as after a finite loss with an infinite gradient.
        """
        state = {}
        for name, part in self._parts().items():
            state[name] = part.state_dict()
            if isinstance(part, nn.Module):
                _check_finite(name, state[name], step)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; other entries of ``state`` are ignored.

        Raises
        ------
        ValueError, RuntimeError
            If the parts are others, or have another shape.
        """
        parts = self._parts()
        missing, surplus = parts.keys() - state.keys(), _part_names(state) - parts.keys()
        if missing or surplus:
            raise ValueError(
                f"it has {sorted(surplus) or 'nothing'} that this trainer lacks and lacks "
                f"{sorted(missing) or 'nothing'} that this trainer has"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return self._networks | self._stepper.parts()


def _part_names(state: Mapping[str, Any]) -> set[str]:
    whole = {"features", "classifier", "averaged", "scaler"}
    return {name for name in state if ":" in name or name in whole}


def _check_finite(name: str, tensors: Mapping[str, Tensor], step: int) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteError(f"{key} of {name} is not finite after step {step}: not saved")
