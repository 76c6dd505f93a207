"""A report as one HTML file: figures embedded, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lnl_ext.files import write_whole
from lnl_ext.measuring.interval import proportion_interval
from lnl_ext.reporting.figures import png

__all__ = ["Page"]

_MANY = 9  # columns that fit a page in letters of the usual size

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<meta name="color-scheme" content="light dark">
<style>
:root { --ink: #1b1b1f; --paper: #fff; --faint: #55555f; --line: #d5d5dc; --shade: #f3f3f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --paper: #16161a; --faint: #a4a4b0; --line: #3c3c46; --shade: #24242b; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left;
         vertical-align: top; overflow-wrap: normal; }
th { background: var(--shade); }
.many { font-size: .8rem; }
.many th, .many td { padding: .2rem .4rem; }
.names td { overflow-wrap: anywhere; min-width: 9rem; }
.names td:first-child { white-space: nowrap; }
@media (max-width: 40rem) { .names td:first-child { white-space: normal; } }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small, figcaption, .note { color: var(--faint); }
figcaption, .note { font-size: .9rem; }
pre { background: var(--shade); padding: .6rem .8rem; white-space: pre-wrap; font-size: .9rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.gallery { display: grid; gap: 1rem; align-items: start;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pictures { display: grid; gap: .8rem; align-items: start;
            grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.pictures figure { margin: 0; }
.pictures img { width: 100%; background: none; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for kind, content in parts %}
{% if kind == "heading" %}<h2>{{ content }}</h2>
{% elif kind == "text" %}<p>{{ content }}</p>
{% elif kind == "note" %}<p class="note">{{ content }}</p>
{% elif kind == "code" %}<pre><code>{{ content }}</code></pre>
{% elif kind == "table" %}<div class="wide"><table class="{{ content.style }}">
<thead><tr>{% for cell in content.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in content.rows %}
<tr>{% for cell in row %}<td{% if cell.number %} class="number"{% endif %}>{{ cell.text }}\
{% if cell.samples is defined %} <small>({{ cell.samples }})<br>{{ cell.interval }}</small>\
{% endif %}</td>\
{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% elif kind == "figure" %}<figure>\
{% if content.images|length > 1 %}<div class="gallery">{% endif %}
{% for alt, data in content.images %}<img alt="{{ alt }}" src="data:image/png;base64,{{ data }}">
{% endfor %}{% if content.images|length > 1 %}</div>{% endif %}
<figcaption>{{ content.caption }}</figcaption></figure>
{% elif kind == "pictures" %}<div class="pictures">
{% for caption, data in content %}<figure><img alt="" src="data:image/png;base64,{{ data }}">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>
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

    def note(self, text: str) -> Page:
        """Add a paragraph in small letters."""
        self._parts.append(("note", text))
        return self

    def code(self, text: str) -> Page:
        """Add text as it stands, line breaks included."""
        self._parts.append(("code", text))
        return self

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Page:
        """Add a table.

        Numbers are set to the right, floats with three digits. A pair is a share and how many
        samples it is of, and is shown with its 95 % interval; None is where there is nothing.

        Raises
        ------
        ValueError
            A row has another length than the header.
        """
        return self._table(header, rows, "many" if len(header) > _MANY else "few")

    def mapping(self, values: Mapping[str, Any]) -> Page:
        """Add a table of names and values; nested names are joined by dots."""
        return self._table(("name", "value"), list(_flat("", values)), "names")

    def _table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], style: str) -> Page:
        for number, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(
                    f"rows[{number}] has {len(row)} cells, expected {len(header)} as in the header"
                )
        cells = [[_cell(value) for value in row] for row in rows]
        self._parts.append(("table", {"header": header, "rows": cells, "style": style}))
        return self

    def figure(self, figure: Any, caption: str) -> Page:
        """Embed a matplotlib figure."""
        return self.gallery({caption: figure}, caption)

    def gallery(self, figures: Mapping[str, Any], caption: str) -> Page:
        """Embed matplotlib figures, side by side where there is room.

        Parameters
        ----------
        figures
            By what to say where they cannot be seen.
        caption
            Below all of them.
        """
        images = [
            (alt, base64.b64encode(png(figure)).decode("ascii")) for alt, figure in figures.items()
        ]
        self._parts.append(("figure", {"images": images, "caption": caption}))
        return self

    def pictures(self, pictures: Sequence[tuple[str, bytes]]) -> Page:
        """Show small images, PNG, each with a caption."""
        shown = [(caption, base64.b64encode(data).decode("ascii")) for caption, data in pictures]
        self._parts.append(("pictures", shown))
        return self

    def render(self) -> str:
        """Return the page as HTML; whatever was added is escaped."""
        from jinja2 import Environment

        template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
        html = template.render(title=self.title, parts=self._parts)
        # Names of files may hold bytes that are no text, which no encoding has.
        return html.encode("utf-8", "backslashreplace").decode("utf-8")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page, so that ``path`` holds all of it or what it held before.

        Raises
        ------
        OSError
            It cannot be written (a full disk, no permission).
        """
        write_whole(Path(path), self.render())


def _cell(value: Any) -> dict[str, Any]:
    if isinstance(value, tuple):
        share, samples = value
        low, high = proportion_interval(share, samples)
        interval = f"{low:.3f} to {high:.3f}"
        return {"number": True, "text": f"{share:.3f}", "samples": samples, "interval": interval}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = f"{value:.3f}" if isinstance(value, float) else "-" if value is None else str(value)
    return {"number": number, "text": text}


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(f"{prefix}{name}.", value)
        else:
            several = isinstance(value, (list, tuple))
            text = ", ".join(map(str, value)) if several else str(value)
            rows.append((f"{prefix}{name}", "-" if value is None else text))
    return rows
