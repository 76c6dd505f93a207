"""What can be chosen: the one list of options of every subcommand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lnl_ext.cli.arguments import option
from lnl_ext.data.bias_column import BiasColumn
from lnl_ext.errors import UserError
from lnl_ext.training.methods import METHODS
from lnl_ext.training.recipe import LNL
from lnl_ext.training.target_names import ADJUSTMENT, head_weight

__all__ = [
    "ARCH",
    "EPOCHS",
    "GROUP",
    "GROUPS",
    "IMAGE_SIZE",
    "SMALL_IMAGE_SIZE",
    "SMALL_SIDE",
    "STEPS",
    "CompareOptions",
    "EvaluateOptions",
    "ExportOptions",
    "ModelOptions",
    "PredictOptions",
    "ProbeOptions",
    "TrainOptions",
]

GROUP = "label_and_bias_group"
"""What the samples' groups, or their weights, are called among the bias targets of batches."""

ARCH, SMALL_SIDE = "resnet18", 96
"""The default architecture, and the side of the images in pixels up to which it is the small."""

IMAGE_SIZE, SMALL_IMAGE_SIZE = 224, 48
"""The largest default size in pixels, and that of the small architecture."""

EPOCHS, STEPS = 12, 1000
"""The default length of a training: the longer of the two."""

_LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where the images are and how they are read."""

    csv: Path | None = option(None, "CSV file with a line per image", metavar="FILE")
    images: Path | None = option(
        None,
        "folder where relative paths of the CSV start; without --label-column a folder with a "
        "subfolder per class, the CSV then giving bias labels only",
        metavar="DIR",
    )
    image_column: str = option("path", "column of image paths", metavar="NAME")
    label_column: str | None = option(None, "column of labels", metavar="NAME")
    bias_column: tuple[str, ...] = option(
        (),
        "column of bias labels: categories, or numbers in bins as in age:bins=0,20,40,60; "
        "once for each column",
        metavar="NAME[:bins=...]",
    )
    batch_size: int = option(32, "images per step, of all processes together", minimum=2)
    workers: int = option(2, "processes that decode images; 0: none", minimum=0)
    device: str = option("auto", "auto (a CUDA GPU where there is one), cpu, cuda, cuda:1 ..., mps")
    threads: int | None = option(
        None,
        "CPU threads; by default torch's choice. A run keeps the number, because another one "
        "rounds sums differently",
        minimum=1,
    )

    def check(self) -> None:
        """Refuse what cannot be right before anything is read.

        Raises
        ------
        UserError
            There is no data, or the GPU that is named does not exist.
        """
        import torch

        if self.csv is None and self.images is None:
            raise UserError("no data: give --csv FILE, or --images DIR, or both")
        if self.device != "auto":
            try:
                device = torch.device(self.device)
            except RuntimeError:
                device = None
            if device is None or device.type not in ("cpu", "cuda", "mps"):
                raise UserError(
                    f"device is {self.device!r}, expected auto, cpu, cuda, cuda:N or mps"
                )
            if device.type == "mps" and not torch.backends.mps.is_available():
                raise UserError("device is 'mps', which this machine or this torch does not have")
            if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                raise UserError(
                    f"device is {self.device!r}, but torch sees {torch.cuda.device_count()} GPUs"
                )


@dataclasses.dataclass(frozen=True)
class TrainOptions(DataOptions):
    """Everything that decides a training run."""

    output: Path | None = option(None, "folder for the run", metavar="DIR", saved=False)
    config: Path | None = option(
        None, "TOML file of options, such as the config.toml of a run", metavar="FILE", saved=False
    )
    resume: bool = option(
        False, "continue from the last checkpoint in --output, if there is one", saved=False
    )
    split_column: str | None = option(
        None, "column that says train, validation or test; test images are left out", metavar="NAME"
    )
    validation: float = option(0.2, "share held out, if there is no split column", above=0)
    balance_validation: bool = option(
        False,
        "hold out as many images of every group of label and bias, of rare groups half, instead of "
        "an equal share",
    )
    arch: str | None = option(
        None,
        "classification model of torchvision, small (four convolutions) or efficientnet_lite0; by "
        f"default small for images of up to {SMALL_SIDE} pixels without --weights, else {ARCH}",
        metavar="NAME",
    )
    weights: str = option(
        "none",
        "none, imagenet (downloaded), efficientnet-lite0 (from the extra pretrained), or a file "
        "with a state_dict (.pt, .safetensors)",
        metavar="WEIGHTS",
    )
    feature_layer: str | None = option(
        None, "layer whose output is the bias heads' input; by default the input of the last layer"
    )
    image_size: int | None = option(
        None,
        "side in pixels to which images are scaled and cut; by default the images' own, at most "
        f"{IMAGE_SIZE}, for small {SMALL_IMAGE_SIZE}",
        minimum=1,
    )
    augment: str = option(
        "shift",
        "training images: shift (mirrored, moved a little), crop (mirrored, random part), flip "
        "(mirrored), none",
        choices=("shift", "crop", "flip", "none"),
    )
    cache: float = option(
        2.0,
        "memory for decoded training images, and as much for validation images; what does not fit "
        "is decoded in every epoch",
        metavar="GIB",
        minimum=0,
    )
    method: str = option(
        "lnl",
        "; ".join(f"{method.name}: {method.description}" for method in METHODS.values()),
        choices=tuple(METHODS),
    )
    balance: float | None = option(
        None,
        "0: draw images as they come; 1: all groups of label and bias as often; between: small "
        f"groups more often than they come. By default {LNL.balance:g} for methods with bias "
        "heads, 1 for resample and groupdro, else 0",
        metavar="PART",
        minimum=0,
        maximum=1,
    )
    adjust: bool | None = option(
        None,
        "take what the bias still says about the label out of the label loss and the bias heads; "
        "by default for adjusted and the methods with bias heads",
    )
    update: str = option(
        "joint",
        "one step for the network and the heads together (joint), or the authors' two steps",
        choices=("joint", "two_step"),
    )
    reversal: float = option(
        LNL.reversal,
        "adversarial strength: weight of the reversed gradient of the bias heads, of all columns "
        "together",
        minimum=0,
    )
    entropy_weight: float = option(
        LNL.entropy_weight, "weight of the bias prediction's entropy, likewise", minimum=0
    )
    confusion_weight: float = option(
        LNL.confusion_weight, "weight of blindeye's confusion loss, likewise", minimum=0
    )
    warm_up: float = option(
        LNL.warm_up,
        "first part of the training, in which the bias heads learn and unlearning has not begun",
        minimum=0,
    )
    rise: float = option(
        LNL.rise,
        "part of the training after it in which the strength rises from 0",
        above=0,
        maximum=1,
    )
    head_steps: int = option(
        LNL.head_steps, "further steps of the bias heads after every step", minimum=0
    )
    epochs: float | None = option(
        None,
        f"passes over the training images; by default {EPOCHS}, or more if that is fewer than "
        f"{STEPS} steps",
        above=0,
    )
    steps: int | None = option(None, "length of the training, instead of --epochs", minimum=1)
    learning_rate: float = option(1e-3, "of the network (AdamW, cosine decay)", above=0)
    head_learning_rate: float = option(LNL.head_learning_rate, "of the bias heads (Adam)", above=0)
    weight_decay: float = option(0.01, "of the network", minimum=0)
    class_weights: str = option(
        "none",
        "balanced: the label loss weighs images as if labels were equally frequent",
        choices=("none", "balanced"),
    )
    keep: str = option(
        "both",
        "weights to keep: of the last epoch (model.pt), of the epoch with the best worst group of "
        "the validation images (model.pt), or both (model.pt and best.pt)",
        choices=("best", "last", "both"),
    )
    patience: int | None = option(
        None,
        "end the training after so many epochs without a better worst group of the validation "
        "images",
        minimum=1,
        metavar="EPOCHS",
    )
    seed: int = option(
        0, "of the split, the weights and the order", minimum=0, maximum=_LARGEST_SEED
    )
    amp: str = option("none", "mixed precision", choices=("none", "bfloat16", "float16"))
    compile: bool = option(False, "compile the losses with torch.compile")
    checkpoint_every: int | None = option(
        None, "steps between checkpoints, in addition to those at the end of epochs", minimum=1
    )

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises
        ------
        UserError
            The message names them.
        """
        super().check()
        if self.output is None:
            raise UserError("no output: give --output DIR, the folder for the run")
        if self.warm_up >= 1:
            raise UserError(f"warm-up is {self.warm_up:g}, expected a part below 1")
        if self.validation >= 1:
            raise UserError(f"validation is {self.validation:g}, expected a share between 0 and 1")
        if self.epochs is not None and self.steps is not None:
            raise UserError("epochs and steps both say how long to train: leave out one of them")
        if self.label_column is None and self.images is None:
            raise UserError("no labels: give --label-column NAME (or --images DIR with subfolders)")
        if METHODS[self.method].knows_bias and not self.bias_column:
            raise UserError(
                f"method {self.method} needs a known bias: give --bias-column NAME, or "
                "--method baseline"
            )
        if self.balance and not self.bias_column:
            raise UserError("batches are balanced over a bias: give --bias-column NAME")
        if self.adjust and not self.bias_column:
            raise UserError("the label loss is adjusted by a bias: give --bias-column NAME")
        names = [BiasColumn.parse(text).name for text in self.bias_column]
        for reserved in (ADJUSTMENT, GROUP, *map(head_weight, names)):
            if reserved in names:
                raise UserError(
                    f"bias-column is {reserved!r}, a name that the training uses: give the column "
                    "another name"
                )
        if METHODS[self.method].adversarial and "label" in names:
            raise UserError(
                "bias-column is 'label', which is the task's name in the results: give the column "
                "another name"
            )
        if METHODS[self.method].confusion_weight and self.update == "two_step":
            raise UserError(
                f"method {self.method} has a confusion loss, which update two_step does not have: "
                "leave --update at joint"
            )


