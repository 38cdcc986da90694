"""Names the rank for which the others wait.

The ranks of a step all take the same time, for they wait for one another. What differs is how long each reads and computes
before the first thing that needs the others. Under ZeRO 3, and where batch normalisation spans ranks, the forward pass itself
waits for the others; there only reading is compared.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

SLOWER = 1.5
"""Times the median of all ranks: then a rank is named."""

SECONDS_BETWEEN_LOOKS = 10.0
SHARE_OF_STEP = 0.1
"""What a rank is behind has to be so much of a step: nobody waits for a slow one that is quick anyway."""


class OwnTime:
    """Seconds that this rank spends by itself.

    Args:
        device: on a GPU what is enclosed is timed there, and counted once it has been computed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.under_way: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        if self.device.type != "cuda":
            with self.reading():
                yield
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self.under_way.append(events)

    def take(self) -> float:
        """Those since the last call, as far as they are known."""
        while self.under_way and self.under_way[0][1].query():
            began, ended = self.under_way.pop(0)
            self.seconds += began.elapsed_time(ended) / 1000
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class SlowRanks:
    """Adds up every rank's own time and says, every so often, who is behind."""

    def __init__(self):
        self.own: list[float] = []
        self.total = 0.0
        self.num_steps = 0

    def add(self, own: Sequence[float], step_seconds: float) -> str:
        """One step: own seconds of each rank, and the whole step's. Returns a line, mostly "".

        Args:
            own: [world_size], the same on all ranks.
        """
        self.own = [a + b for a, b in zip(self.own or [0.0] * len(own), own, strict=True)]
        self.total += step_seconds
        self.num_steps += 1
        if self.total < SECONDS_BETWEEN_LOOKS:
            return ""
        line = line_on_slowest(self.own, self.total, self.num_steps)
        self.own, self.total, self.num_steps = [], 0.0, 0
        return line


def line_on_slowest(own: Sequence[float], total: float, num_steps: int) -> str:
    """About the rank with the most time of its own, if that is out of proportion.

    Args:
        own: [world_size] seconds over ``num_steps`` steps that took ``total`` seconds.
    """
    slowest = max(range(len(own)), key=lambda rank: own[rank])
    others = statistics.median(seconds for rank, seconds in enumerate(own) if rank != slowest) if len(own) > 1 else 0.0
    behind = own[slowest] - others
    if len(own) < 2 or own[slowest] < SLOWER * others or behind < SHARE_OF_STEP * total:
        return ""
    return (
        f"warning: rank {slowest} is slow: reading and computing take it {own[slowest] / num_steps:.3f} s a step, "
        f"{own[slowest] / max(others, 1e-9):.1f} times the others' median of {others / num_steps:.3f} s; they wait for it in "
        f"{100 * behind / total:.0f}% of the last {total:.0f} s"
    )
