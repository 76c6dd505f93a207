"""``lnl evaluate``, ``lnl probe`` and ``lnl predict``: a trained model on images."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lnl_ext.cli.arguments import build
from lnl_ext.cli.leakage import audits, collect_features, figures, leakage_text
from lnl_ext.cli.options import (
    IMAGE_SIZE,
    EvaluateOptions,
    ModelOptions,
    PredictOptions,
    ProbeOptions,
)
from lnl_ext.cli.report import Report, write_json
from lnl_ext.cli.run_folder import (
    IMAGE_COLUMN,
    LABEL_COLUMN,
    PART_COLUMN,
    SPLIT,
    ModelCard,
    run_files,
    trained_on,
    training_associations,
    weights_of,
)
from lnl_ext.cli.samples import (
    Samples,
    bias_classes,
    encoded,
    evaluation_batches,
    read_samples,
    tell,
)
from lnl_ext.data.csv_rows import CsvRows
from lnl_ext.data.folder import find_images
from lnl_ext.data.images import IMAGE_SUFFIXES, IMAGENET_MEAN, IMAGENET_STD
from lnl_ext.data.table import BiasColumn, Table, class_names, read_table
from lnl_ext.errors import UserError
from lnl_ext.files import check_names, replacing
from lnl_ext.measuring.evaluation import Predictions
from lnl_ext.measuring.evaluation import predict as run_model
from lnl_ext.models.backbones import build_network, feature_shape, output_layer, split_network
from lnl_ext.models.exported import ExportedModel
from lnl_ext.models.weights import put_weights, read_weights, unwrapped
from lnl_ext.training.distributed import Processes
from lnl_ext.training.image_transform import Grey, Transformed

__all__ = ["evaluate", "predict", "probe"]

# That of the training: in another one sums round differently.
_LAYOUT = torch.channels_last


@dataclasses.dataclass(frozen=True)
class _Model:
    """A trained model, from wherever it came."""

    network: nn.Module
    source: str
    image_size: int
    batch_size: int
    grey: bool = False
    card: ModelCard | None = None

    @classmethod
    def load(cls, options: ModelOptions) -> _Model:
        if options.run is not None:
            card = ModelCard.load(options.run)
            network = card.network().to(memory_format=_LAYOUT)
            path = weights_of(options.run, card, options.use)
            put_weights(network, read_weights(path), str(path), new_output=False)
            size = options.image_size or card.image_size
            return cls(network, str(options.run), size, options.batch_size, card.grey, card)
        assert options.weights is not None
        if options.weights.suffix == ".pt2":
            program = ExportedModel.load(options.weights)
            size = options.image_size or program.image_size or IMAGE_SIZE
            batch = program.batch_size or options.batch_size
            return cls(program, str(options.weights), size, batch)
        state = read_weights(options.weights)
        with torch.random.fork_rng(devices=[]):
            alike = build_network(options.arch, 2)
            state = unwrapped(state, alike, str(options.weights))
            last = output_layer(alike)
            weight = state.get(f"{last}.weight")
            if weight is None:
                raise UserError(
                    f"weights {options.weights} are not of {options.arch}: no {last}.weight; name "
                    "the architecture with --arch"
                )
            network = build_network(options.arch, len(weight)).to(memory_format=_LAYOUT)
        put_weights(network, state, str(options.weights), new_output=False)
        size = options.image_size or IMAGE_SIZE
        return cls(network, str(options.weights), size, options.batch_size)

    def whole(self, device: torch.device) -> nn.Module:
        """Return images to logits."""
        return self._greyed(self.network.to(device))

    def features(self, feature_layer: str | None, device: torch.device) -> tuple[nn.Module, str]:
        """Return the network up to the feature layer, and the layer's name."""
        if feature_layer is None and self.card is not None:
            feature_layer = self.card.feature_layer
        if isinstance(self.network, ExportedModel):
            front, name = self.network.features(feature_layer)
            return front.to(device), name
        parts = split_network(self.network, feature_layer)
        feature_shape(parts.features, self.image_size)  # says what is wrong with the size
        return self._greyed(parts.features.to(device)), parts.feature_layer

    def _greyed(self, network: nn.Module) -> nn.Module:
        """Return a network that was trained on grey images for the images themselves."""
        return Transformed(Grey(IMAGENET_MEAN, IMAGENET_STD), network) if self.grey else network


def _options(kind: type[Any], flags: Mapping[str, Any], processes: Processes) -> Any:
    """Return checked options, with the columns of the run where none are given."""
    if processes.world_size > 1:
        raise UserError("this command runs in one process: start it without torchrun")
    options = build(kind, flags)
    options.check()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.run is not None:
        card = ModelCard.load(options.run)
        changes: dict[str, Any] = {}
        if options.label_column is None and options.images is None:
            changes["label_column"] = card.label_column
        if not options.bias_column:
            changes["bias_column"] = tuple(card.bias_columns)
        if "image_column" not in flags:
            changes["image_column"] = card.image_column
        options = dataclasses.replace(options, **changes)
    return options


