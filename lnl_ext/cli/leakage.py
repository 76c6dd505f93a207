"""The audit of a network's features, as the commands print and keep it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from lnl_ext.cli.samples import Samples
from lnl_ext.measuring import AuditReport, TooFewSamplesError, audit
from lnl_ext.measuring.evaluation import outputs
from lnl_ext.reporting import Leak
from lnl_ext.reporting.tables import align
from lnl_ext.training.distributed import current, gather_rows

__all__ = ["Figures", "audits", "collect_features", "figures", "leakage_text", "leaks"]


Figures = Mapping[str, Mapping[str, float]]
"""Numbers of an audit, by bias column."""


def collect_features(network: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Return the features of all samples, of which ``batches`` are this process's share."""
    return gather_rows(outputs(network, batches).float())


def audits(
    features: Tensor, samples: Samples, seed: int, test: float = 0.3
) -> dict[str, AuditReport]:
    """Audit features for every bias column.

    A column that is known of too few samples is left out with a message.

    Parameters
    ----------
    features
        Of the samples, (N, ...).
    samples
        Their labels and bias values.
    seed, test
        Of `lnl_ext.audit`.
    """
    tell = tqdm.write if current().is_main else lambda message: None  # above a progress bar
    found: dict[str, AuditReport] = {}
    if not features.isfinite().all():
        tell("Leakage is not measured: the features are not finite")
        return found
    for name, target in samples.bias.items():
        try:
            found[name] = audit(features, samples.labels, {name: target}, seed=seed, test=test)
        except TooFewSamplesError as error:
            tell(f"Leakage of {name} is not measured: {error}")
    return found


def figures(reports: Mapping[str, AuditReport]) -> dict[str, dict[str, float]]:
    """Return numbers by column: those of the strongest probe."""
    return {name: _figures(report, name) for name, report in reports.items()}


def _figures(report: AuditReport, name: str) -> dict[str, float]:
    bias, probe = report.biases[name], report.biases[name].leakage
    return {
        "accuracy": probe.accuracy,
        "accuracy_low": probe.accuracy_interval.low,
        "accuracy_high": probe.accuracy_interval.high,
        "label_only": bias.label_only,
        "majority": bias.majority,
        "information": probe.information,
        "information_low": probe.information_interval.low,
        "information_high": probe.information_interval.high,
        "entropy": bias.entropy,
        "p_value": probe.p_value,
        "p_value_within_labels": probe.p_value_within_labels,
        "samples": report.samples["test"],
    }


def leakage_text(stages: Mapping[str, Figures]) -> str:
    """Return a table of leakage, a line per bias column and stage.

    Parameters
    ----------
    stages
        When the features were audited, and what was found.
    """
    rows = [["", "accuracy (95 %)", "nats (95 %)", "p", "within labels", "label alone", "majority"]]
    for name in dict.fromkeys(name for found in stages.values() for name in found):
        rows += [
            [
                f"{name}, {stage}" if stage else name,
                _interval(found[name], "accuracy"),
                _interval(found[name], "information"),
                *(
                    f"{found[name][figure]:.3f}"
                    for figure in ("p_value", "p_value_within_labels", "label_only", "majority")
                ),
            ]
            for stage, found in stages.items()
            if name in found
        ]
    title = "Leakage: how well the strongest fresh probe on the frozen features predicts the bias"
    return "\n".join([title, *align(rows)])


def _interval(found: Mapping[str, float], figure: str) -> str:
    return f"{found[figure]:.3f} ({found[f'{figure}_low']:.3f} to {found[f'{figure}_high']:.3f})"


def leaks(before: Figures, after: Figures) -> list[Leak]:
    """Return the same for the page of a run."""
    return [
        Leak(
            name,
            accuracy=found["accuracy"],
            majority=found["majority"],
            before=before[name]["accuracy"] if name in before else None,
            label_only=found["label_only"],
            information=found["information"],
            information_interval=(found["information_low"], found["information_high"]),
            samples=int(found["samples"]),
        )
        for name, found in after.items()
    ]
