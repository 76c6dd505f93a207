"""Metadata and build facts, and what a build or an import that cannot work says."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools.errors import PlatformError

import lnl_ext
from lnl_ext import build

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_support import backend, cuda, extension  # noqa: E402


def script(path: Path, text: str) -> str:
    """Write an executable shell script and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def fake_nvcc(home: Path, release: str = "13.0", codes: str = "sm_75 sm_90 sm_100") -> str:
    """Make a toolkit whose nvcc answers what the build asks."""
    return script(
        home / "bin" / "nvcc",
        f'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.88';;\n"
        f"--dryrun) echo '#$ TOP={home}/bin/..' >&2;;\n"
        f"--list-gpu-code) printf '%s\\n' {codes};;\n"
        "*) exit 1;;\nesac\n",
    )


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide every CUDA toolkit and setting of this machine."""
    for name in ("CUDA_HOME", "CUDA_PATH", "LNL_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda.shutil, "which", lambda *args, **kwargs: None)


# The installed package


def test_metadata_states_version_licence_and_dependencies() -> None:
    metadata = importlib.metadata.metadata("lnl_ext")
    requirements = importlib.metadata.requires("lnl_ext") or []
    assert metadata["Version"] == lnl_ext.__version__
    assert metadata["License"] == "MIT"
    assert backend.TORCH_REQUIREMENT in requirements
    assert any(re.fullmatch(r"numpy\b.*", line) for line in requirements if "extra" not in line)
    assert {"train", "test"} <= set(metadata.get_all("Provides-Extra") or [])


def test_version_is_written_once() -> None:
    written = [
        path.name
        for pattern in ("*.py", "*.toml", "CMakeLists.txt", "lnl_ext/*.py", "csrc/*.cpp")
        for path in ROOT.glob(pattern)
        if lnl_ext.__version__ in path.read_text(encoding="utf-8")
    ]
    assert written == ["_version.py"]


def test_type_hints_are_announced() -> None:
    assert (Path(lnl_ext.__file__).parent / "py.typed").exists()


def test_build_info_describes_this_build() -> None:
    info = lnl_ext.build_info()
    assert set(info) == {
        "version",
        "torch",
        "cuda",
        "cuda_version",
        "cuda_arch_list",
        "cpu_capability",
        "compiler",
    }
    assert info["version"] == lnl_ext.__version__
    assert re.fullmatch(r"2\.\d+\.\d+.*", info["torch"])
    assert info["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert re.fullmatch(r"(GCC|Clang|MSVC) [\d.]+", info["compiler"])
    if info["cuda"]:
        assert info["cuda_version"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in info["cuda_arch_list"])
        assert info["cuda_arch_list"]
    else:
        assert info["cuda_version"] is None
        assert info["cuda_arch_list"] == []


# Imports that cannot work


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "2.15.0a0+git1", "3.0.0"])
def test_every_torch_from_the_oldest_on_is_accepted(version: str) -> None:
    build._check_torch(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.9.1+cpu", "1.13.1"])
def test_a_torch_that_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"needs torch >= 2\.11, but torch {re.escape(version)}"):
        build._check_torch(version)


def failing_import(folder: Path, torch_version: str | None) -> str:
    """Import lnl_ext in a new process and return the last line of the error.

    Parameters
    ----------
    folder
        Searched first: for lnl_ext, where it holds one, and for the torch that this writes to it.
    torch_version
        Version of a stand-in for torch, which spares the seconds of importing it; None for none.
    """
    hide = "" if torch_version else "import sys; sys.modules['torch'] = None; "
    stand_in = folder / "torch" / "__init__.py"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"from types import SimpleNamespace\n__version__ = {torch_version!r}\n"
        f"version = SimpleNamespace(cuda={torch.version.cuda!r})\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", hide + "import lnl_ext"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    return run.stderr.strip().splitlines()[-1]


def test_import_without_torch_says_so(tmp_path: Path) -> None:
    message = failing_import(tmp_path, None)
    assert message.startswith("ImportError: lnl_ext needs PyTorch")
    assert "'torch'" in message


def test_import_with_an_old_torch_says_which_it_needs(tmp_path: Path) -> None:
    message = failing_import(tmp_path, "2.8.0")
    assert message.startswith("ImportError: lnl_ext needs torch >= 2.11, but torch 2.8.0 is instal")


@pytest.fixture
def package_without_module(tmp_path: Path) -> Path:
    """Copy what an import needs, without the compiled module."""
    package = tmp_path / "lnl_ext"
    package.mkdir()
    for name in ("build.py", "_version.py"):
        (package / name).write_text((Path(build.__file__).parent / name).read_text())
    (package / "__init__.py").write_text("from .build import build_info\n")
    return package


def test_import_without_compiled_module_says_how_to_build(package_without_module: Path) -> None:
    message = failing_import(package_without_module.parent, torch.__version__)
    assert message.startswith("ImportError: ")
    assert "is not compiled" in message
    assert "pip install ." in message


def run_with_operators(package: Path, name: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with lnl_ext's module and a library of operators `name` that nothing can load."""
    for part in ("_C", "_cpu"):
        module = build._compiled_file(part)
        assert module is not None
        (package / module.name).symlink_to(module)
    library = package / f"{name}{build.EXTENSION_SUFFIXES[0]}"
    library.unlink(missing_ok=True)
    library.write_bytes(b"anything")
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )


def test_operators_that_do_not_load_are_explained(package_without_module: Path) -> None:
    run = run_with_operators(package_without_module, "_cpu", "import lnl_ext")
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: lnl_ext was built for torch {torch.__version__}")
    assert "does not load with the installed torch" in message


def test_the_cpus_half_works_where_cuda_does_not_fit(package_without_module: Path) -> None:
    code = (
        "import torch; torch.version.cuda = '99.0'; import lnl_ext;"
        "print(lnl_ext.build_info()['cuda'], hasattr(torch.ops.lnl_ext, 'bias_loss'))"
    )
    run = run_with_operators(package_without_module, "_cuda", code)
    assert run.stdout.split() == ["False", "True"], run.stderr


# The list of sources


def test_every_source_is_listed_once() -> None:
    sections = ("module", "operators", "cpu", "cuda")
    listed = {path for section in sections for path in extension.sources(section)}
    present = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("cpp", "cu")
        for path in (ROOT / "csrc").rglob(f"*.{suffix}")
        if path.relative_to(ROOT / "csrc").parts[0] not in ("emulator", "tests")
    }
    assert sorted(listed) == sorted(present)


def test_only_cuda_sources_need_nvcc() -> None:
    others = [extension.sources(section) for section in ("module", "operators", "cpu")]
    assert not any(path.endswith(".cu") for section in others for path in section)
    assert [path for path in extension.sources("cuda") if path.endswith(".cu")] == [
        "csrc/cuda/bias_loss_kernels.cu",
        "csrc/cuda/linear_bias_loss_kernels.cu",
    ]


# Builds that cannot work


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(PlatformError, match=r"no C\+\+ compiler: 'no-such-compiler -m64' \(from"):
        extension.check_compiler()


def test_missing_python_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(extension.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(PlatformError, match=r"Python\.h is missing: .*python3-dev"):
        extension.check_compiler()


def test_build_without_torch_says_so(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        f"sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}]\n"
        "exec(open('setup.py').read())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("error: lnl_ext is compiled against PyTorch, which this environment")
    assert backend.TORCH_REQUIREMENT in message


def test_unknown_cuda_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LNL_EXT_CUDA", "yes")
    with pytest.raises(PlatformError, match="LNL_EXT_CUDA is 'yes', expected one of auto, 0, 1"):
        cuda.choose_toolkit("2.14.1", "13.0")


@pytest.mark.usefixtures("no_toolkit")
class TestChoiceOfToolkit:
    def test_cuda_required_but_torch_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LNL_EXT_CUDA", "1")
        with pytest.raises(PlatformError, match=r"torch 2\.14\.1\+cpu is built without CUDA"):
            cuda.choose_toolkit("2.14.1+cpu", None)

    def test_cuda_required_but_nvcc_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LNL_EXT_CUDA", "1")
        with pytest.raises(PlatformError, match=r"nvcc is missing.*toolkit 13\.0.*2\.14\.1"):
            cuda.choose_toolkit("2.14.1+cu130", "13.0")

    def test_automatic_choice_without_nvcc_or_cuda(self) -> None:
        assert cuda.choose_toolkit("2.14.1+cu130", "13.0") is None
        assert cuda.choose_toolkit("2.14.1+cpu", None) is None


class TestToolkit:
    @pytest.fixture(autouse=True)
    def _home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("LNL_EXT_CUDA", raising=False)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    @pytest.mark.parametrize("mode", ["auto", "1"])
    def test_version_must_be_torchs(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
    ) -> None:
        fake_nvcc(tmp_path, release="12.4")
        monkeypatch.setenv("LNL_EXT_CUDA", mode)
        with pytest.raises(PlatformError, match=r"CUDA 12\.4.*torch 2\.14\.1.*CUDA 13\.0"):
            cuda.choose_toolkit("2.14.1+cu130", "13.0")

    def test_cuda_can_be_switched_off(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        fake_nvcc(tmp_path, release="12.4")
        monkeypatch.setenv("LNL_EXT_CUDA", "0")
        assert cuda.choose_toolkit("2.14.1+cu130", "13.0") is None

    def test_folder_is_the_toolkits_when_nvcc_is_a_script_elsewhere(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        nvcc = fake_nvcc(tmp_path / "cuda-13.0")
        script(tmp_path / "elsewhere" / "bin" / "nvcc", f'exec {nvcc} "$@"\n')
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
        toolkit = cuda.choose_toolkit("2.14.1+cu130", "13.0")
        assert toolkit is not None
        assert toolkit.home == tmp_path / "cuda-13.0"
        assert toolkit.version == "13.0"

    def test_cuda_home_without_nvcc_is_not_replaced_by_another(self, tmp_path: Path) -> None:
        assert cuda.find_toolkit() is None

    def test_architectures_are_torchs_as_far_as_nvcc_knows_them(self, tmp_path: Path) -> None:
        nvcc = fake_nvcc(tmp_path, codes="sm_75 sm_80 sm_86 sm_90 sm_90a sm_100 sm_110")
        assert (
            cuda.default_architectures(
                nvcc, ["sm_86", "sm_100", "sm_120", "sm_75", "sm_80", "sm_90"]
            )
            == "7.5;8.0;9.0;10.0+PTX"
        )

    def test_no_common_architecture_is_an_error(self, tmp_path: Path) -> None:
        nvcc = fake_nvcc(tmp_path, codes="sm_75")
        with pytest.raises(PlatformError, match=r"sm_50 sm_60.*set TORCH_CUDA_ARCH_LIST"):
            cuda.default_architectures(nvcc, ["sm_50", "sm_60"])

    @pytest.mark.parametrize(
        ("wanted", "codes"),
        [("8.0;9.0+PTX", "sm_80,sm_90,compute_90"), ("", "sm_75,sm_90,sm_100,compute_90")],
    )
    def test_architectures_wanted_are_compiled_and_remembered(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str, codes: str
    ) -> None:
        fake_nvcc(tmp_path)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        monkeypatch.setenv("MAX_JOBS", "3")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_75 sm_90 sm_100 sm_120")
        plan = extension.plan()
        assert plan.toolkit is not None
        assert plan.architectures == codes.split(",")
        command = plan.nvcc_command("a.cu", "a.o", 3)
        assert {f.rpartition("code=")[2] for f in command if "code=" in f} == set(codes.split(","))
        assert str(tmp_path / "bin" / "nvcc") in command
        assert ("LNL_CUDA_ARCH_LIST", codes) in plan.macros(extension.MODULE)
        for words in ("CUDA 13.0", codes.replace(",", " "), "LNL_EXT_CUDA=0"):
            assert words in plan.announcement

    def test_architectures_of_a_generation_share_the_ptx_of_the_oldest(self) -> None:
        def flags(*pairs: str) -> list[str]:
            codes = [pair.split(">") for pair in pairs]
            return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]

        given = "120>compute_120 75>sm_75 90>sm_90 86>sm_86 80>sm_80 90a>sm_90a"
        shared = "90>compute_90 75>sm_75 90>sm_90 80>sm_86 80>sm_80 90a>sm_90a"
        assert cuda.with_shared_ptx(flags(*given.split())) == flags(*shared.split())
        for alone in ("75>sm_75 75>compute_75", "86>sm_86 86>compute_86"):
            assert cuda.with_shared_ptx(flags(*alone.split())) == flags(*alone.split())


def test_what_is_built_is_said_on_the_terminal_though_pip_shows_no_output(tmp_path: Path) -> None:
    code = "from build_support.extension import announce; announce('for CPUs only')"
    child, terminal = pty.fork()
    if child == 0:
        with (tmp_path / "captured").open("w") as captured:
            run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=captured)
        os._exit(run.returncode)
    with contextlib.closing(os.fdopen(terminal, "rb", buffering=0)) as stream:
        shown = stream.read(100)
        assert os.waitpid(child, 0)[1] == 0
    assert shown == b"for CPUs only\r\n"
    assert (tmp_path / "captured").read_text() == "for CPUs only\n"


def test_source_that_cannot_be_written_to_is_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    with backend.writable_source():
        assert Path.cwd() == tmp_path
    monkeypatch.setattr(backend.os, "access", lambda path, mode: False)
    with backend.writable_source():
        assert Path.cwd() != tmp_path
        assert (Path.cwd() / "csrc" / "a.cpp").read_text() == "int a;"
        assert not Path(".git").exists()
    assert Path.cwd() == tmp_path


def test_module_without_cuda_runs_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LNL_EXT_CUDA", "0")
    plan = extension.plan()
    assert plan.toolkit is None
    assert plan.torch_version == torch.__version__
    assert "CPUs only" in plan.announcement
    assert not [flag for flag in extension.UNIX_FLAGS if flag.startswith("-march")]


def test_operators_use_the_interface_of_the_oldest_torch() -> None:
    macros = dict(extension.plan().macros(extension.CPU))
    assert macros["TORCH_TARGET_VERSION"] == "0x020b000000000000"
    for path in (*extension.sources("cpu"), *extension.sources("cuda")):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"\b(at|c10)::|torch/extension\.h|ATen", text), path


def test_pybind11_is_its_package_or_torchs_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match="pip install pybind11"):
        extension.pybind11_include(tmp_path)
    header = tmp_path / "pybind11" / "pybind11.h"
    header.parent.mkdir()
    header.touch()
    assert extension.pybind11_include(tmp_path) == str(tmp_path)


