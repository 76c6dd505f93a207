"""Weights of a network: from a file or from torchvision into it, and out of it into a file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from lnl_ext.errors import UserError
from lnl_ext.files import write_state
from lnl_ext.models.backbones import SMALL, output_layer

__all__ = ["load_weights", "put_weights", "read_weights", "save_weights"]


def load_weights(network: nn.Module, arch: str, source: str) -> str | None:
    """Give a network the weights that are named.

    Parameters
    ----------
    network
        Made by :func:`lnl_ext.models.backbones.build_network` for ``arch``.
    arch
        Its architecture.
    source
        ``"none"`` leaves it as it is, ``"imagenet"`` downloads torchvision's, anything else is the
        path of a state_dict.

    Returns
    -------
    str or None
        The name of the last layer if it is for other classes than the weights and so keeps its own.

    Raises
    ------
    UserError
        The weights are not there or belong to another architecture.
    """
    if source == "none":
        return None
    if source == "imagenet":
        if arch == SMALL:
            raise UserError(f"weights is 'imagenet', which arch {arch!r} lacks")
        choice = torchvision.models.get_model_weights(arch).DEFAULT
        try:
            state = choice.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"weights imagenet: cannot download {choice.url} ({error}); download it elsewhere "
                "and give --weights FILE"
            ) from error
    else:
        state = read_weights(Path(source))
    return put_weights(network, state, source, new_output=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state_dict, without running any code in the file.

    Raises
    ------
    UserError
        It is not there, or no state_dict.
    """
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost anything
        # torch's own words tell how to run the code in the file.
        reason = "it is damaged, or holds something else than names and tensors"
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif not zipfile.is_zipfile(path):
            reason = "torch.save did not write it, or long ago"
        raise UserError(f"{path} cannot be loaded as a state_dict: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(
            f"{path} holds no state_dict (names and tensors): save model.state_dict() and nothing "
            "around it"
        )
    return state


def put_weights(
    network: nn.Module, state: dict[str, Tensor], source: str, *, new_output: bool
) -> str | None:
    """Load a state_dict; with ``new_output`` one whose last layer may have other classes.

    Returns
    -------
    str or None
        The name of the last layer if it keeps its own weights.

    Raises
    ------
    UserError
        The weights do not fit the network; ``source`` is what the message calls them.
    """
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
    return last if skipped else None


def save_weights(path: Path, network: nn.Module) -> None:
    """Write the state_dict so that ``path`` holds all of it or what it held before.

    Raises
    ------
    OSError
        It cannot be written (a full disk, no permission).
    """
    state = network.state_dict()
    write_state(path, {name: value.detach().cpu().contiguous() for name, value in state.items()})
