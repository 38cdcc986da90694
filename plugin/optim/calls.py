"""The parts of one step: what each kernel call works on, its sums over whole layers, its trust ratios."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.config import CommonOptions
from largebatch.exclusion import LayerPolicy
from largebatch.kernels.interface import (
    Before,
    Decisions,
    Kernels,
    LayerFigures,
    Segments,
    Span,
    step_of_layers,
    upload_,
    uploaded,
)
from largebatch.layer_map.dtensor import local_part
from largebatch.layer_map.reduce import all_reduce_sums_
from largebatch.optim.layer_table import Layout, ProcessGroups
from largebatch.optim.state import LAYER_STATE, needs_step
from largebatch.rules.rule import Layers, Rule


class LayerNames(tuple[str, ...]):
    """A key of dicts that is hashed once, not in every step."""

    @functools.cached_property
    def own_hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self.own_hash


@dataclass
class Call:
    """Tensors of one param group on one device with one compute dtype, and the layers that lie in them.

    Kept from step to step; only gradients and learning rate are new in each.
    """

    segments: Segments
    kernels: Kernels
    policies: list[LayerPolicy] = field(default_factory=list)
    process_groups: list[ProcessGroups] = field(default_factory=list)
    """[num_layers] the ranks that hold the rest of each layer: its sums are added over each group in turn."""
    positions: list[int] = field(default_factory=list)
    """Where the tensors stand in the param group."""
    before: Before | None = None
    """Of this step; None for rules that need nothing before."""
    seen_before: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())
    """[num_layers] fp64 each: norms before and layer state, of which ``before`` has the rounded ones."""

    @functools.cached_property
    def names(self) -> LayerNames:
        """[num_layers] of the layers."""
        return LayerNames(policy.name for policy in self.policies)

    def add(
        self,
        position: int,
        tensor: Tensor,
        state: dict[str, Tensor],
        layout: Layout,
        options: CommonOptions,
    ) -> None:
        """Takes in a tensor: a whole parameter, or a flat partition with its layers."""
        segments, first_row, index = self.segments, len(self.policies), len(self.positions)
        names = segments.rule.elementwise_state
        segments.weights.append(local_part(tensor))
        segments.states.append(tuple(local_part(state[name]) for name in names))
        if needs_step(segments.rule, state[names[0]].dtype if names else segments.dtype):
            segments.steps.append(state["step"])
        # a layer has at most one segment in a partition
        segments.spans.extend(
            Span(index, s.start, s.numel, first_row + s.layer, s.layer_start) for s in layout.layer_map.segments
        )
        segments.seeds.extend(zlib.crc32(policy.name.encode()) for policy in layout.policies)
        if segments.rule.layer_state:
            segments.layer_states.append(state[LAYER_STATE])
        segments.rows.append(len(layout.policies))
        self.positions.append(position)
        self.policies.extend(layout.policies)
        self.process_groups.extend(layout.process_groups)
        self._treat(options, layout.policies)

    def renew_options(self, options: CommonOptions, rule: Rule) -> bool:
        """Takes other options; False, and nothing is changed, if the rule needs other state with them."""
        segments = self.segments
        if type(rule) is not type(segments.rule):
            return False
        segments.rule = rule
        for numbers in (segments.weight_decays, segments.decoupled_weight_decays, segments.are_adapted):
            numbers.clear()
        self._treat(options, self.policies)
        segments.num_changes += 1
        return True

    def _treat(self, options: CommonOptions, policies: list[LayerPolicy]) -> None:
        segments = self.segments
        for policy in policies:
            segments.weight_decays.append(coupled_weight_decay(options, policy))
            segments.decoupled_weight_decays.append(decoupled_weight_decay(options, policy))
            segments.are_adapted.append(is_adapted(options, policy))

    @functools.cached_property
    def reductions(self) -> dict[dist.ProcessGroup, Tensor | None]:
        """Process group of more than one rank -> [n] the layers whose sums are to be added over it; None: all of them."""
        rows: dict[dist.ProcessGroup, list[int]] = {}
        for row, groups in enumerate(self.process_groups):
            for group in groups:
                if dist.get_world_size(group) > 1:
                    rows.setdefault(group, []).append(row)
        num_layers, device = len(self.policies), self.segments.device
        return {g: None if len(r) == num_layers else uploaded(r, torch.int64, device) for g, r in rows.items()}

    @property
    def is_local(self) -> bool:
        """Whether no layer of this call has a part on another rank."""
        return not self.reductions

    def step_(self, grad_scale: Tensor | None) -> LayerFigures:
        """A whole step of a call that is local, by a backend that can do it at once."""
        return self.kernels.step_(self.segments, grad_scale=on(self.segments.device, grad_scale))

    @property
    def needs_norms_before(self) -> bool:
        return bool(self.segments.rule.norms_before)

    def sums_before(self, grad_scale: Tensor | None) -> Tensor:
        """[num_layers, len(norms_before)] fp64 sums of squares over what this rank has of each layer."""
        return self.kernels.sums_before(self.segments, grad_scale=on(self.segments.device, grad_scale))

    def decide_before(self, sums: Tensor | None) -> None:
        """Takes in the sums of :meth:`sums_before` over all ranks; None if the rule needs no norms before."""
        rule, dtype = self.segments.rule, self.segments.dtype
        nothing = torch.zeros(len(self.policies), dtype=torch.float64, device=self.segments.device)
        sums = nothing[:, None][:, :0] if sums is None else sums
        norms, layer_state = tuple(sums.sqrt().unbind(1)), self.layer_state()
        seen = rule.layer_state_before(self.layers(nothing, (), norms, layer_state))
        self.seen_before = norms, seen
        # rounded once, here, from fp64: the same bits however the sums were cut
        self.before = Before(rows(norms, nothing, dtype), rows(seen, nothing, dtype), torch.isfinite(sums).all(dim=1))

    def sums(self, grad_scale: Tensor | None) -> Tensor:
        """[num_layers, 1 + len(norms)] fp64 sums of squares of weights and directions over what this rank has of each layer."""
        grad_scale = on(self.segments.device, grad_scale)
        return self.kernels.accumulate_(self.segments, grad_scale=grad_scale, before=self.before)

    def advance_(self, sums: Tensor, *, grad_scale: Tensor | None) -> LayerFigures:
        """Trust ratios from the sums over whole layers, then the new weights.

        Args:
            sums: [num_layers, 1 + len(norms)] fp64, read. Over all ranks.
        """
        segments, rule = self.segments, self.segments.rule
        weight_norm, *norms = sums.sqrt().unbind(1)
        shrinkage = None
        if any(segments.decoupled_weight_decays):
            shrinkage = 1 - segments.lr * self.constant("decoupled_weight_decays", torch.float64)
            weight_norm = weight_norm * shrinkage.abs()
        norms_before, layer_state = self.seen_before
        layers = self.layers(weight_norm, tuple(norms), norms_before, layer_state)
        is_adapted = self.constant("are_adapted", torch.bool)
        # rounded once, here, from fp64: the same bits however the sums were cut
        ratios = torch.stack([torch.where(is_adapted, r, 1.0).to(segments.dtype) for r in rule.trust_ratio(layers)])
        decay = rule.weight_decay_in_force(layers)
        is_finite = torch.isfinite(sums).all(dim=1) & torch.isfinite(ratios).all(dim=0)
        decisions = Decisions(ratios, decay, shrinkage, is_finite, self.before)
        self.kernels.advance_(segments, grad_scale=on(segments.device, grad_scale), decisions=decisions)
        if rule.layer_state:
            layers = replace(layers, layer_state=rule.layer_state_after(layers))
            self.keep_layer_state(layers.layer_state, is_finite)
        return LayerFigures.of(layers, decisions)

    def layers(
        self,
        weight_norm: Tensor,
        norms: tuple[Tensor, ...],
        norms_before: tuple[Tensor, ...],
        layer_state: tuple[Tensor, ...],
    ) -> Layers:
        segments = self.segments
        decay = self.constant("weight_decays", torch.float64)
        find_step = functools.partial(step_of_layers, segments.steps, segments.rows, segments.device)
        return Layers(weight_norm, norms, norms_before, layer_state, segments.lr, decay, find_step)

    def layer_state(self) -> tuple[Tensor, ...]:
        """[num_layers] fp64 each."""
        segments = self.segments
        return tuple(torch.cat(segments.layer_states).unbind(1)) if segments.layer_states else ()

    def keep_layer_state(self, fresh: tuple[Tensor, ...], is_finite: Tensor) -> None:
        """Writes the layers' new state where the layer has moved."""
        segments = self.segments
        parts = torch.stack(fresh, dim=1).split(segments.rows), is_finite.split(segments.rows)
        for old, new, has_moved in zip(segments.layer_states, *parts, strict=True):
            old.copy_(torch.where(has_moved[:, None] & torch.isfinite(new), new, old))

    def constant(self, name: str, dtype: torch.dtype) -> Tensor:
        """[num_layers] a per-layer list of the segments as a tensor on their device: always the same one, so that a captured
        step that reads it follows later changes of the options."""
        segments = self.segments
        tensor, num_changes = segments.prepared.get(name, (None, 0))
        if tensor is None:
            tensor = uploaded(getattr(segments, name), dtype, segments.device)
        elif num_changes != segments.num_changes:
            upload_(tensor, getattr(segments, name))
        segments.prepared[name] = tensor, segments.num_changes
        return tensor

    def keep(self, figures: LayerFigures) -> None:
        """Takes over the figures of the layers that moved, and leaves those of the others as they were."""
        segments, stats = self.segments, figures.stats
        if stats is segments.stats:
            return
        is_on_host = segments.device.type == "cpu"
        if segments.stats is None or figures.have_all_moved or (is_on_host and figures.is_finite.all()):
            segments.stats = stats
        else:
            torch.where(figures.is_finite, stats, segments.stats, out=segments.stats)


def rows(values: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """[len(values), num_layers] in that dtype."""
    return torch.stack([value.to(dtype) for value in values]) if values else like.new_empty(0, len(like), dtype=dtype)


def sums_over_ranks(calls: list[Call], sums: list[Tensor]) -> list[Tensor]:
    """The sums of each call over whole layers: one collective for each process group that has a part in the step."""
    for process_group in dict.fromkeys(group for call in calls for group in call.reductions):
        mine = [i for i, call in enumerate(calls) if process_group in call.reductions]
        home = calls[mine[0]].segments.device
        parts = [sums[i] if (rows := calls[i].reductions[process_group]) is None else sums[i][rows] for i in mine]
        together = all_reduce_sums_(torch.cat([part.reshape(-1).to(home) for part in parts]), process_group)
        for i, part, new in zip(mine, parts, together.split([part.numel() for part in parts]), strict=True):
            rows, new = calls[i].reductions[process_group], new.view(part.shape).to(sums[i].device)
            sums[i] = new if rows is None else sums[i].index_copy(0, rows, new)
    return sums


def on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def coupled_weight_decay(options: CommonOptions, policy: LayerPolicy) -> float:
    """The weight decay that goes into the layer's direction: 0 if it is excluded or if decay is decoupled."""
    return options.weight_decay if policy.is_decayed and not options.decoupled_weight_decay else 0.0


def decoupled_weight_decay(options: CommonOptions, policy: LayerPolicy) -> float:
    """The weight decay that shrinks the layer's weights before the step: 0 if it is excluded or decay is coupled."""
    return options.weight_decay if policy.is_decayed and options.decoupled_weight_decay else 0.0


def is_adapted(options: CommonOptions, policy: LayerPolicy) -> bool:
    """Whether the layer gets a trust ratio other than 1."""
    has_decay = options.weight_decay != 0 and policy.is_decayed
    return policy.is_adapted and (options.adapt_undecayed or has_decay)
