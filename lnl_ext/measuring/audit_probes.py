"""Fresh probes, trained on frozen features until they get no better on the validation samples."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.measuring.audit_split import Split
from lnl_ext.measuring.probe import fresh_copy, per_head
from lnl_ext.measuring.standardized import Standardized

IGNORED = -100
HIDDEN = 256  # width of the MLP probe
_LEARNING_RATE = 3e-3
_SMALLER = 0.3  # factor of the learning rate when the validation loss stalls
_PATIENCE = 4  # epochs without a better one before that
_REDUCTIONS = 3  # of the learning rate; a stall after the last is the end
_MAX_EPOCHS = 500


class Task(NamedTuple):
    """What the probes have to predict, and from what."""

    features: Tensor
    """(N, D) or (N, D, *S), float32 or float64."""
    target: Tensor
    """(N, heads, S) int64, -100 where ignored; S = 1 for one prediction per sample."""
    class_names: Tensor
    """(C,) int64, ascending: what the classes of `target` were called."""
    positional: bool
    """Whether there is a prediction for every position of the features."""

    @property
    def classes(self) -> int:
        """Number of classes that occur."""
        return len(self.class_names)

    @property
    def given_target(self) -> Tensor:
        """`target` with the classes' names."""
        return torch.where(self.target < 0, self.target, self.class_names[self.target.clamp_min(0)])

    @property
    def heads(self) -> int:
        """Number of predictions per sample or position."""
        return self.target.shape[1]


class Fitted(NamedTuple):
    """A probe that has learned what it can."""

    module: nn.Module
    epochs: int
    converged: bool
    """False if it was still getting better when the limit of epochs was reached."""


class _Classes(nn.Module):
    """A classifier of vectors, applied to the whole sample or to every position."""

    def __init__(self, task: Task, hidden: int | None) -> None:
        super().__init__()
        self.positional = task.positional
        vectors = _vectors(task.features, task.positional)
        width = vectors.shape[-1]
        outputs = task.heads * task.classes
        self.layers = (
            nn.Sequential(nn.Linear(width, outputs))
            if hidden is None
            else nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(_vectors(features, self.positional))
        return logits.movedim(-1, 1)

    def start_from(self, prior: Tensor) -> None:
        """Begin with the class frequencies ``(heads, C)`` as the prediction for every sample."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(prior.log().flatten())


def _vectors(features: Tensor, positional: bool) -> Tensor:
    return features.movedim(1, -1) if positional else features.flatten(1)


def class_frequencies(target: Tensor, classes: int) -> Tensor:
    """Return (heads, C) frequencies, float32, with one added to each count: none is impossible."""
    rows = []
    for known in target.unbind(1):
        counts = torch.bincount(known[known != IGNORED], minlength=classes).double() + 1
        rows.append(counts / counts.sum())
    return torch.stack(rows).float()


def fit_probe(
    kind: str, task: Task, split: Split, *, head: nn.Module | None, batch_size: int, seed: int
) -> Fitted:
    """Train a new probe to convergence.

    Adam; the learning rate falls whenever the cross-entropy on the validation samples has stalled,
    from the best weights so far, and training ends when it stalls at the smallest one. The result
    has the best weights.

    Parameters
    ----------
    kind
        ``"linear"``, ``"mlp"`` (one hidden layer of `HIDDEN`) or ``"head"``.
    task
        Features and targets of all samples.
    split
        Which of them to learn from and to be stopped by; the test samples are not looked at.
    head
        For ``"head"``: its architecture; the parameters are drawn anew.
    batch_size, seed
        Of the training; the global generator is not touched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "head":
            assert head is not None
            probe: nn.Module = fresh_copy(head)
        else:
            classes = _Classes(task, HIDDEN if kind == "mlp" else None)
            classes.start_from(class_frequencies(task.target[split.train], task.classes))
            probe = classes
        per_channel = kind == "head" or task.positional
        probe = Standardized(probe.float(), task.features[split.train], per_channel)
        probe = probe.to(task.features.device)
        return _train(probe, task, split, batch_size, torch.Generator().manual_seed(seed))


def _train(
    probe: nn.Module, task: Task, split: Split, batch_size: int, order: torch.Generator
) -> Fitted:
    optimizer = torch.optim.Adam(probe.parameters(), lr=_LEARNING_RATE)
    best_loss, best_state = _mean_loss(probe, task, split.validation, batch_size), _state(probe)
    stalled = reductions = 0
    for epoch in range(1, _MAX_EPOCHS + 1):
        probe.train()
        shuffled = split.train[torch.randperm(len(split.train), generator=order)]
        for rows in torch.split(shuffled, batch_size):
            if len(rows) < min(batch_size, len(shuffled)):
                continue  # batch norm in a head cannot take a batch of one
            loss = F.cross_entropy(_logits(probe, task, rows), task.target[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss.nan_to_num())  # NaN: every target was ignored
            optimizer.step()
        loss_now = _mean_loss(probe, task, split.validation, batch_size)
        if loss_now < best_loss - 1e-5:
            best_loss, best_state, stalled = loss_now, _state(probe), 0
            continue
        stalled += 1
        if stalled < _PATIENCE:
            continue
        probe.load_state_dict(best_state)
        if reductions == _REDUCTIONS:
            return Fitted(probe.eval(), epoch, True)
        reductions, stalled = reductions + 1, 0
        optimizer = torch.optim.Adam(probe.parameters(), lr=_LEARNING_RATE * _SMALLER**reductions)
    probe.load_state_dict(best_state)
    return Fitted(probe.eval(), _MAX_EPOCHS, False)


def _logits(probe: nn.Module, task: Task, rows: Tensor) -> Tensor:
    """Return the logits (n, C, heads, S); C of a head may be more than the classes that occur."""
    logits: Tensor = probe(task.features[rows])
    positions = task.target.shape[2]
    if (
        logits.dim() < 2
        or len(logits) != len(rows)
        or logits.shape[1] % task.heads
        or logits.shape[1] < task.heads * task.classes
        or logits.shape[2:].numel() != positions
    ):
        raise ValueError(
            f"head gives logits of shape {tuple(logits.shape)}, expected ({len(rows)}, heads * C, "
            f"*S) with heads={task.heads}, at least {task.classes} classes C (those of bias) and "
            f"{positions} position(s)"
        )
    return per_head(logits, task.heads)


def _state(probe: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(probe.state_dict())


def _mean_loss(probe: nn.Module, task: Task, rows: Tensor, batch_size: int) -> float:
    nats = -chosen(log_probabilities(probe, task, rows, batch_size), task.target[rows])
    known = task.target[rows] != IGNORED
    return (nats[known].sum() / known.sum()).item()


def log_probabilities(probe: nn.Module, task: Task, rows: Tensor, batch_size: int) -> Tensor:
    """Return the probe's log probabilities, shape (n, C, heads, S) float32, on the CPU."""
    probe.eval()
    with torch.no_grad():
        return torch.cat(
            [
                F.log_softmax(_logits(probe, task, part).float(), 1).cpu()
                for part in torch.split(rows, batch_size)
            ]
        )


def chosen(log_probability: Tensor, target: Tensor) -> Tensor:
    """Return (n, heads, S): the log probability of the target, 0 where it is ignored."""
    known = target != IGNORED
    taken = log_probability.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1)
    return torch.where(known, taken, 0.0)
