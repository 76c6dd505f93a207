"""Weights for a network: new ones, torchvision's, or those of a file."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from lnl_ext.cli.options import TrainOptions
from lnl_ext.cli.run_folder import load_weights
from lnl_ext.errors import UserError
from lnl_ext.models.backbones import build_network, output_layer

__all__ = ["initial_network", "put_weights"]


def initial_network(options: TrainOptions, classes: int, *, read: bool = True) -> nn.Module:
    """Make the network with the weights that the options name, or with ``read=False`` new ones.

    Raises
    ------
    UserError
        The weights are not there or belong to another architecture.
    """
    torch.manual_seed(options.seed)
    network = build_network(options.arch, classes)
    if options.weights == "none" or not read:
        return network
    if options.weights == "imagenet":
        choice = torchvision.models.get_model_weights(options.arch).DEFAULT
        try:
            state = choice.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"weights imagenet: cannot download {choice.url} ({error}); download it elsewhere "
                "and give --weights FILE"
            ) from error
    else:
        state = load_weights(Path(options.weights))
    put_weights(network, state, options.weights, new_output=True)
    return network


def put_weights(
    network: nn.Module, state: dict[str, Tensor], source: str, *, new_output: bool
) -> None:
    """Load a state_dict; with ``new_output`` one whose last layer may have other classes."""
    own = network.state_dict()
    last = output_layer(network)
    skipped = [
        name
        for name in (f"{last}.weight", f"{last}.bias")
        if new_output and name in state and name in own and state[name].shape != own[name].shape
    ]
    # Auxiliary classifiers (GoogLeNet, Inception) are not trained: theirs do not matter.
    auxiliary = ("aux1.", "aux2.", "AuxLogits.")
    given = {n: v for n, v in state.items() if n not in skipped and not n.startswith(auxiliary)}
    missing = [
        n for n in own if n not in given and n not in skipped and not n.startswith(auxiliary)
    ]
    surplus = [name for name in given if name not in own]
    shapes = [n for n, v in given.items() if n in own and v.shape != own[n].shape]
    for what, names in (("lacks", missing), ("has unknown", surplus), ("has other shapes", shapes)):
        if names:
            raise UserError(
                f"weights {source} do not fit the network: the file {what} {', '.join(names[:4])}"
                + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            )
    network.load_state_dict(given, strict=False)
    if skipped:
        print(f"Weights from {source}; the last layer ({last}) is new")