def _check_written(path: Path | None, options: ModelOptions) -> None:
    """Refuse to write over a file that the command reads or that belongs to the run."""
    used = [] if options.run is None else run_files(options.run)
    used += [file for file in (options.csv, options.weights) if file is not None]
    if path is not None and any(_same_file(path, file) for file in used):
        raise UserError(f"{path} is a file of the data or the model: give another for the results")


def _same_file(one: Path, two: Path) -> bool:
    return one.exists() and two.exists() and one.samefile(two)


def _device(options: ModelOptions, processes: Processes) -> torch.device:
    return processes.device if options.device == "auto" else torch.device(options.device)


def _held_out(options: ModelOptions, card: ModelCard) -> Table:
    """Return the validation images of the run."""
    assert options.run is not None
    columns = [BiasColumn(f"bias:{name}") for name in card.bias_classes]
    table = read_table(
        options.run / SPLIT,
        image_column=IMAGE_COLUMN,
        label_column=LABEL_COLUMN,
        bias_columns=columns,
        split_column=PART_COLUMN,
        exact=True,
    )
    assert table.split is not None
    rows = [row for row, part in enumerate(table.split) if part == "validation"]
    bias = {name.removeprefix("bias:"): values for name, values in table.bias.items()}
    return dataclasses.replace(table, bias=bias, split=None).select(rows)


def _table(options: ModelOptions, model: _Model) -> tuple[Table, dict[str, list[str]]]:
    """Return the images, and the classes of their bias columns."""
    if model.card is not None and options.csv is None and options.images is None:
        return _held_out(options, model.card), model.card.bias_classes
    columns = [BiasColumn.parse(text) for text in options.bias_column]
    table = read_samples(options, columns)
    return table, {c.name: class_names(table.bias[c.name], c) for c in columns}


def _unseen(table: Table, run: Path) -> list[int]:
    """Return the rows of the images that the run was not trained on."""
    seen = trained_on(run)
    return [row for row, path in enumerate(table.paths) if path not in seen]


# ------------------------------------------------------------------ evaluate


def evaluate(flags: Mapping[str, Any], processes: Processes) -> None:
    """Run ``lnl evaluate``."""
    options: EvaluateOptions = _options(EvaluateOptions, flags, processes)
    if options.run is None and options.label_column is None and options.images is None:
        raise UserError("no labels: give --label-column NAME (or --images DIR with subfolders)")
    _check_written(options.json, options)
    model = _Model.load(options)
    table, bias = _table(options, model)
    if table.labels is None:
        raise UserError("no labels: give --label-column NAME")
    if model.card is not None:
        labels = model.card.classes
    elif options.classes is not None:
        labels = options.classes.split(",")
    else:
        labels = class_names(table.labels, options.label_column or "folder")
        print(f"Note: the outputs are taken for {', '.join(labels)}; --classes names another order")
    if options.run is not None:
        seen = len(table) - len(_unseen(table, options.run))
        if seen:
            print(
                f"Note: {seen} of {len(table)} images were trained on: such accuracy means little"
            )
    samples = encoded(
        table, options.label_column or "folder", labels, bias, workers=options.workers
    )
    predictions = _run(model, samples, options, processes)
    outputs = predictions.logits.shape[1]
    if outputs != len(labels):
        raise UserError(
            f"{model.source} has {outputs} outputs and the data {len(labels)} labels "
            f"({', '.join(labels)}): name them in the order of the outputs with --classes"
        )
    trained = {}
    if options.run is not None and model.card is not None:
        trained = training_associations(options.run, model.card)
    report = Report.of(predictions, samples.bias, bias, labels, trained)
    what = "images" if options.csv or options.images else "validation images of the run"
    print(report.text(what))
    if options.json is not None:
        write_json(options.json, report.to_dict())


def _run(
    model: _Model, samples: Samples, options: ModelOptions, processes: Processes
) -> Predictions:
    batches = evaluation_batches(samples, model.image_size, options, batch_size=model.batch_size)
    try:
        return run_model(model.whole(_device(options, processes)), batches)
    except (RuntimeError, AssertionError) as error:  # what networks raise for a wrong size
        if "size" in str(error).lower() or "shape" in str(error).lower():
            raise UserError(
                f"{model.source} does not take images of {model.image_size} pixels "
                f"({str(error).splitlines()[0]}): give --image-size"
            ) from error
        raise


# ------------------------------------------------------------------ probe


