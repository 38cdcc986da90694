"""Which sample comes when, and the random numbers that belong to it.

The order of the data is a pure function of the seed: sample number p of training is the same whatever the world size,
the micro-batch and the accumulation steps, so a global batch always holds the same samples, a run can be resumed at any
step, and no sample is left out or seen twice within an epoch. A global batch may reach over the end of an epoch.

Random numbers for a sample are a function of (seed, sample number, stream) and of nothing else, so the same sample is augmented
in the same way whatever the rank, the worker that reads it, and wherever a run was resumed. The hash is SplitMix64 (Steele,
Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class SampleOrder:
    """Which sample of the data set is sample number p of training: p // n epochs lie behind it, each a fresh permutation."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_samples, generator=generator)

    def indices(self, start: int, stop: int) -> Tensor:
        """[stop - start] int64, which of the data set are samples start..stop-1."""
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            end = min(stop, (epoch + 1) * self.num_samples)
            pieces.append(self._permutation(epoch)[offset : offset + end - start])
            start = end
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def micro_batch_ranges(
    *, global_batch: int, micro_batch: int, rank: int, world_size: int, first_step: int = 0
) -> Iterator[range]:
    """The sample numbers of one rank's micro-batches, endlessly, from optimizer step ``first_step`` on.

    Args:
        global_batch: samples of an optimizer step, over all ranks and micro-steps.
        micro_batch: samples of one forward pass on one rank.
    """
    assert global_batch % (micro_batch * world_size) == 0
    start = first_step * global_batch + rank * micro_batch
    while True:
        yield range(start, start + micro_batch)
        start += micro_batch * world_size


GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: uint64 to uint64, one to one."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashes(seed: int, samples: np.ndarray, stream: int) -> np.ndarray:
    """[num] uint64, independent for different seeds, samples and streams.

    Args:
        samples: [num] sample numbers, integers >= 0.
        stream: which of several numbers that a sample needs.
    """
    state = mixed(np.asarray([seed], dtype=np.uint64) + GOLDEN_RATIO)
    state = mixed(state + np.asarray([stream + 1], dtype=np.uint64) * GOLDEN_RATIO)
    return mixed(state + (np.asarray(samples).astype(np.uint64) + np.uint64(1)) * GOLDEN_RATIO)


def uniforms(seed: int, samples: np.ndarray, stream: int) -> np.ndarray:
    """[num] float64 in [0, 1)."""
    return (hashes(seed, samples, stream) >> np.uint64(11)) * 2.0**-53


def integers(seed: int, samples: np.ndarray, stream: int, limit: int) -> np.ndarray:
    """[num] int64 in [0, limit)."""
    return (uniforms(seed, samples, stream) * limit).astype(np.int64)
