"""The page of a run: what it shows, what it survives, and how a browser shows it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from cli_data import train_flags, write_images
from PIL import Image

from lnl_ext.cli.main import main
from lnl_ext.measuring.interval import proportion_interval
from lnl_ext.reporting import Confusion, Leak, RunSummary, Table, write_run_page

pytestmark = pytest.mark.usefixtures("threads_kept")

CAT, NORTH = '<b>&"cats"', "$north_{x$"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Label loss and entropies (two) at steps; confusion of all, of two hospitals and of two ages.
IMAGES_OF_RUN = 8
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Parsed(HTMLParser):
    """A page whose tags are all closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            place = "br" if self.tags[-1] == "br" else self.open[-1]
            self.text.setdefault(place, []).append(data.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run whose classes have names that HTML and figures must not read."""
    table = write_images(tmp_path_factory.mktemp("page") / "images")
    quoted = CAT.replace('"', '""')
    text = table.read_text().replace("healthy", f'"{quoted}"').replace("north", NORTH)
    table.write_text(text)
    output = table.parent.parent / "run"
    assert main(train_flags(table, output)) == 0
    return output


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def summary(classes: int = 3, **changes: object) -> RunSummary:
    labels = torch.arange(60) % classes
    made = RunSummary(
        title="A <title>",
        about=["Told & shown."],
        results=Table(("accuracy", "nothing"), [(0.25, None)], note="a <note>"),
        command="lnl train --csv='a b'",
        configuration={"epochs": 1, "deep": {"er": None}},
        histories={
            "lnl": [
                *({"step": 3 * n, "label_loss": 1 / n, "b_entropy": None} for n in (1, 2, 3)),
                *({"step": 6 * n, "few_accuracy": 0.5} for n in (1, 2)),
            ]
        },
        data={"Data": Table(("bias", "a", "b"), [("x", 5, 2)], note="71 % aligned")},
        groups={"Groups": Table(("bias", "a"), [("x", (0.5, 7))])},
        leaks=[Leak("colour", accuracy=0.4, majority=0.3, before=0.9)],
        confusions=[
            Confusion("all", labels, labels.roll(1), [f"c{n}" for n in range(classes)]),
        ],
        pictures=("Mistakes", [("a <picture>", picture())]),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def written(tmp_path: Path, made: RunSummary) -> Parsed:
    assert write_run_page(tmp_path / "report.html", made) is None
    return Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_it_shows_what_it_is_given(tmp_path: Path) -> None:
    found = written(tmp_path, summary())
    assert found.text["h1"] == ["A <title>"]
    headings = ["Results", "Data", "Groups", "Leakage: how well a fresh probe predicts the bias"]
    headings += ["Training", "Confusion", "Mistakes", "Command", "Configuration", "Environment"]
    assert found.text["h2"] == headings
    # What was not measured has no column; what is not there is a dash.
    header = ["accuracy", "nothing", "bias", "a", "b", "bias", "a"]
    assert found.text["th"][:11] == [*header, "bias", "before", "after", "majority"]
    cells = found.text["td"]
    assert cells[:7] == ["0.250", "-", "x", "5", "2", "x", "0.500"]
    assert cells[7:15] == ["colour", "0.900", "0.400", "0.300", "epochs", "1", "deep.er", "-"]
    # How many samples a share is of, and its interval.
    assert found.text["small"] == ["(7)"]
    low, high = proportion_interval(0.5, 7)
    assert found.text["br"] == [f"{low:.3f} to {high:.3f}"]
    assert found.text["code"] == ["lnl train --csv='a b'"]
    assert {torch.__version__} <= set(cells)
    # Label loss, confusion and the picture; two points make no curve.
    assert found.tags.count("img") == 3
    assert "a <picture>" in found.text["figcaption"]


@pytest.mark.parametrize(
    "made",
    [
        summary(histories={}, leaks=[], confusions=[], groups={}),
        summary(histories={"a": [], "b": []}),
        summary(histories={"a": [{"step": n, "label_loss": math.nan} for n in range(3)]}),
        summary(leaks=[Leak("_a$", 0.1, 0.1, before=0.2), Leak("_b", 0.1, 0.1, before=0.2)]),
    ],
    ids=["nothing", "no records", "nan", "odd names"],
)
@pytest.mark.filterwarnings("error")
def test_little_or_odd_data_is_no_trouble(tmp_path: Path, made: RunSummary) -> None:
    assert "Environment" in written(tmp_path, made).text["h2"]


@pytest.mark.filterwarnings("error")
def test_names_that_the_font_has_not_are_numbers_with_a_legend(tmp_path: Path) -> None:
    rows = torch.tensor([0, 1])
    confusion = Confusion("all", rows, rows, ["猫", "犬"])
    found = written(tmp_path, summary(confusions=[confusion]))
    assert "Shares of each row. The classes: 0: 猫, 1: 犬." in found.text["figcaption"]


def test_of_many_classes_the_most_frequent_mistakes_are_told(tmp_path: Path) -> None:
    rows = torch.tensor([0, 0, 0, 1, -1])
    predicted = torch.tensor([2, 2, 0, 30, 5])
    confusion = Confusion("all", rows, predicted, [f"c{n}" for n in range(31)])
    cells = written(tmp_path, summary(confusions=[confusion])).text["td"]
    start = cells.index("c0")
    assert cells[start : start + 8] == ["c0", "c2", "2", "0.667", "c1", "c30", "1", "1.000"]
    assert cells[start + 8] == "epochs"


def test_without_matplotlib_it_says_so_and_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = write_run_page(tmp_path / "report.html", summary())
    assert told is not None
    assert told.startswith(f"{tmp_path}/report.html: no figures: ")
    assert told.endswith("; they need: pip install 'lnl_ext[train]'")
    assert "\n" not in told
    found = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert found.tags.count("img") == 1  # the picture
    assert any(text.startswith("There are no figures: ") for text in found.text["p"])
    assert "share of the row" in found.text["th"]


def test_without_jinja2_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    told = write_run_page(tmp_path / "report.html", summary())
    assert told is not None
    assert "report.html was not written: " in told
    assert "pip install 'lnl_ext[train]'" in told
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    told = write_run_page("/dev/full", summary())
    assert told == "/dev/full was not written: No space left on device"


def test_a_folder_in_its_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    told = write_run_page(tmp_path / "report.html", summary())
    assert told == f"{tmp_path}/report.html was not written: Is a directory"


def test_a_name_that_is_no_text_is_shown_as_bytes(tmp_path: Path) -> None:
    found = written(tmp_path, summary(command="lnl train --output=\udce4"))
    assert found.text["code"] == ["lnl train --output=\\udce4"]


# ------------------------------------------------------------------ the page of a real run


def test_a_runs_page_is_whole_and_escaped(run: Path) -> None:
    found = Parsed((run / "report.html").read_text(encoding="utf-8"))
    assert {CAT, "ill"} <= set(found.text["th"])
    assert NORTH in found.text["td"]
    assert not {"b", "script", "link", "iframe"} & set(found.tags)
    assert len(found.loaded) == found.tags.count("img") == IMAGES_OF_RUN + mistakes(run)
    assert all(source.startswith("data:image/png;base64,") for source in found.loaded)


def mistakes(run: Path) -> int:
    """Return how many images of the worst group of a run are classified wrongly."""
    columns = json.loads((run / "report.json").read_text())["bias"].values()
    worst = min(columns, key=lambda column: column["worst_group_accuracy"])
    group = min(worst["groups"], key=lambda found: found["accuracy"])
    wrong = round((1 - group["accuracy"]) * group["samples"])
    assert 0 < wrong <= 12
    return wrong


def browse(page: Path, folder: Path, *flags: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--no-first-run", *flags, page.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOOK = """<script>
addEventListener("load", () => {
  const all = (what) => [...document.querySelectorAll(what)];
  document.documentElement.dataset.seen = JSON.stringify({
    headings: all("h2").map((heading) => heading.innerText),
    rows: all("table").map((table) => table.rows.length),
    labels: all("th").map((cell) => cell.innerText),
    widths: all("img").map((image) => image.naturalWidth),
    shown: all("img").map((image) => image.getBoundingClientRect().width),
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    sideways: document.documentElement.scrollWidth - innerWidth,
  });
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize(("width", "dark"), [(500, True), (1280, False)])
def test_a_browser_shows_the_page_and_loads_nothing(
    run: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    # A copy that tells what the browser made of it; the page itself allows no script.
    text = (run / "report.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; "
    assert text.count(policy) == text.count("</body>") == 1
    text = text.replace(policy, policy + "script-src 'unsafe-inline'; ").replace("</body>", LOOK)
    copy = tmp_path / "copy.html"
    copy.write_text(text, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    more = ["--virtual-time-budget=5000", "--dump-dom"]
    dom = browse(copy, tmp_path, f"--window-size={width},900", scheme, *more)

    class Root(HTMLParser):
        seen = "{}"

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen = dict(attrs).get("data-seen") or self.seen

    root = Root()
    root.feed(dom)
    seen = json.loads(root.seen)
    assert seen["headings"] == Parsed(text.replace(LOOK, "</body>")).text["h2"]
    # Results, two of data and two of groups, leakage, configuration, environment.
    assert len(seen["rows"]) == 8
    assert min(seen["rows"]) >= 2
    assert CAT in seen["labels"]
    figures = slice(IMAGES_OF_RUN)
    assert len(seen["widths"]) == IMAGES_OF_RUN + mistakes(run)
    assert min(seen["widths"][figures]) > 300
    assert min(seen["shown"][figures]) > 200
    assert all(name.startswith("data:") for name in seen["loaded"])
    assert seen["sideways"] <= 0
    brightness = [
        sum(map(int, re.findall(r"\d+", seen[name])[:3])) / 765 for name in ("paper", "ink")
    ]
    assert (brightness[0] < 0.2) == dark
    assert abs(brightness[0] - brightness[1]) > 0.7


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
def test_a_screenshot_has_the_figures(run: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    browse(run / "report.html", tmp_path, "--window-size=1280,4000", f"--screenshot={shot}")
    image = Image.open(shot).convert("RGB")
    assert image.size[0] == 1280
    colors = {color: count for count, color in image.getcolors(1 << 24)}
    assert colors[255, 255, 255] < 0.98 * image.size[0] * image.size[1]
    # matplotlib's first two colours: the lines of the curves.
    assert colors.get((31, 119, 180), 0) > 200
    assert colors.get((255, 127, 14), 0) > 200
