"""Reports as Markdown, and where in the documentation they stand."""

from __future__ import annotations

from typing import Any

from lnl_ext.reporting.tables import markdown

from .settings import describe


def table(report: dict[str, Any]) -> str:
    """Return the rows as a Markdown table: a line a case, a column a candidate."""
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["values"]))
    rows = [
        [
            row["case"],
            *(_cell(row, name, report["base"]) for name in names),
            str(row["rounds"]),
        ]
        for row in report["rows"]
    ]
    return markdown(["case", *names, "rounds"], rows)


def work_table(report: dict[str, Any]) -> str:
    """Return the counted operations of the rows, and the base's over each candidate's."""
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["work"]))
    rows = []
    for row in report["rows"]:
        work, base = row["work"], row["work"][report["base"]]
        cells = [
            "-" if name not in work else f"{number(work[name])}, {base / work[name]:.2f}x"
            for name in names
        ]
        rows.append([row["case"], *cells])
    return markdown(["case", *names], rows)


def section(report: dict[str, Any]) -> str:
    """Return everything that the documentation shows of a report."""
    subject = report["subject"]
    spread = "" if report["unit"] == "MiB" else " [quartiles]"
    return "\n\n".join(
        [
            f"### {report['title']}",
            *report["notes"],
            f"Median{spread} in {report['unit']}, and behind it {report['ratio']} (median over "
            "the rounds).",
            table(report),
            *([report["work"], work_table(report)] if "work" in report else []),
            f"![{subject}](images/throughput_{subject}.png)",
            f"`{report['command']}` on {describe(report['environment'])}. "
            f"Figures: `benchmarks/results/throughput_{subject}.json`.",
        ]
    )


def replace_section(page: str, report: dict[str, Any]) -> str:
    """Return the page with the report between its subject's two markers.

    Raises
    ------
    ValueError
        The page lacks a marker.
    """
    begin, end = (f"<!-- throughput {report['subject']}: {edge} -->" for edge in ("begin", "end"))
    if begin not in page or end not in page:
        raise ValueError(f"the page has no markers {begin} and {end}")
    before, rest = page.split(begin, 1)
    after = rest.split(end, 1)[1]
    return f"{before}{begin}\n{section(report)}\n{end}{after}"


def _cell(row: dict[str, Any], name: str, base: str) -> str:
    if name not in row["values"]:
        return "-"
    values, ratio = row["values"][name], row["ratios"][name]["median"]
    text = number(values["median"])
    if values["q1"] != values["q3"]:
        text += f" [{number(values['q1'])}, {number(values['q3'])}]"
    return text if name == base else f"{text}, {ratio:.2f}x"


def number(value: float) -> str:
    """Return three digits of ``value``, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
