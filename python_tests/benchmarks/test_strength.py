"""The tables of real images that ``benchmarks/strength.py`` trains on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import strength


def test_faces_are_read_from_their_names(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{20 + number}_{number % 2}_{number % 5}_2017{number:04}.jpg.chip.jpg").touch()
    (tmp_path / "39_1_20170116.jpg.chip.jpg").touch()  # without an ethnicity
    header, rows = strength.faces(tmp_path, 9)
    assert header == ["path", "gender", "age", "ethnicity", "part"]
    assert Counter(row[-1] for row in rows) == {"validation": 3, "train": 6}
    for path, gender, age, ethnicity, _ in rows:
        years, number, origin, _ = Path(path).name.split("_")
        assert age == years
        assert gender == ("male", "female")[int(number)]
        assert ethnicity == ("white", "black", "asian", "indian", "other")[int(origin)]


def test_tone_goes_with_the_species_in_training_only(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    listed: dict[str, list[str]] = {"bright": [], "dark": []}
    for number in range(160):
        name = f"{('cat', 'dog')[number % 2]}.{number}.jpg"
        (tmp_path / "train" / name).touch()
        listed[("bright", "dark")[number // 2 % 2]].append(name)
    for tone, names in listed.items():
        (tmp_path / f"list_{tone}.txt").write_text("\n".join(names))
    header, rows = strength.pets(tmp_path, 90)
    assert header == ["path", "species", "tone", "part"]
    assert len({row[0] for row in rows}) == len(rows) == 90
    usual = Counter(
        (part, (species, tone) in (("dog", "bright"), ("cat", "dark")))
        for _, species, tone, part in rows
    )
    assert usual == {
        ("validation", True): 15,
        ("validation", False): 15,
        ("train", True): 54,
        ("train", False): 6,
    }
