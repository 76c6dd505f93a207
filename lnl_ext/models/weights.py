"""Weights of a network: from a file or from torchvision into it, and out of it into a file."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from lnl_ext.errors import UserError
from lnl_ext.files import write_state
from lnl_ext.models.backbones import SMALL, output_layer
from lnl_ext.models.efficientnet import EFFICIENTNET_LITE0, LITE0_WEIGHTS, lite0_weights

__all__ = [
    "NAMED_WEIGHTS",
    "load_weights",
    "put_weights",
    "read_weights",
    "save_weights",
    "unwrapped",
]

NAMED_WEIGHTS = ("none", "imagenet", LITE0_WEIGHTS)
"""What `load_weights` takes instead of a path."""


def load_weights(network: nn.Module, arch: str, source: str) -> str | None:
    """Give a network the weights that are named.

    Parameters
    ----------
    network
        Made by :func:`lnl_ext.models.backbones.build_network` for ``arch``.
    arch
        Its architecture.
    source
        ``"none"`` leaves it as it is, ``"imagenet"`` downloads torchvision's,
        ``"efficientnet-lite0"`` takes them from an installed package, anything else is the path of
        a state_dict, as `read_weights` takes it.

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
    if source == LITE0_WEIGHTS:
        if arch != EFFICIENTNET_LITE0:
            raise UserError(
                f"weights {LITE0_WEIGHTS} are those of arch {EFFICIENTNET_LITE0!r}, not {arch!r}"
            )
        state = lite0_weights()
    elif source == "imagenet":
        if arch in (SMALL, EFFICIENTNET_LITE0):
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

    Parameters
    ----------
    path
        A file of ``torch.save``, or of the package safetensors if its name ends so.

    Raises
    ------
    UserError
        It is not there, or no state_dict; or the package safetensors is needed and missing.
    """
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be loaded as a state_dict: it is damaged ({error})"
        ) from error


def unwrapped(state: dict[str, Tensor], network: nn.Module, source: str) -> dict[str, Tensor]:
    """Return a state_dict under the names of the network, without those of what was around it.

    `torch.compile`, parallel and averaged networks put ``_orig_mod.`` and ``module.`` before the
    names; a model of which this network is the whole puts the name that it has there. An averaged
    network's number of averages is dropped.

    Raises
    ------
    UserError
        The network is a part of what was saved; the message names the prefix. ``source`` is what it
        calls the weights.
    """
    own = network.state_dict().keys()
    state = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): value for name, value in state.items()}
    state = {n: v for n, v in state.items() if n in own or n.split(".")[-1] != "n_averaged"}
    while not own & state.keys():
        heads = {name.partition(".")[0] for name in state}
        if len(heads) != 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    first = next(iter(own), "")
    for name in state.keys() - own:
        prefix = name.removesuffix(first)
        if prefix.endswith(".") and first not in state:
            others = [other for other in state if not other.startswith(prefix)]
            raise UserError(
                f"weights {source} hold more than the network: names of the network begin with "
                f"{prefix!r}, beside others ({_first(others)}): save that part alone"
            )
    return state


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def put_weights(
    network: nn.Module, state: dict[str, Tensor], source: str, *, new_output: bool
) -> str | None:
    """Load a state_dict; with ``new_output`` one whose last layer may have other classes.

    Prefixes of its names are dropped as `unwrapped` does.

    Returns
    -------
    str or None
        The name of the last layer if it keeps its own weights.

    Raises
    ------
    UserError
        The weights do not fit the network; ``source`` is what the message calls them.
    """
    state = unwrapped(state, network, source)
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
                f"weights {source} do not fit the network: the file {what} {_first(names)}"
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
