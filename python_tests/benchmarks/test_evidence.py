"""The evidence page of a short run has every part."""

from __future__ import annotations

from pathlib import Path

import evidence
import pytest
from digits import evidence as parts
from digits import runs

from lnl_ext.paper.recipes import RECIPES, Recipe


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the sets by small ones."""
    load = runs.Data.load

    def load_small(*arguments: object) -> runs.Data:
        root, variance, seed, _ = arguments
        data = load(root, variance, seed, 96)  # type: ignore[arg-type]
        test = runs.ColoredMNIST(
            root,
            split="test",
            variance=variance,
            seed=seed,
            indices=range(200),  # type: ignore[arg-type]
        )
        return runs.Data(data.train, test, data.train, test)

    monkeypatch.setattr(runs.Data, "load", load_small)
    monkeypatch.setattr(parts, "EMBEDDED", 60)


def test_evidence_writes_the_page(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--methods=lnl", "--epochs=1", "--no-progress", "--log-every=2"]
    evidence.main([*arguments, f"--output={tmp_path}"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in ("whose colour", "lnl", "I(b; f)", "optimizer.learning_rate", "Environment"):
        assert part in page
    assert page.count("data:image/png;base64,") == 4
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert "## lnl: test accuracy" in capsys.readouterr().out
    assert (tmp_path / "runs" / "lnl" / "lnl" / "checkpoint.pt").is_file()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_losses_of_every_recipes_heads_are_drawn(recipe: Recipe) -> None:
    drawn = parts.CURVES["bias cross-entropy of the head"]
    assert all(f"{head.target}_cross_entropy" in drawn for head in recipe.heads)
