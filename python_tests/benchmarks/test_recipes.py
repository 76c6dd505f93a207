"""The recipes of the coloured-MNIST benchmark, and one short run of it."""

from __future__ import annotations

import dataclasses
import json

import colored_mnist
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from digits import demo, runs
from digits.protocol import MNIST, PAPER
from recording import records

from lnl_ext.data import ColoredMNIST
from lnl_ext.paper.recipes import RECIPES, get_recipe
from lnl_ext.training.methods import METHODS, get_method
from lnl_ext.training.recipe import LNL


def test_paper_recipe_is_the_authors():
    recipe = RECIPES["paper"]
    assert recipe.batch_size == 128
    assert recipe.from_baseline
    assert recipe.ramp_steps is None
    for config, rate in ((recipe.baseline, 0.01), (recipe.unlearning, 0.001)):
        assert config.epochs == 100
        optimizers = [config.optimizer]
        if config is recipe.unlearning:
            assert config.update == "two_step"
            optimizers.append(config.head_optimizer)
        for optimizer in optimizers:
            assert optimizer.name == "sgd"
            assert optimizer.learning_rate == rate
            assert optimizer.momentum == 0.9
            assert optimizer.weight_decay == 5e-4
            assert optimizer.schedule == "step"
            assert (optimizer.decay_epochs, optimizer.decay_factor) == (40, 0.1)
    (head,) = recipe.heads
    assert head.reversal == 0.1
    # They weigh the mean of three heads' entropies with 0.01.
    assert head.entropy_weight == pytest.approx(0.01 / 3)


def test_the_recipe_of_lnl_is_the_one_of_the_command():
    recipe = RECIPES["lnl"]
    config = recipe.unlearning
    assert config == LNL.config(
        epochs=config.epochs,
        optimizer=config.optimizer,
        average_decay=config.average_decay,
        channels_last=True,
    )
    (head,) = recipe.heads
    for name in ("reversal", "entropy_weight", "confusion_weight"):
        assert head.heads * getattr(head, name) == pytest.approx(getattr(LNL, name))


def test_only_methods_that_unlearn_by_reversal_or_entropy_have_their_logits_adjusted():
    adjusted = {"adjusted", "grl", "entropy", "lnl"}
    for name, method in METHODS.items():
        recipe = get_recipe("digits", method)
        assert (recipe.adjustment(method) is not None) == (name in adjusted)
        assert recipe is RECIPES["unadjusted" if name == "blindeye" else "digits"]
        assert get_recipe("paper", method) is RECIPES["paper"]
        of_lnl = RECIPES["lnl"].adjustment(method)  # its trainer adjusts them where it unlearns
        assert of_lnl == ("color_adjustment" if name == "adjusted" else None)
        if name != "adjusted":
            assert RECIPES["unadjusted"].adjustment(method) is None
            assert RECIPES["paper"].adjustment(method) is None
    with pytest.raises(ValueError, match="'adjusted' needs a recipe with a logit adjustment"):
        RECIPES["paper"].adjustment(METHODS["adjusted"])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_baseline_is_not_trained_for_less(recipe):
    assert recipe.baseline.epochs >= recipe.unlearning.epochs


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_adversaries_take_the_batches_of_the_data(recipe, name):
    dataset = ColoredMNIST(MNIST, split="test", indices=range(4))
    _, _, bias = dataset.batch(range(4))
    adversaries = recipe.adversaries(get_method(name))
    assert bool(adversaries) == get_method(name).adversarial
    features = torch.rand(4, 32, 14, 14, requires_grad=True)
    for target, adversary in adversaries.items():
        adversary.set_progress(1.0)
        loss = adversary(features, bias[target])
        assert loss.isfinite()
        loss.backward()
        assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["digits", "unadjusted"])
def test_heads_of_single_digits_count_per_sample_of_the_batch(name):
    """Their sums over the batch are those of 3 + 3 predictions a sample, absent digits included."""
    recipe = RECIPES[name]
    (adversary,) = recipe.adversaries(get_method("lnl")).values()
    adversary.set_progress(1.0)
    dataset = ColoredMNIST(MNIST, split="test", indices=range(recipe.batch_size))
    _, labels, bias = dataset.batch(range(len(dataset)))
    features = torch.rand(len(dataset), 32, 14, 14, requires_grad=True)
    adversary(features, bias["color_and_digit"]).backward()

    other = features.detach().requires_grad_()
    logits = adversary.head(other).view(len(dataset), 11, 3, 8)
    own = logits[torch.arange(len(dataset)), labels + 1]
    seen = torch.stack([logits[:, 0], own], dim=1).log_softmax(-1)
    color = bias["color"][:, None].expand(-1, 2, -1)
    cross_entropy = 6 * F.nll_loss(seen.flatten(0, 2), color.flatten())
    entropy = -6 * (seen.exp() * seen).sum(-1).mean()
    (head,) = recipe.heads
    (-head.reversal * cross_entropy - head.entropy_weight * entropy).backward()
    torch.testing.assert_close(features.grad, other.grad, rtol=1e-4, atol=1e-8)


@pytest.fixture(scope="module")
def data() -> runs.Data:
    """A few hundred digits, and fewer for tests and probes."""

    def digits(split: str, biased: bool, number: int = 100) -> ColoredMNIST:
        return ColoredMNIST(MNIST, split=split, biased=biased, indices=range(number))

    return runs.Data(
        digits("train", True, 320),
        digits("test", False),
        digits("train", False),
        digits("test", False),
    )


@pytest.mark.parametrize(
    ("method", "recipe", "stages"),
    [
        ("lnl", "lnl", ["lnl"]),
        ("lnl", "digits", ["lnl"]),
        ("adjusted", "digits", ["adjusted"]),
        ("lnl", "paper", ["baseline", "lnl"]),
        ("gray", "paper", ["gray"]),
    ],
)
def test_a_run_is_measured_and_recorded(tmp_path, data, method, recipe, stages):
    result = runs.measure(
        method, recipe, data, 0, epochs=0.5, output=tmp_path / "run", progress=False
    ).run
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(stages)
    assert result.epoch == 0.5 * len(stages)
    assert result.paper_accuracy == PAPER.get(method, {}).get(0.02)
    for value in (result.test_accuracy, result.leakage, result.leakage_before):
        assert 0 <= value <= 1
    records.append(tmp_path / "results.jsonl", result)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line) == dataclasses.asdict(result)
    assert f"{result.test_accuracy:.4f}" in runs.table([result])


def test_a_finished_run_is_not_trained_again(tmp_path, data):
    def run() -> runs.Run:
        return runs.measure(
            "lnl", "digits", data, 0, epochs=0.5, output=tmp_path, progress=False, before=False
        ).run

    assert run() == run()


def test_the_demo_draws_and_reports_both_methods(tmp_path, data):
    result = runs.Run(
        benchmark="colored_mnist",
        method="lnl",
        recipe="digits",
        variance=0.02,
        seed=7,
        epoch=3.0,
        test_accuracy=0.75,
        leakage=0.5,
        leakage_before=None,
        leakage_chance=0.25,
        information=0.4,
        minutes=1.0,
        train_samples=320,
        threads=1,
        paper_accuracy=0.8185,
    )
    both = [dataclasses.replace(result, method="baseline", test_accuracy=0.25), result]
    text = demo.table(both)
    assert "+0.5000" in text
    assert "0.4055" in text
    assert "0.8185" in text
    demo.draw(both, data, tmp_path / "folder" / "demo.png")
    assert (tmp_path / "folder" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_an_output_folder_has_a_page(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(runs.Data, "load", lambda *arguments: data)
    results = tmp_path / "results.jsonl"
    given = [f"--results={results}", "--epochs=0.5", "--recipe=paper", "--no-progress"]
    colored_mnist.main(given)
    assert "page" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [results]
    colored_mnist.main([*given, f"--output={tmp_path}/run"])
    assert f"page: {tmp_path}/run/lnl/report.html" in capsys.readouterr().out
    page = (tmp_path / "run" / "lnl" / "report.html").read_text(encoding="utf-8")
    result = json.loads(results.read_text().splitlines()[-1])
    for name in ("test_accuracy", "leakage", "leakage_before", "leakage_chance"):
        assert f'<td class="number">{result[name]:.3f}</td>' in page
    assert "python benchmarks/colored_mnist.py --results=" in page
    assert "<td>trainer of baseline.optimizer.learning_rate</td>" in page
    assert page.count("<img ") == 2  # two confusion matrices; half an epoch makes no curve


def test_settings_are_chosen_on_other_digits_than_trained_on(tmp_path):
    chosen = runs.Data.held_out(MNIST, 0.02, 0)
    whole = ColoredMNIST(MNIST, biased=False)
    assert len(chosen.train) == 55_000
    torch.testing.assert_close(chosen.train.labels, whole.labels[:55_000])
    torch.testing.assert_close(chosen.test.labels, whole.labels[55_000:])
    torch.testing.assert_close(chosen.probe_train.labels, whole.labels[:10_000])
    assert chosen.train.biased
    for measured in (chosen.test, chosen.probe_train, chosen.probe_test):
        assert measured.split == "train"
        assert not measured.biased


def test_choosing_takes_coefficients_and_records_nothing(tmp_path, data, monkeypatch, capsys):
    seen = []

    def remember(name, recipe, *arguments, **options):
        seen.append(recipe)
        return trained(name, recipe, *arguments, **options)

    trained = runs.train_method
    monkeypatch.setattr(runs, "train_method", remember)
    monkeypatch.setattr(runs.Data, "held_out", lambda *arguments: data)
    results = tmp_path / "results.jsonl"
    given = [f"--results={results}", "--epochs=0.5", "--no-progress", "--entropy-weight=0.02"]
    colored_mnist.main([*given, "--choose"])
    (head,) = seen[0].heads
    assert (head.reversal, head.entropy_weight) == (RECIPES["lnl"].heads[0].reversal, 0.02)
    assert not results.exists()
    assert "held-out digits" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        colored_mnist.parse(given)
    assert "need --choose" in capsys.readouterr().err
