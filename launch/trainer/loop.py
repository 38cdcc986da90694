"""Optimizer steps of accumulated micro-batches, from the first (or the resumed) to the last, or until interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from largebatch.launch.data.transfers import Download, uploaded
from largebatch.launch.recipe.resolved_run import Phase
from largebatch.launch.supervise.signals import Interruption
from largebatch.launch.trainer.reporting import Reporter
from largebatch.launch.trainer.running_statistics import averaged_over_ranks
from largebatch.launch.trainer.saving.saver import Saver
from largebatch.launch.trainer.slow_ranks import OwnTime, SlowRanks
from largebatch.launch.trainer.step_reports import Speed, TakenStep, report_step, speed_name
from largebatch.launch.trainer.task import Task
from largebatch.models.batch_norm import GLOBAL
from largebatch.optim.layerwise import LayerwiseOptimizer
from largebatch.telemetry import LayerStats

SECONDS_BETWEEN_POLLS = 2.0


@dataclass
class Outcome:
    """How a phase, and so far the run, ended."""

    step: int
    is_complete: bool
    metrics: dict[str, float]
    samples_per_second: float
    checkpoint: str


class TrainingLoop:
    """One phase of a run, built by train.py.

    A step costs one all-reduce of our own. Its result is looked at after the next step has been enqueued, and no more than
    that result is waited for, so that the device always has something to do. Nothing else in a step waits for it but
    DeepSpeed's own reading of norms and overflows.

    Args:
        engine: what deepspeed.initialize returned.
        folder: of the checkpoints.
    """

    def __init__(
        self, engine: Any, phase: Phase, task: Task, reporter: Reporter, *, folder: str, rank: int, world_size: int
    ):
        self.engine, self.phase, self.resolved, self.task = engine, phase, phase.resolved, task
        self.reporter = reporter
        self.rank, self.world_size = rank, world_size
        self.saver = Saver(engine, folder, reporter, rank=rank, section=self.resolved.section)
        self.device = engine.device
        self.own_time, self.slow_ranks = OwnTime(self.device), SlowRanks()
        self.dtype = next(engine.module.parameters()).dtype
        self.interruption = Interruption()
        self.micro_steps_between_polls = 1
        self.taken: TakenStep | None = None
        self.poll: Download | None = None
        self.is_stopping = False
        self.last_step_seconds = 0.0
        self.last_reported_step: int | None = None
        self.num_unreadable = 0
        size = self.resolved.section["batch_norm"].get("ghost_batch_size")
        is_over_ranks = size == GLOBAL or (isinstance(size, int) and size > self.resolved.micro_batch)
        self.is_forward_own = engine.zero_optimization_stage() < 3 and not is_over_ranks
        """Whether the forward pass waits for no other rank."""

    def run(self, first_step: int) -> Outcome:
        """Trains from step ``first_step`` of this phase to its end, evaluating and saving on the way."""
        resolved, section = self.resolved, self.resolved.section
        steps_per_epoch = self.task.num_samples / resolved.global_batch
        metrics: dict[str, float] = {}
        step = first_step
        self.reporter.start_bar()
        self.speed = Speed()
        with self.interruption.watched(), contextlib.closing(self._batches(first_step)) as batches:
            while step < resolved.num_steps:
                if not self._train_one_step(step, batches):
                    break
                step += 1
                if step == first_step + 1:  # compiles kernels: its seconds are kept apart from those of the next
                    self._report_taken()
                is_last = step == resolved.num_steps
                is_evaluated = is_last or crosses(step, section["evaluate_every_epochs"] * steps_per_epoch)
                if is_evaluated:
                    metrics = self._evaluate(step)
                if not is_last:
                    is_due = crosses(step, (section["save_every_epochs"] or float("inf")) * steps_per_epoch)
                    self._save_on_the_way(step, metrics if is_evaluated else {}, is_due=is_due)
            self._report_taken()
            is_whole = step == resolved.num_steps
            if not is_whole or (self.is_stopping and self.phase.number + 1 < self.phase.num_phases):
                checkpoint = self._save_at_end(step, metrics if is_whole else {})
                self.reporter.event("interrupted", step=self._total(step), checkpoint=checkpoint)
                return Outcome(self._total(step), False, metrics, self.speed.samples_per_second, checkpoint)
            if not metrics:
                metrics = self._evaluate(step)
            checkpoint = self._save_at_end(step, metrics)
            return Outcome(self._total(step), True, metrics, self.speed.samples_per_second, checkpoint)

    def _batches(self, first_step: int) -> Iterator[Any]:
        return self.task.micro_batches(
            seed=self.phase.seed,
            global_batch=self.resolved.global_batch,
            micro_batch=self.resolved.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            first_step=first_step,
        )

    def _total(self, step: int) -> int:
        """Steps of the whole run after ``step`` of this phase."""
        return self.phase.first_step + step

    def _train_one_step(self, step: int, batches: Iterator[Any]) -> bool:
        """Accumulates one global batch and steps; False if a stop was asked for before the step was taken."""
        engine, resolved = self.engine, self.resolved
        # dropout depends on seed, step and rank alone, so that a resumed run draws what the first would have
        torch.manual_seed(((resolved.section["seed"] * 1_000_003 + self._total(step)) * 65_537 + self.rank) % 2**63)
        lr = engine.get_lr()[0]
        engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        # running statistics move with every micro-step; those of a step that is not taken have to be undone
        buffers = [(b, b.clone()) for b in engine.module.buffers()] if resolved.accumulation_steps > 1 else []
        for micro_step in range(resolved.accumulation_steps):
            if self._is_interrupted(micro_step):
                for buffer, before in buffers:
                    buffer.copy_(before)
                return False
            with self.own_time.reading():
                batch = next(batches)
            with self.own_time.computing() if self.is_forward_own else contextlib.nullcontext():
                loss = self.task.loss(engine, batch, dtype=self.dtype)
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
            self.reporter.advance(resolved.micro_batch * self.world_size)
        mine = [float(self.interruption.is_requested), self.last_step_seconds] + [0.0] * self.world_size
        mine[2 + self.rank] = self.own_time.take()
        agreed = torch.cat(
            [
                loss_sum.view(1) / resolved.accumulation_steps,
                uploaded(torch.tensor(mine, dtype=torch.float64), self.device),
            ]
        )
        if self.world_size > 1:
            dist.all_reduce(agreed)
        result = Download(agreed)
        self._report_taken()
        fields: dict[str, Any] = {"lr": lr, "is_applied": engine.was_step_applied()}
        if engine.fp16_enabled():
            fields["loss_scale"] = engine.optimizer.loss_scale
        self.taken = TakenStep(step + 1, result, fields, self._layers(step + 1))
        return True

    def _is_interrupted(self, micro_step: int) -> bool:
        """Whether any rank was asked to stop; all ranks ask at the same micro-steps.

        A step of less than SECONDS_BETWEEN_POLLS brings the news with its loss; a longer one asks on the way, too. On a GPU
        each time looks at the answer of the time before, which is there already.
        """
        if self.is_stopping:
            return True
        if self.world_size == 1:
            return self.interruption.is_requested
        is_first_step = self.taken is None and self.last_step_seconds == 0
        if micro_step % self.micro_steps_between_polls or (micro_step == 0 and not is_first_step):
            return False
        flag = uploaded(torch.tensor(float(self.interruption.is_requested)), self.device)
        dist.all_reduce(flag)
        before, self.poll = self.poll, Download(flag)
        answer = before if self.device.type == "cuda" else self.poll
        return answer is not None and answer.values().item() > 0

    def _report_taken(self) -> None:
        """Reports the step that was taken last, if that has not been done; waits until the device has taken it."""
        if self.taken is None:
            return
        taken, self.taken = self.taken, None
        loss, num_requests, seconds, *own = taken.agreed.values().tolist()
        loss, seconds = loss / self.world_size, seconds / self.world_size
        self.is_stopping = num_requests > 0
        if seconds:  # the mean over the ranks, so the same on all
            slow = self.slow_ranks.add(own, seconds)
            if slow:
                self.reporter.say(slow)
                self.reporter.event("slow_rank", step=self._total(taken.step), reason=slow)
            seconds_per_micro_step = seconds / self.resolved.accumulation_steps
            self.micro_steps_between_polls = max(1, int(SECONDS_BETWEEN_POLLS / seconds_per_micro_step))
        self.last_step_seconds = self.speed.count(self.resolved.global_batch)
        num_samples = taken.step * self.resolved.global_batch
        self.last_reported_step = self._total(taken.step)
        report_step(
            self.reporter,
            taken,
            loss=loss,
            step=self.last_reported_step,
            total_steps=self.phase.total_steps,
            epoch=num_samples / self.task.num_samples,
            num_samples=self.phase.first_sample + num_samples,
            speed={speed_name(self.task): self.resolved.global_batch / self.last_step_seconds},
        )

    def _layers(self, step: int) -> list[tuple[LayerStats, Download]] | None:
        """Metrics of the layers, on their way to the host, where this step is one whose are wanted."""
        optimizer = self.engine.basic_optimizer
        is_due = step % self.resolved.section["layer_stats_every_steps"] == 0 or step in (1, self.resolved.num_steps)
        if isinstance(optimizer, LayerwiseOptimizer) and is_due and self.rank == 0:
            return [(stats, Download(stats.figures)) for stats in optimizer.layer_stats_on_device()]
        return None

    def _evaluate(self, step: int) -> dict[str, float]:
        self._report_taken()
        with averaged_over_ranks(self.engine.module):
            metrics = self.task.evaluate(
                self.engine.module, dtype=self.dtype, rank=self.rank, world_size=self.world_size, device=self.device
            )
        num_samples = step * self.resolved.global_batch
        epoch = num_samples / self.task.num_samples
        self.reporter.event("evaluation", step=self._total(step), epoch=epoch, **metrics)
        tagged = {f"Test/{name}": value for name, value in metrics.items()}
        self.reporter.scalars(tagged, self.phase.first_sample + num_samples)
        self._report_unreadable(step)
        self.speed.restart()
        return metrics

    def _report_unreadable(self, step: int) -> None:
        """A line with all samples that no rank could read, once there are new ones. A collective."""
        found = self.task.unreadable
        num_unreadable, everywhere = len(found), [found]
        if self.world_size > 1:
            counts = torch.tensor([num_unreadable], device=self.device)
            dist.all_reduce(counts)
            num_unreadable = counts.item()
        if num_unreadable == self.num_unreadable:
            return
        self.num_unreadable = num_unreadable
        if self.world_size > 1:
            everywhere = [{} for _ in range(self.world_size)]
            dist.all_gather_object(everywhere, found)
        merged = {name: reason for of_rank in everywhere for name, reason in of_rank.items()}
        self.reporter.say(f"{len(merged)} files could not be read so far; metrics.jsonl names them")
        self.reporter.event("unreadable", step=self._total(step), count=len(merged), files=merged)

    def _save_on_the_way(self, step: int, metrics: dict[str, float], *, is_due: bool) -> None:
        """A checkpoint where one is due, or where an evaluation was the best so far.

        Args:
            metrics: of the evaluation after this step; empty without one.
        """
        self.saver.poll()
        if is_due or (metrics and self.saver.is_best(self._total(step), metrics)):
            self._report_taken()
            self.saver.on_the_way(self._total(step), metrics)
            self.speed.restart()

    def _save_at_end(self, step: int, metrics: dict[str, float]) -> str:
        self._report_taken()
        checkpoint = self.saver.at_end(self._total(step), metrics)
        self.saver.close()
        self.speed.restart()
        return checkpoint


def crosses(step: int, interval: float) -> bool:
    """Whether a multiple of the interval (in steps, may be a fraction) lies in (step - 1, step]."""
    return interval < 1 or int(step / interval + 1e-9) > int((step - 1) / interval + 1e-9)
