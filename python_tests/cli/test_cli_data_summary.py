"""``lnl train`` says what the data are before it trains."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from cli_data import train_flags, write_images

from lnl_ext.cli.main import main

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("summary") / "images")


def changed(table: Path, name: str, change) -> Path:
    """Write another table of the same images."""
    with table.open(newline="") as stream:
        rows = [change(number, row) for number, row in enumerate(csv.DictReader(stream))]
    path = table.with_name(name)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def told(table: Path, tmp_path: Path, capsys, *more: str) -> tuple[str, str]:
    flags = train_flags(table, tmp_path / "run", "--method=baseline", "--epochs=0.2", *more)
    assert main(flags) == 0
    text, errors = capsys.readouterr()
    return text.split("shufflenet_v2_x0_5, bias heads")[0], errors


def test_the_table_of_label_and_bias(table, tmp_path, capsys):
    split = changed(
        table, "split.csv", lambda n, row: row | {"part": "train" if n < 40 else "validation"}
    )
    text, errors = told(split, tmp_path, capsys, "--split-column=part")
    # Of the first 40 images the numbers 0, 7, 14 ... have the other label's hospital.
    assert (
        "Training images by disease and hospital: 85 % aligned, 6 exceptions "
        "(50 % if disease and hospital were independent)\n"
        "  hospital  healthy  ill  all\n"
        "  north          17    3   20\n"
        "  south           3   17   20\n"
    ) in text
    assert "age missing: 8" in text
    assert "Note: column" not in text
    assert "none tells" not in errors


def test_a_warning_where_nothing_tells_them_apart(table, tmp_path, capsys):
    same = changed(table, "same.csv", lambda n, row: row | {"hospital": row["disease"] + "'s"})
    text, errors = told(same, tmp_path, capsys)
    assert "hospital: 100 % aligned, 0 exceptions" in text
    assert (
        "lnl: warning: all training images are aligned: none tells disease and hospital" in errors
    )
    assert errors.count("none tells") == 1


def test_a_column_of_parts_that_is_not_used(table, tmp_path, capsys):
    parts = ["train", "train", "val", "test"]
    split = changed(table, "parts.csv", lambda n, row: row | {"set": parts[n % 4], "all": "train"})
    text, _ = told(split, tmp_path, capsys)
    assert f"Note: column 'set' of {split} says train, validation or test and is not used" in text
    assert "--split-column set keeps to it" in text
