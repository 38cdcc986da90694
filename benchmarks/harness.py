"""Timing side by side: every contestant once a round, medians over the rounds, ratios to named peers."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Timing:
    """Seconds a call took, round by round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, share: float) -> float:
        return sorted(self.seconds)[round(share * (len(self.seconds) - 1))]


def interleaved(
    contestants: dict[str, Callable[[], object]], *, num_rounds: int, num_warm_up: int = 3, device: str = "cpu"
) -> dict[str, Timing]:
    """Calls every contestant once a round, in another order each time: what ran before decides what the caches hold.

    On CUDA the device is idle at the start and at the end of each timing.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    timings = {name: Timing() for name in contestants}
    shuffle, order = random.Random(0).shuffle, list(contestants)
    for round_number in range(num_warm_up + num_rounds):
        shuffle(order)
        for name in order:
            call = contestants[name]
            wait()
            start = time.perf_counter()
            call()
            wait()
            if round_number >= num_warm_up:
                timings[name].seconds.append(time.perf_counter() - start)
    gc.collect()
    return timings


def copy_bandwidth(device: str, num_bytes: int = 2**29) -> float:
    """Bytes read and written a second by torch's own copy of a large tensor."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, num_rounds=9, device=device)["copy"]
    return 2 * num_bytes / timing.median


def versions(*packages: str) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def hardware(device: str) -> str:
    """The machine in words; for a GPU with its power limit."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,power.limit,driver_version", "--format=csv,noheader"]
        shown = subprocess.run(query, capture_output=True, text=True)
        return shown.stdout.splitlines()[0] if shown.returncode == 0 else torch.cuda.get_device_name()
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def commit() -> str:
    shown = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return shown.stdout.strip() or "unknown"


def preamble(title: str, device: str, command: str) -> list[str]:
    """The head of a report: what was run, where and when."""
    return [
        f"# {title}",
        "",
        f"- command: `{command}`",
        f"- commit {commit()}, {datetime.date.today()}",
        f"- {hardware(device)}; Python {platform.python_version()}",
        f"- {versions('torch', 'triton', 'deepspeed', 'timm', 'torch_optimizer', 'pytorch_optimizer', 'apex')}",
        "",
    ]
