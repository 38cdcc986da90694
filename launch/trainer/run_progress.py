"""How far a run has come, from what it leaves in its folder. Reads only."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from largebatch.launch.trainer.saving import step_folders

TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Progress:
    """Attributes:
    step: of the newest line in the metrics file that names one; None without.
    checkpoint: step of the newest checkpoint, whole or not; None without.
    is_complete: whether the run has come to its end.
    """

    step: int | None
    checkpoint: int | None
    is_complete: bool

    def is_beyond(self, other: Progress) -> bool:
        """Whether there is a later step, or a later checkpoint."""
        pairs = ((self.step, other.step), (self.checkpoint, other.checkpoint))
        return any(mine is not None and (theirs is None or mine > theirs) for mine, theirs in pairs)

    @property
    def text(self) -> str:
        step = "no step taken yet" if self.step is None else f"last step {self.step}"
        checkpoint = "no checkpoint yet" if self.checkpoint is None else f"newest checkpoint step{self.checkpoint}"
        return f"{step}, {checkpoint}"


def progress_of(folder: str) -> Progress:
    step, is_complete = last_step(os.path.join(folder, "metrics.jsonl"))
    checkpoints = step_folders.steps_in(os.path.join(folder, "checkpoints"))
    return Progress(step, checkpoints[0] if checkpoints else None, is_complete)


def last_step(path: str) -> tuple[int | None, bool]:
    """(newest step that the end of a metrics file names, whether its last line is the run's end)."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None, False
    step, is_first = None, True
    is_complete = False
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the first was cut by the tail, the last by a kill
            continue
        if is_first:
            is_complete, is_first = record.get("event") == "end", False
        if "step" in record:
            step = record["step"]
            break
    return step, is_complete
