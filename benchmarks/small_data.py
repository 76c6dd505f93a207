"""Train `lnl train`'s defaults and a plain network on 1,280 faces, and compare their accuracy.

Of the faces (gender, biased by the age group) 93 % are aligned; 400 others, as many of every group,
are the test. The plain network is what a user would write first: four convolutions with max-pooling
at 48 pixels, Adam, mirrored images, 15 epochs. The command trains the method `baseline`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from recording.options import command

SPLIT = 1  # seed
TEST, ALIGNED, CONFLICTING = 100, 595, 45  # faces of a group
SIDE, EPOCHS, BATCH = 48, 15, 32


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command(__doc__)
    parser.add_argument("--faces", type=Path, required=True, help="tar of UTKFace's images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    return parser.parse_args(arguments)


def write_tables(faces: Path, folder: Path) -> None:
    """Unpack the faces that are used, with train.csv and test.csv."""
    from comparison.data_sets import face

    groups = defaultdict(list)
    with tarfile.open(faces) as archive:
        for member in archive:
            if (known := face(Path(member.name).name)) is not None:
                groups[known].append(member)
        rows: dict[str, list[list[str]]] = {"test": [], "train": []}
        for (gender, young), members in sorted(groups.items()):
            members.sort(key=lambda member: member.name)
            random.Random(SPLIT).shuffle(members)
            count = ALIGNED if gender == young else CONFLICTING
            for number, member in enumerate(members[: TEST + count]):
                stream = archive.extractfile(member)
                assert stream is not None
                path = folder / Path(member.name).name
                path.write_bytes(stream.read())
                part = "test" if number < TEST else "train"
                rows[part].append([path.name, str(gender), "young" if young else "old"])
    for part, lines in rows.items():
        with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as table:
            csv.writer(table).writerows([["path", "gender", "age"], *lines])


def plain(folder: Path, seed: int) -> float:
    """Train the plain network and return its accuracy on the test images."""
    import numpy as np
    import torch
    from PIL import Image
    from torch import nn

    def part(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = [], []
        with (folder / f"{name}.csv").open(encoding="utf-8") as table:
            for row in csv.DictReader(table):
                image = Image.open(io.BytesIO((folder / row["path"]).read_bytes())).convert("RGB")
                images.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
                labels.append(int(row["gender"]))
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return pixels.float() / 127.5 - 1, torch.tensor(labels)

    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, channels in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    images, labels = part("train")
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(images)), BATCH):
            batch = images[rows].flip(3) if torch.rand(()) < 0.5 else images[rows]
            loss = nn.functional.cross_entropy(network(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    images, labels = part("test")
    with torch.no_grad():
        right = network.eval()(images).argmax(1) == labels
    return float(right.double().mean())


def default(folder: Path, seed: int) -> float:
    """Train by the command and return the accuracy that it evaluates."""
    lnl, run = [sys.executable, "-m", "lnl_ext"], folder / f"run-{seed}"
    columns = ("--label-column", "gender", "--bias-column", "age")
    train = ["train", "--csv", "train.csv", *columns, "--method", "baseline", "--threads", "1"]
    train += ["--seed", str(seed), "--output", str(run)]
    evaluate = ["evaluate", str(run), "--csv", "test.csv", *columns, "--json", f"{run}.json"]
    for words in (train, evaluate):
        subprocess.run([*lnl, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    accuracy: float = json.loads(Path(f"{run}.json").read_text(encoding="utf-8"))["accuracy"]
    return accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both with every seed and print a line each."""
    chosen = parse(arguments)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tables(chosen.faces, folder)
        found = []
        for seed in chosen.seeds:
            found.append((plain(folder, seed), default(folder, seed)))
            print("seed {}: plain {:.4f}, lnl train {:.4f}".format(seed, *found[-1]), flush=True)
    means = [sum(values) / len(found) for values in zip(*found, strict=True)]
    print("mean: plain {:.4f}, lnl train {:.4f}".format(*means))


if __name__ == "__main__":
    main()
