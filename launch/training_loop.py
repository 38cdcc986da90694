"""Optimizer steps of accumulated micro-batches, from the first (or the resumed) to the last, or until interrupted."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.launch import checkpoints
from largebatch.launch.arguments import Plan
from largebatch.launch.evaluation import evaluate
from largebatch.launch.input_pipeline import DataSet, Images, MicroBatches
from largebatch.launch.reporting import Reporter
from largebatch.optim.layerwise import LayerwiseOptimizer

SECONDS_BETWEEN_POLLS = 2.0


class Interruption:
    """Ctrl-C and SIGTERM ask for a stop; the loop asks here, between micro-steps, whether any rank was asked."""

    def __init__(self):
        self.is_requested = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        previous = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number, frame) -> None:
        self.is_requested = True


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    is_complete: bool
    accuracy: dict[str, float]
    images_per_second: float
    checkpoint: str


class TrainingLoop:
    """Everything a run needs, built by train.py.

    Args:
        engine: what deepspeed.initialize returned.
        folder: of the checkpoints.
    """

    def __init__(
        self, engine: Any, plan: Plan, data: DataSet, reporter: Reporter, *, folder: str, rank: int, world_size: int
    ):
        self.engine, self.plan, self.data, self.reporter, self.folder = engine, plan, data, reporter, folder
        self.rank, self.world_size = rank, world_size
        self.device = engine.device
        self.dtype = next(engine.module.parameters()).dtype
        self.test = Images(data.test.pixels.to(self.device), data.test.labels.to(self.device))
        self.batches = MicroBatches(
            data.train,
            seed=plan.section["seed"],
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=rank,
            world_size=world_size,
            device=self.device,
        )
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=plan.section["label_smoothing"])
        self.interruption = Interruption()
        self.micro_steps_between_polls = 1
        self.training_seconds, self.images_trained = 0.0, 0

    def run(self, first_step: int) -> Outcome:
        """Trains from ``first_step`` to the end, evaluating and saving on the way."""
        plan, section = self.plan, self.plan.section
        steps_per_epoch = len(self.data.train) / plan.global_batch
        accuracy: dict[str, float] = {}
        step = first_step
        self.reporter.start_bar()
        with self.interruption.watched():
            while step < plan.num_steps:
                if not self._train_one_step(step):
                    checkpoint = self._save(step)
                    self.reporter.event("interrupted", step=step, checkpoint=checkpoint)
                    return Outcome(step, False, accuracy, self._throughput(), checkpoint)
                step += 1
                is_last = step == plan.num_steps
                if is_last or crosses(step, section["evaluate_every_epochs"] * steps_per_epoch):
                    accuracy = self._evaluate(step)
                if not is_last and crosses(step, (section["save_every_epochs"] or float("inf")) * steps_per_epoch):
                    self._save(step)
            if not accuracy:
                accuracy = self._evaluate(step)
            return Outcome(step, True, accuracy, self._throughput(), self._save(step))

    def _train_one_step(self, step: int) -> bool:
        """Accumulates one global batch and steps; False if interrupted before the step was taken."""
        engine, plan = self.engine, self.plan
        # dropout depends on seed, step and rank alone, so that a resumed run draws what the first would have
        torch.manual_seed((plan.section["seed"] * 1_000_003 + step) * 65_537 + self.rank)
        lr = engine.get_lr()[0]
        engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        start = time.perf_counter()
        for micro_step in range(plan.accumulation_steps):
            if micro_step % self.micro_steps_between_polls == 0 and self._is_interrupted():
                return False
            pixels, labels = self.batches.micro_batch_of(step, micro_step)
            loss = self.loss_function(engine(self.data.inputs(pixels, self.dtype)).float(), labels)
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
            self.reporter.advance(plan.micro_batch * self.world_size)
        mean_loss = self._mean_over_ranks(loss_sum / plan.accumulation_steps)
        seconds = time.perf_counter() - start
        self._tune_polling(seconds / plan.accumulation_steps)
        self.training_seconds += seconds
        self.images_trained += plan.global_batch
        self._report(step + 1, lr, mean_loss, plan.global_batch / seconds)
        return True

    def _mean_over_ranks(self, value: Tensor) -> float:
        if self.world_size > 1:
            dist.all_reduce(value)
        return value.item() / self.world_size

    def _is_interrupted(self) -> bool:
        """Whether any rank was asked to stop. A collective: all ranks ask at the same micro-steps."""
        if self.world_size == 1:
            return self.interruption.is_requested
        flag = torch.tensor(float(self.interruption.is_requested), device=self.device)
        dist.all_reduce(flag)
        return bool(flag.item())

    def _tune_polling(self, seconds_per_micro_step: float) -> None:
        """Long steps are polled every two seconds or so, short ones once; decided by rank 0 for all."""
        interval = torch.tensor(max(1.0, SECONDS_BETWEEN_POLLS / max(seconds_per_micro_step, 1e-6)), device=self.device)
        if self.world_size > 1:
            dist.broadcast(interval, src=0)
        self.micro_steps_between_polls = int(interval.item())

    def _report(self, step: int, lr: float, loss: float, images_per_second: float) -> None:
        engine, section = self.engine, self.plan.section
        num_samples = step * self.plan.global_batch
        scalars = {"Train/loss": loss, "Train/lr": lr, "Train/images_per_second": images_per_second}
        if engine.fp16_enabled():
            scalars["Train/loss_scale"] = engine.optimizer.loss_scale
        self.reporter.status(loss=f"{loss:.4f}", lr=f"{lr:.4g}", step=f"{step}/{self.plan.num_steps}")
        self.reporter.event(
            "step",
            step=step,
            epoch=num_samples / len(self.data.train),
            loss=loss,
            lr=lr,
            images_per_second=images_per_second,
            is_applied=engine.was_step_applied(),
            **({"loss_scale": scalars["Train/loss_scale"]} if "Train/loss_scale" in scalars else {}),
        )
        optimizer = engine.basic_optimizer
        is_due = step % section["layer_stats_every_steps"] == 0 or step in (1, self.plan.num_steps)
        if isinstance(optimizer, LayerwiseOptimizer) and is_due and self.rank == 0:
            layers = optimizer.layer_stats()
            self.reporter.event("layers", step=step, layers=layers)
            for name, figures in layers.items():
                scalars[f"TrustRatio/{name}"] = figures["trust_ratio"]
                scalars[f"LocalLR/{name}"] = figures["local_lr"]
        self.reporter.scalars(scalars, num_samples)

    def _evaluate(self, step: int) -> dict[str, float]:
        accuracy = evaluate(
            self.engine.module, self.data, self.test, dtype=self.dtype, rank=self.rank, world_size=self.world_size
        )
        num_samples = step * self.plan.global_batch
        self.reporter.event("evaluation", step=step, epoch=num_samples / len(self.data.train), **accuracy)
        self.reporter.scalars({f"Test/{name}": value for name, value in accuracy.items()}, num_samples)
        return accuracy

    def _save(self, step: int) -> str:
        return checkpoints.save(self.engine, self.folder, step, local_rank=self.engine.local_rank)

    def _throughput(self) -> float:
        return self.images_trained / self.training_seconds if self.training_seconds else 0.0


def crosses(step: int, interval: float) -> bool:
    """Whether a multiple of the interval (in steps, may be a fraction) lies in (step - 1, step]."""
    return int(step / interval + 1e-9) > int((step - 1) / interval + 1e-9)
