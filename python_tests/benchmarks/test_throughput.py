"""benchmarks/throughput.py: it runs, measures what it says, and its tables are its figures."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import throughput
import torch
from timing import authors, peak, settings, steps, tables, turns

ROOT = Path(throughput.__file__).resolve().parent.parent
CPU = torch.device("cpu")


def check_report(report, subject):
    assert report["subject"] == subject
    assert report["command"].startswith("python benchmarks/throughput.py ")
    assert {"torch", "threads", "cpu_capability", "processor"} <= report["environment"].keys()
    assert report["rows"]
    for row in report["rows"]:
        assert row["values"].keys() == row["ratios"].keys()
        assert report["base"] in row["values"]
        assert row["ratios"][report["base"]]["median"] == 1
        for value in row["values"].values():
            assert 0 < value["q1"] <= value["median"] <= value["q3"]
        if "work" in row:
            assert all(work > 0 for work in row["work"].values())
            assert row["work"].keys() == row["values"].keys()


def test_quick_run_writes_figures_plots_and_page(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "all", "--quick"]
    subprocess.run([*command, "--threads", "1", "--output", str(tmp_path)], check=True)
    page = (tmp_path / "docs" / "performance.md").read_text()
    for subject in throughput.SUBJECTS:
        name = f"throughput_{subject}"
        report = json.loads((tmp_path / "benchmarks" / "results" / f"{name}.json").read_text())
        check_report(report, subject)
        assert report["quick"]
        assert (tmp_path / "docs" / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert tables.section(report) in page


COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("throughput_*.json"))


@pytest.mark.parametrize("subject", [path.stem.removeprefix("throughput_") for path in COMMITTED])
def test_documentation_shows_the_committed_figures(subject):
    report = json.loads(
        (ROOT / "benchmarks" / "results" / f"throughput_{subject}.json").read_text()
    )
    check_report(report, subject)
    assert not report["quick"]
    page = (ROOT / "docs" / "performance.md").read_text()
    assert tables.replace_section(page, report) == page


def test_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="no markers <!-- throughput loss: begin -->"):
        tables.replace_section("# A page", {"subject": "loss"})


def test_ratios_are_taken_within_rounds():
    row = turns.row("case", {"ours": [1.0, 2.0, 4.0], "other": [3.0, 6.0, 12.0]}, "ours")
    assert row["ratios"]["other"] == {"median": 3.0, "q1": 3.0, "q3": 3.0}
    assert row["values"]["ours"] == {"median": 2000.0, "q1": 1500.0, "q3": 3000.0}
    row = turns.row("case", {"a": [1.0, 2.0], "b": [2.0, 4.0]}, "a", base_over=True)
    assert row["ratios"]["b"]["median"] == 0.5


def test_every_candidate_runs_once_a_round():
    calls = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = turns.take_turns(candidates, CPU, 0.0, warm_up=1, min_rounds=7)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 7)
    rounds = [calls[3 + 3 * k : 6 + 3 * k] for k in range(7)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


@pytest.mark.parametrize("problem", [steps.digits(4, CPU), steps.faces(4, 32, CPU)])
def test_authors_procedure_is_the_packages_two_step(problem):
    # float64, since batch norm over so few samples magnifies rounding.
    for module in (problem.features, problem.classifier, problem.head):
        module.double()
    problem = dataclasses.replace(problem, images=problem.images.double())
    plain = steps.Modules.of(problem, copy.deepcopy(problem.head), False)
    packaged = steps.Modules.of(problem, problem.head, False)
    plain_step = steps.authors(problem, plain)
    packaged_step = steps.ours(problem, packaged, "two_step")
    before = [p.clone() for p in plain.features.parameters()]
    for _ in range(3):
        plain_step()
        packaged_step()
    after = list(plain.features.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for part in ("features", "classifier", "head"):
        expected, found = getattr(plain, part).state_dict(), getattr(packaged, part).state_dict()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_operations_are_those_of_the_passes():
    problem = steps.faces(2, 32, CPU)
    modules = steps.Modules.of(problem, problem.head, False)
    forward = steps.operations(lambda: modules.head(modules.features(problem.images)))
    one_pass = steps.operations(steps.one_pass(problem, modules))
    first = 2 * 2 * 16 * 16 * 64 * 3 * 7 * 7 / 1e9  # the images need no gradient
    classifier = 3 * 2 * 2 * 512 * 2 / 1e9
    assert one_pass == pytest.approx(3 * forward - first + classifier)
    authors_step = steps.operations(steps.authors(problem, modules))
    classifier_again = 2 * 2 * 512 * 2 / 1e9
    assert authors_step == pytest.approx(2 * one_pass - 2 * classifier_again)


def test_reversal_of_the_authors_code():
    x = torch.ones(3, requires_grad=True)
    authors._Reverse.apply(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), -authors.REVERSAL))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_peak_sees_a_tensor_that_is_freed_again():
    def run():
        torch.ones(2**24)  # 64 MiB

    assert 60 * 2**20 < peak.extra_peak(run, CPU) < 90 * 2**20


def test_environment_names_the_processor():
    facts = settings.environment(settings.Settings(CPU, 1, 1.0, True))
    assert facts["processor"]
    assert facts["processor"] in settings.describe(facts)
