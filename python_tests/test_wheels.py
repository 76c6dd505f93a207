"""One wheel, built with the oldest torch, in environments with newer ones: `make test-wheel`."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from environments import ROOT, Environment, copy_source

pytestmark = pytest.mark.slow

OLDEST = "2.11.0"
OTHERS = ["2.13.0", torch.__version__]
CORE = ["ops", "adversary/test_adversary.py", "test_gradient_reversal.py"]
SETTINGS = {
    "cpu": {"LNL_EXT_CUDA": "0"},
    "cuda": {"LNL_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"},
}


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Make the environment that the wheels are built in."""
    environment = Environment(tmp_path_factory.mktemp("oldest") / "venv", torch=OLDEST)
    environment.pip("install", "--quiet", "build", "pybind11")
    return environment


@pytest.fixture(scope="module", params=list(SETTINGS))
def wheel(
    request: pytest.FixtureRequest, oldest: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Build a source distribution, and from it a wheel."""
    if request.param == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("no nvcc to build a wheel with CUDA")
    folder = tmp_path_factory.mktemp(request.param)
    source = copy_source(folder)
    build = ("-m", "build", "--no-isolation", "--outdir", str(folder), str(source))
    oldest.run(*build, **SETTINGS[request.param])
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module", params=OTHERS)
def newer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Make an environment with another torch."""
    release = True if request.param == torch.__version__ else request.param
    return Environment(tmp_path_factory.mktemp("newer") / "venv", torch=release)


def test_compiled_parts_are_alone_and_have_no_path(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        archive.extractall(tmp_path)
    parts = ["_C", "_cpu"] + ["_cuda"] * ("/cuda" in str(wheel.parent))
    assert sorted(Path(name).name.split(".")[0] for name in libraries) == parts
    for name in libraries:
        tags = subprocess.run(["readelf", "-d", tmp_path / name], capture_output=True, text=True)
        assert tags.returncode == 0
        assert not re.search("RPATH|RUNPATH", tags.stdout)
        symbols = subprocess.run(
            ["nm", "--dynamic", "--undefined-only", "--demangle", tmp_path / name],
            capture_output=True,
            text=True,
        )
        assert symbols.returncode == 0
        assert not re.findall(r".*\b(?:at|c10|torch|caffe2)::.*", symbols.stdout)


def test_core_tests_pass_with_the_torch_it_is_built_with(
    wheel: Path, oldest: Environment, tmp_path: Path
) -> None:
    check(wheel, oldest, tmp_path)


def test_core_tests_pass_with_another_torch(
    wheel: Path, newer: Environment, tmp_path: Path
) -> None:
    check(wheel, newer, tmp_path)


def check(wheel: Path, environment: Environment, outside: Path) -> None:
    """Install the wheel, compiling nothing, and run the tests of operators and adversary."""
    environment.pip("install", "--quiet", "pytest", "hypothesis")
    install = ("install", "--no-index", "--no-deps", "--force-reinstall", str(wheel))
    environment.pip(*install, CXX="/no compiler", CUDA_HOME="/no toolkit")
    info = environment.check_installed(outside)
    assert info["torch"].startswith(OLDEST)
    found = environment.run("-c", "import torch; print(torch.version.cuda)").stdout.strip()
    assert info["cuda"] == ("/cuda" in str(wheel.parent) and found.startswith("13."))
    tests = [str(ROOT / "python_tests" / name) for name in CORE]
    # Not from here: the source tree would be imported.
    report = environment.run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        *tests,
        cwd=outside,
    )
    print(report.stdout)
    assert re.search(r"\d+ passed", report.stdout)
