"""A probe: what forward and backward of a model really need in memory and time, at several micro-batches.

The model runs on the device with made-up inputs, gradients in place. Counted is the peak of what lives beyond weights,
gradients and inputs: on CUDA by the allocator, on the CPU from the tensors that every operation returns and autograd keeps.
What a kernel takes for itself (cuDNN's workspace) is seen on CUDA only: on the CPU it would say what oneDNN needs with this
processor's instruction set and number of threads, and nothing about the GPUs that are planned for.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Loss = Callable[[nn.Module, int], Tensor]
"""(model, micro-batch) -> the mean loss of that many made-up samples."""


@dataclass(frozen=True)
class Probe:
    """Peak bytes and seconds over micro-batches, and the lines through them.

    Attributes:
        micro_batches: that were run.
        peaks: bytes at each, beyond weights, gradients and inputs.
        saved: bytes that autograd held at the end of the forward pass, at each.
        seconds: of forward and backward, at each.
    """

    micro_batches: tuple[int, ...]
    peaks: tuple[int, ...]
    saved: tuple[int, ...]
    seconds: tuple[float, ...]

    def activations(self, micro_batch: int) -> int:
        """Peak bytes at a micro-batch, by least squares; never below what was measured at a smaller one."""
        fixed, slope = line(self.micro_batches, self.peaks)
        below = [peak for n, peak in zip(self.micro_batches, self.peaks, strict=True) if n <= micro_batch]
        return max([round(fixed + slope * micro_batch), *below])

    @property
    def bytes_per_sample(self) -> float:
        return line(self.micro_batches, self.peaks)[1]

    def samples_per_second(self, micro_batch: int) -> float:
        fixed, slope = line(self.micro_batches, self.seconds)
        largest = max(self.micro_batches)
        if slope <= 0 or fixed < 0 or micro_batch < largest:
            position = self.micro_batches.index(largest)
            return largest / self.seconds[position]
        return micro_batch / (fixed + slope * micro_batch)

    @property
    def largest_misfit(self) -> float:
        """Largest relative distance of a measured peak from the line; 0 with two micro-batches."""
        fixed, slope = line(self.micro_batches, self.peaks)
        pairs = zip(self.micro_batches, self.peaks, strict=True)
        return max(abs(fixed + slope * n - peak) / peak for n, peak in pairs)


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(value at 0, slope) of the least-squares line."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return mean_y - slope * mean_x, slope


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations make while it is on, now and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: set[int] = set()

    def know(self, tensors) -> None:
        """Leaves these out."""
        self.known.update(t.untyped_storage()._cdata for t in tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, outputs)
        return outputs

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self.known or not num_bytes:
            return
        self.known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.now -= num_bytes


def probe(model: nn.Module, loss: Loss, *, micro_batches: Sequence[int] = (2, 4), device: str = "cpu") -> Probe:
    """Runs forward and backward at each micro-batch, twice: gradients are there when it is measured.

    Args:
        model: in the compute type, in training mode, on the device.
        loss: makes its inputs itself, on the device; they count as activations.
        micro_batches: two or more different ones; 1 is too small for batch normalisation of 1 x 1 maps.

    Raises:
        ValueError: fewer than two micro-batches.
        RuntimeError: what the model raises, such as out of memory.
    """
    if len(set(micro_batches)) < 2 or min(micro_batches) < 1:
        raise ValueError(f"micro_batches is {list(micro_batches)!r}; expected two or more different ones, >= 1")
    figures = [measure(model, loss, n, device) for n in sorted(set(micro_batches))]
    peaks, saved, seconds = zip(*figures, strict=True)
    return Probe(tuple(sorted(set(micro_batches))), peaks, saved, seconds)


def measure(model: nn.Module, loss: Loss, micro_batch: int, device: str) -> tuple[int, int, float]:
    """(peak bytes, bytes saved for backward, seconds) of a forward and backward pass."""
    loss(model, micro_batch).backward()  # makes the gradients, and whatever is made once
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    loss(model, micro_batch).backward()
    wait()
    seconds = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = loss(model, micro_batch)
        saved = torch.cuda.memory_allocated() - before
        result.backward()
        return torch.cuda.max_memory_allocated() - before, saved, seconds
    live = LiveBytes()
    owned = [*model.parameters(), *model.buffers()]
    live.know(owned + [p.grad for p in model.parameters() if p.grad is not None])
    with live:
        result = loss(model, micro_batch)
        saved = live.now
        result.backward()
    return live.peak, saved, seconds
