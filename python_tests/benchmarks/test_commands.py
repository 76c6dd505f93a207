"""What stands at the top of benchmarks/ is a command, and every one is explained at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMANDS = sorted(BENCHMARKS.glob("*.py"))
HELP = """
import atexit, runpy, sys
sys.argv = [sys.argv[1], "--help"]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
atexit.register(lambda: print("torch imported:", "torch" in sys.modules))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_help_is_one_sentence_and_does_not_wait_for_torch(command: Path):
    shown = subprocess.run(
        [sys.executable, "-c", HELP, str(command)],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200"},
    ).stdout
    assert shown.startswith("usage: ")
    _, description, *_ = shown.split("\n\n")
    assert description.endswith(".")
    assert "\n" not in description
    assert "torch imported: False" in shown


def test_the_page_lists_every_command_and_room():
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"`python benchmarks/{command.name}" in page
    for room in (folder for folder in BENCHMARKS.iterdir() if (folder / "__init__.py").exists()):
        assert f"`{room.name}/`" in page
