"""Which checkpoints are kept: the last few, and the best."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from largebatch.launch.trainer.saving import step_folders

BEST = "best"
"""The pointer to the best checkpoint, beside ``latest``."""


@dataclass(frozen=True)
class Retention:
    """What stays when a new checkpoint is complete.

    Never removed: the new one, those that ``latest`` and ``best`` name, and those of later steps, which another run has
    left or which were passed over as damaged.

    Attributes:
        last: of the checkpoints up to the new one, so many of the newest; None: all of them.
        metric: of the evaluations; the checkpoint with the best is named by ``best`` and kept. None: none is.
    """

    last: int | None = None
    metric: str | None = None

    @classmethod
    def of(cls, section: dict[str, Any]) -> Retention:
        """What a recipe's section asks for."""
        return cls(section["keep_last"], section["keep_best"])

    def is_better(self, metric: float, than: float | None) -> bool:
        """Whether a metric beats another, or is the first. An equal one does not, and NaN never does; losses go down."""
        if math.isnan(metric):
            return False
        if than is None:
            return True
        return metric < than if self.metric.endswith("loss") else metric > than

    def best(self, folder: str, last_step: int) -> tuple[int, float] | None:
        """(step, metric) of the best checkpoint, up to a step, that was saved right after an evaluation.

        Of equals it is the earliest.
        """
        found = None
        for step in sorted(step for step in step_folders.steps_in(folder) if step <= last_step) if self.metric else []:
            manifest = step_folders.read_manifest(os.path.join(folder, step_folders.name_of(step))) or {}
            # earlier versions wrote "figures"
            metric = (manifest.get("metrics") or manifest.get("figures") or {}).get(self.metric)
            if metric is not None and self.is_better(metric, found[1] if found else None):
                found = step, metric
        return found

    def apply(self, folder: str, newest: int) -> None:
        """Points ``best`` to the best and removes what need not be kept, once ``newest`` is complete."""
        best = self.best(folder, newest)
        if best is not None:
            step_folders.point_to(folder, best[0], BEST)
        if self.last is None:
            return
        kept = {newest, *(best or ())[:1]}
        kept |= {
            step for name in (step_folders.LATEST, BEST) if (step := step_folders.pointed_to(folder, name)) is not None
        }
        before = [step for step in step_folders.steps_in(folder) if step <= newest]
        for step in before[self.last :]:
            if step not in kept:
                step_folders.remove(os.path.join(folder, step_folders.name_of(step)))


KEEP_ALL = Retention()
