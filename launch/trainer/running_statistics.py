"""Running statistics of batch normalisation on several ranks.

Each rank's have seen that rank's images only. An evaluation and a checkpoint see the average over the ranks. Training goes
on with each rank's own, which a checkpoint keeps beside, so that a run resumed on as many ranks goes on bit by bit; on
another number of ranks all begin with the average.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largebatch.models.batch_norm import average_running_statistics


def statistics_of(model: nn.Module) -> list[Tensor]:
    """The buffers themselves; none where the model has no batch normalisation."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


@contextlib.contextmanager
def averaged_over_ranks(model: nn.Module) -> Iterator[None]:
    """Inside, the running statistics are the ranks' mean; afterwards, each rank's own again. A collective."""
    own = [buffer.clone() for buffer in statistics_of(model)]
    average_running_statistics(model)
    try:
        yield
    finally:
        restore(model, own)


@torch.no_grad()
def restore(model: nn.Module, own: list[Tensor]) -> None:
    for buffer, values in zip(statistics_of(model), own, strict=True):
        buffer.copy_(values)


def file_name(rank: int) -> str:
    return f"running_statistics_rank{rank}_of_{dist.get_world_size()}.pt"


def own_state(model: nn.Module, rank: int) -> tuple[str, list[Tensor]]:
    """(file name, this rank's) for a checkpoint; empty without batch normalisation or in a world of one."""
    own = statistics_of(model) if dist.get_world_size() > 1 else []
    return file_name(rank), [buffer.cpu() for buffer in own]


def load_own(model: nn.Module, folder: str, rank: int) -> None:
    """Takes up this rank's where the checkpoint has them, else leaves the average."""
    path = os.path.join(folder, file_name(rank))
    if os.path.isfile(path):
        restore(model, torch.load(path, weights_only=True))
