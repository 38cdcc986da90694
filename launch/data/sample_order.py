"""Which sample comes when.

The order of the data is a pure function of the seed: sample number p of training is the same whatever the world size,
the micro-batch and the accumulation steps, so a global batch always holds the same samples, a run can be resumed at any
step, and no sample is left out or seen twice within an epoch. A global batch may reach over the end of an epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

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
    *, global_batch: int, micro_batch: int, rank: int, world_size: int, first_step: int
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
