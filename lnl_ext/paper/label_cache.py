"""Labels that are slow to parse, kept on disk as plain arrays between runs."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lnl_ext.files import replacing

__all__ = ["cache_folder", "cached_arrays"]

Arrays = Mapping[str, npt.NDArray[np.generic]]

_FORM = 1  # of what is stored; another number makes old files unused


def cache_folder() -> Path:
    """Return where parsed labels are kept: beside torch's own cache of downloads.

    ``$TORCH_HOME/lnl_ext``, by default ``~/.cache/torch/lnl_ext``.
    """
    return Path(torch.hub.get_dir()).parent / "lnl_ext"


def cached_arrays(
    sources: Sequence[Path], parse: Callable[[], Arrays]
) -> dict[str, npt.NDArray[np.generic]]:
    """Return what ``parse`` returns, from the cache if the sources are unchanged.

    Parameters
    ----------
    sources
        The files that ``parse`` reads, and in whose order. Path, size and time of change of each
        say whether they are unchanged.
    parse
        Makes arrays by name, none of them of Python objects.

    Returns
    -------
    dict of str to ndarray

    Warns
    -----
    UserWarning
        The cache cannot be written, or a file in it is damaged. The labels are parsed then.
    """
    path = cache_folder() / f"{_key(sources)}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as error:  # a damaged file can raise nearly anything
            warnings.warn(f"{path} is damaged and will be made anew: {error}", stacklevel=2)
    arrays = {name: np.asarray(array) for name, array in parse().items()}
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise TypeError(f"parse returned arrays of Python objects: {', '.join(objects)}")
    try:
        with replacing(path, shared=True) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        warnings.warn(f"parsed labels cannot be kept: {error}", stacklevel=2)
    return arrays


def _key(sources: Sequence[Path]) -> str:
    described = [str(_FORM)]
    for source in sources:
        status = source.stat()
        described += [str(source.resolve()), str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256("\0".join(described).encode()).hexdigest()[:32]
