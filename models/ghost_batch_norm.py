"""A batch normalisation layer whose statistics go over ghost batches, a micro-batch, or those of several ranks.

What a ghost batch is, and how it is set: batch_norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class NeighbouringRanks:
    """The process group of ``size`` ranks around this one; made when first used, on all ranks at once."""

    def __init__(self, size: int, world_size: int):
        self.size, self.world_size = size, world_size
        self._group: Any = None

    def __deepcopy__(self, memo: dict) -> NeighbouringRanks:
        return self  # a process group cannot be copied

    @property
    def group(self) -> Any:
        """None for all ranks."""
        if self.size < self.world_size and self._group is None:
            for first in range(0, self.world_size, self.size):
                group = dist.new_group(list(range(first, first + self.size)))
                if first <= dist.get_rank() < first + self.size:
                    self._group = group
        return self._group

    @property
    def position(self) -> int:
        return dist.get_rank() % self.size


class Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over ghost batches, or over the micro-batches of several ranks.

    The statistics are taken in two passes, in fp32 or the input's wider type. The backward keeps the input, not the output.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, num_ghosts, ranks):
        """y and the statistics.

        Args:
            x: [batch, channels, ...], batch a multiple of num_ghosts.
            weight, bias: [channels], or None.
            num_ghosts: consecutive equal pieces of the batch; 1 if ``ranks`` is given.
            ranks: NeighbouringRanks whose inputs share statistics, or None.

        Returns:
            y as x, and mean and biased variance: [num_ghosts, channels] fp32 or fp64.
        """
        wide = pieces_of(x, num_ghosts)
        mean = wide.mean(reduced_dims(wide), keepdim=True)
        y = torch.empty_like(x, dtype=wide.dtype)  # not a view: what follows may be in place, such as ReLU
        centred = torch.sub(wide, mean, out=pieces_of(y, num_ghosts))
        num_values = wide.numel() // mean.numel()
        variance = torch.linalg.vector_norm(centred, dim=reduced_dims(wide), keepdim=True).square() / num_values
        if ranks is not None:
            rank_mean, (mean, variance) = mean, shared_statistics(mean, variance, ranks)
            centred += rank_mean - mean
        reciprocal = (variance + eps).rsqrt()
        scale = reciprocal if weight is None else reciprocal * per_channel(weight, wide)
        centred *= scale
        if bias is not None:
            centred += per_channel(bias, wide)
        ctx.save_for_backward(x, weight, mean, reciprocal)
        ctx.num_ghosts, ctx.ranks, ctx.has_bias = num_ghosts, ranks, bias is not None
        mean, variance = mean.flatten(1), variance.flatten(1)
        ctx.mark_non_differentiable(mean, variance)
        return y.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx, grad_y, *_):
        x, weight, mean, reciprocal = ctx.saved_tensors
        grad = pieces_of(grad_y, ctx.num_ghosts)
        normalised = (pieces_of(x, ctx.num_ghosts) - mean).mul_(reciprocal)
        sums = torch.stack(
            [grad.sum(reduced_dims(grad), keepdim=True), (grad * normalised).sum(reduced_dims(grad), keepdim=True)]
        )
        grad_bias, grad_weight = sums.sum(1).flatten(1)
        num_values = grad.numel() // mean.numel()
        if ctx.ranks is not None:
            dist.all_reduce(sums, group=ctx.ranks.group)
            num_values *= ctx.ranks.size
        mean_grad, mean_projection = sums / num_values
        scale = reciprocal if weight is None else reciprocal * per_channel(weight, grad)
        grad_x = normalised.mul_(-mean_projection).add_(grad).sub_(mean_grad).mul_(scale)
        return (
            grad_x.flatten(0, 1).to(x.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            grad_bias.to(weight.dtype) if ctx.has_bias else None,
            None,
            None,
            None,
        )


def reduced_dims(wide: Tensor) -> list[int]:
    """The dimensions of [ghosts, images, channels, ...] over which statistics go."""
    return [1, *range(3, wide.dim())]


def pieces_of(x: Tensor, num_ghosts: int) -> Tensor:
    """[ghosts, images, channels, ...] in fp32 or wider; a view of x where its type allows."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (num_ghosts, -1))


