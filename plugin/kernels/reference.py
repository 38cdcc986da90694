"""The definition of correct: the rules applied in plain torch, any device, any dtype including fp64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.kernels.interface import Before, Decisions, Segments, Span
from largebatch.kernels.rounding import random_bits, rounded_to_bf16
from largebatch.rules.rule import Part

# fp64 copies are made of at most this many elements at a time (8 MB), so that a step needs no full-size temporary
SUM_BLOCK = 1 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 tensors, fp32 for all others: the dtype of the arithmetic."""
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
    is_fused = False
    takes_whole_steps = False

    def is_current(self, segments: Segments) -> bool:
        return segments.have_same_layout()

    def grad_square_sum(self, segments: Segments) -> Tensor:
        return torch.stack([square_sum(grad) for grad in segments.grads]).sum()

    def sums_before(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        rule = segments.rule
        sums = torch.zeros(segments.num_layers, len(rule.norms_before), dtype=torch.float64, device=segments.device)
        for span, part, _, _ in parts(segments, grad_scale, None):
            for column, vector in enumerate(rule.vectors_before(part)):
                sums[span.row, column] = square_sum(vector)
        return sums

    def accumulate_(self, segments: Segments, *, grad_scale: Tensor | None, before: Before | None = None) -> Tensor:
        rule = segments.rule
        shape = (segments.num_layers, 1 + len(rule.norms))
        sums = torch.zeros(shape, dtype=torch.float64, device=segments.device)
        for span, part, _, states in parts(segments, grad_scale, before):
            fresh = rule.accumulate(part)
            is_finite = all_finite(part.grad, *fresh) if rule.accumulates() else torch.isfinite(part.grad)
            if before is not None:
                is_finite = is_finite & before.is_finite[span.row]
            if rule.accumulates():
                for i, (old, new) in enumerate(zip(states, fresh, strict=True)):
                    store_(old, new, is_finite, segments, span, i)
                part = part._replace(state=in_dtype(states, segments.dtype))
            sums[span.row, 0] = square_sum(part.weight)
            for column, direction in enumerate(rule.directions(part), start=1):
                sums[span.row, column] = square_sum(torch.where(is_finite, direction, torch.nan))
        return sums

    def advance_(self, segments: Segments, *, grad_scale: Tensor | None, decisions: Decisions) -> None:
        rule = segments.rule
        for span, part, weight, states in parts(segments, grad_scale, decisions.before):
            row, old_weight = span.row, part.weight
            if decisions.shrinkage is not None:
                part = part._replace(weight=old_weight * decisions.shrinkage[row])
            part = part._replace(weight_decay=decisions.weight_decays[row])
            new_weight, new_states = rule.advance(part, lr=segments.lr, ratios=tuple(decisions.ratios[:, row]))
            is_written = decisions.is_finite[row] & all_finite(new_weight, *new_states)
            weight.copy_(torch.where(is_written, new_weight, old_weight))
            if new_states is not part.state:
                for i, (old, new) in enumerate(zip(states, new_states, strict=True)):
                    store_(old, new, is_written, segments, span, i)

    def count_(self, segments: Segments) -> None:
        if segments.steps:
            torch._foreach_add_(segments.steps, 1.0)


def parts(
    segments: Segments, grad_scale: Tensor | None, before: Before | None
) -> Iterator[tuple[Span, Part, Tensor, tuple[Tensor, ...]]]:
    """(span, what the rule sees of it, weight, states) of each span; the last two are views, to be written."""
    dtype = segments.dtype
    for span, weight, grad, states in segments.pieces():
        part = Part(
            weight.to(dtype),
            scaled(grad, dtype, grad_scale),
            in_dtype(states, dtype),
            step_number(segments, span),
            segments.weight_decays[span.row],
            () if before is None else tuple(before.norms[:, span.row]),
            () if before is None else tuple(before.layer_state[:, span.row]),
        )
        yield span, part, weight, states


def scaled(grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None) -> Tensor:
    """The gradient in the compute dtype, times ``grad_scale``."""
    grad = grad.to(dtype)
    return grad if grad_scale is None else grad * grad_scale


def in_dtype(states: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(state.to(dtype) for state in states)


def step_number(segments: Segments, span: Span) -> float | Tensor:
    """t of the step being taken: a Python float on the CPU, elsewhere 0-dim fp64 on the device."""
    if not segments.steps:
        return 0.0
    step = segments.steps[span.tensor]
    return float(step) + 1 if segments.device.type == "cpu" else step.to(segments.device, torch.float64) + 1


def all_finite(first: Tensor, *others: Tensor) -> Tensor:
    """Elementwise: whether the values of all tensors are finite."""
    is_finite = torch.isfinite(first)
    for tensor in others:
        is_finite = is_finite & torch.isfinite(tensor)
    return is_finite


def store_(old: Tensor, new: Tensor, is_written: Tensor, segments: Segments, span: Span, index: int) -> None:
    """Writes state number ``index`` where ``is_written``; in bf16 with stochastic rounding."""
    if old.dtype == torch.bfloat16:
        bits = random_bits(
            old.numel(),
            first=span.layer_start,
            seed=segments.seeds[span.row],
            step=segments.steps[span.tensor] + 1,
            device=old.device,
        )
        bits = in_storage_order(bits >> 16 * index & 0xFFFF, old)
        new = rounded_to_bf16(torch.where(is_written, new, 0.0), bits)
    old.copy_(torch.where(is_written, new, old))


def in_storage_order(values: Tensor, like: Tensor) -> Tensor:
    """[numel] values laid out in the shape of ``like`` so that they follow its storage."""
    laid_out = torch.empty_like(like, dtype=values.dtype)
    laid_out.as_strided((values.numel(),), (1,)).copy_(values)
    return laid_out
