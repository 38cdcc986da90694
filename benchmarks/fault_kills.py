"""Kills of a supervised run at random moments: which process, when, and what was going on just then. Used by fault_campaign.py."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import time
from dataclasses import dataclass

import psutil

TARGETS = {"rank": 5, "launcher": 2, "starter": 1, "job": 3, "supervisor": 1}
"""What is killed with signal 9, and how often in proportion.

rank: one of the ranks. launcher: the process that started the ranks. starter: the `deepspeed` command that started the
launcher. job: all of these at once. supervisor: `largebatch run`, which the campaign starts again.
"""

MOMENTS = {"training": 4, "saving": 5, "starting": 1}
"""When, and how often in proportion.

training: up to 1.5 s after the first step of a start. saving: up to 60 ms after the folder of an unfinished checkpoint
appears. starting: up to 6 s after the start, mostly before the first step.
"""

SECONDS_TO_START = 1200.0
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass
class Kill:
    """One kill, as it was done."""

    target: str
    moment: str
    rank: int | None
    seconds_after_start: float
    step: int
    was_saving: bool


def name_of(process: psutil.Process) -> str:
    """Its place in the run: a key of TARGETS, or "" for anything else."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        environment = process.environ()
        if "LOCAL_RANK" in environment:
            return "rank" if any(word.endswith("train.py") for word in words) else ""
        if "deepspeed.launcher.launch" in words:
            return "launcher"
        if any(os.path.basename(word) == "deepspeed" for word in words[:2]):
            return "starter"
    return ""


def processes_of(supervisor: int) -> dict[str, list[psutil.Process]]:
    """Those of a run, by their place in it; ranks in their order."""
    found: dict[str, list[psutil.Process]] = {name: [] for name in TARGETS}
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(supervisor)
        found["supervisor"] = [top]
        for process in top.children(recursive=True):
            if name := name_of(process):
                found[name].append(process)
    found["rank"].sort(key=lambda p: p.environ().get("RANK", "") if p.is_running() else "")
    return found


def unfinished(checkpoints: pathlib.Path) -> set[str]:
    with contextlib.suppress(OSError):
        return {name for name in os.listdir(checkpoints) if name.endswith(".partial")}
    return set()


def wait_for_moment(moment: str, folder: pathlib.Path, draw: random.Random, is_over) -> bool:
    """Returns True when the moment has come, False if the run is over before."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    began = time.monotonic()
    if moment == "starting":
        until = began + draw.uniform(0, 6)
        while time.monotonic() < until and not is_over():
            time.sleep(0.01)
        return not is_over()
    size = metrics.stat().st_size if metrics.exists() else 0
    inode = metrics.stat().st_ino if metrics.exists() else 0
    while True:  # a start first drops lines (another file), then adds some
        if is_over() or time.monotonic() - began > SECONDS_TO_START:
            return False
        with contextlib.suppress(OSError):
            now = metrics.stat()
            if now.st_ino != inode:
                inode, size = now.st_ino, now.st_size
            elif now.st_size > size:
                break
        time.sleep(0.02)
    if moment == "saving":
        time.sleep(draw.uniform(0, 1.0))
        before = unfinished(checkpoints)
        while not unfinished(checkpoints) - before:
            if is_over():
                return False
            time.sleep(SECONDS_BETWEEN_LOOKS)
        time.sleep(draw.uniform(0, 0.06))
    else:
        time.sleep(draw.uniform(0, 1.5))
    return not is_over()


def kill(target: str, found: dict[str, list[psutil.Process]], draw: random.Random) -> int | None:
    """Signal 9 to a target among the processes found; returns the rank it was, or None.

    Raises:
        LookupError: there is none at this moment.
    """
    chosen = [p for name in ("starter", "launcher", "rank") for p in found[name]] if target == "job" else found[target]
    if not chosen:
        raise LookupError(target)
    if target == "rank":
        rank = draw.randrange(len(chosen))
        chosen = [chosen[rank]]
    for process in chosen:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    return rank if target == "rank" else None


def drawn(weights: dict[str, int], draw: random.Random) -> str:
    return draw.choices(list(weights), list(weights.values()))[0]
