"""Several processes: who they are, shares of a data set that are complete, gathered results."""

from __future__ import annotations

import datetime
import itertools
from typing import Any

import pytest
import torch
from processes import free_port, in_processes, needs_gloo
from torch.utils.data import DataLoader, TensorDataset

from lnl_ext.measuring.evaluation import Predictions
from lnl_ext.training import distributed
from lnl_ext.training.batches import BatchStream, ShardedBatchSampler, TensorBatches
from lnl_ext.training.distributed import Processes


def samplers(world_size: int, samples: int, batch_size: int, **options: Any) -> list[Any]:
    """The samplers of all processes, seeded alike."""
    made = [
        ShardedBatchSampler(samples, batch_size, processes=Processes(rank, world_size), **options)
        for rank in range(world_size)
    ]
    for sampler in made:
        sampler.generator.manual_seed(1)
    return made


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("samples", "batch_size"), [(24, 6), (22, 6), (23, 7), (4, 6), (3, 3)])
def test_processes_see_together_the_batches_of_a_single_one(
    samples: int, batch_size: int, shuffle: bool
) -> None:
    (single,) = samplers(1, samples, batch_size, shuffle=shuffle)
    for world_size in (2, 3):
        shares = samplers(world_size, samples, batch_size, shuffle=shuffle)
        for sampler in (single, *shares):
            sampler.generator.manual_seed(5)
        for _ in range(2):  # passes, each with an order of its own
            expected = list(single)
            found = list(zip(*shares, strict=True))
            assert len(found) == len(shares[0])
            if len(found) < len(expected):  # a rest with fewer samples than processes
                assert samples % batch_size < world_size
                expected.pop()
            for whole, parts in zip(expected, found, strict=True):
                together = [i for tied in itertools.zip_longest(*parts) for i in tied]
                assert together[: len(whole)] == whole
                assert set(together[len(whole) :]) <= {None}
                assert all(parts)


def test_an_order_is_complete_and_new_in_every_pass() -> None:
    (sampler,) = samplers(1, 10, 4)
    passes = [list(itertools.chain(*sampler)) for _ in range(2)]
    assert [sorted(order) for order in passes] == [list(range(10))] * 2
    assert passes[0] != passes[1]
    assert [len(batch) for batch in sampler] == [4, 4, 2]
    assert [len(batch) for batch in samplers(1, 10, 4, drop_last=True)[0]] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 2}, "batch_size is 2 for 3 processes: it counts the samples of all"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, r"batch_size must be an integer >= 1, got 2\.0"),
        ({"samples": 4, "drop_last": True}, "batch_size 5 with drop_last leaves no batch of 4"),
        ({"samples": 2}, "batch_size 5 for 3 processes leaves no batch of 2 samples"),
    ],
)
def test_samplers_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedBatchSampler(
            **{"samples": 20, "batch_size": 5, **arguments}, processes=Processes(1, 3)
        )


# ---------------------------------------------------------------------- one process


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed.from_environment() as processes:
        assert processes == Processes(0, 1, 0)
        assert processes.is_main
        assert not torch.distributed.is_initialized()
    data = TensorDataset(torch.arange(3))
    assert distributed.shard(data) is data
    rows = torch.arange(4)
    assert torch.equal(distributed.gather_rows(rows), rows)


def test_half_of_the_variables_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(RuntimeError, match="RANK is set, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        distributed.from_environment(),
    ):
        pass


@needs_gloo
@pytest.mark.parametrize(
    "failure",
    [
        None,  # nobody listens
        RuntimeError("Gloo connectFullMesh failed with [gloo/pair.cc:561] Connection closed"),
    ],
)
def test_others_that_do_not_connect_are_named(
    monkeypatch: pytest.MonkeyPatch, failure: RuntimeError | None
) -> None:
    variables = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_PORT": free_port()}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))

    def fail(*arguments: Any, **options: Any) -> None:
        assert failure is not None
        raise failure

    if failure is not None:
        monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with (
        pytest.raises(distributed.LostProcessError, match="process 1 of 2 could not connect"),
        distributed.from_environment(datetime.timedelta(seconds=1)),
    ):
        pass


# ---------------------------------------------------------------------- two processes


def members() -> tuple[Processes, bool]:
    return distributed.current(), distributed.current().is_main


@needs_gloo
def test_torchruns_variables_connect_processes() -> None:
    assert in_processes(members) == [(Processes(0, 2, 0), True), (Processes(1, 2, 1), False)]
    assert distributed.current() == Processes()


def share_and_gather(samples: int) -> tuple[list[int], Predictions]:
    data = distributed.shard(TensorDataset(torch.arange(samples)))
    mine = torch.tensor([int(data[i][0]) for i in range(len(data))], dtype=torch.int64)
    predictions = Predictions(mine[:, None] * torch.tensor([1.0, -1.0]), mine)
    return mine.tolist(), distributed.gather_predictions(predictions)


@needs_gloo
@pytest.mark.parametrize("samples", [1, 8, 9])
def test_every_sample_is_evaluated_once_and_results_come_back_in_order(samples: int) -> None:
    results = in_processes(share_and_gather, samples)
    assert sorted(itertools.chain(*(mine for mine, _ in results))) == list(range(samples))
    for _, gathered in results:
        assert gathered.labels.tolist() == list(range(samples))
        assert torch.equal(gathered.logits[:, 0], torch.arange(samples).float())


def gather_too_many() -> str:
    try:
        distributed.gather_rows(torch.zeros(2 + 2 * distributed.current().rank))
    except ValueError as error:
        return str(error)
    return "no error"


@needs_gloo
def test_rows_that_are_no_shares_are_refused() -> None:
    for message in in_processes(gather_too_many):
        assert "the processes have [2, 4] rows, which are not shares of one data set" in message


def sharded_batches() -> tuple[list[list[int]], list[list[int]], str]:
    rows = torch.arange(11)
    tensors = TensorBatches(rows, rows, batch_size=4)
    loader = DataLoader(TensorDataset(rows), batch_sampler=ShardedBatchSampler(11, 4))
    BatchStream(tensors).seed(1)
    BatchStream(loader).seed(1)
    try:
        BatchStream(DataLoader(TensorDataset(rows), batch_size=2))
    except ValueError as error:
        message = str(error)
    return [x.tolist() for x, *_ in tensors], [x.tolist() for (x,) in loader], message


@needs_gloo
def test_batches_are_shared_out_and_loaders_that_do_not_are_refused() -> None:
    results = in_processes(sharded_batches)
    seen = [i for tensors, _, _ in results for batch in tensors for i in batch]
    assert sorted(seen) == list(range(11))
    for tensors, loader, message in results:
        assert tensors == loader
        assert "not shared out among the 2 processes: give it batch_sampler=Sharded" in message
