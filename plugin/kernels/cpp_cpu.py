"""The kernels for CPU tensors in C++: all of a step in one call, layer after layer, so that the caches serve the second pass.

The loops are in csrc/passes.inc. Tensors are taken as flat arrays; one that does not lie densely in memory, or whose
state is laid out otherwise, is worked on in a copy.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from largebatch.kernels.build import cpu_kernels
from largebatch.kernels.interface import Before, Decisions, LayerFigures, Segments
from largebatch.rules.rule import Rule


def rule_options(rule: Rule) -> dict[str, Any]:
    """A rule's options by their names: csrc/options.h takes each of them, or raises KeyError."""
    return {field.name: getattr(rule, field.name) for field in fields(rule)}


VARIABLE = "LARGEBATCH_INSTRUCTION_SET"


class CppKernels:
    """See :class:`largebatch.kernels.interface.FusedKernels`."""

    name = "cpp"
    is_fused = True
    takes_whole_steps = False

    def __init__(self) -> None:
        """
        Raises:
            CannotBuildError: no compiler, no ninja, or the compiler failed.
        """
        self.module = cpu_kernels()

    def is_current(self, segments: Segments) -> bool:
        plan = plan_of(self.module, segments)
        segments.prepared["cpp is looked up"] = True
        return plan.look_up(segments.grads)

    def grad_square_sum(self, segments: Segments) -> Tensor:
        return self.module.square_sums([grad.detach() for grad in segments.grads]).sum()

    def count_(self, segments: Segments) -> None:
        plan_of(self.module, segments).count()

    def sums_before(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        with FlatPlan(self.module, segments) as plan:
            return plan.sums_before(segments.grads, as_float(grad_scale))

    def accumulate_(self, segments: Segments, *, grad_scale: Tensor | None, before: Before | None = None) -> Tensor:
        with FlatPlan(self.module, segments) as plan:
            return plan.accumulate(segments.grads, as_float(grad_scale), *norms_of(before))

    def advance_(self, segments: Segments, *, grad_scale: Tensor | None, decisions: Decisions) -> None:
        with FlatPlan(self.module, segments) as plan:
            plan.advance(
                segments.grads,
                as_float(grad_scale),
                float(segments.lr),
                decisions.ratios.t(),
                decisions.weight_decays,
                decisions.shrinkage,
                decisions.is_finite,
                *norms_of(decisions.before),
            )

    def step_(self, segments: Segments, *, grad_scale: Tensor | None) -> LayerFigures:
        with FlatPlan(self.module, segments) as plan:
            return LayerFigures._make(plan.step(segments.grads, as_float(grad_scale), float(segments.lr)))


def norms_of(before: Before | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if before is None else (before.norms[0], before.is_finite)


def use_instruction_set(module: Any) -> None:
    """The one that the environment variable LARGEBATCH_INSTRUCTION_SET names; without it the best that this processor has.

    Raises:
        ValueError: this processor has it not.
    """
    known = module.instruction_sets()
    wanted = os.environ.get(VARIABLE, known[0])
    if wanted not in known:
        raise ValueError(f"{VARIABLE} is {wanted!r}; this processor has {', '.join(map(repr, known))}")
    module.use_instruction_set(wanted)


def as_float(grad_scale: Tensor | None) -> float:
    return 1.0 if grad_scale is None else float(grad_scale)


class FlatPlan:
    """The compiled plan of a call, as a context; irregular tensors are copied in at its start and back at its end."""

    def __init__(self, module: Any, segments: Segments):
        self.module, self.segments = module, segments
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Any:
        plan = plan_of(self.module, self.segments)
        if not self.segments.prepared.pop("cpp is looked up", False):
            plan.look_up(self.segments.grads)
        if plan.is_flat():
            return plan
        weights, states = [], []
        for weight, state in zip(self.segments.weights, self.segments.states, strict=True):
            weights.append(self.copied(weight.detach(), weight.detach().contiguous()))
            states.append(tuple(self.copied(s, torch.empty_like(weights[-1], dtype=s.dtype).copy_(s)) for s in state))
        plan = made(self.module, self.segments, weights, states)
        plan.look_up(self.segments.grads)
        return plan

    def __exit__(self, *_: Any) -> None:
        for tensor, copy in self.copies:
            tensor.copy_(copy)

    def copied(self, tensor: Tensor, copy: Tensor) -> Tensor:
        if copy is not tensor:
            self.copies.append((tensor, copy))
        return copy


def plan_of(module: Any, segments: Segments) -> Any:
    """The compiled plan of these segments, made at the first call and whenever their options have changed."""
    plan, num_changes = segments.prepared.get("cpp", (None, 0))
    if plan is None or num_changes != segments.num_changes:
        plan = made(module, segments, segments.weights, segments.states)
        segments.prepared["cpp"] = plan, segments.num_changes
    return plan


def made(module: Any, segments: Segments, weights: list[Tensor], states: list[tuple[Tensor, ...]]) -> Any:
    return module.Plan(
        weights,  # not detached: they shall follow an exchange of .data
        [list(state) for state in states],
        segments.steps,
        [tuple(span) for span in segments.spans],
        segments.weight_decays,
        segments.decoupled_weight_decays,
        segments.are_adapted,
        segments.seeds,
        segments.rule.name,
        rule_options(segments.rule),
        segments.may_overwrite_grads,
    )
