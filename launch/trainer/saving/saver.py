"""What a run saves on the way and at its end, beside its training or in its course, and what it tells of that."""

from __future__ import annotations

from typing import Any

from largebatch.launch.trainer.reporting import Reporter
from largebatch.launch.trainer.saving import atomic
from largebatch.launch.trainer.saving.background import BackgroundSaving
from largebatch.launch.trainer.saving.retention import Retention
from largebatch.launch.trainer.saving.storage import broadcast


class Saver:
    """The checkpoints of one phase of a run. All methods are collectives but ``poll``.

    Args:
        engine: what deepspeed.initialize returned.
        section: the recipe's, checked: keep_last, keep_best, save_in_background.
    """

    def __init__(self, engine: Any, folder: str, reporter: Reporter, *, rank: int, section: dict[str, Any]):
        if engine.checkpoint_engine.is_decoupled():
            raise ValueError(
                "checkpoint.writer.decoupled is true; expected false: such files are not on the disk when the checkpoint gets "
                "its name. Set largebatch.save_in_background instead"
            )
        self.engine, self.folder, self.reporter, self.rank = engine, folder, reporter, rank
        self.retention = Retention.of(section)
        self.background = BackgroundSaving(engine, rank=rank) if section["save_in_background"] else None
        self.step_under_way = 0
        self.is_told = False
        self.best_metric: float | None = None
        self.is_best_known = False

    def is_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether a checkpoint after this evaluation would be the best so far."""
        if self.retention.metric is None:
            return False
        if not self.is_best_known:
            found = broadcast(self.retention.best(self.folder, step - 1) if self.rank == 0 else None)
            self.best_metric, self.is_best_known = found[1] if found else None, True
        return self.retention.is_better(metrics[self.retention.metric], self.best_metric)

    def on_the_way(self, step: int, metrics: dict[str, float]) -> None:
        """A checkpoint that cannot be written is told of, and training goes on: the ones before are there.

        Args:
            step: of the whole run. metrics: of the evaluation after it; empty without one.
        """
        self._finish()
        if metrics and self.is_best(step, metrics):
            self.best_metric = metrics[self.retention.metric]
        options = {"retention": self.retention, "metrics": metrics}
        try:
            if self.background is None:
                atomic.save(self.engine, self.folder, step, rank=self.rank, **options)
            else:
                self.step_under_way = step
                self.background.start(self.folder, step, **options)
        except atomic.CheckpointError as error:
            self.is_best_known = False
            self._tell(step, error)

    def at_end(self, step: int, metrics: dict[str, float]) -> str:
        """Writes the last checkpoint and waits for all; returns its path.

        Raises:
            CheckpointNotWrittenError: on all ranks.
        """
        self._finish()
        try:
            return atomic.save(
                self.engine, self.folder, step, rank=self.rank, retention=self.retention, metrics=metrics
            )
        except atomic.CheckpointNotRemovedError as error:
            self._tell(step, error)
            return error.checkpoint

    def poll(self) -> None:
        """Tells of a checkpoint written beside training that has failed since; ranks learn of it at different steps."""
        if self.background is not None and self.background.is_done and not self.is_told:
            self.is_told = True
            if isinstance(self.background.error, atomic.CheckpointError):
                self._tell(self.step_under_way, self.background.error)

    def close(self) -> None:
        """Waits for the checkpoint under way."""
        self._finish()
        if self.background is not None:
            self.background.close()

    def _finish(self) -> None:
        """Waits for the checkpoint under way; from here on all ranks know how it ended."""
        if self.background is None:
            return
        try:
            self.background.finish()
        except atomic.CheckpointError as error:
            self.is_best_known = False
            if not self.is_told:
                self._tell(self.step_under_way, error)
        self.is_told = False

    def _tell(self, step: int, error: atomic.CheckpointError) -> None:
        self.reporter.say(f"warning: {error}")
        self.reporter.event("checkpoint_failed", step=step, reason=str(error))
