"""Run `lnl train` on real images at some strengths and print leakage and accuracy.

``python benchmarks/strength.py faces --data UTKFace`` takes the gender as label, the age and the
ethnicity as bias, as they come. ``python benchmarks/strength.py pets --data FOLDER`` takes dogs and
cats, nine in ten of the training images bright dogs and dark cats, half of the validation images.
Runs are kept below ``--output`` and not repeated.
"""

from __future__ import annotations

import csv
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recording.options import command

IMAGES = 3600
SETTINGS = (
    *("--arch=shufflenet_v2_x0_5", "--image-size=64", "--epochs=10"),
    *("--split-column=part", "--threads=1", "--workers=0"),
)
_UTKFACE = re.compile(r"(\d+)_([01])_([0-4])_\d+.*")
_GENDERS = ("male", "female")  # of UTKFace's numbers
_ETHNICITIES = ("white", "black", "asian", "indian", "other")
_TONES = ("dark", "bright")


def faces(data: Path, images: int) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of faces, a random part of the folder."""
    chosen = sorted(data.iterdir())
    random.Random(0).shuffle(chosen)
    rows = []
    for path in chosen:
        if match := _UTKFACE.fullmatch(path.name):
            gender, ethnicity = _GENDERS[int(match[2])], _ETHNICITIES[int(match[3])]
            rows.append([str(path.absolute()), gender, match[1], ethnicity, ""])
    for number, row in enumerate(rows[:images]):
        row[-1] = "validation" if number % 3 == 0 else "train"
    return ["path", "gender", "age", "ethnicity", "part"], rows[:images]


def pets(data: Path, images: int) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of dogs and cats whose tone goes with the species."""
    usual, unusual = _pets(data, "TB1"), _pets(data, "TB2")
    validation = images // 6
    rows = [[*row, "validation"] for row in (*usual[:validation], *unusual[:validation])]
    train = images - 2 * validation
    few = train // 10
    for kept, number in ((usual, train - few), (unusual, few)):
        rows += [[*row, "train"] for row in kept[validation : validation + number]]
    return ["path", "species", "tone", "part"], rows


def _pets(data: Path, split: str) -> list[list[str]]:
    from lnl_ext.paper.dogs_and_cats import list_pets

    files = list_pets(data, split)
    rows = [
        [str(path.absolute()), path.name[:3], _TONES[tone]]
        for path, tone in zip(files.paths, files.tone.tolist(), strict=True)
    ]
    random.Random(0).shuffle(rows)
    return rows


_SETS = {
    "faces": (faces, ["gender", "age:bins=0,30,40,120", "ethnicity"]),
    "pets": (pets, ["species", "tone"]),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every strength and print a table."""
    parser = command(__doc__)
    parser.add_argument("set", choices=list(_SETS))
    parser.add_argument("--data", type=Path, required=True, help="folder with the images")
    parser.add_argument("--output", type=Path, default=Path("strength_output"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--strengths", nargs="*", default=["0.5:0.05", "1:0.1"], metavar="REVERSAL:ENTROPY"
    )
    chosen = parser.parse_args(arguments)
    from lnl_ext.reporting.tables import markdown

    make, (label, *bias) = _SETS[chosen.set]
    chosen.output.mkdir(parents=True, exist_ok=True)
    table = chosen.output / f"{chosen.set}.csv"
    header, rows = make(chosen.data, IMAGES)
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    train = [
        *(sys.executable, "-m", "lnl_ext", "train", f"--csv={table}", f"--label-column={label}"),
        *(f"--bias-column={column}" for column in bias),
        *(*SETTINGS, f"--seed={chosen.seed}"),
    ]
    names = [column.partition(":")[0] for column in bias]
    leakage = f"leakage of {', '.join(names)}"
    found = []
    for strength in ["baseline", *chosen.strengths]:
        more = ["--method=baseline"]
        if strength != "baseline":
            reversal, entropy = strength.split(":")
            more = [f"--reversal={reversal}", f"--entropy-weight={entropy}"]
        output = chosen.output / f"{chosen.set}-{chosen.seed}-{strength}"
        if not (output / "report.json").exists():
            print(f"training: {strength}", file=sys.stderr, flush=True)
            run = [*train, *more, f"--output={output}", "--resume"]
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        found.append(_row(strength, names, report))
    print(markdown(["reversal", "entropy", "accuracy", "worst group", leakage], found))


def _row(strength: str, names: list[str], report: dict[str, Any]) -> list[str]:
    before, after = report["leakage_before"], report["leakage_after"]
    cells = [
        (f"{before[name]['accuracy']:.3f} -> " if name in before else "")
        + f"{after[name]['accuracy']:.3f} (label alone {after[name]['label_only']:.3f})"
        for name in names
    ]
    reversal, _, entropy = strength.partition(":")
    accuracies = [f"{report[name]:.3f}" for name in ("accuracy", "worst_group_accuracy")]
    return [reversal, entropy, *accuracies, ", ".join(cells)]


if __name__ == "__main__":
    main()
