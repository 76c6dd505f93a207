"""Training in several processes: the gradients of one process, one record, one fate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_run import SAMPLES, Problem
from processes import in_processes, needs_gloo
from tiny_run import SAMPLES as TINY_SAMPLES
from tiny_run import differences, tiny_batches, tiny_data, tiny_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.measuring.evaluation import predict
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training import distributed
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.checkpoint import CheckpointError, load_checkpoint
from lnl_ext.training.trainer import CHECKPOINT

pytestmark = needs_gloo

CASES: dict[str, dict[str, Any]] = {
    "missing targets": {},
    "masked entropy": {"mask_entropy": True},
    "class weights": {"weight": [0.5, 1.0, 2.0, 0.0, 4.0]},
    "smoothed": {"label_smoothing": 0.1},
    "sum": {"reduction": "sum"},
    "cross entropy only": {"entropy_weight": 0.0},
}


def linear_run(case: str, update: str, dtype: torch.dtype) -> dict[str, Any]:
    """Gradients of the last step, weights and record of an epoch of three unequal batches."""
    problem = Problem()
    options = dict(CASES[case])
    if "weight" in options:
        options["weight"] = torch.tensor(options["weight"]).to(dtype)
    problem.many[:7, 1] = IGNORE_INDEX  # the first batch has nothing for one of three heads
    problem.many[7:10] = IGNORE_INDEX
    problem.images = problem.images.to(dtype)
    networks = {"f": problem.features, "g": problem.classifier, **problem.heads}
    for network in networks.values():
        network.to(dtype)
    adversaries = {name: problem.adversary(name, **options) for name in ("one", "many")}
    # Shares of a batch of 7 are 4 and 3 samples, with targets in other numbers.
    record = problem.fit(adversaries, batch=7, update=update)
    return {
        "gradients": {
            f"{name}.{key}": p.grad
            for name, network in networks.items()
            for key, p in network.named_parameters()
        },
        "weights": {name: network.state_dict() for name, network in networks.items()},
        "record": {k: v for k, v in record.items() if k != "seconds"},
    }


@pytest.mark.parametrize("update", ["joint", "two_step"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_with_the_whole_batch(case: str, update: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        expected = linear_run(case, update, dtype)
        results = in_processes(linear_run, case, update, dtype)
        assert differences(results[0]["weights"], results[1]["weights"]) == []
        assert repr(results[0]["record"]) == repr(results[1]["record"])
        for found in results:
            for name, gradient in expected["gradients"].items():
                torch.testing.assert_close(
                    found["gradients"][name], gradient, rtol=tolerance, atol=tolerance
                )
            for network, weights in expected["weights"].items():
                for name, weight in weights.items():
                    torch.testing.assert_close(
                        found["weights"][network][name], weight, rtol=tolerance, atol=tolerance
                    )
            for name, value in expected["record"].items():
                if isinstance(value, float):
                    value = pytest.approx(value, rel=1e-5, nan_ok=True)
                assert found["record"][name] == value, name


# ---------------------------------------------------------------------- records, random states


def shared_evaluation(trainer: Any) -> dict[str, float]:
    """The accuracy, the work shared; and that of the whole set in this process."""
    model = nn.Sequential(*trainer.inference_modules())
    images, labels, _ = tiny_data()
    share = DataLoader(distributed.shard(TensorDataset(images, labels)), batch_size=4)
    predictions = distributed.gather_predictions(predict(model, share))
    whole = predict(model, DataLoader(TensorDataset(images, labels), batch_size=4))
    assert len(predictions.labels) == TINY_SAMPLES
    torch.testing.assert_close(predictions.logits, whole.logits)
    return {"accuracy": predictions.accuracy, "rank": distributed.current().rank}


def tiny_run(folder: str, update: str, stop: int | None) -> dict[str, Any]:
    """A run with everything that draws or averages; up to a step, or on from what is there."""
    trainer = tiny_trainer(update=update, head_steps=2)
    path = Path(folder) / CHECKPOINT
    if stop is None and path.exists():
        trainer.load(path)
    batches = tiny_batches()
    tracked: list[dict[str, Any]] = []
    if stop is not None:
        real = trainer._train_step

        def stopping(*arguments: Any) -> Any:
            if trainer.step == stop:
                raise KeyboardInterrupt
            return real(*arguments)

        trainer._train_step = stopping
    try:
        trainer.fit(
            batches,
            output=folder,
            evaluate=shared_evaluation,
            checkpoint_every=2,
            tracker=tracked.append,
            progress=distributed.current().rank == 1,
        )
    except KeyboardInterrupt:
        distributed.gather_objects(None)  # nobody leaves before all are here
    return {
        "weights": [p.detach().clone() for p in trainer.features.parameters()],
        "history": [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history],
        "draw": torch.rand(()).item(),
        "tracked": [record["step"] for record in tracked],
    }


@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_a_run_of_two_processes_resumes_bit_for_bit(tmp_path: Path, update: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = in_processes(tiny_run, str(whole), update, None)
    assert differences(expected[0]["weights"], expected[1]["weights"]) == []
    assert expected[0]["history"] == expected[1]["history"]
    assert [record["rank"] for record in expected[0]["history"]] == [0.0] * 2
    assert [process.pop("tracked") for process in expected] == [[6, 12], []]
    assert expected[0]["draw"] != expected[1]["draw"]  # dropout is each process's own

    in_processes(tiny_run, str(stopped), update, 9)
    assert load_checkpoint(stopped / CHECKPOINT)["step"] == 8
    found = in_processes(tiny_run, str(stopped), update, None)
    assert [process.pop("tracked") for process in found] == [[12], []]
    assert differences(expected, found) == []
    assert (
        differences(load_checkpoint(whole / CHECKPOINT), load_checkpoint(stopped / CHECKPOINT))
        == []
    )
    lines = [len((f / "metrics.jsonl").read_text().splitlines()) for f in (whole, stopped)]
    assert lines == [2, 2]  # by one process

    with pytest.raises(CheckpointError, match=r"of another run \(processes: 2, now 1\)"):
        tiny_trainer(update=update, head_steps=2).load(whole / CHECKPOINT)


def coefficients_known_zero() -> bool:
    problem = Problem()
    adversary = BiasAdversary(problem.heads["one"], reversal=lambda t: t, entropy_weight=0.0)
    problem.fit({"one": adversary})
    return adversary.known_zero("entropy_weight")


def test_coefficients_that_are_zero_stay_known_to_be() -> None:
    """A broadcast among the buffers would be a write."""
    assert in_processes(coefficients_known_zero) == [True, True]


# ---------------------------------------------------------------------- errors


class Fails(TensorBatches):
    """Batches that fail in process 1."""

    def __iter__(self) -> Any:
        for number, batch in enumerate(super().__iter__()):
            if number == 2 and distributed.current().rank == 1:
                raise OSError("an image that cannot be read")
            yield batch


def failing(what: str, folder: str) -> tuple[str, str]:
    """How a run ends in this process."""
    rank = distributed.current().rank
    problem = Problem()
    config: dict[str, Any] = {}
    if what == "not finite":
        problem.images[-1] = math.nan  # one sample, in the share of one process
    if what == "configuration" and rank == 1:
        config["seed"] = 5
    try:
        adversaries = {"one": problem.adversary("one")}
        if what == "batches":
            problem.fit(adversaries, kind=Fails)
        elif what == "length":
            problem.fit(adversaries, batch=8 if rank == 1 else 4)
        elif what == "disk":
            (Path(folder) / "file").touch()
            trainer = tiny_trainer()
            trainer.fit(tiny_batches(), progress=False)
            trainer.save(Path(folder) / "file" / CHECKPOINT)
        elif what == "folder":
            (Path(folder) / CHECKPOINT).touch()
            problem.fit(adversaries, output=Path(folder))
        else:
            problem.fit(adversaries, **config)
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""


def test_a_loss_that_is_not_finite_in_one_process_ends_all(tmp_path: Path) -> None:
    ends = in_processes(failing, "not finite", str(tmp_path))
    assert ends[0] == ends[1]
    assert ends[0][0] == "NonFiniteError"
    assert f"is nan at epoch 0, step {SAMPLES // 4}" in ends[0][1]


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    lost, own = in_processes(failing, "batches", str(tmp_path))
    assert own == ("OSError", "an image that cannot be read")
    assert lost[0] == "LostProcessError"
    assert lost[1].startswith("process 0 of 2 lost another one, which ended or did not answer")


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("disk", "CheckpointError", "could not write checkpoint"),
        ("folder", "FileExistsError", "holds the checkpoint of another run"),
        ("configuration", "ValueError", "config is not the same in all processes"),
        ("length", "ValueError", "batches is not the same in all processes (process 0: 5; "),
    ],
)
def test_what_one_process_finds_ends_all(
    tmp_path: Path, what: str, error: str, message: str
) -> None:
    ends = in_processes(failing, what, str(tmp_path))
    assert [end[0] for end in ends] == [error, error]
    assert all(message in end[1] for end in ends)


def made_too_early() -> str:
    trainer = tiny_trainer()
    trainer._processes = distributed.Processes()  # as one made before the processes connected
    with pytest.raises(RuntimeError) as error:
        trainer.fit(tiny_batches(), progress=False)
    return str(error.value)


def test_a_trainer_made_before_the_processes_is_refused() -> None:
    for message in in_processes(made_too_early):
        assert message.startswith("2 processes take part, but 1 did when this Trainer was made")
