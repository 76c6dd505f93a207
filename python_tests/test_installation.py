"""Builds and installs the package into new environments with real pip: `make test-install`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from environments import ROOT, Environment, copy_source

pytestmark = pytest.mark.slow

PIPS = ["pip==23.2", "pip"]  # the oldest that must work, and the newest
# Neither a toolkit nor its minutes of compilation are needed to see whether torch is found.
WITHOUT_CUDA = {"LNL_EXT_CUDA": "0"}


def check(environment: Environment, outside: Path) -> None:
    """Use the package that was built from source, without CUDA."""
    info = environment.check_installed(outside)
    assert info["torch"] == torch.__version__
    assert info["cuda"] is False


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the source tree, without anything built."""
    return copy_source(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("pip", PIPS)
@pytest.mark.parametrize("isolation", [[], ["--no-build-isolation"]], ids=["isolated", "open"])
def test_source_tree_installs_against_the_installed_torch(
    source: Path, tmp_path: Path, pip: str, isolation: list[str]
) -> None:
    environment = Environment(tmp_path / "venv", pip=pip)
    if isolation:
        environment.pip("install", "--quiet", "--upgrade", "setuptools>=70.1", "pybind11")
    environment.pip("install", *isolation, str(source), **WITHOUT_CUDA)
    check(environment, tmp_path)


def test_paths_may_hold_spaces_and_letters_beyond_ascii(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "über alles"
    shutil.copytree(source, folder / "lnl ext")
    environment = Environment(folder / "a venv")
    environment.pip("install", str(folder / "lnl ext"), **WITHOUT_CUDA)
    check(environment, tmp_path)


def test_source_tree_may_be_read_only(source: Path, tmp_path: Path) -> None:
    folder = copy_source(tmp_path, source)  # earlier tests have built in it
    environment = Environment(tmp_path / "venv")
    if os.getuid() != 0:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        environment.pip("install", str(folder), **WITHOUT_CUDA)
    else:  # root may write whatever the mode says, but not to a read-only mount
        mounted = ["unshare", "--mount", "sh", "-ec"]
        mount = 'mount --bind "$0" "$0"; mount -o remount,ro,bind "$0"; '
        if subprocess.run([*mounted, mount, str(folder)], capture_output=True).returncode:
            pytest.skip("root may not mount here, and may write to every folder")
        run = subprocess.run(
            [*mounted, mount + 'exec "$1" -m pip install "$0"', str(folder), environment.python],
            env={**os.environ, **WITHOUT_CUDA},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
    check(environment, tmp_path)
    assert not list(folder.glob("*.egg-info"))


def test_second_install_replaces_the_first(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    for _ in range(2):
        environment.pip("install", "--force-reinstall", "--no-deps", str(source), **WITHOUT_CUDA)
    check(environment, tmp_path)


def test_uv_installs_it(source: Path, tmp_path: Path) -> None:
    # Isolated, uv builds with the newest torch, of several GB: it hides the environment's own.
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--quiet", "--upgrade", "uv", "setuptools>=70.1", "pybind11")
    uv = ("-m", "uv", "pip", "install", "--python", str(environment.python), "--no-deps")
    environment.run(*uv, "--no-build-isolation", str(source), **WITHOUT_CUDA)
    check(environment, tmp_path)


def test_source_distribution_becomes_a_wheel_that_installs(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    code = f"from build_support import backend; backend.build_sdist({str(tmp_path)!r})"
    environment.run("-c", code, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    arguments = ("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist))
    environment.pip(*arguments, **WITHOUT_CUDA)
    (wheel,) = tmp_path.glob("*.whl")
    environment.pip("install", str(wheel))
    check(environment, tmp_path)


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
    environment.pip("install", "--quiet", "--upgrade", "setuptools>=70.1", "pybind11")
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
    environment = Environment(tmp_path / "venv", torch=False)
    arguments = ("install", "--no-build-isolation", "--no-deps", str(source))
    run = environment.pip(*arguments, fails=True, **WITHOUT_CUDA)
    assert "error: lnl_ext is compiled against PyTorch" in run.stdout + run.stderr
