"""The page is one file that loads nothing, escapes what it is given, and shows its figures."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lnl_ext.reporting import (
    Page,
    confusion_figure,
    embedding_figure,
    environment,
    history_figure,
    png,
)


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th") and data.strip():
            self.cells.append(data)


def test_page_is_self_contained_and_escapes(tmp_path: Path) -> None:
    figure = history_figure({"run": [{"step": 1, "loss": 2.0}]}, {"loss": ("loss",)})
    page = Page("<script>alert(1)</script>")
    page.heading("A & B").text("x < y").figure(figure, 'a "quoted" caption')
    page.table(("name", "value"), [("accuracy", 0.123456), ("none", None), ("runs", 3)])
    page.mapping({"config": {"epochs": 3, "deep": {"er": True}}})
    page.write(tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")

    found = Collector()
    found.feed(text)
    assert "script" not in found.tags
    assert len(found.sources) == 1
    assert found.sources[0].startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(found.sources[0].split(",", 1)[1])))
    assert image.size[0] > 200
    assert {"0.123", "-", "3", "config.epochs", "config.deep.er", "True"} <= set(found.cells)
    assert "x &lt; y" in text


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells, expected 2"):
        Page("").table(("a", "b"), [(1, 2), (3,)])


def test_confusion_rows_are_shares() -> None:
    rows = torch.tensor([0, 0, 0, 0, 1, -1])
    predicted = torch.tensor([0, 0, 0, 1, 0, 1])
    figure = confusion_figure(
        {"one": (rows, predicted)}, classes=2, colors=[(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    )
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [1.0, 0.0]])
    assert sorted(text.get_text() for text in axes.texts) == [".25", ".75", "1.00"]
    with pytest.raises(ValueError, match=r"expected \(N,\) both"):
        confusion_figure({"one": (rows, predicted[:3])}, classes=2)


def test_history_draws_the_points_that_records_have() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "accuracy": 0.5}]
    figure = history_figure({"run": records}, {"loss": ("loss",), "accuracy": ("accuracy",)})
    loss, accuracy = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 2], [2, 1]]
    assert accuracy.lines[0].get_xydata().tolist() == [[2, 0.5]]


def test_embedding_keeps_clusters_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 4, 2, generator=generator) + 20 * labels[:, None, None]
    figure = embedding_figure(
        {"f": features}, labels, torch.rand(60, 3, generator=generator), color_name="colour"
    )
    points = torch.tensor(np.asarray(figure.axes[0].collections[0].get_offsets()))
    centers = torch.stack([points[labels == c].mean(0) for c in range(2)])
    nearest = torch.cdist(points, centers).argmin(1)
    assert (nearest == labels).all()
    assert len(png(figure)) > 1000


def test_environment_names_what_decides_a_run() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert re.match(r"\d+\.\d+", found["lnl_ext"])
