import functools
import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce_table
from digits import protocol
from digits import table as parts
from digits.table import Cell

from lnl_ext.data import read_mnist_split
from lnl_ext.paper.colored_mnist import VARIANCES
from lnl_ext.paper.recipes import RECIPES
from lnl_ext.training.methods import METHODS

SCRIPT = Path(reproduce_table.__file__)


def line(method="lnl", variance=0.02, seed=0, accuracy=0.5, recipe="digits", epoch=5.0):
    return json.dumps(
        {
            "benchmark": "colored_mnist",
            "method": method,
            "recipe": recipe,
            "variance": variance,
            "seed": seed,
            "epoch": epoch,
            "test_accuracy": accuracy,
        }
    )


def test_names_are_the_packages():
    assert [name for name in METHODS if name in protocol.METHODS] == list(protocol.METHODS)
    assert tuple(RECIPES) == protocol.RECIPES
    assert protocol.VARIANCES == VARIANCES


def test_the_table_has_28_cells_and_more_seeds_where_asked():
    methods, variances = list(protocol.PAPER), list(protocol.VARIANCES)
    assert len(parts.cells(methods, variances, {})) == 28
    more = parts.cells(methods, variances, reproduce_table.SEEDS)
    assert len(set(more)) == len(more) == 28 + 2 * 2 * 4
    assert all(cell.seed == 0 for cell in more[:28])


def test_runs_are_read_back_and_the_last_counts(tmp_path):
    results = tmp_path / "runs.jsonl"
    assert parts.finished(results, "digits", 5) == {}
    runs = [line(accuracy=0.1), line(seed=1), line(recipe="paper"), line(accuracy=0.7)]
    results.write_text("\n".join([*runs, line(seed=2, epoch=3.0)]))
    done = parts.finished(results, "digits", 5)
    assert done == {Cell("lnl", 0.02, 0): 0.7, Cell("lnl", 0.02, 1): 0.5}


def test_a_damaged_results_file_is_refused(tmp_path):
    results = tmp_path / "runs.jsonl"
    results.write_text(line() + "\n" + line()[:20])
    with pytest.raises(ValueError, match=r"line 2 of .* is not a run"):
        parts.finished(results, "digits", 5)


def test_the_papers_unlearning_passes_over_the_data_in_two_stages():
    assert parts.passes("baseline", "paper", None) == 100
    assert parts.passes("lnl", "paper", None) == 200
    assert parts.passes("lnl", "paper", 2) == 4
    assert parts.passes("lnl", "digits", None) == 3
    assert parts.passes("lnl", "digits", 5) == 5


def test_the_table_sets_means_beside_the_papers_figures():
    accuracy = {Cell("lnl", 0.02, 0): 0.8, Cell("lnl", 0.02, 1): 0.9}
    text = parts.table(accuracy, ["lnl", "grl"], [0.02, 0.025]).splitlines()
    assert text[0] == "| method | 0.020 | 0.025 |"
    assert text[2] == "| lnl | 0.8500 (2 seeds) | - |"
    assert text[3] == "| the paper's | 0.8185 | 0.8854 |"
    assert text[4] == "| grl | - | - |"


def test_the_adjustment_has_a_row_where_the_recipe_has_one(capsys):
    assert reproduce_table.parse([]).methods == list(reproduce_table.ROWS)
    for recipe in ("paper", "unadjusted"):
        assert reproduce_table.parse([f"--recipe={recipe}"]).methods == list(protocol.PAPER)
        with pytest.raises(SystemExit):
            reproduce_table.parse([f"--recipe={recipe}", "--methods", "lnl", "adjusted"])
        assert "'adjusted' needs a recipe with a logit adjustment" in capsys.readouterr().err


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A folder with the first digits of both of MNIST's splits."""
    folder = tmp_path_factory.mktemp("mnist")
    for split, name in (("train", "train"), ("test", "t10k")):
        arrays = read_mnist_split(protocol.MNIST, split)
        for array, kind in zip(arrays, ("images-idx3", "labels-idx1"), strict=True):
            few = array[:300].astype("u1")
            header = struct.pack(f">HBB{few.ndim}I", 0, 8, few.ndim, *few.shape)
            (folder / f"{name}-{kind}-ubyte").write_bytes(header + few.tobytes())
    return folder


def command(tmp_path, data_root, *more):
    return [
        sys.executable,
        str(SCRIPT),
        "--methods=baseline",
        "--variances=0.02",
        "--epochs=0.2",
        f"--data-root={data_root}",
        f"--results={tmp_path / 'runs.jsonl'}",
        f"--output={tmp_path / 'runs'}",
        *more,
    ]


def test_one_command_from_nothing_to_the_table(tmp_path, few_digits, capsys):
    stopped = tmp_path / "runs" / "baseline-0.020-0-lnl-0.3" / "baseline"
    stopped.mkdir(parents=True)
    (stopped / "checkpoint.pt").write_bytes(b"of another length, which it does not go on from")
    first = subprocess.run(
        command(tmp_path, few_digits), capture_output=True, text=True, check=True
    )
    assert "0 of 1 runs are there" in first.stdout
    (run,) = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert f"| baseline | {json.loads(run)['test_accuracy']:.4f} |" in first.stdout
    assert list((tmp_path / "runs").iterdir()) == [stopped.parent]
    reproduce_table.main(command(tmp_path, few_digits)[2:])
    assert "runs are there" not in capsys.readouterr().out
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_a_signal_ends_the_runs_too(tmp_path, few_digits, number):
    process = subprocess.Popen(
        command(tmp_path, few_digits, "--epochs=5000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a script, SIGINT is ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    folder = tmp_path / "runs" / "baseline-0.020-0-lnl-5000"
    log = folder / "baseline" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / "runs.jsonl").exists()
    deadline = time.monotonic() + 60
    size = -1  # of its log, which grows by a line an epoch while it runs
    while log.stat().st_size != size:
        assert time.monotonic() < deadline
        size = log.stat().st_size
        time.sleep(2)


def test_a_run_that_fails_is_reported_with_its_output(tmp_path):
    failed = subprocess.run(command(tmp_path, tmp_path / "nowhere"), capture_output=True, text=True)
    assert failed.returncode != 0
    assert "output.txt" in failed.stderr
    assert (tmp_path / "runs" / "baseline-0.020-0-lnl-0.2" / "output.txt").read_text()


def test_figure_of_accuracy_by_variance(tmp_path, capsys):
    results = tmp_path / "runs.jsonl"
    lines = [
        {"benchmark": "colored_mnist", "recipe": "lnl", "method": "lnl"}
        | {"variance": variance, "seed": seed, "test_accuracy": 0.5 + 10 * variance + 0.01 * seed}
        | {"epoch": reproduce_table.EPOCHS}
        for variance, seed in ((0.03, 0), (0.02, 0), (0.02, 1))
    ]
    results.write_text("\n".join(map(json.dumps, lines)) + "\n")
    target = tmp_path / "new" / "figure.png"
    reproduce_table.main(["--table", f"--results={results}", f"--figure={target}"])
    assert "0.7050 (2 seeds)" in capsys.readouterr().out
    assert target.read_bytes().startswith(b"\x89PNG")