def per_channel(values: Tensor, wide: Tensor) -> Tensor:
    return values.to(wide.dtype).view(1, 1, -1, *[1] * (wide.dim() - 3))


def shared_statistics(mean: Tensor, variance: Tensor, ranks: NeighbouringRanks) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all ranks' values together; every rank has as many values."""
    gathered = mean.new_zeros(ranks.size, 2, *mean.shape)
    gathered[ranks.position, 0], gathered[ranks.position, 1] = mean, variance
    dist.all_reduce(gathered, group=ranks.group)  # an all-gather that every backend has: the other summands are zeros
    means, variances = gathered.unbind(1)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class GhostBatchNorm(_BatchNorm):
    """Batch normalisation over ghost batches, with running statistics in fp32. State dict as that of torch's.

    Takes over the parameters and buffers of the layer that it replaces.

    Attributes:
        ghost_size: images whose statistics are taken together; None: the whole micro-batch.
        ranks: NeighbouringRanks that share statistics, or None.
        step_momentum: share of the new statistics in the running ones after a whole optimizer step; None: their average
            since the beginning, as in torch.
    """

    def __init__(self, layer: _BatchNorm):
        super().__init__(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = layer.affine, layer.track_running_stats
        self.weight, self.bias = layer.weight, layer.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name))
        self.training = layer.training
        self.step_momentum = layer.momentum
        self.ghost_size: int | None = None
        self.ranks: NeighbouringRanks | None = None

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch normalisation got {x.dim()} dimensions; expected [batch, channels, ...]")

    def _apply(self, fn, recurse=True):
        """As torch's, but the running statistics keep fp32 when a model is cast to 16 bits."""
        kept = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new is not None and torch.finfo(new.dtype).bits < torch.finfo(old.dtype).bits:
                setattr(self, name, old.to(new.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x normalised, in its dtype and memory format."""
        self._check_input_dim(x)
        use_batch = self.training or self.running_mean is None
        if not use_batch or (self.ghost_size is None and self.ranks is None):
            return self._native(x, use_batch)
        ghost_size = self.ghost_size or len(x)
        if len(x) % ghost_size:
            raise ValueError(f"the ghost batch size is {ghost_size} images and a micro-batch has {len(x)}")
        num_values = ghost_size * (x.numel() // (len(x) * x.shape[1])) * (self.ranks.size if self.ranks else 1)
        if num_values == 1:
            raise ValueError(
                f"batch normalisation over one value per channel, got input {tuple(x.shape)}; use larger ghost batches"
            )
        y, mean, variance = Normalise.apply(x, self.weight, self.bias, self.eps, len(x) // ghost_size, self.ranks)
        if self.running_mean is not None and self.running_var is not None:
            momentum = self._count_batch()
            # torch's running variance is the unbiased one
            self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), momentum)
            unbiased = variance.mean(0) * (num_values / (num_values - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return y

    def _native(self, x: Tensor, use_batch: bool) -> Tensor:
        momentum = self._count_batch() if self.training and self.running_mean is not None else 0.0
        # torch wants parameters and running statistics in one type
        dtype = None if self.running_mean is None else self.running_mean.dtype
        weight, bias = (p if p is None or dtype is None else p.to(dtype) for p in (self.weight, self.bias))
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, use_batch, momentum, self.eps)

    def _count_batch(self) -> float:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        return 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        over = (
            f", ghost_size={self.ghost_size}" if self.ghost_size else f", ranks={self.ranks.size}" if self.ranks else ""
        )
        return super().extra_repr() + over