def probe(flags: Mapping[str, Any], processes: Processes) -> None:
    """Run ``lnl probe``."""
    options: ProbeOptions = _options(ProbeOptions, flags, processes)
    if not options.bias_column:
        raise UserError("no attribute to probe for: give --bias-column NAME")
    if options.validation >= 0.8:  # a fifth of the images ends the probes' training
        raise UserError(f"validation is {options.validation:g}, expected a share below 0.8")
    _check_written(options.json, options)
    model = _Model.load(options)
    table, bias = _table(options, model)
    if options.csv is not None or options.images is not None:
        columns = [BiasColumn.parse(text) for text in options.bias_column]
        bias = bias_classes(table, columns)
    if options.run is not None:
        # The features of images that they were fitted to say nothing about those of others.
        rows = _unseen(table, options.run)
        if not rows:
            raise UserError(
                f"{options.run} was trained on every image of {table.source}: give others, or none "
                "for the validation images of the run"
            )
        if len(rows) < len(table):
            print(f"Left out: {len(table) - len(rows)} images that the run was trained on")
        table = table.select(rows)
    labels = [] if table.labels is None else class_names(table.labels, "label")
    samples = encoded(table, "label", labels, bias, workers=options.workers)
    network, feature_layer = model.features(options.feature_layer, _device(options, processes))
    batches = evaluation_batches(samples, model.image_size, options, batch_size=model.batch_size)
    features = collect_features(network, batches)
    print(f"Features of {model.source} at {feature_layer} {tuple(features.shape[1:])}")
    reports = audits(features, samples, options.seed, options.validation)
    if not reports:
        raise UserError("no attribute could be probed for")
    counts = next(iter(reports.values())).samples
    print(
        f"Probes learned from {counts['train']} images, were stopped by {counts['validation']} and "
        f"are measured on {counts['test']} others"
    )
    found = figures(reports)
    print(leakage_text({"": found}))
    if table.labels is None:
        print("Without --label-column, 'label alone' is the majority as well")
    if options.json is not None:
        write_json(options.json, found)


# ------------------------------------------------------------------ predict


def predict(flags: Mapping[str, Any], processes: Processes) -> None:
    """Run ``lnl predict``."""
    # Labels and bias of the images are not looked at.
    unlabelled = {n: v for n, v in flags.items() if n not in ("label_column", "bias_column")}
    options: PredictOptions = _options(PredictOptions, unlabelled, processes)
    if options.output is None:
        raise UserError("no output: give --output FILE for the predictions")
    if options.csv is None and options.images is None:
        raise UserError("no data: give --csv FILE, or --images DIR")
    _check_written(options.output, options)
    model = _Model.load(options)
    table = _unlabelled(options)
    tell(table)
    check_names(table.names)
    samples = encoded(table, "", [], {}, workers=options.workers)
    probabilities = _run(model, samples, options, processes).logits.softmax(1)
    classes = [str(number) for number in range(probabilities.shape[1])]
    if model.card is not None:
        classes = model.card.classes
    elif options.classes is not None:
        classes = options.classes.split(",")
    if len(classes) != probabilities.shape[1]:
        raise UserError(
            f"--classes has {len(classes)} names, the model {probabilities.shape[1]} outputs"
        )
    carried = {}
    if options.csv is not None:
        carried = _carried(options.csv, [samples.table.lines[row] for row in samples.rows])
    _write_predictions(options.output, samples, classes, probabilities, carried)
    print(f"Wrote {len(samples)} predictions to {options.output}")


def _unlabelled(options: PredictOptions) -> Table:
    if options.csv is not None:
        return read_table(options.csv, image_column=options.image_column, root=options.images)
    assert options.images is not None
    root = options.images.absolute()
    if not root.is_dir():
        raise UserError(f"images {options.images}: no such folder")
    paths, notes = find_images(root)
    if not paths:
        raise UserError(
            f"images {options.images}: no image file in this folder, by extension "
            f"({', '.join(IMAGE_SUFFIXES)})" + "".join(f". {note}" for note in notes)
        )
    names = tuple(str(path.relative_to(root)) for path in paths)
    counted = tuple(notes)
    return Table(
        str(options.images), tuple(paths), names, (0,) * len(paths), None, {}, notes=counted
    )


def _write_predictions(
    path: Path,
    samples: Samples,
    classes: Sequence[str],
    probabilities: Tensor,
    carried: Mapping[str, Sequence[str]],
) -> None:
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.writer(stream)
        own = ["path", "prediction", *(f"probability:{name}" for name in classes)]
        others = [f"table:{name}" if name in own else name for name in carried]
        writer.writerow([*own, *others])
        for at, (row, values) in enumerate(zip(samples.rows, probabilities.tolist(), strict=True)):
            best = max(range(len(values)), key=values.__getitem__)
            writer.writerow(
                [
                    samples.table.names[row],
                    classes[best],
                    *(f"{value:.6f}" for value in values),
                    *(cells[at] for cells in carried.values()),
                ]
            )


def _carried(csv_file: Path, lines: Sequence[int]) -> dict[str, list[str]]:
    """Return the columns of a table, without that of the paths, at some of its lines."""
    rows = CsvRows.read(csv_file, None)
    at = {line: number for number, line in enumerate(rows.lines)}
    return {
        name: [cells[at[line]] for line in lines]
        for name, cells in rows.columns.items()
        if name != "path"
    }
