"""New virtual environments, to install the package into with real pip."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import lnl_ext

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_SOURCE = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache")


def copy_source(folder: Path, source: Path = ROOT) -> Path:
    """Copy a source tree into a folder, without anything built, and return the copy's path."""
    copy = folder / "lnl_ext"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


class Environment:
    """A new virtual environment.

    Parameters
    ----------
    folder
        Where it is made.
    torch
        Release to install, ``True`` for the packages of this environment, torch among them.
    pip
        Requirement to replace the bundled pip with.
    """

    def __init__(self, folder: Path, torch: bool | str = True, pip: str | None = None) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        if pip:
            self.pip("install", "--quiet", "--upgrade", pip)
        if isinstance(torch, str):
            self.pip("install", "--quiet", f"torch=={torch}", "numpy", "setuptools>=70.1")
        elif torch:
            site_packages = self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
            link = Path(site_packages.stdout.strip()) / "packages.pth"
            link.write_text(sysconfig.get_path("purelib"))
        else:
            self.pip("install", "--quiet", "setuptools>=70.1")

    def run(
        self, *arguments: str, cwd: Path | None = None, fails: bool = False, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python; its failure, or its success with `fails`, is the test's."""
        names = ("CUDA_HOME", "CUDA_PATH", "LNL_EXT_CUDA", "PYTHONPATH")
        inherited = {name: text for name, text in os.environ.items() if name not in names}
        run = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd,
            env={**inherited, **settings},
            capture_output=True,
            text=True,
        )
        assert (run.returncode != 0) == fails, run.stdout + run.stderr
        return run

    def pip(
        self, *arguments: str, fails: bool = False, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run pip."""
        return self.run("-m", "pip", *arguments, fails=fails, **settings)

    def check_installed(self, outside: Path) -> lnl_ext.BuildInfo:
        """Import the package away from its source and use it; return its `build_info`."""
        code = (
            "import json, torch, lnl_ext\n"
            "logits = torch.zeros(2, 3, requires_grad=True)\n"
            "lnl_ext.fused_bias_loss(logits, torch.tensor([0, 2])).backward()\n"
            "print(json.dumps([lnl_ext.__file__, lnl_ext.build_info()]))"
        )
        path, info = json.loads(self.run("-c", code, cwd=outside).stdout.splitlines()[-1])
        assert Path(path).is_relative_to(self.python.parent.parent)
        assert info["version"] == lnl_ext.__version__
        return info
