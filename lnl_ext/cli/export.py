"""``lnl export``: the network of a run as a file for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lnl_ext.cli.arguments import build
from lnl_ext.cli.options import ExportOptions
from lnl_ext.cli.run_folder import ModelCard, run_files, weights_of
from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD
from lnl_ext.errors import UserError
from lnl_ext.files import replacing
from lnl_ext.models.weights import put_weights, read_weights
from lnl_ext.training.distributed import Processes
from lnl_ext.training.image_transform import Grey, Transformed

__all__ = ["export"]


def export(flags: Mapping[str, Any], processes: Processes) -> None:
    """Run ``lnl export``."""
    options = build(ExportOptions, flags)
    if options.run is None:
        raise UserError("expected a model: the folder of a run")
    card = ModelCard.load(options.run)
    path = options.output or options.run / f"model.{options.format}"
    taken = [file for file in run_files(options.run) if file.exists()]
    if path.exists() and any(path.samefile(file) for file in taken):
        raise UserError(f"{path} is a file of the run: give another --output")
    network = card.network()
    weights = weights_of(options.run, card, options.use)
    put_weights(network, read_weights(weights), str(weights), new_output=False)
    write = {"safetensors": _safetensors, "pt2": _pt2, "onnx": _onnx}[options.format]
    write(path, network.eval(), card)
    size = card.image_size
    print(f"Wrote {path}, from {weights}")
    print(
        f"Input: images (N, 3, {size}, {size}) float32, RGB in [0, 1], then (value - mean) / std "
        f"by channel; mean {_numbers(card.mean)}, std {_numbers(card.std)}"
    )
    if card.grey and options.format == "safetensors":
        print("The weights take grey images: the same value in all three channels")
    print(f"Output: logits of {', '.join(card.classes)}")


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _metadata(card: ModelCard) -> dict[str, str]:
    """Return what a file says about itself, as texts."""
    return {
        "arch": card.arch,
        "classes": json.dumps(card.classes),
        "image_size": str(card.image_size),
        "mean": json.dumps(card.mean),
        "std": json.dumps(card.std),
    }


def _safetensors(path: Path, network: nn.Module, card: ModelCard) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError(f"{error}; it needs: pip install safetensors") from None
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata=_metadata(card))


def _whole(network: nn.Module, card: ModelCard) -> nn.Module:
    """Return the network with the transform of its images in front, as the run evaluates it."""
    if not card.grey:
        return network
    return Transformed(Grey(IMAGENET_MEAN, IMAGENET_STD), network).eval()


def _traced(network: nn.Module, card: ModelCard) -> torch.export.ExportedProgram:
    """Return the program of the network, for any number of images of the run's size."""
    images = torch.zeros(2, 3, card.image_size, card.image_size)
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(_whole(network, card), (images,), dynamic_shapes=(batch,))


def _pt2(path: Path, network: nn.Module, card: ModelCard) -> None:
    program = _traced(network, card)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        torch.export.save(program, stream, extra_files=_metadata(card))


def _onnx(path: Path, network: nn.Module, card: ModelCard) -> None:
    try:
        import onnxscript  # noqa: F401 - what torch.onnx needs
    except ImportError as error:
        raise UserError(f"{error}; it needs: pip install 'lnl_ext[onnx]'") from None
    program = torch.onnx.export(
        _traced(network, card),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(_metadata(card))
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)
