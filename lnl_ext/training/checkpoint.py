"""Checkpoints that are whole or absent."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lnl_ext.files import write_state

FORMAT = 2
_UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the file."""


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
    except (OSError, RuntimeError, *_UNPICKLABLE) as error:  # a full disk may be either of two
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
