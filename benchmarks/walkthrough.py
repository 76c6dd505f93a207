"""Run the commands of the walk-through in docs/own_data.md on faces and print what they print.

A table of 1,200 faces of UTKFace is written, in which most women are below 30 and most men are not;
then `lnl train` runs for two methods and three seeds, and `lnl compare`, `evaluate`, `probe`,
`predict` and `export` on what they left. Finished runs are not repeated.
"""

from __future__ import annotations

import csv
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from recording.options import command

IMAGES = 1200
EXCEPTIONS = 0.12  # of the women of 30 or more and of the men below: the share that is kept
TRAIN = (
    *("--csv", "faces.csv", "--label-column", "gender", "--bias-column", "age:bins=0,30,120"),
    *("--balance-validation", "--threads", "1", "--workers", "1"),
)
METHODS, SEEDS = ("baseline", "lnl"), (0, 1, 2)
_UTKFACE = re.compile(r"(\d+)_([01])_[0-4]_\d+.*")
_PROGRESS = re.compile(r"[^\r\n]*(?:step/s|s/step)[^\r\n]*[\r\n]*|[ ]*\r")


def table(data: Path) -> list[list[str]]:
    """Return rows of path, gender and age."""
    chosen = sorted(data.iterdir())
    chance = random.Random(0)
    chance.shuffle(chosen)
    rows = []
    for path in chosen:
        match = _UTKFACE.fullmatch(path.name)
        if match is None:
            continue
        gender = "female" if match[2] == "1" else "male"
        usual = (int(match[1]) < 30) == (gender == "female")
        if usual or chance.random() < EXCEPTIONS:
            rows.append([str(path.absolute()), gender, match[1]])
    return rows[:IMAGES]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table, run the commands."""
    parser = command(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of UTKFace's images")
    parser.add_argument("--output", type=Path, default=Path("walkthrough_output"))
    chosen = parser.parse_args(arguments)
    rows = table(chosen.data)
    chosen.output.mkdir(parents=True, exist_ok=True)
    with (chosen.output / "faces.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["path", "gender", "age"], *rows])
    names = {f"{method}-{seed}": (method, seed) for method in METHODS for seed in SEEDS}
    for name, (method, seed) in names.items():
        if not (chosen.output / name / "report.json").exists():
            more = ["--method", method, "--seed", str(seed), "--output", name, "--resume"]
            _run(chosen.output, "train", *TRAIN, *more)
    _run(chosen.output, "compare", *names)
    _run(chosen.output, "compare", *names, "--format", "html", "--output", "compare.html")
    _run(chosen.output, "evaluate", "lnl-0", "--use", "best")
    _run(chosen.output, "probe", "lnl-0", "--use", "best")
    _run(chosen.output, "predict", "lnl-0", "--csv", "faces.csv", "--output", "predictions.csv")
    lines = (chosen.output / "predictions.csv").read_text(encoding="utf-8").splitlines()
    print("\n".join(re.sub(r"/[^,]*/", "faces/", line) for line in lines[:3]), end="\n\n")
    _run(chosen.output, "export", "lnl-0", "--format", "pt2")


def _run(folder: Path, *words: str) -> None:
    shown = [word for word in words if word != "--resume"]
    print(f"$ lnl {shlex.join(shown)}", flush=True)
    run = [sys.executable, "-m", "lnl_ext", *words]
    done = subprocess.run(
        run, cwd=folder, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = [line.rstrip() for line in _PROGRESS.sub("", done.stdout).splitlines()]
    print("\n".join(lines), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
