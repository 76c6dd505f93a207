"""The example of docs/processes.md, alone and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from processes import needs_gloo

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


@needs_gloo
def test_the_example_trains_in_two_processes(tmp_path: Path) -> None:
    (example, *_) = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    linux = sys.platform == "linux"
    script = COUNT + example + BEFORE + AFTER if linux else example
    (tmp_path / "run.py").write_text(script, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "run.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout) <= 1  # one line, of process 0
    assert len(load_checkpoint(tmp_path / "out" / "checkpoint.pt")["streams"]) == 2
    if linux:
        # A group whose threads are left, while Python ends, can abort the process. What is left
        # here is the gradients' group, which the trainer holds and which sees no Python tensors.
        for rank in range(2):
            assert (tmp_path / f"loops{rank}").read_text() == "4 2"
