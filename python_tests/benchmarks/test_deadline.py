"""Steps under one deadline: promised times, what fails or hangs, what is kept of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpu_check
import pytest
from gpu import deadline
from gpu.deadline import Step, limit_of, limits_fit, run_steps, write_json
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


def python(code: str):
    return lambda limit, result: [sys.executable, "-c", code, str(result), str(limit)]


def shell(code: str):
    return lambda limit, result: ["/bin/sh", "-c", code, "sh", str(result)]


def of(name: str, command, least: float = 5.0, most: float = 5.0, **rest) -> Step:
    return Step(name, command, least, most, **rest)


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "GRACE", 0.8)


@given(
    times=st.lists(
        st.tuples(st.floats(5, 100), st.floats(0, 200), st.floats(0, 2), st.booleans()),
        min_size=1,
        max_size=9,
    ),
    spare=st.floats(0, 100),
)
def test_every_step_gets_what_it_is_promised_and_all_end_in_time(times, spare: float):
    steps = [
        of(str(i), shell(""), least, least + more, skip="why" if skipped else None)
        for i, (least, more, _, skipped) in enumerate(times)
    ]
    total = spare + sum(step.least for step in steps)
    assert limits_fit(steps, total)
    left = total
    for i, (step, (_, _, wish, _)) in enumerate(zip(steps, times, strict=True)):
        if step.skip is None:
            limit = limit_of(step, steps[i + 1 :], left)
            assert step.least - 1e-6 <= limit <= step.most
            left -= min(limit, wish * step.most)  # some take all that they can get
    assert left >= -1e-6


@pytest.mark.parametrize("minutes", [5.0, gpu_check.MINUTES, 20.0])
def test_the_plan_of_gpu_check_keeps_its_promises(minutes: float):
    steps = gpu_check.plan("cuda", "9.0", False, [], minutes)
    margin = gpu_check.MARGIN * minutes / gpu_check.MINUTES
    assert limits_fit(steps, 60 * minutes - margin)
    # The timings have two of eight minutes whatever the tests do.
    least = sum(step.least for step in steps if step.name.endswith("timings"))
    assert least >= 0.25 * 60 * minutes


def test_promises_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match="the steps need 10 s at least, given 9"):
        run_steps([of("a", shell("")), of("b", shell(""))], 9.0, ROOT)


def test_a_step_that_hangs_is_killed_with_all_it_started_and_what_it_said_is_kept(
    tmp_path: Path, short_grace: None
):
    pid = tmp_path / "pid"
    hangs = shell(
        "trap '' INT; echo '{\"rows\": [1]}' > $1; "
        f"sleep 1000 & echo $! > {pid}; echo half way; while :; do sleep 1000; done"
    )
    begin = time.monotonic()
    first, second = run_steps(
        [of("hangs", hangs, 2.0, 2.5), of("later", shell("echo fine"), 4.0)], 6.5, ROOT
    )
    assert time.monotonic() - begin < 6.5
    assert (first.status, first.detail, first.output) == ("killed", {"rows": [1]}, ["half way"])
    assert 2.0 <= first.limit <= 2.5
    assert second.status == "passed"
    for _ in range(100):  # init may take a moment to collect it
        if not alive(int(pid.read_text())):
            break
        time.sleep(0.05)
    assert not alive(int(pid.read_text()))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture(params=["heard", "ignored"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """SIGINT as in a terminal, or as in the background of a script."""
    handler = signal.default_int_handler if request.param == "heard" else signal.SIG_IGN
    before = signal.signal(signal.SIGINT, handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_a_step_says_when_it_is_interrupted_still_counts(short_grace: None, interrupts: None):
    # as pytest does
    says = shell("trap 'echo == 1 passed in 2.00s ==; exit 2' INT; echo test_b; sleep 1000 & wait")
    (outcome,) = run_steps([of("tests", says, 3, 3, read=gpu_check.counts_of)], 3.0, ROOT)
    assert outcome.status == "killed"
    assert outcome.detail == {"passed": 1}
    assert outcome.output[0] == "test_b"


def test_failures_are_recorded_and_the_later_steps_run(capsys: pytest.CaptureFixture[str]):
    steps = [
        of("fails", python("print('the reason'); raise SystemExit(3)")),
        of("absent", lambda limit, result: ["/no/such/tool"]),
        of("not here", shell("exit 1"), skip="there is none"),
        of("empty", shell("echo nothing"), read=gpu_check.counts_of),
        of("needs the first", shell(""), needs="fails"),
        of("passes", python("import sys; open(sys.argv[1], 'w').write('[1, 2]')")),
        of("needs the last", shell("echo $SETTING"), needs="passes", environment={"SETTING": "x"}),
        of("is told its time", python("import sys; assert 0 < float(sys.argv[2]) < 5")),
    ]
    seen = []
    outcomes = run_steps(steps, 100.0, ROOT, lambda so_far: seen.append(len(so_far)))
    assert {outcome.name: outcome.status for outcome in outcomes} == {
        "fails": "failed",
        "absent": "failed",
        "not here": "skipped",
        "empty": "failed",
        "needs the first": "skipped",
        "passes": "passed",
        "needs the last": "passed",
        "is told its time": "passed",
    }
    details = [outcome.detail for outcome in outcomes]
    assert outcomes[0].output == ["the reason"]
    assert "/no/such/tool" in details[1]
    assert details[2:6] == [
        "there is none",
        "no summary in the output of pytest",
        "'fails' did not pass",
        [1, 2],
    ]
    assert seen == list(range(1, 9))
    printed = capsys.readouterr().out
    assert "fails: failed" in printed
    assert "  | the reason" in printed


def test_parts_are_processes_of_their_own_which_all_run(tmp_path: Path):
    write = "echo '{0}' > $1; echo said {0}; [ {0} != 2 ]"
    parts = {f"part {i}": shell(write.format(i)) for i in range(3)}
    for together in (0, 1):
        (outcome,) = run_steps([of("all", None, 9, 9, parts=parts, together=together)], 9.0, ROOT)
        assert (outcome.name, outcome.status) == ("all", "failed")
        assert {name: part["detail"] for name, part in outcome.detail.items()} == {
            "part 0": 0,
            "part 1": 1,
            "part 2": 2,
        }
        assert [part["status"] for part in outcome.detail.values()] == ["passed"] * 2 + ["failed"]
        assert outcome.output == ["part 2: said 2"]


def test_parts_share_their_step_s_time(short_grace: None):
    waits = shell("sleep 1000")
    parts = {"waits": waits, "quick": shell("echo fine")}
    begin = time.monotonic()
    (outcome,) = run_steps([of("all", None, 2, 2, parts=parts)], 9.0, ROOT)
    assert {name: part["status"] for name, part in outcome.detail.items()} == {
        "waits": "killed",
        "quick": "passed",
    }
    (outcome,) = run_steps([of("all", None, 2, 2, parts=parts, together=1)], 9.0, ROOT)
    assert time.monotonic() - begin < 6
    assert outcome.status == "killed"
    assert outcome.output == ["quick: no time was left for it"]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.json"
    write_json(path, {"steps": 1})
    with pytest.raises(TypeError):
        write_json(path, {"steps": object()})
    assert json.loads(path.read_text()) == {"steps": 1}
    assert os.listdir(tmp_path) == ["report.json"]
