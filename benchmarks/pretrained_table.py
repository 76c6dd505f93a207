"""Run every method on dogs and cats and on faces with pretrained features, and print the table.

    python benchmarks/pretrained_table.py --pets FOLDER --faces FOLDER --threads 1

It may be stopped at any moment and started again: runs that stand in the results file are not
repeated, one that was interrupted is. The folders are those of `dogs_and_cats.py` and
`imdb_faces.py`, whose runs these are, with ``--weights efficientnet-lite0``. The frozen blocks run
once for all runs of a training set, and once more for grey images; what they give is kept in
``--cache``, about 250 MB each. After a change of `photographs/pretrained.py` or of the data begin
another one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dogs_and_cats
import imdb_faces
from photographs.options import PRETRAINED
from recording.options import RESULTS, command

if TYPE_CHECKING:
    from photographs.runs import Task

SPLITS = ("TB1", "TB2", "EB1", "EB2")
METHODS = ("baseline", "lnl", "grl", "blindeye", "gray")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command(__doc__)
    add = parser.add_argument
    add("--pets", type=Path, help="folder of dogs and cats; without it they are left out")
    add("--faces", type=Path, help="folder of faces; without it they are left out")
    add("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--threads", type=int, help="CPU threads; torch's choice by default")
    add("--cache", type=Path, default=Path("pretrained_output"), help="folder for what is kept")
    add("--results", type=Path, default=RESULTS / "pretrained.jsonl", help="file to append to")
    return parser.parse_args(arguments)


def run_options(
    options: argparse.Namespace, split: str, method: str, seed: int
) -> argparse.Namespace:
    """Return the options of one run."""
    of_pets = split.startswith("TB")
    given = ["--data", str(options.pets if of_pets else options.faces), "--weights", PRETRAINED]
    given += ["--train-split", split, "--method", method, "--seed", str(seed), "--no-progress"]
    read = dogs_and_cats.read_options if of_pets else imdb_faces.read_options
    return read(given)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, the first seed of every method first, and print the table."""
    options = parse(arguments)
    import torch
    from photographs import faces, pets, table
    from photographs.runs import Images, Sets, measure, ready
    from recording import records

    from lnl_ext.files import replacing

    if options.threads is not None:
        torch.set_num_threads(options.threads)

    @functools.cache
    def task(split: str, gray: bool) -> Task:
        of_run = run_options(options, split, "gray" if gray else "baseline", 0)
        make = pets.task if split.startswith("TB") else faces.task
        kept = options.cache / f"{split}_{'gray' if gray else 'color'}.pt"
        if not kept.is_file():
            sets = vars(ready(of_run, make(of_run)).sets)
            with replacing(kept) as temporary:
                torch.save({name: vars(images) for name, images in sets.items()}, temporary)
        parts = torch.load(kept, weights_only=True)
        return make(of_run, Sets(**{name: Images(**part) for name, part in parts.items()}))

    done = records.read(options.results) if options.results.is_file() else []
    there = {(run["seed"], run["method"], run["train_split"]) for run in done}
    given = [s for s in options.splits if options.pets if s.startswith("TB")]
    given += [s for s in options.splits if options.faces if s.startswith("EB")]
    for wanted in itertools.product(options.seeds, options.methods, given):
        if wanted not in there:
            seed, method, split = wanted
            benchmark = dogs_and_cats.BENCHMARK if split in ("TB1", "TB2") else imdb_faces.BENCHMARK
            of_run = run_options(options, split, method, seed)
            run = measure(benchmark, of_run, task(split, method == "gray")).run
            records.append(options.results, run)
            print(
                f"{split}, {method}, seed {seed}: {run.opposite_accuracy:.4f} on the opposite "
                f"set, {run.test_accuracy:.4f} on the unbiased one",
                flush=True,
            )
    print(table.means(records.read(options.results)))


if __name__ == "__main__":
    main()
