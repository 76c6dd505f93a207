"""``lnl compare``: methods side by side, over their seeds, in every format."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from cli_data import train_flags, write_images
from scipy import stats

from lnl_ext.cli.main import main

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("compare") / "images")


@pytest.fixture(scope="module")
def runs(table: Path) -> list[Path]:
    """Three seeds of the baseline, one run of a method with an adversary."""
    found = []
    for method, seed in (("baseline", 0), ("baseline", 1), ("baseline", 2), ("grl", 0)):
        folder = table.parent.parent / f"{method}-{seed}"
        flags = [f"--method={method}", f"--seed={seed}", "--keep=last"]
        flags = [*train_flags(table, folder, *flags)]
        assert main([flag for flag in flags if not flag.startswith("--bias-column=age")]) == 0
        found.append(folder)
    return found


def compared(runs: list[Path], capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert main(["compare", *map(str, runs), *more]) == 0
    return capsys.readouterr().out


COLUMNS = ["overall", "worst group", "aligned", "conflicting", "AUC", "leakage of hospital"]


def test_means_and_intervals_over_seeds(runs, capsys):
    found = json.loads(compared(runs, capsys, "--format=json"))
    baseline, grl = found["rows"]
    assert (baseline["method"], grl["method"]) == ("baseline", "grl")
    assert baseline["seeds"] == [0, 1, 2]
    assert baseline["runs"] == [str(run) for run in runs[:3]]
    assert list(baseline["measured"]) == COLUMNS
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    for name, value in {
        "overall": lambda r: r["accuracy"],
        "worst group": lambda r: r["worst_group_accuracy"],
        "conflicting": lambda r: r["bias"]["hospital"]["conflicting"],
        "AUC": lambda r: r["auc"],
        "leakage of hospital": lambda r: r["leakage_after"]["hospital"]["information"],
    }.items():
        values = [value(report) for report in reports]
        measured = baseline["measured"][name]
        assert measured["values"] == values[:3]
        assert measured["mean"] == pytest.approx(statistics.fmean(values[:3]))
        if len(set(values[:3])) > 1:
            error = statistics.stdev(values[:3]) / math.sqrt(3)
            low, high = stats.t.interval(0.95, 2, measured["mean"], error)
            high = high if name.startswith("leakage") else min(1, high)
            assert (measured["low"], measured["high"]) == pytest.approx((max(0, low), high))
        assert grl["measured"][name]["mean"] == values[3]
    # Of a single run the interval is that of its images.
    assert grl["measured"]["overall"]["low"] == reports[3]["accuracy_low"]
    assert grl["measured"]["worst group"]["high"] == reports[3]["worst_group_accuracy_high"]


def test_text_and_markdown(runs, capsys, tmp_path):
    text = compared(runs, capsys)
    lines = text.splitlines()
    assert " ".join(lines[0].split()) == " ".join(["method seeds", *COLUMNS])
    assert lines[1].split()[:4] == ["baseline", "0,", "1,", "2"]
    assert lines[2].split()[:2] == ["grl", "0"]
    assert "Student's t" in text
    path = tmp_path / "table.md"
    told = compared(runs, capsys, "--format=markdown", f"--output={path}")
    assert told == f"Wrote {path}\n"
    rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert [len(row.split("|")) for row in rows] == [len(COLUMNS) + 4] * 4


def test_a_page_with_the_trade_off(runs, capsys, tmp_path):
    path = tmp_path / "page.html"
    compared(runs, capsys, "--format=html", f"--output={path}")
    page = path.read_text()
    for heading in ("Methods", "Trade-off", "Runs"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<img ") == 2
    assert 'alt="leakage of hospital and worst group"' in page
    for run in runs:
        assert str(run) in page


def test_options_that_differ_within_a_method_make_rows(table, runs, capsys):
    folder = table.parent.parent / "other"
    flags = train_flags(table, folder, "--method=baseline", "--keep=last")
    flags = [flag for flag in flags if not flag.startswith("--bias-column=age")]
    assert main([*flags, "--learning-rate=0.01"]) == 0
    found = json.loads(compared([*runs, folder], capsys, "--format=json"))
    assert [(row["method"], row["seeds"]) for row in found["rows"]] == [
        ("baseline, learning-rate 0.001", [0, 1, 2]),
        ("grl", [0]),
        ("baseline, learning-rate 0.01", [0]),
    ]


def test_what_cannot_be_compared_is_named(table, runs, tmp_path, capsys):
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run folder" in capsys.readouterr().err
    assert main(["compare", str(runs[0]), str(runs[0])]) == 2
    assert "have the same options and seed: give one" in capsys.readouterr().err
    other = tmp_path / "other"
    assert main(train_flags(table, other, "--method=baseline", "--epochs=0.2")) == 0
    assert main(["compare", str(runs[0]), str(other)]) == 2
    assert "have different bias classes" in capsys.readouterr().err
    (other / "report.json").unlink()
    assert main(["compare", str(other)]) == 2
    assert "has no report.json: the run has not ended" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare"])
    assert "the following arguments are required: RUN" in capsys.readouterr().err