@dataclasses.dataclass(frozen=True)
class ModelOptions(DataOptions):
    """A trained model and the images to use it on."""

    run: Path | None = option(None, "folder of a run of lnl train", positional=True)
    arch: str = option(ARCH, "architecture of --weights", metavar="NAME")
    weights: Path | None = option(
        None,
        "instead of a run: a state_dict of --arch (.pt, .safetensors), or a program of "
        "torch.export (.pt2)",
        metavar="FILE",
    )
    use: str = option(
        "model",
        "which weights of a run: model.pt, or best.pt (see lnl train --keep)",
        choices=("model", "best"),
    )
    image_size: int | None = option(
        None,
        f"side in pixels to which images are scaled and cut; that of the run, else {IMAGE_SIZE}",
        minimum=1,
    )

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises
        ------
        UserError
            There is no model, or more than one.
        """
        if (self.run is None) == (self.weights is None):
            raise UserError("expected a model: the folder of a run, or --weights FILE")
        if self.run is None or self.csv is not None or self.images is not None:
            super().check()


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ModelOptions):
    """Accuracy, by group."""

    classes: str | None = option(
        None, "labels in the order of the model's outputs, as in cat,dog (with --weights)"
    )
    json: Path | None = option(None, "file for the results as JSON", metavar="FILE")


@dataclasses.dataclass(frozen=True)
class ProbeOptions(ModelOptions):
    """How much of an attribute the features hold."""

    feature_layer: str | None = option(
        None, "layer to probe; that of the run, else the last layer's input"
    )
    validation: float = option(0.3, "share that the probe is tested on and not trained on", above=0)
    seed: int = option(0, "of the split and of the probe", minimum=0, maximum=_LARGEST_SEED)
    json: Path | None = option(None, "file for the results as JSON", metavar="FILE")


@dataclasses.dataclass(frozen=True)
class PredictOptions(ModelOptions):
    """Predictions."""

    classes: str | None = option(
        None, "labels in the order of the model's outputs, as in cat,dog (with --weights)"
    )
    output: Path | None = option(None, "CSV file for the predictions", metavar="FILE")


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Finished runs, and how to show them."""

    runs: tuple[Path, ...] = option(
        (),
        "folders of runs of lnl train: several methods, several seeds",
        positional=True,
        metavar="RUN",
    )
    format: str = option(
        "text", "how to write the comparison", choices=("text", "json", "markdown", "html")
    )
    output: Path | None = option(None, "file for it, instead of the terminal", metavar="FILE")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """A run, and the file to make of it."""

    run: Path | None = option(None, "folder of a run of lnl train", positional=True)
    format: str = option(
        "safetensors",
        "safetensors (weights), pt2 (a program of torch.export), onnx (needs onnx and onnxscript)",
        choices=("safetensors", "pt2", "onnx"),
    )
    output: Path | None = option(
        None, "file to write; by default model.FORMAT in the folder of the run", metavar="FILE"
    )
    use: str = option(
        "model",
        "which weights of the run: model.pt, or best.pt (see lnl train --keep)",
        choices=("model", "best"),
    )


GROUPS: dict[str, tuple[str, ...]] = {
    "data": (
        *("csv", "images", "image_column", "label_column", "bias_column"),
        *("split_column", "validation", "balance_validation", "classes"),
    ),
    "model": ("arch", "weights", "use", "feature_layer", "image_size", "augment"),
    "method": (
        *("method", "reversal", "entropy_weight", "confusion_weight", "warm_up", "rise"),
        *("head_steps", "head_learning_rate", "balance", "adjust", "class_weights"),
        "update",
    ),
    "training": (
        *("epochs", "steps", "batch_size", "learning_rate", "weight_decay", "patience", "seed"),
    ),
    "machine": ("device", "threads", "workers", "cache", "amp", "compile"),
    "run and results": (
        *("output", "format", "json", "config", "keep", "checkpoint_every", "resume"),
    ),
}
"""How the help sorts the options of all commands."""
