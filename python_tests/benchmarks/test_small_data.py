"""The data of the comparison of `lnl train`'s defaults with a plain network, and that network."""

from __future__ import annotations

import csv
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import small_data
from PIL import Image


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Twelve faces of each gender and age group, women bright; and files that are no such faces."""
    names = [
        f"UTKFace/{age + number % 5}_{gender}_0_{number}.jpg"
        for age in (15, 40)
        for gender in (0, 1)
        for number in range(12)
    ]
    path = tmp_path / "faces.tar"
    with tarfile.open(path, "w") as archive:
        for name in [*names, "UTKFace/35_0_0_1.jpg", "UTKFace/about.jpg"]:
            bright = 200 if name.split("_")[1:2] == ["1"] else 20
            content = io.BytesIO()
            Image.fromarray(np.full((60, 50, 3), bright, np.uint8)).save(content, "JPEG")
            member = tarfile.TarInfo(name)
            member.size = len(content.getvalue())
            content.seek(0)
            archive.addfile(member, content)
    return path


def test_the_parts_share_no_face_and_the_test_is_balanced(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("TEST", 2), ("ALIGNED", 9), ("CONFLICTING", 3)):
        monkeypatch.setattr(small_data, name, count)
    folder = tmp_path / "tables"
    folder.mkdir()
    small_data.write_tables(faces, folder)
    rows = {}
    for part in ("train", "test"):
        with (folder / f"{part}.csv").open(encoding="utf-8") as table:
            rows[part] = list(csv.DictReader(table))
    paths = [row["path"] for part in rows.values() for row in part]
    assert len(set(paths)) == len(paths) == 32
    groups = {
        name: Counter((row["gender"], row["age"]) for row in part) for name, part in rows.items()
    }
    assert set(groups["test"].values()) == {2}
    assert groups["train"] == {
        ("0", "old"): 9,
        ("1", "young"): 9,
        ("0", "young"): 3,
        ("1", "old"): 3,
    }
    assert small_data.plain(folder, seed=0) == 1.0
