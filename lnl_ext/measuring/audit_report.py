"""What an audit found, as data, as text and as a figure."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from lnl_ext.files import finite_or_none
from lnl_ext.measuring.groups import GroupAccuracy
from lnl_ext.measuring.information import Measurement

_NAMED = 12  # classes whose numbers are written out


@dataclasses.dataclass(frozen=True)
class ProbeAudit(Measurement):
    """How well one fresh probe predicts the bias on samples it has not seen.

    Attributes
    ----------
    accuracy, accuracy_interval
        Share of right predictions, ignored targets left out.
    cross_entropy
        In nats.
    information, information_interval
        ``H(b) - CE``, in nats: a lower bound of the mutual information of bias and features, in
        expectation over the test samples. 0 where the probe is worse than the class frequencies.
    p_value
        Of the permutation test of "this bias cannot be predicted from these features".
    p_value_within_labels
        Likewise of "the features say no more about the bias than the label does".
    epochs
        How long the probe was trained.
    converged
        Whether training ended because the validation loss no longer fell.
    """

    epochs: int
    converged: bool


@dataclasses.dataclass(frozen=True)
class BiasAudit:
    """What was found about one bias.

    Attributes
    ----------
    classes, heads
        Number of bias classes that occur, and of predictions per sample or position.
    class_names
        Their numbers as given, ascending.
    chance
        ``1 / classes``.
    majority
        Accuracy on the test samples of always predicting the class most frequent in the training
        samples.
    label_only
        The same of predicting the class most frequent among the training samples of the same
        label: what follows from the label, and so from every feature that is good for the label.
    entropy
        H(b) on the test samples, in nats, with the correction of Miller and Madow for the number
        of samples, at most ``log(classes)``; the mean over the heads.
    probes
        By name.
    groups
        None without predictions of a classifier, or for a bias with several values a sample.
    """

    classes: int
    class_names: tuple[int, ...]
    heads: int
    chance: float
    majority: float
    label_only: float
    entropy: float
    probes: dict[str, ProbeAudit]
    groups: GroupAccuracy | None

    @property
    def strongest(self) -> str:
        """The name of the probe with the largest information: the bound to report."""
        return max(self.probes, key=lambda name: self.probes[name].information)

    @property
    def leakage(self) -> ProbeAudit:
        """The strongest probe's result."""
        return self.probes[self.strongest]


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes
    ----------
    samples
        How many there were in all, and for the probes to learn from (``train``), to be stopped by
        (``validation``) and to be measured on (``test``).
    accuracy
        Of the classifier on all samples; None without predictions.
    biases
        By name.
    settings
        The arguments that decide the results.
    """

    samples: dict[str, int]
    accuracy: float | None
    biases: dict[str, BiasAudit]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, fit for JSON; groups are lists of objects.

        A number that is not finite is None.
        """
        result = dataclasses.asdict(self)
        for name, bias in self.biases.items():
            entry = result["biases"][name]
            entry["strongest"] = bias.strongest
            entry["class_names"] = list(bias.class_names)
            for probe in entry["probes"].values():
                for field in ("accuracy_interval", "information_interval"):
                    probe[field] = list(probe[field])
            if bias.groups is not None:
                groups = bias.groups
                entry["groups"] = {
                    "worst": groups.worst,
                    "aligned": groups.aligned,
                    "conflicting": groups.conflicting,
                    "groups": [
                        {
                            "label": label,
                            "bias": group,
                            "accuracy": accuracy,
                            "samples": groups.samples[label, group],
                        }
                        for (label, group), accuracy in groups.accuracy.items()
                    ],
                }
        plain: dict[str, Any] = finite_or_none(result)
        return plain

    def to_markdown(self) -> str:
        """Return the report as Markdown, with what each number is compared with."""
        parts = ["# Bias audit", "", self._introduction()]
        for name, bias in self.biases.items():
            parts += ["", f"## {name}", "", *_probe_lines(bias, self.settings["confidence"])]
            if bias.groups is not None:
                parts += ["", *_group_lines(bias.groups)]
        return "\n".join(parts) + "\n"

    def _introduction(self) -> str:
        counts = self.samples
        text = (
            f"{counts['all']} samples: fresh probes learned from {counts['train']}, were stopped "
            f"by {counts['validation']} and measured on {counts['test']} that they had not seen."
        )
        if self.accuracy is not None:
            text += f" The classifier's accuracy on all samples is {self.accuracy:.4f}."
        return text

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw probes against chance and majority, and the groups' accuracy, into a file.

        Parameters
        ----------
        path
            The format is that of the suffix (png, svg, pdf).

        Raises
        ------
        ImportError
            matplotlib is not installed.
        """
        from lnl_ext.measuring.audit_figure import audit_figure

        audit_figure(self).savefig(path, dpi=120)


def _probe_lines(bias: BiasAudit, confidence: float) -> list[str]:
    percent = f"{100 * confidence:g} %"
    named = ""
    if bias.class_names != tuple(range(bias.classes)):
        shown = bias.class_names[:_NAMED]
        named = f" ({', '.join(map(str, shown))}{', ...' if len(shown) < bias.classes else ''})"
    lines = [
        f"{bias.classes} classes{named}, H(b) = {bias.entropy:.3f} nats (Miller-Madow); "
        f"chance {bias.chance:.3f}, always the most frequent class {bias.majority:.3f}, "
        f"that of the label {bias.label_only:.3f}.",
        "",
        f"| probe | accuracy ({percent}) | I(b; f) at least, nats ({percent}) | "
        "p-value of H0 'not predictable' | p-value of H0 'not beyond the label' |",
        "|---|---|---|---|---|",
    ]
    for name, probe in bias.probes.items():
        mark = "" if probe.converged else " (not converged)"
        accuracy, information = probe.accuracy_interval, probe.information_interval
        lines.append(
            f"| {name}{mark} | {probe.accuracy:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f}) "
            f"| {probe.information:.3f} ({information.low:.3f} to {information.high:.3f}) "
            f"| {probe.p_value:.4f} | {probe.p_value_within_labels:.4f} |"
        )
    return lines


def _group_lines(groups: GroupAccuracy) -> list[str]:
    labels = sorted({label for label, _ in groups.accuracy})
    biases = sorted({bias for _, bias in groups.accuracy})
    worst = groups.worst_group
    lines = [
        f"Worst group: label {worst[0]} with bias {worst[1]}, accuracy {groups.worst:.4f} of "
        f"{groups.samples[worst]} samples."
    ]
    sides = (("aligned", groups.aligned), ("conflicting", groups.conflicting))
    told = [f"bias-{side} {accuracy:.4f}" for side, accuracy in sides if accuracy is not None]
    if told:
        lines.append(f"Accuracy on samples by the training set's association: {', '.join(told)}.")
    lines += [
        "",
        "Accuracy (samples) by label and bias class:",
        "",
        "| label | " + " | ".join(map(str, biases)) + " |",
        "|---" * (len(biases) + 1) + "|",
    ]
    for label in labels:
        cells = [
            f"{groups.accuracy[label, bias]:.3f} ({groups.samples[label, bias]})"
            if (label, bias) in groups.accuracy
            else "-"
            for bias in biases
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines
