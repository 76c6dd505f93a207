"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_has_its_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str) -> None:
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    loss = names["loss"]
    assert loss.isfinite()  # type: ignore[attr-defined]
