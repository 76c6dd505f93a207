"""The training loop: epochs, schedules, and a state that can be saved at any step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.batches import Batch, BatchStream, drawn, to_device
from lnl_ext.training.checkpoint import load_run, save_run
from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.denominators import Term
from lnl_ext.training.distributed import (
    broadcast_buffers,
    check_alike,
    current,
    gather_objects,
    naming_lost_processes,
    on_main,
)
from lnl_ext.training.group_dro import GroupDRO
from lnl_ext.training.image_transform import Transformed
from lnl_ext.training.objective import Objective, TaskLoss
from lnl_ext.training.run_log import LossMeter, Record, RunLog, Tracker
from lnl_ext.training.strength_checks import StrengthChecks
from lnl_ext.training.target_names import ADJUSTMENT, by_name, head_weight
from lnl_ext.training.updates import Update

CHECKPOINT = "checkpoint.pt"  # in a run's output folder
Evaluate = Callable[["Trainer"], Mapping[str, float]]
"""Called at the end of an epoch; returns figures for its record."""


class Trainer:
    """Trains features, a classifier and bias adversaries together.

    Parameters
    ----------
    features : nn.Module
        f: images to features. Its device is where batches are moved.
    classifier : nn.Module
        g: features to class logits (N, C).
    adversaries : mapping of str to BiasAdversary
        Heads on the features, each with the bias target of its name in the batches; none for a
        baseline. Targets may be ignored anywhere: a batch without any for a head does not
        update it, and does not count in its metrics.
    config : TrainerConfig
    task_loss : callable
        ``task_loss(logits, labels)``, a mean over the batch; cross-entropy by default. With several
        processes or ``accumulate`` all samples must weigh alike in it.
    image_transform : callable, optional
        Applied to images in training and by :meth:`inference_modules` alike (grey input).
    sample_weights : mapping of str to str, optional
        Under which name the weights of the samples for an adversary stand among the batches' bias
        targets (`lnl_ext.independence_weights`); its mean is then over the samples.
    logit_adjustment : str, optional
        Under which name the batches' bias targets have what is added to the class logits in the
        task loss only: ``(N, C)`` floating point (`lnl_ext.logit_adjustment`). The task loss must
        then have no label smoothing.
    task_weights : str or GroupDRO, optional
        Weights of the samples in the task loss: under which name the batches' bias targets have
        them, ``(N,)`` floating point (`lnl_ext.training.balance.balanced_weights`); or
        `lnl_ext.training.group_dro.GroupDRO`, which makes them from the groups in the batches.
        ``task_loss`` must then take ``reduction="none"``, as `torch.nn.functional` has it.

    Examples
    --------
    >>> trainer = Trainer(f, g, {"colour": BiasAdversary(head)}, TrainerConfig(epochs=3))
    >>> history = trainer.fit(batches, output="runs/colour")

    To resume after an interruption, build the same trainer and load before :meth:`fit`:

    >>> trainer.load("runs/colour/checkpoint.pt")
    >>> history = trainer.fit(batches, output="runs/colour")

    With several processes (`lnl_ext.training.distributed`), connected before, the same program in
    each of them trains as one with the whole batch does, but for random draws in the networks and
    the statistics of batch norm, which are over the share of each; those of process 0 are kept.
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        adversaries: Mapping[str, BiasAdversary] | None = None,
        config: TrainerConfig | None = None,
        *,
        task_loss: TaskLoss = F.cross_entropy,
        image_transform: Callable[[Tensor], Tensor] | None = None,
        sample_weights: Mapping[str, str] | None = None,
        logit_adjustment: str | None = None,
        task_weights: str | GroupDRO | None = None,
    ) -> None:
        self.config = config = TrainerConfig() if config is None else config
        self.features = features
        self.classifier = classifier
        self.adversaries = by_name("adversaries", adversaries)
        sample_weights = by_name("sample_weights", sample_weights)
        if config.adjust:
            logit_adjustment = logit_adjustment or ADJUSTMENT
            weights = {name: head_weight(name) for name in self.adversaries}
            sample_weights = weights | sample_weights
        self.image_transform = image_transform
        self.logit_adjustment = logit_adjustment
        self.step = 0
        self.steps_per_epoch: int | None = None
        self.seconds = 0.0
        self.history: list[Record] = []
        self._modules = (features, classifier, *self.adversaries.values())
        if config.channels_last:
            for module in self._modules:
                module.to(memory_format=torch.channels_last)
        self._objective = Objective(
            features,
            classifier,
            self.adversaries,
            task_loss,
            sample_weights,
            logit_adjustment,
            config.update == "two_step",
            task_weights,
        )
        self.device = self._objective.device
        self._processes = current()
        self.update = Update(self._objective, config)
        self._meter = LossMeter()
        self._checks = StrengthChecks(
            self.adversaries, config.strength_at(1.0), self._objective.sample_weights
        )
        self._stream: BatchStream | None = None
        self._loaded: Any = None

    def fit(
        self,
        batches: Iterable[Batch],
        *,
        output: str | os.PathLike[str] | None = None,
        evaluate: Evaluate | None = None,
        checkpoint_every: int | None = None,
        log_every: int | None = None,
        tracker: Tracker | None = None,
        progress: bool = True,
        stop: Callable[[Trainer], bool] | None = None,
    ) -> list[Record]:
        """Run to the end of the configuration, from wherever the trainer stands.

        Parameters
        ----------
        batches : sized iterable of (images, labels, {adversary: bias target})
            A `torch.utils.data.DataLoader`, `lnl_ext.training.batches.TensorBatches`, or anything
            with a length that can be passed over again. Its attribute ``generator``, if it or its
            samplers have one, is seeded with the run's seed, and its state is part of the
            checkpoint. With several processes each is given its share of every batch
            (`lnl_ext.training.batches.ShardedBatchSampler`, which `TensorBatches` uses).
        output : path, optional
            Folder for ``metrics.jsonl`` (a line per record) and ``checkpoint.pt`` (of the last
            epoch's end). With several processes process 0 writes.
        evaluate : callable, optional
            Called with the trainer at the end of every epoch; its metrics join the epoch's record.
            With several processes it is called in all, which may share the work
            (`lnl_ext.training.distributed.shard`); the metrics of process 0 count.
        checkpoint_every, log_every : int, optional
            Write a checkpoint, or a record, also after each such number of steps.
        tracker : callable, optional
            Called with every record, a dictionary, in process 0; for instance
            `lnl_ext.training.run_log.TensorBoard`.
        progress : bool
            Show a progress bar.
        stop : callable, optional
            Called with the trainer before every epoch; True ends the run there (early stopping). It
            must follow from :attr:`history`, which is the same in all processes and in a resumed
            run.

        Returns
        -------
        list of dict
            The records of all epochs, those before a resume included.

        Raises
        ------
        NonFiniteError
            A loss or a weight became NaN or infinite. The last checkpoint is from before that.
        FileExistsError
            ``output`` holds the checkpoint of another run.
        LostProcessError
            Another process ended, or did not answer in time. The last checkpoint is whole.
        RuntimeError
            Processes were connected after this trainer was made.
        """
        if (now := current()) != self._processes:
            raise RuntimeError(
                f"{now.world_size} processes take part, but {self._processes.world_size} did when "
                "this Trainer was made: connect them before"
            )
        for name, every in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
            if every is not None and every < 1:
                raise ValueError(f"{name} must be >= 1, got {every}")
        folder = None if output is None else Path(output)
        if checkpoint_every is not None and folder is None:
            raise ValueError("checkpoint_every needs output, the folder to write to")
        with naming_lost_processes():
            source = drawn(batches, float(self.config.balance), adjust=self.config.adjust)
            stream = BatchStream(source, self.config.accumulate)
            check_alike(
                **self._identity(),
                step=self.step,
                batches=stream.steps,
                output=folder is not None,
                checkpoint_every=checkpoint_every,
                log_every=log_every,
                evaluate=evaluate is not None,
            )
            end = self._begin(stream, folder)
            writes = self._processes.is_main
            if writes:
                self._checks.warn_before()
            with RunLog(
                self._meter,
                end,
                self.step,
                log_every,
                output=folder if writes else None,
                tracker=tracker if writes else None,
                progress=progress and writes,
            ) as log:
                while self.step < end and not (stop is not None and stop(self)):
                    for _ in self._epoch(end, stream, log):
                        if folder and checkpoint_every and self.step % checkpoint_every == 0:
                            self.save(folder / CHECKPOINT)
                    self.history.append(self._end_epoch(evaluate))
                    log.write(self.history[-1])
                    if folder is not None:
                        self.save(folder / CHECKPOINT)
        return self.history

    def _begin(self, stream: BatchStream, folder: Path | None) -> int:
        """Seed a new run, or put the random state of one back; return its length in steps."""
        if self.steps_per_epoch is None:
            if on_main(lambda: folder is not None and (folder / CHECKPOINT).exists()):
                raise FileExistsError(
                    f"output {folder} holds the checkpoint of another run: load it to resume from "
                    "there, or give another folder"
                )
            self._start(stream.steps)
            stream.seed(self.config.seed)
        elif stream.steps != self.steps_per_epoch:
            raise ValueError(
                f"batches gives {stream.steps} steps an epoch, the run began with "
                f"{self.steps_per_epoch}"
            )
        elif self._stream is not None:  # fit was called before in this process
            stream.load_state_dict(self._stream.state_dict())
        elif self._loaded is not None:
            stream.load_state_dict(self._loaded["stream"])
        self._stream, self._loaded = stream, None
        return self.config.steps(stream.steps)

    def _epoch(self, run_end: int, stream: BatchStream, log: RunLog) -> Iterator[None]:
        """Train to the end of the epoch or of the run, whichever comes first.

        Yields between two steps, where the run can be saved.
        """
        offset = self.step % stream.steps
        end = min(run_end, self.step - offset + stream.steps)
        for module in self._modules:
            module.train()
        began = time.monotonic() - self.seconds
        for number, batches in enumerate(stream.one_pass(offset), offset + 1):
            terms = self._train_step(self.step / run_end, batches)
            self.step += 1
            self.seconds = time.monotonic() - began
            log.add(self._record("step"), f"batch {number} of {stream.steps}", terms)
            if self.step == end:
                break
            yield

    def _end_epoch(self, evaluate: Evaluate | None) -> Record:
        """Return the record of the epoch that ends at this step."""
        self._meter.flush()
        record = self._record("epoch") | self._meter.means()
        self._meter.reset()
        if self._processes.is_main:
            self._checks.warn_after(record)
        if evaluate is not None:
            broadcast_buffers([*self._modules, *self.update.inference_modules()])
            found = {name: float(value) for name, value in evaluate(self).items()}
            figures = on_main(lambda: found)
            if taken := sorted(record.keys() & figures.keys()):
                raise ValueError(f"evaluate gave {', '.join(taken)}, which the record has already")
            record |= figures
        return record

    def _train_step(self, progress: float, batches: Sequence[Batch]) -> dict[str, Term]:
        strength = self.config.strength_at(progress)
        scaled = {} if self.config.strength == 1.0 else {"strength": strength}
        for adversary in self.adversaries.values():
            adversary.set_progress(progress, **scaled)
        taken = self._objective.bias_names
        ready = [to_device(b, taken, self.device, self._prepare_images) for b in batches]
        self._checks.count(ready)
        return self.update(ready, heads_only=strength == 0.0)

    def _prepare_images(self, images: Tensor) -> Tensor:
        images = images if self.image_transform is None else self.image_transform(images)
        layout = self.config.channels_last and images.dim() == 4
        return images.contiguous(memory_format=torch.channels_last) if layout else images

    def _record(self, kind: str) -> Record:
        assert self.steps_per_epoch is not None
        epoch = (self.step - 1) // self.steps_per_epoch
        record = {"kind": kind, "epoch": epoch, "step": self.step}
        record |= {"seconds": round(self.seconds, 3)} | self.update.learning_rates()
        if self.adversaries:
            last = (self.step - 1) / self.config.steps(self.steps_per_epoch)
            record["strength"] = self.config.strength_at(last)
        return record

    def inference_modules(self) -> tuple[nn.Module, nn.Module]:
        """Return f and g to evaluate with.

        The averaged ones once averaging has begun, with the image transform in front of f. They
        share their weights with the trainer.
        """
        features, classifier = self.update.inference_modules()
        if self.image_transform is not None:
            features = Transformed(self.image_transform, features)
        return features, classifier

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state of the run between two steps to ``path``.

        With several processes each must call it; process 0 writes.

        Raises
        ------
        CheckpointError
            If it cannot be written; an earlier checkpoint there is unchanged.
        NonFiniteError
            If a loss or a weight is not finite; likewise.
        RuntimeError
            If the run has not begun.
        """
        if self._stream is None:
            raise RuntimeError("there is nothing to save: fit has not been called")
        self._meter.flush()  # a loss that is not finite is found before it is saved
        names = ("step", "steps_per_epoch", "seconds", "history")
        state = {name: getattr(self, name) for name in names} | {"identity": self._identity()}
        own = {"stream": self._stream.state_dict(), "recent": self.update.recent_state()}
        state["processes"] = gather_objects(own)
        on_main(lambda: save_run(path, state, self.update.parts() | {"meter": self._meter}))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the state that :meth:`save` wrote; :meth:`fit` then resumes from there.

        The result is that of the uninterrupted run, bit for bit on the CPU with the same number of
        threads. With several processes each must call it, and their number must be the run's.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        CheckpointError
            If the file is damaged, or belongs to another configuration or other modules.
        """
        state = load_run(path, self._identity(), lambda s: self._start(s["steps_per_epoch"]))
        self.step, self.seconds, self.history = (state[n] for n in ("step", "seconds", "history"))
        self._stream, self._loaded = None, state["processes"][self._processes.rank]
        self.update.load_recent_state(self._loaded["recent"])

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same where a run resumes, and in all its processes."""
        return {
            "config": self.config.to_dict(),
            "taken": self._objective.taken,
            # Random states and shares of a batch belong to it.
            "processes": self._processes.world_size,
        }

    def _start(self, steps_per_epoch: int) -> dict[str, Any]:
        """Fix the length of the run, which the schedules need; return what has a state then."""
        self.steps_per_epoch = steps_per_epoch
        self.update.start(self.config.steps(steps_per_epoch), steps_per_epoch)
        return self.update.parts() | {"meter": self._meter}
