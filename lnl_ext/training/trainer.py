"""The training loop: stages, epochs, schedules, and a state that can be saved at any step."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.batch_counts import BatchCounter, Term
from lnl_ext.training.batches import Batch, BatchStream, to_device
from lnl_ext.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lnl_ext.training.config import Stage, TrainerConfig, changed_fields
from lnl_ext.training.distributed import (
    check_alike,
    current,
    gather_objects,
    naming_lost_processes,
    on_main,
)
from lnl_ext.training.replicas import broadcast_buffers, build_update
from lnl_ext.training.run_log import LossMeter, Record, RunLog
from lnl_ext.training.run_state import RunState
from lnl_ext.training.stepper import Stepper
from lnl_ext.training.updates import TaskLoss

Evaluate = Callable[["Trainer"], Mapping[str, float]]
"""Called at the end of an epoch; returns figures for its record."""

CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in a run's output folder."""

_NOTHING: dict[str, Any] = {"logit_adjustment": None, "sample_weights": {}}
_CUDA_FLUSH = 50  # steps between transfers of the losses to the host, which wait for the device


class _Run(NamedTuple):
    """What one call of `Trainer.fit` was given."""

    stream: BatchStream
    log: RunLog
    folder: Path | None
    evaluate: Evaluate | None
    checkpoint_every: int | None
    log_every: int | None


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
    each of
    them trains as one process with the whole batch does, but for what is drawn at random in the
    networks and for the statistics of batch norm, which are over the share of each process; those
    of process 0 are kept. ``task_loss`` must then be a mean over samples that all weigh alike.

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
        if "label" in self.adversaries:
            raise ValueError("an adversary is called 'label', as the task is: use another name")
        sample_weights = dict(sample_weights or {})
        if unknown := sample_weights.keys() - self.adversaries.keys():
            raise ValueError(f"sample_weights: there is no adversary {sorted(unknown)[0]!r}")
        self.image_transform = image_transform
        self.logit_adjustment = logit_adjustment
        # What the losses take from the batches, beside the targets of the adversaries.
        self._taken = {"logit_adjustment": logit_adjustment, "sample_weights": sample_weights}
        self._bias_names = [*self.adversaries, *sample_weights.values()]
        if logit_adjustment is not None:
            self._bias_names.append(logit_adjustment)
        self.device = next((p.device for p in features.parameters()), torch.device("cpu"))
        self.step = 0
        self.steps_per_epoch: int | None = None
        self.seconds = 0.0
        self.history: list[Record] = []
        self._network = nn.Sequential(features, classifier)
        if config.channels_last:
            for module in (self._network, *self.adversaries.values()):
                module.to(memory_format=torch.channels_last)
        heads = itertools.chain.from_iterable(a.parameters() for a in self.adversaries.values())
        self.stepper = Stepper(self._network, heads, config, self.device.type)
        self._state = RunState(features, classifier, self.adversaries, self.stepper)
        self._processes = current()
        self._update = build_update(
            features,
            classifier,
            self.adversaries,
            task_loss,
            config,
            self.stepper,
            sample_weights,
            logit_adjustment,
        )
        self._counter = BatchCounter(self.adversaries)
        self._meter = LossMeter()
        self._stream: BatchStream | None = None
        self._loaded_stream: dict[str, Any] | None = None

    def _start(self, steps_per_epoch: int) -> None:
        """Fix the length of the run, which the learning rate schedules need."""
        self.steps_per_epoch = steps_per_epoch
        train_steps = self.config.stages(steps_per_epoch)[-1].steps
        self.stepper.start(train_steps, steps_per_epoch)

    # ------------------------------------------------------------------ running

    def fit(
        self,
        batches: Iterable[Batch],
        *,
        output: str | os.PathLike[str] | None = None,
        evaluate: Evaluate | None = None,
        checkpoint_every: int | None = None,
        log_every: int | None = None,
        tensorboard: bool = False,
        progress: bool = True,
    ) -> list[Record]:
        """Run to the end of the configuration, from wherever the trainer stands.

        Parameters
        ----------
        batches : sized iterable of (images, labels, {adversary: bias target})
            A `torch.utils.data.DataLoader`, `lnl_ext.training.batches.TensorBatches`, or anything
            with a
            length that can be passed over again. Its attribute ``generator``, if it or its samplers
            have one, is seeded with the run's seed, and its state is part of the checkpoint. With
            several processes every one is given its share of each batch
            (`lnl_ext.training.batch_sampler.ShardedBatchSampler`, which `TensorBatches` uses).
        output : path, optional
            Folder for ``metrics.jsonl`` (a line per epoch), ``checkpoint.pt`` (written at the end
            of every epoch) and ``tensorboard/``. With several processes process 0 writes.
        evaluate : callable, optional
            Called with the trainer at the end of every epoch; its figures join the epoch's record.
            With several processes it is called in all, which may share the work
            (`lnl_ext.training.distributed.shard`); the figures of process 0 count.
        checkpoint_every : int, optional
            Write a checkpoint every so many steps as well.
        log_every : int, optional
            Write a metrics line every so many steps as well.
        tensorboard, progress : bool
            Write TensorBoard scalars; show a progress bar.

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
            stream = BatchStream(batches)
            check_alike(
                config=self.config.to_dict(),
                taken=self._taken,
                adversaries=list(self.adversaries),
                step=self.step,
                batches=stream.steps,
                output=output is not None,
                checkpoint_every=checkpoint_every,
                log_every=log_every,
                evaluate=evaluate is not None,
            )
            self._begin(stream, folder)
            assert self.steps_per_epoch is not None
            stages = self.config.stages(self.steps_per_epoch)
            writes = self._processes.is_main
            with RunLog(
                folder if writes else None,
                total_steps=sum(stage.steps for stage in stages),
                done_steps=self.step,
                tensorboard=tensorboard and writes,
                progress=progress and writes,
            ) as log:
                run = _Run(stream, log, folder, evaluate, checkpoint_every, log_every)
                for stage in stages:
                    while self.step < stage.first + stage.steps:
                        self._run_epoch(stage, run)
                        self._end_epoch(stage, run)
        return self.history

    def _begin(self, stream: BatchStream, folder: Path | None) -> None:
        """Seed a new run, or put a loaded one's random state back."""
        if self.steps_per_epoch is None:
            if on_main(lambda: folder is not None and (folder / CHECKPOINT).exists()):
                raise FileExistsError(
                    f"output {folder} holds the checkpoint of another run: load it to go on from "
                    "there, or give another folder"
                )
            self._start(stream.steps)
            stream.seed(self.config.seed)
        else:
            if stream.steps != self.steps_per_epoch:
                raise ValueError(
                    f"batches has {stream.steps} batches, the run began with {self.steps_per_epoch}"
                )
            if self._stream is not None:  # fit was called before in this process
                stream.load_state_dict(self._stream.state_dict())
            elif self._loaded_stream is not None:
                stream.load_state_dict(self._loaded_stream)
        self._stream, self._loaded_stream = stream, None

    def _run_epoch(self, stage: Stage, run: _Run) -> None:
        """Train to the end of the epoch or of the stage, whichever comes first."""
        assert self.steps_per_epoch is not None
        epoch, offset = divmod(self.step - stage.first, self.steps_per_epoch)
        end = min(stage.first + stage.steps, self.step - offset + self.steps_per_epoch)
        flush_every = 1 if self.device.type == "cpu" else _CUDA_FLUSH
        for module in (self._network, *self.adversaries.values()):
            module.train()
        began = time.monotonic() - self.seconds
        for number, batch in enumerate(run.stream.one_pass(offset), offset + 1):
            terms = self._train_step(stage, batch)
            self.step += 1
            self.seconds = time.monotonic() - began
            where = (
                f"stage {stage.name}, epoch {epoch}, step {self.step} "
                f"(batch {number} of {self.steps_per_epoch})"
            )
            self._meter.add(where, terms)
            log_now = run.log_every is not None and self.step % run.log_every == 0
            if log_now or len(self._meter) >= flush_every:
                self._meter.flush()
            if log_now:
                run.log.write(self._record("step", stage, epoch) | self._meter.last)
            run.log.advance(stage.name, self._meter)
            if self.step == end:
                break
            if run.checkpoint_every is not None and self.step % run.checkpoint_every == 0:
                assert run.folder is not None
                self.save(run.folder / CHECKPOINT)
        self._meter.flush()

    def _train_step(self, stage: Stage, batch: Batch) -> dict[str, Term]:
        images, labels, bias = to_device(batch, self._bias_names, self.device)
        if self.image_transform is not None:
            images = self.image_transform(images)
        if self.config.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        pretraining = stage.name == "pretrain"
        t = 0.0
        if not pretraining:
            t = min(1.0, (self.step - stage.first) / (self.config.ramp_steps or stage.steps))
        for adversary in self.adversaries.values():
            adversary.set_progress(t)
        counts = self._counter.count(labels, bias)
        shares = self._counter.shares(counts)
        values = self._update(images, labels, bias, detached=pretraining, shares=shares)
        if not pretraining:
            self.stepper.end_of_train_step()
        return self._counter.terms(counts, values)

    def _record(self, kind: str, stage: Stage, epoch: int) -> Record:
        return {
            "kind": kind,
            "stage": stage.name,
            "epoch": epoch,
            "step": self.step,
            "seconds": round(self.seconds, 3),
            **self.stepper.learning_rates(),
        }

    def _end_epoch(self, stage: Stage, run: _Run) -> None:
        assert self.steps_per_epoch is not None
        epoch = (self.step - stage.first - 1) // self.steps_per_epoch
        record = self._record("epoch", stage, epoch) | self._meter.means()
        self._meter.reset()
        if run.evaluate is not None:
            broadcast_buffers(self._state.modules())
            found = {name: float(value) for name, value in run.evaluate(self).items()}
            figures = on_main(lambda: found)
            taken = sorted(record.keys() & figures.keys())
            if taken:
                raise ValueError(f"evaluate gave {', '.join(taken)}, which the record has already")
            record |= figures
        self.history.append(record)
        run.log.write(record)
        if run.folder is not None:
            self.save(run.folder / CHECKPOINT)

    # ------------------------------------------------------------------ results and state

    def inference_modules(self) -> tuple[nn.Module, nn.Module]:
        """Return f and g to evaluate with.

        The averaged ones where there are (and averaging has begun), with the image transform in
        front of f. They share their weights with the trainer.
        """
        features, classifier = self.features, self.classifier
        averaged = self.stepper.averaged
        if averaged is not None and averaged.n_averaged > 0:
            features, classifier = cast(nn.Sequential, averaged.module)
        if self.image_transform is not None:
            features = nn.Sequential(_Apply(self.image_transform), features)
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
        broadcast_buffers(self._state.modules())
        state: dict[str, Any] = {
            "config": self.config.to_dict(),
            "taken": self._taken,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "seconds": self.seconds,
            "history": self.history,
            "meter": self._meter.state_dict(),
            "streams": gather_objects(self._stream.state_dict()),
            **self._state.state_dict(self.step),
        }
        on_main(lambda: save_checkpoint(path, state))

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
        state = load_checkpoint(path)
        try:
            changes = changed_fields(state["config"], self.config.to_dict())
            changes += changed_fields(state.get("taken", _NOTHING), self._taken)
            if changes:
                raise ValueError(
                    f"it was written with another configuration ({'; '.join(changes)})"
                )
            processes, written_by = self._processes.world_size, len(state["streams"])
            if written_by != processes:
                raise ValueError(
                    f"it was written by {written_by} processes, here are {processes}: random "
                    "states and shares of a batch belong to their number"
                )
            self._start(state["steps_per_epoch"])
            self._state.load_state_dict(state)
        except (ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit this trainer: {error}"
            ) from error
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.history = list(state["history"])
        self._meter.load_state_dict(state["meter"])
        self._stream, self._loaded_stream = None, state["streams"][self._processes.rank]


class _Apply(nn.Module):
    """A function of images as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)
