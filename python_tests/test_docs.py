"""The examples of README and docs/ run as they stand; the site builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(page, example, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, example in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]
# What an example may need besides the package; installed by the extra `docs`.
FRAMEWORKS = ("lightning", "transformers", "accelerate")


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def test_pages_have_their_examples() -> None:
    found = {page.values[0].name for page in EXAMPLES}  # type: ignore[attr-defined]
    assert {"README.md", "guide.md", "audit.md"} <= found


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_example_runs(page: Path, example: str) -> None:
    for name in FRAMEWORKS:
        if re.search(rf"^(import|from) {name}\b", example, re.MULTILINE) and missing(name):
            pytest.skip(f"{name} is not installed")
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(example, str(page), "exec"), names)
    loss = names["loss"]
    assert loss.isfinite()  # type: ignore[attr-defined]


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
    # Nothing is fetched from elsewhere when a page is opened.
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)'
            r'|<link[^>]+stylesheet[^>]+(https?:[^" >]+)',
            page.read_text(encoding="utf-8"),
        )
        assert not loaded, f"{page.name} loads {loaded}"
