"""LAMB by NVIDIA apex's multi-tensor kernels, where they compute the same thing; for comparison and for machines without Triton.

What differs from the other backends, and cannot be helped from outside: apex leaves the update in the gradients, takes
norms in fp32, does not look for NaN, and wants the number of the step from the host. So the gradients are looked at first, and
step counts and scale are read with what was found: one wait for the device a step. A NaN anywhere drops the whole step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from largebatch.kernels.interface import Before, LayerFigures, Segments, uploaded
from largebatch.kernels.reference import ReferenceKernels
from largebatch.rules.lamb import LAMB

DECOUPLED_FROM_MOMENTS = 1
"""apex's ``adam_w_mode``: weight decay goes into the update, not into the moments."""


class UnsuitableError(RuntimeError):
    """apex's kernels compute something else than was asked for."""


def check_suits(segments: Segments) -> None:
    """Raises UnsuitableError, naming the first thing that apex's kernels do not do."""
    rule = segments.rule
    demands = [
        (type(rule) is LAMB, f"the rule is {rule.name!r}; apex has LAMB only"),
        (getattr(rule, "bias_correction", True) != "lr", "bias_correction is 'lr'; apex knows true and false"),
        (rule.weight_norm_bounds is None, f"weight_norm_bounds is {rule.weight_norm_bounds}; apex has none"),
        (rule.trust_ratio_bounds is None, f"trust_ratio_bounds is {rule.trust_ratio_bounds}; apex has none"),
        (not any(segments.decoupled_weight_decays), "decoupled_weight_decay is true; apex has the decay in the update"),
        (all(segments.is_whole(span) for span in segments.spans), "the engine cuts layers; apex needs whole ones"),
        (
            all(
                t.dtype == torch.float32
                for i, weight in enumerate(segments.weights)
                for t in (weight, segments.grads[i], *segments.states[i])
            ),
            "parameters, gradients and state must all be fp32",
        ),
        (
            all(a or d == 0.0 for a, d in zip(segments.are_adapted, segments.weight_decays, strict=True)),
            "a layer has weight decay and no adaptation; apex adapts every layer that decays",
        ),
    ]
    for is_met, reason in demands:
        if not is_met:
            raise UnsuitableError(f"kernels 'apex' cannot do this step: {reason}. Use 'triton' or 'auto'")


class ApexKernels(ReferenceKernels):
    """See :class:`largebatch.kernels.interface.FusedKernels`. Sums over ranks are not apex's: see ``accumulate_``."""

    name = "apex"
    is_fused = True
    takes_whole_steps = False

    def __init__(self, applier: Any, functors: Any):
        self.applier, self.functors = applier, functors

    def accumulate_(self, segments: Segments, *, grad_scale: Tensor | None, before: Before | None = None) -> Tensor:
        raise UnsuitableError(
            "kernels 'apex' cannot do this step: its layers have parts on other ranks, or on other devices, and apex does "
            "norm and step at once. Use 'triton' or 'auto'"
        )

    def step_(self, segments: Segments, *, grad_scale: Tensor | None) -> LayerFigures:
        check_suits(segments)
        device, num_layers = segments.device, segments.num_layers
        rows = [span.row for span in segments.spans]
        places = uploaded(rows, torch.int64, device)
        figures = torch.zeros(4, num_layers, dtype=torch.float64, device=device)
        figures[2] = 1.0
        figures[3] = uploaded(segments.weight_decays, torch.float64, device)
        weights = [segments.weights[span.tensor].detach() for span in segments.spans]
        grads = [segments.grads[span.tensor] for span in segments.spans]
        if weights:
            are_finite = torch.isfinite(self.norms(grads)).all()
            one = torch.ones((), device=device)
            is_finite, scale, *steps = self.read(are_finite, one if grad_scale is None else grad_scale, *segments.steps)
            if not is_finite or math.isnan(scale):
                return self.figures(segments, figures, torch.zeros(num_layers, dtype=torch.bool, device=device))
            if scale > 1.0:  # apex's clip only makes gradients smaller
                torch._foreach_mul_(grads, scale)
                scale = 1.0
            figures[0].index_copy_(0, places, self.norms(weights).double())
            for key in dict.fromkeys((segments.weight_decays[r], segments.are_adapted[r]) for r in rows):
                mine = [i for i, r in enumerate(rows) if (segments.weight_decays[r], segments.are_adapted[r]) == key]
                self.launch(segments, [segments.spans[i].tensor for i in mine], *key, scale, steps)
            figures[1].index_copy_(0, places, self.norms(grads).double())  # where apex has left the updates
            adapted = uploaded(segments.are_adapted, torch.bool, device) & (figures[0] > 0) & (figures[1] > 0)
            figures[2] = torch.where(adapted, (figures[0].float() / figures[1].float()).double(), 1.0)
        return self.figures(segments, figures, torch.ones(num_layers, dtype=torch.bool, device=device))

    def figures(self, segments: Segments, found: Tensor, is_finite: Tensor) -> LayerFigures:
        """Of [4, num_layers] fp64: weight norm, norm of the update, trust ratio, weight decay."""
        weight_norm, update_norm, ratio, decay = found
        local_lr = (segments.lr * ratio.float()).double()
        return LayerFigures(torch.stack((weight_norm, update_norm, ratio, local_lr, decay)), is_finite)

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """[len(tensors)] fp32 L2 norms."""
        no_overflow = torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
        return self.applier(self.functors.multi_tensor_l2norm, no_overflow, [tensors], True)[1]

    def read(self, *tensors: Tensor) -> list[float]:
        """The values of 0-dim tensors, all with one wait for the device."""
        return torch.stack([tensor.double() for tensor in tensors]).tolist()

    def launch(
        self,
        segments: Segments,
        tensors: list[int],
        decay: float,
        is_adapted: bool,
        scale: float,
        steps: list[float],
    ) -> None:
        """A call of apex's kernel for tensors that share decay and adaptation, one for each number of the step.

        Args:
            steps: [number of tensors in the segments] that each has taken.
        """
        rule, device = segments.rule, segments.device
        for number in dict.fromkeys(int(steps[i]) + 1 for i in tensors):
            mine = [i for i in tensors if int(steps[i]) + 1 == number]
            self.applier(
                self.functors.multi_tensor_lamb,
                torch.zeros(1, dtype=torch.int32, device=device),
                [
                    [segments.grads[i] for i in mine],
                    [segments.weights[i].detach() for i in mine],
                    [segments.states[i][0] for i in mine],
                    [segments.states[i][1] for i in mine],
                ],
                float(segments.lr),
                *rule.betas,
                rule.eps,
                number,
                int(rule.bias_correction),
                decay,
                1,  # grad_averaging: (1 - beta1) g
                DECOUPLED_FROM_MOMENTS,
                torch.full((1,), 1.0 / scale, device=device),  # "global norm" over "max norm": the clip
                1.0,
                is_adapted and decay == 0.0,  # use_nvlamb: adapt layers without decay, too
            )
