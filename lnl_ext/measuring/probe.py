"""Fresh probes: heads trained on frozen features until they stop improving on held-out samples.

The adversary's own cross-entropy does not measure what features hold: where its head cannot
predict the bias from them, another one may.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.adversary.heads import PooledMapHead
from lnl_ext.measuring.scaling import Scaled
from lnl_ext.ops.types import IGNORE_INDEX

__all__ = [
    "PROBES",
    "Fitted",
    "Task",
    "class_frequencies",
    "fit_probe",
    "fresh_copy",
    "per_head",
    "true_class",
]

PROBES = ("linear", "mlp", "conv")
_HIDDEN = 256  # width of the MLP probe
_LEARNING_RATE = 1e-2
_LINEAR_RATE = 3e-2  # of the linear probe, whose loss is convex
_SMALLER = 0.2  # factor of the learning rate when the validation loss stalls
_PATIENCE = 3  # epochs without a better one before that
_REDUCTIONS = 2  # of the learning rate; a stall after the last is the end
_ENOUGH = 3e-4  # nats by which the validation loss must fall to be a better one
_MAX_EPOCHS = 500
_STEPS = 8  # of an epoch at least, where these have ...
_SMALLEST_BATCH = 32  # ... so many samples each


class Task(NamedTuple):
    """What the probes have to predict, and from what."""

    features: Tensor
    """(N, D) or (N, D, *S), float32 or float64."""
    target: Tensor
    """(N, heads, S) int64, `IGNORE_INDEX` where ignored; S = 1 for one prediction per sample."""
    class_names: Tensor
    """(C,) int64, ascending: what the classes of `target` were called."""
    positional: bool
    """Whether there is a prediction for every position of the features."""

    @property
    def classes(self) -> int:
        """Number of classes that occur."""
        return len(self.class_names)

    @property
    def heads(self) -> int:
        """Number of predictions per sample or position."""
        return self.target.shape[1]

    @property
    def given_target(self) -> Tensor:
        """`target` with the classes' names."""
        return torch.where(self.target < 0, self.target, self.class_names[self.target.clamp_min(0)])

    def probes(self) -> tuple[str, ...]:
        """Return the kinds of probes that fit: a convolutional one needs maps and pools them."""
        maps = self.features.dim() == 4 and not self.positional
        return PROBES if maps else PROBES[:2]


class Fitted(NamedTuple):
    """A probe that has learned what it can."""

    module: nn.Module
    frequencies: Tensor
    """(heads, C): of the classes among the samples that it learned from."""
    doubt: float
    """Share of these frequencies in what it predicts: that of one sample among those."""
    epochs: int = 0
    converged: bool = False
    """False if it was still getting better when the limit of epochs was reached."""

    def log_probabilities(self, task: Task, rows: Tensor, batch_size: int) -> Tensor:
        """Return (n, C, heads, S) float32 on the CPU.

        No probe is so sure that one sample unlike all that it learned from decides on the mean.
        """
        self.module.eval()
        with torch.no_grad():
            sure = torch.cat(
                [
                    F.log_softmax(_logits(self.module, task, part).float(), 1).cpu()
                    for part in torch.split(rows, batch_size)
                ]
            )
        prior = sure.new_full(sure.shape[1:3], -math.inf)  # C may be more than the classes
        prior[: task.classes] = (self.doubt * self.frequencies.T).log()
        return torch.logaddexp(sure + math.log1p(-self.doubt), prior.unsqueeze(2))