# The PEP 517 backend


def install_fake_torch(folder: Path, version: str) -> None:
    """Make a torch of this version appear installed in a package folder."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    metadata = folder / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("installed", "requirements"),
    [("2.11.0", []), ("2.14.1+cu130", []), ("3.0.0", []), ("2.9.0", ["torch>=2.11"]), (None, None)],
)
def test_isolated_build_uses_the_torch_of_the_target_environment(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: str | None,
    requirements: list[str] | None,
) -> None:
    if installed:
        install_fake_torch(tmp_path, installed)
    monkeypatch.setattr(backend, "target_site_packages", lambda: [str(tmp_path)])
    # An isolated environment has no torch of its own.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "torch").is_dir()])
    monkeypatch.delitem(sys.modules, "torch")
    wanted = [backend.TORCH_REQUIREMENT] if requirements is None else requirements
    assert backend.get_requires_for_build_wheel() == wanted
    assert backend.get_requires_for_build_editable() == wanted


def test_torch_requirement_is_the_projects() -> None:
    assert f'"{backend.TORCH_REQUIREMENT}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("found", ["63.4.0", "65.5.0"])
def test_setuptools_that_cannot_build_wheels_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(backend.setuptools, "__version__", found)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf"setuptools >= 70\.1, .* has {re.escape(found)}"):
        backend.check_setuptools()


def test_old_setuptools_builds_with_the_package_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.setuptools, "__version__", "65.5.0")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    backend.check_setuptools()
