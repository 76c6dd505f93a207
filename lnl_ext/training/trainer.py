"""The training loop: stages, epochs, schedules, and a state that can be saved at any step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.batches import Batch, BatchStream, to_device
from lnl_ext.training.checkpoint import load_run, save_run
from lnl_ext.training.config import Stage, TrainerConfig
from lnl_ext.training.denominators import Term
from lnl_ext.training.distributed import (
    broadcast_buffers,
    check_alike,
    current,
    gather_objects,
    naming_lost_processes,
    on_main,
)
from lnl_ext.training.run_log import LossMeter, Record, RunLog, Tracker
from lnl_ext.training.updates import Objective, TaskLoss, Update

Evaluate = Callable[["Trainer"], Mapping[str, float]]
"""Called at the end of an epoch; returns figures for its record."""

CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in a run's output folder."""


class _Run(NamedTuple):
    """What one call of `Trainer.fit` was given."""

    stream: BatchStream
    log: RunLog
    folder: Path | None
    evaluate: Evaluate | None
    checkpoint_every: int | None


class Trainer:
    """Trains features, a classifier and bias adversaries together.

    Parameters
    ----------
    features : nn.Module
        f: images to the tap. Its device is where batches are moved.
    classifier : nn.Module
        g: tap to class logits (N, C).
    adversaries : mapping of str to BiasAdversary
        Heads on the tap, each with the bias target of its name in the batches; none for a
        baseline. Targets that are ignored may be anywhere: a batch without any target for a head
        is no step for that head, and counts nothing in its figures.
    config : TrainerConfig
    task_loss : callable
        ``task_loss(logits, labels)``, a mean over the batch; cross-entropy by default.
    image_transform : callable, optional
        Applied to images in training and by :meth:`inference_modules` alike (grey input).
    sample_weights : mapping of str to str, optional
        For adversaries with ``reduction="sum"``: under which name their weights of the samples
        stand among the batches' bias targets (`lnl_ext.independence_weights`).
    logit_adjustment : str, optional
        Under which name the batches' bias targets have what is added to the class logits in the
        task loss, and in it only: ``(N, C)`` floating point (`lnl_ext.logit_adjustment`). The task
        loss is then to be without label smoothing.

    Examples
    --------
    >>> trainer = Trainer(f, g, {"colour": BiasAdversary(head)}, TrainerConfig(epochs=3))
    >>> history = trainer.fit(batches, output="runs/colour")

    With several processes (`lnl_ext.training.distributed`), connected before, the same program in
    each of them trains as one process with the whole batch does, but for what is drawn at random in
    the networks and for the statistics of batch norm, which are over the share of each process;
    those of process 0 are kept. There, and where batches are accumulated, ``task_loss`` must be a
    mean over samples that all weigh alike.

    To go on after an interruption, build the same trainer and load before :meth:`fit`:

    >>> trainer.load("runs/colour/checkpoint.pt")
    >>> history = trainer.fit(batches, output="runs/colour")
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
    ) -> None:
        self.config = config = TrainerConfig() if config is None else config
        self.features = features
        self.classifier = classifier
        self.adversaries = dict(adversaries or {})
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
            two_step=config.update == "two_step",
        )
        self.device = self._objective.device
        self._processes = current()
        self.update = Update(self._objective, config)
        self._meter = LossMeter()
        self._stream: BatchStream | None = None
        self._loaded_stream: dict[str, Any] | None = None

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
            Folder for ``metrics.jsonl`` (a line per record) and ``checkpoint.pt`` (written at the
            end of every epoch). With several processes process 0 writes.
        evaluate : callable, optional
            Called with the trainer at the end of every epoch; its figures join the epoch's record.
            With several processes it is called in all, which may share the work
            (`lnl_ext.training.distributed.shard`); the figures of process 0 count.
        checkpoint_every, log_every : int, optional
            Write a checkpoint, or a record, every so many steps as well.
        tracker : callable, optional
            Called with every record, a dictionary; with several processes in process 0.
            `lnl_ext.training.run_log.TensorBoard` is one.
        progress : bool
            Show a progress bar.

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
            Another process of the run ended, or did not answer in time. The last checkpoint is
            whole.
        RuntimeError
            Processes were connected after this trainer was made.
        """
        if current() != self._processes:
            raise RuntimeError(
                f"{current().world_size} processes take part, but {self._processes.world_size} did "
                "when this Trainer was made: connect them before"
            )
        for name, every in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
            if every is not None and every < 1:
                raise ValueError(f"{name} must be >= 1, got {every}")
        if checkpoint_every is not None and output is None:
            raise ValueError("checkpoint_every needs output, the folder to write to")
        folder = None if output is None else Path(output)
        with naming_lost_processes():
            stream = BatchStream(batches, self.config.accumulate)
            check_alike(
                **self._identity(),
                step=self.step,
                batches=stream.steps,
                output=output is not None,
                checkpoint_every=checkpoint_every,
                log_every=log_every,
                evaluate=evaluate is not None,
            )
            stages = self._begin(stream, folder)
            writes = self._processes.is_main
            with RunLog(
                self._meter,
                folder if writes else None,
                total_steps=stages[-1].end,
                done_steps=self.step,
                every=log_every,
                tracker=tracker if writes else None,
                progress=progress and writes,
            ) as log:
                run = _Run(stream, log, folder, evaluate, checkpoint_every)
                for stage in stages:
                    while self.step < stage.end:
                        self._run_epoch(stage, run)
        return self.history

    def _begin(self, stream: BatchStream, folder: Path | None) -> list[Stage]:
        """Seed a new run, or put the random state of one back; return its stages."""
        if self.steps_per_epoch is None:
            if on_main(lambda: folder is not None and (folder / CHECKPOINT).exists()):
                raise FileExistsError(
                    f"output {folder} holds the checkpoint of another run: load it to go on from "
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
        elif self._loaded_stream is not None:
            stream.load_state_dict(self._loaded_stream)
        self._stream, self._loaded_stream = stream, None
        return self.config.stages(stream.steps)

    def _run_epoch(self, stage: Stage, run: _Run) -> None:
        """Train to the end of the epoch or of the stage, whichever comes first."""
        steps = run.stream.steps
        epoch, offset = divmod(self.step - stage.first, steps)
        end = min(stage.end, self.step - offset + steps)
        for module in self._modules:
            module.train()
        began = time.monotonic() - self.seconds
        for number, batches in enumerate(run.stream.one_pass(offset), offset + 1):
            terms = self._train_step(stage, batches)
            self.step += 1
            self.seconds = time.monotonic() - began
            record = self._record("step", stage, epoch)
            run.log.add(record, f"batch {number} of {steps}", terms)
            if self.step == end:
                break
            if run.checkpoint_every is not None and self.step % run.checkpoint_every == 0:
                assert run.folder is not None
                self.save(run.folder / CHECKPOINT)
        self._meter.flush()
        record = self._record("epoch", stage, epoch) | self._meter.means()
        self._meter.reset()
        if run.evaluate is not None:
            broadcast_buffers(
                part for part in self._parts().values() if isinstance(part, nn.Module)
            )
            found = {name: float(value) for name, value in run.evaluate(self).items()}
            figures = on_main(lambda: found)
            if taken := sorted(record.keys() & figures.keys()):
                raise ValueError(f"evaluate gave {', '.join(taken)}, which the record has already")
            record |= figures
        self.history.append(record)
        run.log.write(record)
        if run.folder is not None:
            self.save(run.folder / CHECKPOINT)

    def _train_step(self, stage: Stage, batches: Sequence[Batch]) -> dict[str, Term]:
        training = stage.name == "train"
        progress = (self.step - stage.first) / (self.config.ramp_steps or stage.steps)
        for adversary in self.adversaries.values():
            adversary.set_progress(min(1.0, progress) if training else 0.0)
        return self.update([self._prepared(b) for b in batches], pretraining=not training)

    def _prepared(self, batch: Batch) -> Batch:
        images, labels, bias = to_device(batch, self._objective.bias_names, self.device)
        if self.image_transform is not None:
            images = self.image_transform(images)
        if self.config.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels, bias

    def _record(self, kind: str, stage: Stage, epoch: int) -> Record:
        record = {"kind": kind, "stage": stage.name, "epoch": epoch, "step": self.step}
        return record | {"seconds": round(self.seconds, 3)} | self.update.learning_rates()

    def inference_modules(self) -> tuple[nn.Module, nn.Module]:
        """Return f and g to evaluate with.

        The averaged ones where there are (and averaging has begun), with the image transform in
        front of f. They share their weights with the trainer.
        """
        features, classifier = self.features, self.classifier
        averaged = self.update.averaged
        if averaged is not None and averaged.n_averaged > 0:
            features, classifier = cast(nn.Sequential, averaged.module)
        if self.image_transform is not None:
            features = nn.Sequential(_Apply(self.image_transform), features)
        return features, classifier

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state of the run between two steps to ``path``.

        With several processes each must call it; process 0 writes its own state, and the random
        states of all.

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
        state: dict[str, Any] = {
            "identity": self._identity(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "seconds": self.seconds,
            "history": self.history,
            "streams": gather_objects(self._stream.state_dict()),
        }
        on_main(lambda: save_run(path, state, self._parts()))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the state that :meth:`save` wrote; :meth:`fit` then goes on from there.

        The result is that of the uninterrupted run, bit for bit on the CPU with the same number
        of threads. With several processes each must call it, and their number must be that of the
        run.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        CheckpointError
            If the file is damaged, or belongs to another configuration or other modules.
        """
        state = load_run(path, self._identity(), self._started)
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = state["history"]
        self._stream, self._loaded_stream = None, state["streams"][self._processes.rank]

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same where a run goes on, and in all its processes."""
        return {
            "config": self.config.to_dict(),
            "taken": self._objective.taken,
            # Random states and shares of a batch belong to it.
            "processes": self._processes.world_size,
        }

    def _started(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the parts of a run that has begun, here or elsewhere."""
        self._start(state["steps_per_epoch"])
        return self._parts()

    def _start(self, steps_per_epoch: int) -> None:
        """Fix the length of the run, which the learning rate schedules need."""
        self.steps_per_epoch = steps_per_epoch
        self.update.start(self.config.stages(steps_per_epoch)[-1].steps, steps_per_epoch)

    def _parts(self) -> dict[str, Any]:
        """Return everything that has a state_dict, by its name in a checkpoint."""
        parts: dict[str, Any] = {"features": self.features, "classifier": self.classifier}
        parts |= {f"adversary:{name}": part for name, part in self.adversaries.items()}
        return parts | self.update.parts() | {"meter": self._meter}


class _Apply(nn.Module):
    """A function of images as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)
