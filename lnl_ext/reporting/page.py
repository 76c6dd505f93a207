"""A report as one HTML file: figures embedded, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lnl_ext.reporting.figures import png

__all__ = ["Page"]

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1f; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #d5d5dc; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; }
th, td { border: 1px solid #d5d5dc; padding: .25rem .6rem; text-align: left; }
th { background: #f3f3f7; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #55555f; font-size: .9rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for kind, content in parts %}
{% if kind == "heading" %}<h2>{{ content }}</h2>
{% elif kind == "text" %}<p>{{ content }}</p>
{% elif kind == "table" %}<div class="wide"><table>
<thead><tr>{% for cell in content.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in content.rows %}
<tr>{% for cell in row %}<td{% if cell.number %} class="number"{% endif %}>{{ cell.text }}</td>\
{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% elif kind == "figure" %}<figure><img alt="{{ content.caption }}" \
src="data:image/png;base64,{{ content.data }}">
<figcaption>{{ content.caption }}</figcaption></figure>
{% endif %}
{% endfor %}
</body>
</html>
"""


class Page:
    """Builds the page part by part; `write` makes the file.

    Parameters
    ----------
    title
        Heading and title.

    Examples
    --------
    >>> page = Page("Run 7")
    >>> page.heading("Configuration").mapping({"epochs": 3, "seed": 0})
    >>> page.write("report.html")
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[tuple[str, Any]] = []

    def heading(self, text: str) -> Page:
        """Begin a section."""
        self._parts.append(("heading", text))
        return self

    def text(self, text: str) -> Page:
        """Add a paragraph."""
        self._parts.append(("text", text))
        return self

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Page:
        """Add a table; numbers are set to the right, floats with four digits.

        Raises
        ------
        ValueError
            A row has another length than the header.
        """
        for number, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(
                    f"rows[{number}] has {len(row)} cells, expected {len(header)} as in the header"
                )
        cells = [[_cell(value) for value in row] for row in rows]
        self._parts.append(("table", {"header": header, "rows": cells}))
        return self

    def mapping(self, values: Mapping[str, Any]) -> Page:
        """Add a table of names and values; nested names are joined by dots."""
        return self.table(("name", "value"), list(_flat("", values)))

    def figure(self, figure: Any, caption: str) -> Page:
        """Embed a matplotlib figure."""
        data = base64.b64encode(png(figure)).decode("ascii")
        self._parts.append(("figure", {"data": data, "caption": caption}))
        return self

    def render(self) -> str:
        """Return the page as HTML; whatever was added is escaped."""
        from jinja2 import Environment

        template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
        return template.render(title=self.title, parts=self._parts)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.render(), encoding="utf-8")


def _cell(value: Any) -> dict[str, Any]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
    return {"number": number, "text": text}


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(f"{prefix}{name}.", value)
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows
