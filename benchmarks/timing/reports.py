"""A subject's report: what was measured, as plain data, and where it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import adversary, linear, losses, memory, plots, scaling, steps, tables
from .settings import Settings, environment

SUBJECTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "loss": losses.measure,
    "small": losses.measure_small,
    "linear": linear.measure,
    "linear_large": linear.measure_large,
    "adversary": adversary.measure,
    "step": steps.measure,
    "memory": memory.measure,
    "scaling": scaling.measure,
}
PAGE = Path("docs") / "performance.md"
ROOT = Path(__file__).resolve().parents[2]


def measure(subject: str, settings: Settings, command: str) -> dict[str, Any]:
    """Measure a subject; return its report as plain data."""
    report = {"subject": subject, "command": command, "quick": settings.quick}
    return report | {"environment": environment(settings)} | SUBJECTS[subject](settings)


def write(report: dict[str, Any], output: Path) -> None:
    """Write a report's figures, plot and section of the page under the folder ``output``."""
    subject = report["subject"]
    results = output / "benchmarks" / "results" / f"throughput_{subject}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plots.draw(report, output / "docs" / "images" / f"throughput_{subject}.png")
    page = output / PAGE
    source = page if page.exists() else ROOT / PAGE
    text = tables.replace_section(source.read_text(encoding="utf-8"), report)
    page.write_text(text, encoding="utf-8")
