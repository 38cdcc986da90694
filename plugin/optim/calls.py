"""The parts of one step: what each kernel call works on, its sums over whole layers, its trust ratios."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.config import SharedOptions
from largebatch.exclusion import LayerPolicy
from largebatch.kernels.interface import Kernels, Segments
from largebatch.layer_map.reduce import all_reduce_sums_
from largebatch.layer_map.segment import LayerMap
from largebatch.optim.state import step_number
from largebatch.telemetry import LayerStats


@dataclass
class Call:
    """Tensors of one param group on one device with one compute dtype, and the layers that lie in them."""

    segments: Segments
    options: SharedOptions
    device: torch.device
    dtype: torch.dtype
    process_group: dist.ProcessGroup | None
    kernels: Kernels
    policies: list[LayerPolicy] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def add(self, tensor: Tensor, state: dict[str, Tensor], layer_map: LayerMap, policies: list[LayerPolicy]) -> None:
        """Takes in a tensor: a whole parameter, or a flat partition with its segments."""
        segments, rule = self.segments, self.segments.rule
        first_row = len(self.policies)
        states = [state[name] for name in rule.elementwise_state]
        step = step_number(state, tensor.device) if rule.counts_steps else 0.0
        is_whole = layer_map.layer_numels == (tensor.numel(),) and layer_map.partition_numel == tensor.numel()
        for segment in layer_map.segments:
            cut = (lambda t: t) if is_whole else (lambda t, s=segment: t.narrow(0, s.start, s.numel))
            segments.weights.append(cut(tensor.detach()))
            segments.grads.append(cut(tensor.grad))
            segments.states.append(tuple(cut(t) for t in states))
            segments.steps.append(step)
            segments.weight_decays.append(coupled_weight_decay(self.options, policies[segment.layer]))
            segments.rows.append(first_row + segment.layer)
        self.policies.extend(policies)
        self.tensors.append(tensor)

    def local_sums(self, grad_scale: Tensor | None) -> Tensor:
        """[num_layers, 2] fp64 sums of squares of weights and direction over what this rank has of each layer."""
        sums = torch.zeros(len(self.policies), 2, dtype=torch.float64, device=self.device)
        if self.segments.rows:
            # a layer has at most one segment in a partition, so no row is written twice
            sums[self.segments.rows] = self.kernels.direction_square_sums(
                self.segments, grad_scale=on(self.device, grad_scale)
            )
        return sums

    def advance_(self, sums: Tensor, *, grad_scale: Tensor | None, is_finite: Tensor) -> LayerStats:
        """Trust ratios from the sums over whole layers, then the new weights and states.

        Args:
            sums: [num_layers, 2] fp64, read. Over all ranks.
            is_finite: 0-dim bool, read. Where False nothing changes.
        """
        options, rule, lr = self.options, self.segments.rule, self.segments.lr
        weight_norm, direction_norm = sums.sqrt().unbind(1)
        shrinkage = None
        if options.decoupled_weight_decay and options.weight_decay:
            shrinkage = 1 - lr * sums.new_tensor([options.weight_decay * p.is_decayed for p in self.policies])
            weight_norm = weight_norm * shrinkage.abs()
        weight_decay = sums.new_tensor([coupled_weight_decay(options, p) for p in self.policies])
        adapted = torch.tensor([is_adapted(options, p) for p in self.policies], device=self.device)
        ratio = rule.trust_ratio(weight_norm, direction_norm, lr=lr, weight_decay=weight_decay)
        # rounded once, here, from fp64: the same bits however the sums were cut
        ratio = torch.where(adapted, ratio, 1.0).to(self.dtype)
        weight_decay = rule.weight_decay_in_force(weight_norm, direction_norm, weight_decay)
        self.kernels.advance_(
            self.segments,
            grad_scale=on(self.device, grad_scale),
            ratios=ratio,
            weight_decays=weight_decay,
            shrinkage=shrinkage,
            is_finite=is_finite,
        )
        names = tuple(policy.name for policy in self.policies)
        return LayerStats(names, weight_norm, direction_norm, ratio, lr * ratio, weight_decay)


def sums_over_ranks(calls: list[Call], grad_scale: Tensor | None) -> list[Tensor]:
    """The sums of each call over whole layers: one collective for each process group that has a part in the step."""
    sums = [call.local_sums(grad_scale) for call in calls]
    for process_group in dict.fromkeys(call.process_group for call in calls):
        if process_group is None:
            continue
        mine = [i for i, call in enumerate(calls) if call.process_group is process_group]
        together = torch.cat([sums[i].to(calls[mine[0]].device) for i in mine])
        reduced = all_reduce_sums_(together, process_group).split([len(sums[i]) for i in mine])
        for i, part in zip(mine, reduced, strict=True):
            sums[i] = part.to(calls[i].device)
    return sums


def on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def coupled_weight_decay(options: SharedOptions, policy: LayerPolicy) -> float:
    """The weight decay that goes into the layer's direction: 0 if it is excluded or if decay is decoupled."""
    return options.weight_decay if policy.is_decayed and not options.decoupled_weight_decay else 0.0


def is_adapted(options: SharedOptions, policy: LayerPolicy) -> bool:
    """Whether the layer gets a trust ratio other than 1."""
    has_decay = options.weight_decay != 0 and policy.is_decayed
    return policy.is_adapted and (options.adapt_undecayed or has_decay)
