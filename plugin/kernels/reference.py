"""The definition of correct: the rules applied in plain torch, any device, any dtype including fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from largebatch.kernels.interface import Segments

# fp64 copies are made of at most this many elements at a time (8 MB), so that a step needs no full-size temporary
SUM_BLOCK = 1 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 tensors, fp32 for all others: the dtype of states and of the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def square_sum(tensor: Tensor) -> Tensor:
    """0-dim fp64 sum of squares, accumulated in fp64, block after block in storage order."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= SUM_BLOCK:
        return flat.double().square().sum()
    return torch.stack([block.double().square().sum() for block in flat.split(SUM_BLOCK)]).sum()


class ReferenceKernels:
    """See :class:`largebatch.kernels.interface.Kernels`."""

    name = "reference"

    def square_sums(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack([square_sum(tensor) for tensor in tensors])

    def direction_square_sums(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        sums = []
        for i, weight in enumerate(segments.weights):
            direction = segments.rule.direction(
                weight.to(compute_dtype(weight.dtype)),
                scaled_grad(segments.grads[i], weight, grad_scale),
                segments.states[i],
                step=segments.steps[i],
                weight_decay=segments.weight_decays[i],
            )
            sums.append(torch.stack([square_sum(weight), square_sum(direction)]))
        return torch.stack(sums)

    def advance_(
        self,
        segments: Segments,
        *,
        grad_scale: Tensor | None,
        ratios: Tensor,
        weight_decays: Tensor,
        shrinkage: Tensor | None,
        is_finite: Tensor,
    ) -> None:
        for i, weight in enumerate(segments.weights):
            row = segments.rows[i]
            old_weight = weight.to(compute_dtype(weight.dtype))
            new_weight, new_state = segments.rule.advance(
                old_weight if shrinkage is None else old_weight * shrinkage[row],
                scaled_grad(segments.grads[i], weight, grad_scale),
                segments.states[i],
                lr=segments.lr,
                ratio=ratios[row],
                step=segments.steps[i],
                weight_decay=weight_decays[row],
            )
            for old, new in zip((weight, *segments.states[i]), (new_weight, *new_state), strict=True):
                old.copy_(torch.where(is_finite, new, old))


def scaled_grad(grad: Tensor, weight: Tensor, grad_scale: Tensor | None) -> Tensor:
    """The gradient in the compute dtype, times ``grad_scale``."""
    grad = grad.to(compute_dtype(weight.dtype))
    return grad if grad_scale is None else grad * grad_scale
