"""What `import lnl_ext` gives and costs, and what the command answers without torch."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import lnl_ext

PACKAGE = str(Path(lnl_ext.__file__).parent.parent)
INNER = {"cli", "paper"}  # rooms without public names: the command, and the benchmarks' parts
MODULES = [  # that have the name of something public, and two others
    *(
        module.name
        for module in pkgutil.walk_packages(lnl_ext.__path__, "lnl_ext.")
        if module.name.rpartition(".")[2] in lnl_ext.__all__
    ),
    *("lnl_ext.cli.main", "lnl_ext.training.trainer"),
]


def python(*arguments: str, fails: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == fails, run.stdout + run.stderr
    return run


# ------------------------------------------------------------------ names


def test_every_name_is_there_and_listed() -> None:
    assert set(lnl_ext.__all__) <= set(dir(lnl_ext))
    for name in lnl_ext.__all__:
        value = getattr(lnl_ext, name)
        kind = types.ModuleType if name == "reference" else (str, type, types.FunctionType)
        assert isinstance(value, kind), name
    with pytest.raises(AttributeError, match="module 'lnl_ext' has no attribute 'nothing'"):
        lnl_ext.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from lnl_ext import nothing  # noqa: F401


@pytest.mark.parametrize(
    "first",
    [
        "from lnl_ext import *",
        "from lnl_ext import audit, logit_adjustment",
        f"import {', '.join(reversed(MODULES))}",
    ],
)
def test_no_module_shadows_a_function_whatever_is_imported_first(first: str) -> None:
    program = f"""
import types
{first}
import {", ".join(MODULES)}
from lnl_ext import audit, logit_adjustment
import lnl_ext
import lnl_ext.data as data
from lnl_ext import data as same_data, reference
import lnl_ext.reference
for function in (audit, lnl_ext.audit, logit_adjustment, lnl_ext.logit_adjustment):
    assert isinstance(function, types.FunctionType), function
for module in (lnl_ext.adversary, lnl_ext.measuring, lnl_ext.data, lnl_ext.training, data):
    assert isinstance(module, types.ModuleType), module
assert data is same_data and reference is lnl_ext.reference
assert reference.fused_bias_loss is not lnl_ext.fused_bias_loss
"""
    python("-c", program)


def test_rooms_are_attributes_without_an_import_of_their_own() -> None:
    rooms = [module.name for module in pkgutil.iter_modules(lnl_ext.__path__) if module.ispkg]
    program = "import lnl_ext\n" + "".join(f"lnl_ext.{r}\n" for r in rooms if r not in INNER)
    python("-c", program + "lnl_ext.schedules.Linear\nlnl_ext.build_info()\n")


# ------------------------------------------------------------------ operators


@pytest.fixture(scope="module")
def saved_loss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Loss(torch.nn.Module):
        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return lnl_ext.fused_bias_loss(logits, target, entropy_weight=0.1)

    path = tmp_path_factory.mktemp("exported") / "loss.pt2"
    program = torch.export.export(Loss(), (torch.randn(4, 3), torch.tensor([0, 1, 2, 0])))
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("imports", ["import lnl_ext, torch", "import torch, lnl_ext"])
def test_a_saved_loss_loads_where_the_package_is_only_imported(
    saved_loss: Path, imports: str
) -> None:
    program = f"""
{imports}
loss = torch.export.load({str(saved_loss)!r}).module()
print(loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).item())
"""
    expected = lnl_ext.reference.fused_bias_loss(
        torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), entropy_weight=0.1
    )
    assert float(python("-c", program).stdout) == pytest.approx(expected.item())


def test_an_import_loads_the_operators_and_no_more() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import lnl_ext
print(*sorted(name for name in set(sys.modules) - before))
"""
    loaded = python("-c", program).stdout.split()
    ours = {name for name in loaded if name.startswith("lnl_ext")}
    assert {"lnl_ext._C", "lnl_ext.ops.bias_loss", "lnl_ext.ops.linear_bias_loss"} <= ours
    rooms = {name.split(".")[1] for name in ours if "." in name}
    later = {"adversary", "cli", "data", "estimators", "measuring", "models", "paper", "training"}
    assert not rooms & later
    assert "sklearn" not in loaded


# ------------------------------------------------------------------ the command


@pytest.fixture
def no_torch(tmp_path: Path) -> str:
    """A path to search first, where importing torch ends the process with an error."""
    stand_in = tmp_path / "torch" / "__init__.py"
    stand_in.parent.mkdir()
    stand_in.write_text("raise SystemExit('torch was imported')\n")
    return os.pathsep.join([str(tmp_path), PACKAGE])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "COMMAND"),
        (["--version"], 0, lnl_ext.__version__),
        (["train", "--help"], 0, "--bias-column"),
        (["probe", "--help"], 0, "--feature-layer"),
        (["trian"], 2, "invalid choice: 'trian'"),
        (["train", "--revesal=1"], 2, "unrecognized arguments: --revesal=1"),
        (["train", "--method=lln"], 2, "invalid choice: 'lln'"),
    ],
)
@pytest.mark.parametrize("way", ["module", "script"])
def test_help_and_mistyped_flags_are_answered_without_torch(
    no_torch: str, tmp_path: Path, way: str, arguments: list[str], code: int, text: str
) -> None:
    started = ["-m", "lnl_ext"]
    if way == "script":  # as pip writes it for the entry point
        script = tmp_path / "lnl"
        script.write_text("import sys\nfrom lnl_ext.cli.main import main\nsys.exit(main())\n")
        started = [str(script)]
    run = python(*started, *arguments, fails=code, PYTHONPATH=no_torch)
    assert text in (run.stderr if code else run.stdout)


def test_the_entry_point_is_the_tested_function() -> None:
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'lnl = "lnl_ext.cli.main:main"' in text


def test_a_command_without_torch_says_so_in_a_line(tmp_path: Path) -> None:
    hidden = tmp_path / "torch"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError('gone', name='torch')\n")
    path = os.pathsep.join([str(tmp_path), PACKAGE])
    run = python("-m", "lnl_ext", "train", "--output=x", fails=2, PYTHONPATH=path)
    assert run.stderr.startswith("lnl: error: lnl_ext needs PyTorch")
    assert run.stderr.count("\n") == 1
