"""Batch normalisation when the batch comes in pieces: over how many images its statistics go, and how fast they are kept.

Gradient accumulation over k micro-steps leaves the gradient of the global batch as it is, but not batch normalisation: its
statistics go over what one forward pass sees. The *ghost batch size* is that number of images. ``"micro_batch"``: the micro-batch
of one rank, as PyTorch does. A number N that divides the micro-batch: every N consecutive samples of the data order are normalised
by themselves (ghost batch, arXiv:1705.08741), so that the gradient of a global batch does not depend on the micro-batch or
the number of ranks. ``"global"``: the micro-batches of one micro-step on all ranks. N as a multiple of the micro-batch: those
of N / micro-batch neighbouring ranks. No ghost batch can reach over micro-steps: the earlier ones are gone.

A micro-batch of one rank is normalised by torch's own kernels. Other sizes cost more: DavidNet's forward and backward on one CPU
core take 1.3 times as long in fp32 and twice in bf16.

Running statistics are kept in fp32 whatever the compute type, and with momentum m they move by m a *step*: each of k micro-steps
moves them by 1 - (1 - m)^(1/k). torch's 0.1 remembers some twenty steps: in a run of few large steps evaluation lags behind the
weights, while one step of thousands of images tells the statistics well. Over the ranks they are averaged when they are needed:
see average_running_statistics.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from largebatch.models.ghost_batch_norm import GhostBatchNorm, NeighbouringRanks

MICRO_BATCH, GLOBAL = "micro_batch", "global"


def apply_ghost_batches(
    model: nn.Module,
    *,
    ghost_batch_size: str | int,
    micro_batch: int,
    accumulation_steps: int,
    world_size: int,
    momentum: float | None = None,
) -> str:
    """Replaces the batch normalisation layers of a model in place; may be called again when the batch changes.

    Parameters and buffers stay the same objects, and names the same.

    Args:
        ghost_batch_size: "micro_batch", "global", or a number of images; see the module's docstring.
        micro_batch: images of one forward pass on one rank.
        accumulation_steps: micro-steps of an optimizer step.
        momentum: share of a step's statistics in the running ones, > 0 and < 1; None: as the layers have it.

    Returns:
        One line that says what is in force.

    Raises:
        ValueError: the ghost batch size cannot be had with this batch, or the model has no batch normalisation and a momentum
            or a size other than "micro_batch" was asked for; TypeError: it is of another type.
    """
    ghost_size, num_ranks = pieces_for(ghost_batch_size, micro_batch, world_size)
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)}
    if not layers:
        if ghost_batch_size != MICRO_BATCH:
            raise ValueError(
                f"largebatch.batch_norm.ghost_batch_size is {ghost_batch_size!r} and the model has no batch normalisation; leave it out"
            )
        if momentum is not None:
            raise ValueError(
                f"largebatch.batch_norm.momentum is {momentum!r} and the model has no batch normalisation; leave it out"
            )
        return "no batch normalisation"
    ranks = NeighbouringRanks(num_ranks, world_size) if num_ranks > 1 else None
    replacements: dict[_BatchNorm, GhostBatchNorm] = {}
    for name, layer in layers.items():
        if not isinstance(layer, GhostBatchNorm):
            if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                raise ValueError(
                    f"{name} is a {type(layer).__name__}; expected torch's BatchNorm1d, 2d or 3d, for which a ghost batch size "
                    "can be set"
                )
            parent, _, child = name.rpartition(".")
            layer = replacements.setdefault(layer, GhostBatchNorm(layer))
            setattr(model.get_submodule(parent), child, layer)
        layer.ghost_size, layer.ranks = ghost_size, ranks
        if momentum is not None:
            layer.step_momentum = momentum
        if layer.step_momentum is not None:
            layer.momentum = momentum_of_update(layer.step_momentum, accumulation_steps)
    momenta = {(m.step_momentum, m.momentum) for m in model.modules() if isinstance(m, GhostBatchNorm)}
    return describe(ghost_size, num_ranks, micro_batch, accumulation_steps, len(set(layers.values())), momenta)


def momentum_of_update(momentum: float, updates_per_step: int) -> float:
    """What one of several updates has to move, so that together they let as much of the old value decay as one would."""
    return 1 - (1 - momentum) ** (1 / updates_per_step)


def pieces_for(ghost_batch_size: str | int, micro_batch: int, world_size: int) -> tuple[int | None, int]:
    """(ghost size or None for the whole micro-batch, ranks that share statistics)."""
    if ghost_batch_size == MICRO_BATCH:
        return None, 1
    if ghost_batch_size == GLOBAL:
        return None, world_size
    if not isinstance(ghost_batch_size, int) or isinstance(ghost_batch_size, bool) or ghost_batch_size < 1:
        error = (
            ValueError
            if isinstance(ghost_batch_size, (int, str)) and not isinstance(ghost_batch_size, bool)
            else TypeError
        )
        raise error(
            f'largebatch.batch_norm.ghost_batch_size is {ghost_batch_size!r}; expected "micro_batch", "global", or a number of images >= 1'
        )
    if micro_batch % ghost_batch_size == 0:
        return (None if ghost_batch_size == micro_batch else ghost_batch_size), 1
    if ghost_batch_size % micro_batch == 0 and world_size % (ghost_batch_size // micro_batch) == 0:
        return None, ghost_batch_size // micro_batch
    ghosts = [n for n in range(1, micro_batch + 1) if micro_batch % n == 0]
    shared = [n * micro_batch for n in range(2, world_size + 1) if world_size % n == 0]
    raise ValueError(
        f"largebatch.batch_norm.ghost_batch_size is {ghost_batch_size}, the micro-batch {micro_batch} on {world_size} rank{'s'[: world_size > 1]}; "
        f"expected one of {', '.join(map(str, ghosts + shared))}: statistics cannot reach over micro-steps. Set it to one "
        f"of these, or train_micro_batch_size_per_gpu to {ghost_batch_size} or a multiple of it"
    )


def describe(
    ghost_size: int | None,
    num_ranks: int,
    micro_batch: int,
    accumulation_steps: int,
    num_layers: int,
    momenta: set[tuple[float | None, float | None]],
) -> str:
    if ghost_size:
        over = f"{ghost_size} consecutive images"
    elif num_ranks > 1:
        over = f"{micro_batch * num_ranks} images, the micro-batches of {num_ranks} ranks"
    else:
        over = f"{micro_batch} images, the micro-batch"
    moves = ", ".join(
        "their average since the beginning" if step is None else f"momentum {step:g} a step, {update:.3g} a micro-step"
        for step, update in sorted(momenta, key=str)
    )
    times = f" x {accumulation_steps} micro-steps" if accumulation_steps > 1 else ""
    return f"batch normalisation ({num_layers} layers) over {over}{times}; running statistics in fp32: {moves}"


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Makes the running statistics of all ranks their mean: call it on all ranks before an evaluation or a checkpoint.

    Each rank has seen other images; without this, ranks would evaluate different models, and a checkpoint would hold those
    of rank 0 alone. One all-reduce; none in a world of one or without batch normalisation.
    """
    buffers = [
        b
        for m in model.modules()
        if isinstance(m, _BatchNorm)
        for b in (m.running_mean, m.running_var)
        if b is not None
    ]
    if not buffers or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([b.double().flatten() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
