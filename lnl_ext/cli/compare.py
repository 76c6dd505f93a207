"""``lnl compare``: finished runs side by side."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lnl_ext.cli.arguments import build, read_toml, saved_value
from lnl_ext.cli.options import CompareOptions, TrainOptions
from lnl_ext.cli.run_folder import CONFIG, REPORT, ModelCard
from lnl_ext.errors import UserError
from lnl_ext.files import write_whole
from lnl_ext.measuring.interval import Interval
from lnl_ext.reporting.comparison import LEAKAGE, ComparedRun, Comparison, Measured
from lnl_ext.training.distributed import Processes

__all__ = ["compare"]

_NOT_A_ROW = ("seed", "threads", "workers", "device", "checkpoint_every", "compile")
"""Options that are no reason for a row of its own."""


@dataclasses.dataclass(frozen=True)
class _Run:
    folder: Path
    options: TrainOptions
    card: ModelCard
    report: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> _Run:
        card = ModelCard.load(folder)
        options = build(TrainOptions, read_toml(folder / CONFIG, TrainOptions))
        try:
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no {REPORT}: the run has not ended; lnl train --output {folder} "
                "--resume continues it"
            ) from None
        except ValueError as error:
            raise UserError(f"{folder / REPORT} is damaged: {error}") from None
        return cls(folder, options, card, report)

    def measured(self) -> dict[str, Measured]:
        """Return what the report has, by column of the comparison."""
        found = {
            "overall": _measured(self.report, "accuracy"),
            "worst group": _measured(self.report, "worst_group_accuracy"),
        }
        several = len(self.card.bias_classes) > 1
        for name in self.card.bias_classes:
            column = f" ({name})" if several else ""
            groups = self.report["bias"].get(name, {})
            found[f"aligned{column}"] = _measured(groups, "aligned")
            found[f"conflicting{column}"] = _measured(groups, "conflicting")
        found["AUC"] = _measured(self.report, "auc")
        for name in self.card.bias_classes:
            leakage = self.report["leakage_after"].get(name, {})
            found[f"{LEAKAGE}{name}"] = _measured(leakage, "information")
        if not self.card.bias_classes:
            del found["worst group"]
        return {name: value for name, value in found.items() if value is not None}


def _measured(figures: Mapping[str, Any], name: str) -> Measured | None:
    if figures.get(name) is None:
        return None
    ends = [figures.get(f"{name}_{end}") for end in ("low", "high")]
    return Measured(figures[name], Interval(*(math.nan if end is None else end for end in ends)))


def compare(flags: Mapping[str, Any], processes: Processes) -> None:
    """Run ``lnl compare``."""
    options = build(CompareOptions, flags)
    runs = [_Run.load(folder) for folder in options.runs]
    _check(runs)
    names = _names(runs)
    compared = Comparison(
        [
            ComparedRun(name, run.options.seed, str(run.folder), run.measured())
            for name, run in zip(names, runs, strict=True)
        ]
    )
    label = runs[0].options.label_column or "folder"
    formats: dict[str, Callable[[], str]] = {
        "text": compared.text,
        "json": lambda: json.dumps(compared.to_dict(), indent=2),
        "markdown": compared.markdown,
        "html": lambda: compared.html(f"{label}: {len(compared.names)} methods, {len(runs)} runs"),
    }
    text = formats[options.format]()
    if options.output is None:
        print(text)
        return
    write_whole(options.output, text + "\n")
    print(f"Wrote {options.output}")


def _check(runs: list[_Run]) -> None:
    """Refuse runs that do not belong into one table."""
    first = runs[0]
    for run in runs[1:]:
        for what, one, two in (
            ("labels", first.card.classes, run.card.classes),
            ("bias classes", first.card.bias_classes, run.card.bias_classes),
        ):
            if one != two:
                raise UserError(
                    f"{first.folder} and {run.folder} have different {what}: {_short(one)}, "
                    f"{_short(two)}"
                )
    seen: dict[tuple[Any, ...], Path] = {}
    for run in runs:
        settings = tuple(map(repr, _settings(run.options).items())), run.options.seed
        if settings in seen:
            raise UserError(
                f"{seen[settings]} and {run.folder} have the same options and seed: give one"
            )
        seen[settings] = run.folder


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def _settings(options: TrainOptions) -> dict[str, Any]:
    return {
        field.name: saved_value(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.metadata["saved"] and field.name not in _NOT_A_ROW
    }


def _names(runs: list[_Run]) -> list[str]:
    """Return the row of every run: its method, and options in which its runs differ."""
    settings = [_settings(run.options) for run in runs]
    names = []
    for own in settings:
        alike = [other for other in settings if other["method"] == own["method"]]
        differs = [name for name in own if len(set(_each(alike, name))) > 1]
        told = [f"{name.replace('_', '-')} {_shown(own[name])}" for name in differs]
        names.append(", ".join([own["method"], *told]))
    return names


def _each(settings: Iterable[Mapping[str, Any]], name: str) -> Iterable[str]:
    return (repr(one[name]) for one in settings)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
