"""Checkpoints that are whole or absent, and everything that is in them."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lnl_ext.files import write_state
from lnl_ext.training.config import changed_fields

FORMAT = 4
_UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the file."""


class NonFiniteError(ArithmeticError):
    """A loss or a weight became NaN or infinite; the message says which, and at which step."""


# ---------------------------------------------------------------------- the file


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write ``state`` so that ``path`` holds the old checkpoint or the new one, never a part.

    The state goes to a temporary file in the same folder, is flushed to the disk, and takes the
    place of ``path`` in one step.

    Parameters
    ----------
    path : path
        The folder is made if missing.
    state : dict
        Tensors and plain containers, nothing that needs pickled code.

    Raises
    ------
    CheckpointError
        If the file cannot be written (a full disk, no permission). The previous checkpoint is
        then unchanged and the temporary file is gone.
    """
    path = Path(path)
    try:
        write_state(path, {"format": FORMAT, **state})
    except (OSError, *_UNPICKLABLE) as error:  # not what a lost DataLoader worker raises meanwhile
        raise CheckpointError(f"could not write checkpoint {path}: {error}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, on the CPU, with ``weights_only=True``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CheckpointError
        If the file is cut short or damaged (checksums are compared, which ``torch.load`` does
        not do), or holds something else than a checkpoint of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged header makes zipfile raise almost anything
        raise CheckpointError(
            f"checkpoint {path} is cut short or not a checkpoint ({path.stat().st_size} bytes): "
            f"{error}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: wrong checksum of {damaged}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # and so does a damaged pickle
        raise CheckpointError(
            f"checkpoint {path} cannot be loaded (weights_only=True): {error}"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} is a torch file, but no checkpoint of lnl_ext")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state['format']}, this version reads {FORMAT}"
        )
    return state


# ---------------------------------------------------------------------- the run


def save_run(path: str | os.PathLike[str], state: dict[str, Any], parts: Mapping[str, Any]) -> None:
    """Write ``state`` and the ``state_dict`` of everything in ``parts``.

    Raises
    ------
    CheckpointError
        As :func:`save_checkpoint`.
    NonFiniteError
        If a weight or buffer of a module is NaN or infinite; it names ``state["step"]``.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    for name, part in parts.items():
        for key, tensor in states[name].items() if isinstance(part, nn.Module) else ():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NonFiniteError(
                    f"{key} of {name} is not finite after step {state['step']}: not saved"
                )
    save_checkpoint(path, state | {"parts": states})


def load_run(
    path: str | os.PathLike[str],
    identity: dict[str, Any],
    parts: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> dict[str, Any]:
    """Give the parts back what :func:`save_run` wrote, and return the rest.

    Parameters
    ----------
    path
        The file.
    identity
        What ``state["identity"]`` must be.
    parts
        Called with the state for the parts to give back to.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CheckpointError
        If the file is damaged, or belongs to another run or other parts.
    """
    state = load_checkpoint(path)
    try:
        if changes := changed_fields(state["identity"], identity):
            raise ValueError(f"it is of another run ({'; '.join(changes)})")
        own, states = parts(state), state.pop("parts")
        missing, surplus = own.keys() - states.keys(), states.keys() - own.keys()
        if missing or surplus:
            raise ValueError(
                f"it has {sorted(surplus) or 'nothing'} that this trainer lacks and lacks "
                f"{sorted(missing) or 'nothing'} that this trainer has"
            )
        for name, part in own.items():
            part.load_state_dict(states[name])
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit this trainer: {error}") from error
    return state


# ---------------------------------------------------------------------- random generators


def capture_random_state(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators and of ``generators``."""
    import numpy as np  # here: a training step alone needs none

    version, python_state, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - as below
    keys = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))  # uint32 does not pickle
    return {
        "python": [version, list(python_state), gauss],
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": keys}},
        "torch": torch.get_rng_state(),
        "cuda": (
            torch.cuda.get_rng_state_all()
            if torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            else []
        ),
        "batches": [generator.get_state() for generator in generators],
    }


def restore_random_state(state: dict[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Put back what :func:`capture_random_state` returned.

    Raises
    ------
    ValueError
        If the state has another number of generators, or of CUDA devices.
    """
    import numpy as np

    if len(state["batches"]) != len(generators):
        raise ValueError(
            f"the run's batches had {len(state['batches'])} generators, these have "
            f"{len(generators)}"
        )
    version, python_state, gauss = state["python"]
    random.setstate((version, tuple(python_state), gauss))
    words = state["numpy"]["state"]
    np.random.set_state(  # noqa: NPY002 - the global generator is what is captured
        state["numpy"] | {"state": words | {"key": words["key"].numpy().astype(np.uint32)}}
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        if len(state["cuda"]) != torch.cuda.device_count():
            raise ValueError(
                f"the run had {len(state['cuda'])} CUDA devices, here are "
                f"{torch.cuda.device_count()}: their random generators cannot be restored"
            )
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, generator_state in zip(generators, state["batches"], strict=True):
        generator.set_state(generator_state)
