"""A folder of small JPEGs whose colour goes with the label, and a table of it."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32
IMAGES = 48


def write_images(folder: Path) -> Path:
    """Bright or dark stripes (the label) tinted red or blue (the bias, mostly the label's)."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    chance = random.Random(0)
    rows = []
    for number in range(IMAGES):
        label = number % 2
        site = label if number % 7 else 1 - label
        values = generator.integers(0, 60, (SIZE, SIZE, 3))
        values[:: 4 if label else 2] += 120
        values[..., 0 if site else 2] += 60
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(
            folder / f"{number:02d}.jpg", quality=90
        )
        age = "" if number % 5 == 0 else str(chance.randint(0, 60))
        rows.append([f"{number:02d}.jpg", ["healthy", "ill"][label], ["north", "south"][site], age])
    table = folder / "data.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "disease", "hospital", "age"])
        writer.writerows(rows)
    return table


def train_flags(table: Path, output: Path, *more: str) -> list[str]:
    """Return a command line of a run of seconds."""
    return [
        "train",
        f"--csv={table}",
        "--label-column=disease",
        "--bias-column=hospital",
        "--bias-column=age:bins=0,30,60",
        f"--output={output}",
        "--arch=shufflenet_v2_x0_5",
        f"--image-size={SIZE}",
        "--batch-size=8",
        "--epochs=2",
        "--warm-up=0.5",
        "--validation=0.25",
        "--workers=0",
        "--threads=1",
        *more,
    ]
