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


Clock = Callable[[Callable[[], object]], float]
"""Calls a function; returns how many seconds that took."""

CYCLES_A_SECOND = 2e9
"""Of a GPU, roughly, and rather too many."""


def host_clock(device: str) -> Clock:
    """By the host's clock; on CUDA from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(call: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    return seconds


def device_clock(device: str) -> Clock:
    """On CUDA, between two events on the device; on a CPU the host's clock.

    The device is kept busy while the host launches the call, so that the time between its launches does not count; unless
    the call itself waits for the device. Calls the function twice: how long the host launches is found out first.
    """
    if device != "cuda":
        return host_clock(device)

    def seconds(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        launching = time.perf_counter() - start
        torch.cuda.synchronize()
        torch.cuda._sleep(int(1.5 * launching * CYCLES_A_SECOND))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def interleaved(
    contestants: dict[str, Callable[[], object]],
    *,
    num_rounds: int,
    num_warm_up: int = 3,
    device: str = "cpu",
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Calls every contestant once a round, in another order each time: what ran before decides what the caches hold.

    Args:
        clock: the host's, unless given.
    """
    clock = clock or host_clock(device)
    timings = {name: Timing() for name in contestants}
    shuffle, order = random.Random(0).shuffle, list(contestants)
    for round_number in range(num_warm_up + num_rounds):
        shuffle(order)
        for name in order:
            seconds = clock(contestants[name])
            if round_number >= num_warm_up:
                timings[name].seconds.append(seconds)
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
        try:
            return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError):
            return torch.cuda.get_device_name()
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def commit() -> str:
    try:
        shown = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
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
