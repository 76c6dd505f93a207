"""The state of every random generator that training may draw from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def capture_random_state(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators and of ``generators``."""
    version, python_state, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - as below
    return {
        "python": [version, list(python_state), gauss],
        "numpy": [
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
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
    if len(state["batches"]) != len(generators):
        raise ValueError(
            f"the run's batches had {len(state['batches'])} generators, these have "
            f"{len(generators)}"
        )
    version, python_state, gauss = state["python"]
    random.setstate((version, tuple(python_state), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(  # noqa: NPY002 - the global generator is what is captured
        ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached)
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


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's (CPU and CUDA) global generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - data sets and transforms of others draw from it
    torch.manual_seed(seed)
