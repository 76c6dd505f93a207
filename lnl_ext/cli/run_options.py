"""The options of a training run, from flags, a file, and the run to resume."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lnl_ext.cli.arguments import build, read_toml, saved_value
from lnl_ext.cli.options import TrainOptions
from lnl_ext.cli.run_folder import CONFIG
from lnl_ext.errors import UserError
from lnl_ext.models.weights import NAMED_WEIGHTS
from lnl_ext.training.methods import METHODS
from lnl_ext.training.recipe import LNL

__all__ = ["train_options"]

_FREE_ON_RESUME = ("cache", "device", "checkpoint_every", "output", "config", "resume")


def train_options(flags: Mapping[str, Any]) -> TrainOptions:
    """Merge flags, the configuration file, and on resuming the configuration of the run.

    Raises
    ------
    UserError
        An option is wrong, or on resuming another than that of the run.
    """
    layers: list[dict[str, Any]] = []
    saved = None
    if flags.get("resume"):
        if flags.get("output") is None:
            raise UserError("no output: give --output DIR, the folder of the run to resume")
        path = Path(flags["output"]) / CONFIG
        if path.exists():
            layers.append(_from_file(path))
            saved = build(TrainOptions, *layers)
        elif not flags.keys() & {"config", "csv", "images"}:
            raise UserError(f"{flags['output']} holds no run to resume: it has no {CONFIG}")
    if flags.get("config") is not None:
        layers.append(_from_file(Path(flags["config"])))
    for number, layer in enumerate(layers):
        above = set().union(*layers[number + 1 :], flags)
        for name, other in (("epochs", "steps"), ("steps", "epochs")):
            if name in above:  # a flag says how long, and the file said it in the other way
                layer.pop(other, None)
    # Sums over another number of threads round differently: it is part of what repeats a run.
    options = build(TrainOptions, {"threads": torch.get_num_threads()}, *layers, flags)
    options = dataclasses.replace(options, **_of_method(options))
    options.check()
    if options.weights not in NAMED_WEIGHTS:
        options = dataclasses.replace(options, weights=os.path.abspath(options.weights))
    if saved is not None:
        changed = [
            f"{field.name}: {before!r}, now {now!r}"
            for field in dataclasses.fields(TrainOptions)
            if field.name not in _FREE_ON_RESUME
            and (before := saved_value(getattr(saved, field.name)))
            != (now := saved_value(getattr(options, field.name)))
        ]
        if changed:
            raise UserError(
                f"{options.output} holds a run with other options ({'; '.join(changed)}): give "
                "another --output, or leave them as they are"
            )
    return options


def _of_method(options: TrainOptions) -> dict[str, Any]:
    """Return what the method decides where nothing is given; the run's configuration says it."""
    method = METHODS[options.method]
    decided: dict[str, Any] = {}
    if options.adjust is None:
        decided["adjust"] = method.adjusted or (LNL.adjust and method.adversarial)
    if options.balance is None:
        decided["balance"] = LNL.balance if method.adversarial else float(method.balanced)
    return decided


def _from_file(path: Path) -> dict[str, Any]:
    values = read_toml(path, TrainOptions)
    if values.get("weights", "none") not in NAMED_WEIGHTS:
        values["weights"] = str(path.parent / values["weights"])  # as every path of the file
    return values
