"""The examples of README and docs/ run as they stand; the site builds without a warning."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lnl_ext
from lnl_ext import BiasAdversary
from lnl_ext.adversary import bias_adversary

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(page, example, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, example in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]
GUIDE = [example for example in EXAMPLES if example.values[0].name == "guide.md"]
UNLEARNING = [example for example in GUIDE if "\naccuracy = " in example.values[1]]
# What an example may need besides the package; installed by the extra `docs`.
FRAMEWORKS = ("lightning", "transformers", "accelerate")
TRACKERS = ("wandb", "mlflow")  # in no extra: a stand-in takes the calls where they are missing


class StandInTracker:
    """Takes the calls that the examples make of W&B and of MLflow, and notes the steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def init(self, *, project: str, config: dict[str, object], mode: str) -> StandInTracker:
        json.dumps([project, config, mode])
        return self

    def start_run(self) -> StandInTracker:
        return self

    def log(self, data: dict[str, object], step: int) -> None:
        json.dumps(data)
        self.steps.append(step)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        assert all(isinstance(value, (int, float)) for value in metrics.values())
        self.steps.append(step)

    def __enter__(self) -> StandInTracker:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def test_pages_have_their_examples() -> None:
    found = {page.values[0].name for page in EXAMPLES}  # type: ignore[attr-defined]
    assert {"README.md", "guide.md", "audit.md"} <= found


def need_frameworks(example: str) -> None:
    for name in FRAMEWORKS:
        if re.search(rf"^(import|from) {name}\b", example, re.MULTILINE) and missing(name):
            pytest.skip(f"{name} is not installed")


def run(page: Path, example: str) -> dict[str, object]:
    """Run an example and return its names; those of the guide use what its first one defines."""
    names: dict[str, object] = {"__name__": "example"}
    if page.name == "guide.md":
        exec(compile(GUIDE[0].values[1], str(page), "exec"), names)
    exec(compile(example, str(page), "exec"), names)
    return names


# The others run in the comparison with themselves, below.
@pytest.mark.parametrize(("page", "example"), [e for e in EXAMPLES if e not in UNLEARNING])
def test_example_runs(
    page: Path, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_frameworks(example)
    stand_ins = []
    for name in TRACKERS:
        if f"import {name}\n" in example and missing(name):
            stand_ins.append(StandInTracker())
            monkeypatch.setitem(sys.modules, name, stand_ins[-1])
    monkeypatch.chdir(tmp_path)  # where trackers write
    names = run(page, example)
    for result in ("loss", "accuracy"):
        assert result not in names or names[result].isfinite()  # type: ignore[attr-defined]
    assert names.keys() & {"loss", "accuracy", "biased_data"}
    assert all(tracker.steps == [4, 8] for tracker in stand_ins)


class WithoutStrength(BiasAdversary):
    """An adversary from which the features learn nothing."""

    def __init__(self, head: nn.Module, **options: object) -> None:
        options |= dict.fromkeys(("reversal", "entropy_weight"), 0.0)
        super().__init__(head, **options)  # type: ignore[arg-type]


def test_examples_of_the_guide_end_with_an_accuracy() -> None:
    assert len(UNLEARNING) >= 5


@pytest.mark.parametrize(("page", "example"), UNLEARNING)
def test_an_example_of_the_guide_is_not_worse_than_without_the_adversary(
    page: Path, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On biased data, in the accuracy where bias and label differ; of the same seed."""
    need_frameworks(example)
    monkeypatch.chdir(tmp_path)
    names = run(page, example)
    assert "loss" not in names or names["loss"].isfinite()  # type: ignore[attr-defined]
    found = names["accuracy"]
    monkeypatch.setattr(lnl_ext, "BiasAdversary", WithoutStrength)
    monkeypatch.setattr(bias_adversary, "BiasAdversary", WithoutStrength)  # methods take it there
    plain = run(page, example)["accuracy"]
    assert found != plain
    assert found >= plain  # type: ignore[operator]


@pytest.mark.skipif(missing("material"), reason="mkdocs-material is not installed")
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "fused_linear_bias_loss" in api
    assert "label_smoothing" in api
    assert not re.findall(r'id="lnl_ext[^"]*__', api)  # special methods
    assert "====" not in api  # a table in reStructuredText, which Markdown does not know
    # Nothing is fetched from elsewhere when a page is opened, and the search works from the disk.
    for page in tmp_path.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)'
            r'|<link[^>]+stylesheet[^>]+(https?:[^" >]+)',
            text,
        )
        assert not loaded, f"{page.name} loads {loaded}"
        assert 'src="javascripts/iframe-worker.js"' in text or page.name == "404.html"
    assert (tmp_path / "search" / "search_index.js").exists()


@pytest.mark.skipif(missing("griffe"), reason="mkdocstrings is not installed")
def test_api_page_says_the_defaults_of_the_signatures() -> None:
    """Names documented together would all get the default of the first."""
    import griffe

    package = griffe.load("lnl_ext", search_paths=[ROOT], docstring_parser="numpy")
    named = re.findall(r"^::: lnl_ext\.(\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    described = 0
    for function in (f for name in named for f in functions(package[name])):
        sections = function.docstring.parsed if function.docstring else []
        for entry in (e for s in sections if s.kind.value == "parameters" for e in s.value):
            if not entry.name.startswith("*"):
                default = function.parameters[entry.name].default
                assert entry.default == default, f"{function.path}({entry.name})"
                described += 1
    assert described > 100


def functions(documented: Any) -> Iterator[Any]:
    """Yield what has parameters of a documented name: it, or its public members and theirs."""
    if documented.is_alias:
        documented = documented.final_target
    if documented.is_function or documented.is_class:
        yield documented
    for member in documented.members.values():
        if not member.is_alias and not member.name.startswith("_"):
            yield from functions(member)
