"""How long a step and a training take, from a throughput and the communication of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

BACKWARD_SHARE = 2 / 3
"""Of forward and backward together: backward computes two gradients where forward computes one product."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    Attributes:
        compute: forward and backward of all micro-steps, and the optimizer.
        communication: all collectives, one after another.
        hidden: of the communication, behind the backward pass.
    """

    compute: float
    communication: float
    hidden: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.communication - self.hidden

    @property
    def efficiency(self) -> float:
        """Share of the step that is not waiting for the network."""
        return self.compute / self.total


def step_time(
    *,
    global_batch: int,
    world_size: int,
    samples_per_second: float,
    communication: float,
    overlap: float = 0.0,
    optimizer_seconds: float = 0.0,
    accumulation_steps: int = 1,
) -> StepTime:
    """Seconds of a step.

    Args:
        samples_per_second: of one rank, forward and backward.
        communication: seconds of all collectives of the step.
        overlap: 0 to 1, share of the last micro-step's backward pass that communication may hide behind; 0 gives the longest
            time, 1 the shortest.
        optimizer_seconds: of the optimizer's own computation.
    """
    for name, value in (("global batch", global_batch), ("world size", world_size), ("samples/s", samples_per_second)):
        if not value > 0:
            raise ValueError(f"the {name} is {value!r}; expected > 0")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap!r}; expected 0 to 1")
    passes = global_batch / world_size / samples_per_second
    hidden = min(communication, overlap * BACKWARD_SHARE * passes / accumulation_steps)
    return StepTime(passes + optimizer_seconds, communication, hidden)


def num_steps(num_samples: int, global_batch: int, epochs: float) -> int:
    """Optimizer steps of so many passes over the data; the last may be a part of an epoch, not of a batch."""
    return math.ceil(epochs * num_samples / global_batch - 1e-9)


def duration(seconds: float) -> str:
    """E.g. "3 d 4 h", "2 h 05 min", "14.2 min", "31 s", "42 ms"."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days:,} d {hours} h"
