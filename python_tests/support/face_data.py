"""Small data in the formats of the photograph benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, bright: bool = True, size: int = 40) -> None:
    """A JPEG of noise, bright or dark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    low = 130 if bright else 0
    pixels = np.random.default_rng(seed).integers(low, low + 120, (size, size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_pets(root: Path, each: int) -> None:
    """Kaggle's folder: ``each`` images of every species that are dark, bright, and in no list."""
    lists: dict[str, list[str]] = {"dark": [], "bright": [], "no": []}
    for offset, species in enumerate(("cat", "dog")):
        for number in range(3 * each):
            tone = ("dark", "bright", "no")[number // each]
            name = f"{species}.{number}.jpg"
            write_image(root / "train" / name, 2 * number + offset, bright=tone == "bright")
            lists[tone].append(name)
    for tone in ("dark", "bright"):
        # The authors' lists name all of Kaggle's images, of which these are a part.
        names = [*lists[tone], f"cat.{9000 + len(tone)}.jpg"]
        (root / f"list_{tone}.txt").write_text("\n".join(names) + "\n")


def write_utkface(root: Path, each: int) -> None:
    """``each`` faces of every gender at 5, 25, 35, 45 and 70 years."""
    for gender in (0, 1):
        for age in (5, 25, 35, 45, 70):
            for number in range(each):
                name = f"{age}_{gender}_{number % 5}_2017010{number % 10}{age:03}.jpg.chip.jpg"
                write_image(root / name, 100 * age + number, bright=gender == 1)
