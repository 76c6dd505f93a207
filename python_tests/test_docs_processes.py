"""The example of docs/processes.md, alone and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import free_port, needs_gloo

from lnl_ext.training.checkpoint import load_checkpoint

# Threads that run collectives: two a group, joined when nothing holds the group any more.
COUNT = """
import os
from pathlib import Path

def loops():
    names = [Path(entry, "comm").read_text() for entry in Path("/proc/self/task").iterdir()]
    return sum("gloo_runloop" in name for name in names)

"""
BEFORE = "    before = loops()\n"
AFTER = 'Path("loops" + os.environ["RANK"]).write_text(f"{before} {loops()}")\n'

PAGE = Path(__file__).resolve().parent.parent / "docs" / "processes.md"


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start torchrun with the program in the folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *flags, "run.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_gloo
@pytest.mark.parametrize("machines", [1, 2])
def test_the_example_trains_in_two_processes(tmp_path: Path, machines: int) -> None:
    """Of one torchrun, or of two, as on two machines."""
    text = PAGE.read_text(encoding="utf-8")
    (example, *_) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    linux = sys.platform == "linux"
    script = COUNT + example + BEFORE + AFTER if linux else example
    (tmp_path / "run.py").write_text(script, encoding="utf-8")
    commands = ["--standalone --nproc-per-node 2"]
    if machines == 2:
        commands = re.findall(r"^torchrun (--nnodes 2 .*) run\.py$", text, re.MULTILINE)
        assert len(commands) == 2
    here = {"nproc-per-node 4": "nproc-per-node 1", "first-machine": "127.0.0.1"}
    here["29500"] = str(free_port())
    for there, instead in here.items():
        commands = [command.replace(there, instead) for command in commands]
    started = [start(tmp_path, *command.split()) for command in commands]
    ends = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * machines, ends
    assert 0 <= float(ends[0][0]) <= 1  # one line, of process 0
    assert [output for output, _ in ends[1:]] == [""] * (machines - 1)
    assert len(load_checkpoint(tmp_path / "out" / "checkpoint.pt")["processes"]) == 2
    if linux:
        # A group whose threads are left, while Python ends, can abort the process. What is left
        # here is the gradients' group, which the trainer holds and which sees no Python tensors.
        for rank in range(2):
            assert (tmp_path / f"loops{rank}").read_text() == "4 2"