def fit_probe(
    kind: str,
    task: Task,
    learn: Tensor,
    stop: Tensor,
    *,
    head: nn.Module | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> Fitted:
    """Train a new probe to convergence.

    Adam; the learning rate falls whenever the cross-entropy on the samples ``stop`` has stalled,
    from the best weights so far, and training ends when it stalls at the smallest one. The result
    has the best weights.

    Parameters
    ----------
    kind
        ``"linear"``, ``"mlp"`` (one hidden layer), ``"conv"`` (`PooledMapHead`, for features
        (N, D, H, W)) or ``"head"``.
    task
        Features and targets of all samples.
    learn, stop
        The samples to learn from and to be stopped by, (n,) int64. No others are looked at.
    head
        For ``"head"``: its architecture; the parameters are drawn anew.
    batch_size
        Of the training, smaller for few samples.
    seed
        Of the parameters and the order; the global generator is not touched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = _new_probe(kind, task, learn, head)
        per_channel = kind in ("head", "conv") or task.positional
        probe = Scaled(probe.float(), task.features[learn], per_channel)
        fitted = Fitted(
            probe.to(task.features.device),
            class_frequencies(task.target[learn], task.classes),
            doubt=1 / (len(learn) + 1),
        )
        rate = _LINEAR_RATE if kind == "linear" else _LEARNING_RATE
        order = torch.Generator().manual_seed(seed)
        return _train(fitted, task, learn, stop, rate, batch_size, order)


def _new_probe(kind: str, task: Task, learn: Tensor, head: nn.Module | None) -> nn.Module:
    if kind == "head":
        assert head is not None
        return fresh_copy(head)
    outputs = task.heads * task.classes
    if kind == "conv":
        probe: nn.Sequential = PooledMapHead(task.features.shape[1], outputs)
        last = probe[-1]
    else:
        vectors = _Vectors(task.positional)
        width = vectors(task.features[:1]).shape[-1]
        hidden = [nn.Linear(width, _HIDDEN), nn.ReLU()] if kind == "mlp" else []
        last = nn.Linear(_HIDDEN if hidden else width, outputs)
        probe = nn.Sequential(vectors, *hidden, last, _ClassesSecond())
    assert isinstance(last, nn.Linear)
    with torch.no_grad():  # the class frequencies are the first prediction, for every sample
        last.weight.zero_()
        last.bias.copy_(class_frequencies(task.target[learn], task.classes).log().flatten())
    return probe


class _Vectors(nn.Module):
    """Whole samples as vectors (n, D * S), or their positions (n, *S, D)."""

    def __init__(self, positional: bool) -> None:
        super().__init__()
        self.positional = positional

    def forward(self, features: Tensor) -> Tensor:
        return features.movedim(1, -1) if self.positional else features.flatten(1)


class _ClassesSecond(nn.Module):
    """Logits (n, *S, C) as (n, C, *S)."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.movedim(-1, 1)


def _train(
    fitted: Fitted,
    task: Task,
    learn: Tensor,
    stop: Tensor,
    rate: float,
    batch_size: int,
    order: torch.Generator,
) -> Fitted:
    probe = fitted.module
    optimizer = torch.optim.Adam(probe.parameters(), lr=rate)
    best_loss, best_state = _mean_loss(fitted, task, stop, batch_size), _state(probe)
    stalled = reductions = 0
    step_size = min(batch_size, max(_SMALLEST_BATCH, len(learn) // _STEPS))
    for epoch in range(1, _MAX_EPOCHS + 1):
        probe.train()
        shuffled = learn[torch.randperm(len(learn), generator=order)]
        for rows in torch.split(shuffled, step_size):
            if len(rows) == 1:
                continue  # batch norm cannot take a batch of one
            target = task.target[rows].to(task.features.device)
            loss = F.cross_entropy(_logits(probe, task, rows), target)
            optimizer.zero_grad()
            torch.autograd.backward(loss.nan_to_num())  # NaN: every target was ignored
            optimizer.step()
        loss_now = _mean_loss(fitted, task, stop, batch_size)
        if loss_now < best_loss - _ENOUGH:
            best_loss, best_state, stalled = loss_now, _state(probe), 0
            continue
        stalled += 1
        if stalled < _PATIENCE:
            continue
        probe.load_state_dict(best_state)
        if reductions == _REDUCTIONS:
            return fitted._replace(epochs=epoch, converged=True)
        reductions, stalled = reductions + 1, 0
        optimizer = torch.optim.Adam(probe.parameters(), lr=rate * _SMALLER**reductions)
    probe.load_state_dict(best_state)
    return fitted._replace(epochs=_MAX_EPOCHS)


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


def _mean_loss(fitted: Fitted, task: Task, rows: Tensor, batch_size: int) -> float:
    target = task.target[rows]
    nats = -true_class(fitted.log_probabilities(task, rows, batch_size), target)
    return (nats.sum() / (target != IGNORE_INDEX).sum()).item()


def true_class(log_probability: Tensor, target: Tensor) -> Tensor:
    """Return (n, heads, S): the log probability of the target, 0 where it is ignored."""
    known = target != IGNORE_INDEX
    taken = log_probability.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1)
    return torch.where(known, taken, 0.0)


def class_frequencies(target: Tensor, classes: int) -> Tensor:
    """Return (heads, C) frequencies, float32, with one added to each count: none is impossible."""
    rows = []
    for known in target.unbind(1):
        counts = torch.bincount(known[known != IGNORE_INDEX], minlength=classes).double() + 1
        rows.append(counts / counts.sum())
    return torch.stack(rows).float()


def per_head(logits: Tensor, heads: int) -> Tensor:
    """Turn logits ``(N, heads * C, *S)`` into ``(N, C, heads, S)``, as cross_entropy takes them."""
    return logits.reshape(len(logits), heads, logits.shape[1] // heads, -1).transpose(1, 2)


# ------------------------------------------------------------------ new parameters


def fresh_copy(head: nn.Module) -> nn.Module:
    """Copy ``head`` and draw the copy's parameters anew, from torch's global generator.

    Every submodule with ``reset_parameters`` (or ``_reset_parameters``, as attention has it) is
    reset, after those inside it; all parameters require a gradient.

    Raises
    ------
    ValueError
        A parameter, or a persistent floating-point buffer, is not set by these methods: it would
        keep what it has learned.
    """
    probe = copy.deepcopy(head)
    values = {
        name: value
        for name, value in probe.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
        and not nn.parameter.is_lazy(value)
        and (value.is_floating_point() or value.is_complex())
    }
    with torch.no_grad():
        for value in values.values():
            value.fill_(math.nan)
        _reset(probe)
        kept = [name for name, value in values.items() if value.isnan().any()]
    if kept:
        raise ValueError(
            f"head has {', '.join(kept)}, which no reset_parameters of its modules sets: a fresh "
            "probe would not be fresh. Give their module such a method, or make constant buffers "
            "persistent=False"
        )
    for parameter in probe.parameters():
        parameter.requires_grad_(True)
    return probe


def _reset(module: nn.Module) -> None:
    """Reset the modules inside, then the module itself, which may have its own wishes for them."""
    for child in module.children():
        _reset(child)
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            reset()
            return
