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
from torch import Tensor

from largebatch.launch import checkpoints
from largebatch.launch.reporting import Reporter
from largebatch.launch.run_plan import Plan
from largebatch.launch.task import Task
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
    figures: dict[str, float]
    samples_per_second: float
    checkpoint: str


class TrainingLoop:
    """Everything a run needs, built by train.py.

    Args:
        engine: what deepspeed.initialize returned.
        folder: of the checkpoints.
    """

    def __init__(
        self, engine: Any, plan: Plan, task: Task, reporter: Reporter, *, folder: str, rank: int, world_size: int
    ):
        self.engine, self.plan, self.task, self.reporter, self.folder = engine, plan, task, reporter, folder
        self.rank, self.world_size = rank, world_size
        self.device = engine.device
        self.dtype = next(engine.module.parameters()).dtype
        self.interruption = Interruption()
        self.micro_steps_between_polls = 1
        self.training_seconds, self.samples_trained = 0.0, 0

    def run(self, first_step: int) -> Outcome:
        """Trains from ``first_step`` to the end, evaluating and saving on the way."""
        plan, section = self.plan, self.plan.section
        steps_per_epoch = self.task.num_samples / plan.global_batch
        batches = self.task.micro_batches(
            seed=section["seed"],
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            first_step=first_step,
        )
        figures: dict[str, float] = {}
        step = first_step
        self.reporter.start_bar()
        with self.interruption.watched():
            while step < plan.num_steps:
                if not self._train_one_step(step, batches):
                    checkpoint = self._save(step)
                    self.reporter.event("interrupted", step=step, checkpoint=checkpoint)
                    return Outcome(step, False, figures, self._throughput(), checkpoint)
                step += 1
                is_last = step == plan.num_steps
                if is_last or crosses(step, section["evaluate_every_epochs"] * steps_per_epoch):
                    figures = self._evaluate(step)
                if not is_last and crosses(step, (section["save_every_epochs"] or float("inf")) * steps_per_epoch):
                    self._save(step)
            if not figures:
                figures = self._evaluate(step)
            return Outcome(step, True, figures, self._throughput(), self._save(step))

    def _train_one_step(self, step: int, batches: Iterator[Any]) -> bool:
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
            loss = self.task.loss(engine, next(batches), dtype=self.dtype)
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
            self.reporter.advance(plan.micro_batch * self.world_size)
        mean_loss = self._mean_over_ranks(loss_sum / plan.accumulation_steps)
        seconds = time.perf_counter() - start
        self._tune_polling(seconds / plan.accumulation_steps)
        self.training_seconds += seconds
        self.samples_trained += plan.global_batch
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

    def _report(self, step: int, lr: float, loss: float, samples_per_second: float) -> None:
        engine, section = self.engine, self.plan.section
        num_samples = step * self.plan.global_batch
        scalars = {"Train/loss": loss, "Train/lr": lr, f"Train/{speed_name(self.task)}": samples_per_second}
        if engine.fp16_enabled():
            scalars["Train/loss_scale"] = engine.optimizer.loss_scale
        self.reporter.status(loss=f"{loss:.4f}", lr=f"{lr:.4g}", step=f"{step}/{self.plan.num_steps}")
        self.reporter.event(
            "step",
            step=step,
            epoch=num_samples / self.task.num_samples,
            loss=loss,
            lr=lr,
            is_applied=engine.was_step_applied(),
            **{speed_name(self.task): samples_per_second},
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
        figures = self.task.evaluate(
            self.engine.module, dtype=self.dtype, rank=self.rank, world_size=self.world_size, device=self.device
        )
        num_samples = step * self.plan.global_batch
        self.reporter.event("evaluation", step=step, epoch=num_samples / self.task.num_samples, **figures)
        self.reporter.scalars({f"Test/{name}": value for name, value in figures.items()}, num_samples)
        return figures

    def _save(self, step: int) -> str:
        return checkpoints.save(self.engine, self.folder, step, local_rank=self.engine.local_rank)

    def _throughput(self) -> float:
        return self.samples_trained / self.training_seconds if self.training_seconds else 0.0


def speed_name(task: Task) -> str:
    return "images_per_second" if task.sample_name == "images" else "samples_per_second"


def crosses(step: int, interval: float) -> bool:
    """Whether a multiple of the interval (in steps, may be a fraction) lies in (step - 1, step]."""
    return int(step / interval + 1e-9) > int((step - 1) / interval + 1e-9)
