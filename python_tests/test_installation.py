"""Builds and installs the package into new environments with real pip: `make test-install`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import lnl_ext

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PIPS = ["pip==23.2", "pip"]  # the oldest that must work, and the newest
NOT_SOURCE = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "_C.*", ".*_cache")
# Neither a toolkit nor its minutes of compilation are needed to see whether torch is found.
WITHOUT_CUDA = {"LNL_EXT_CUDA": "0"}


class Environment:
    """A new virtual environment, which sees the packages of this one if it is to have torch."""

    def __init__(self, folder: Path, with_torch: bool = True, pip: str | None = None) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        if pip:
            self.pip("install", "--quiet", "--upgrade", pip)
        if with_torch:
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

    def check_installed(self, outside: Path) -> None:
        """Import the package away from its source and use it."""
        code = (
            "import json, torch, lnl_ext\n"
            "logits = torch.zeros(2, 3, requires_grad=True)\n"
            "lnl_ext.fused_bias_loss(logits, torch.tensor([0, 2])).backward()\n"
            "print(json.dumps([lnl_ext.__file__, lnl_ext.build_info()]))"
        )
        path, info = json.loads(self.run("-c", code, cwd=outside).stdout.splitlines()[-1])
        assert Path(path).is_relative_to(self.python.parent.parent)
        assert info["version"] == lnl_ext.__version__
        assert info["torch"] == torch.__version__
        assert info["cuda"] is False


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the source tree, without anything built."""
    folder = tmp_path_factory.mktemp("source") / "lnl_ext"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return folder


@pytest.mark.parametrize("pip", PIPS)
@pytest.mark.parametrize("isolation", [[], ["--no-build-isolation"]], ids=["isolated", "open"])
def test_source_tree_installs_against_the_installed_torch(
    source: Path, tmp_path: Path, pip: str, isolation: list[str]
) -> None:
    environment = Environment(tmp_path / "venv", pip=pip)
    environment.pip("install", *isolation, str(source), **WITHOUT_CUDA)
    environment.check_installed(tmp_path)


def test_source_distribution_becomes_a_wheel_that_installs(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    code = f"from build_support import backend; backend.build_sdist({str(tmp_path)!r})"
    environment.run("-c", code, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    arguments = ("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist))
    environment.pip(*arguments, **WITHOUT_CUDA)
    (wheel,) = tmp_path.glob("*.whl")
    environment.pip("install", str(wheel))
    environment.check_installed(tmp_path)


def test_source_distribution_is_complete(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    code = f"from build_support import backend; backend.build_sdist({str(tmp_path)!r})"
    environment.run("-c", code, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: nothing to compare the source distribution with")
    left_out = {path for path in tracked.stdout.splitlines() if not (unpacked / path).exists()}
    assert left_out <= {".gitignore"}


def test_missing_nvcc_is_said_once_and_plainly(source: Path, tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("torch is built without CUDA: another sentence, tested in test_packaging.py")
    environment = Environment(tmp_path / "venv")
    run = environment.pip(
        "install",
        "--no-build-isolation",
        str(source),
        fails=True,
        LNL_EXT_CUDA="1",
        CUDA_HOME=str(tmp_path),
    )
    assert "error: LNL_EXT_CUDA=1, but nvcc is missing" in run.stdout + run.stderr


def test_missing_torch_is_said_plainly(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", with_torch=False)
    arguments = ("install", "--no-build-isolation", "--no-deps", str(source))
    run = environment.pip(*arguments, fails=True, **WITHOUT_CUDA)
    assert "error: lnl_ext is compiled against PyTorch" in run.stdout + run.stderr
