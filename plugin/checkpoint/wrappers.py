"""DeepSpeed's optimizer wrappers from the loader's side: what they step, where it lies in their checkpoints, how the model's
weights follow. Beside largebatch.layer_map.zero the only reader of their private attributes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import uncut
from largebatch.layer_map.zero import attribute, partitions_of


@dataclass(frozen=True)
class SteppedTensor:
    """What the optimizer steps: a parameter, its master, or a partition of many.

    Attributes:
        group: number of its param group.
    """

    tensor: Tensor
    group: int
    partition: Partition


def stepped_tensors(engine: Any) -> list[SteppedTensor]:
    """In the order of the wrapper's lists. Not a collective."""
    wrapper = engine.optimizer
    if isinstance(wrapper, torch.optim.Optimizer):
        return [
            SteppedTensor(p, number, Partition(uncut(p.numel()).layer_map(0), (p,), None, uncut(p.numel())))
            for number, group in enumerate(wrapper.param_groups)
            for p in group["params"]
        ]
    partitions = partitions_of(wrapper)
    numbers = group_numbers(wrapper, len(partitions))
    return [SteppedTensor(t, number, p) for (t, p), number in zip(partitions.items(), numbers, strict=True)]


def group_numbers(wrapper: Any, num_tensors: int) -> list[int]:
    """Param group of each tensor, in the order of :func:`partitions_of`."""
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        mapping = attribute(wrapper, "sub_group_to_group_id")
        return [mapping[k] for k in range(num_tensors)]
    if kind == "FP16_UnfusedOptimizer":
        return [number for number, group in enumerate(attribute(wrapper, "fp32_groups")) for _ in group]
    return list(range(num_tensors))


def grouped_parameters(engine: Any) -> list[list[Tensor]]:
    """The model's parameters in each param group, in the order in which they were given."""
    wrapper = engine.optimizer
    if isinstance(wrapper, torch.optim.Optimizer):
        return [list(group["params"]) for group in wrapper.param_groups]
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        groups: list[list[Tensor]] = [[] for _ in wrapper.optimizer.param_groups]
        sub_groups = attribute(wrapper, "fp16_groups")
        for number, sub_group in zip(group_numbers(wrapper, len(sub_groups)), sub_groups, strict=True):
            groups[number].extend(sub_group)
        return groups
    names = {"DeepSpeedZeroOptimizer": "bit16_groups", "BF16_Optimizer": "bf16_groups"}
    return [list(group) for group in attribute(wrapper, names.get(kind, "fp16_groups"))]


@dataclass(frozen=True)
class SavedOptimizer:
    """The optimizer's part of one file of a checkpoint.

    Attributes:
        masters: fp32 weights of each stepped tensor, in the order of the layout's cuts.
        state_dict: of the torch optimizer.
        loss_scale: cur_scale, cur_iter, last_overflow_iter and cur_hysteresis of a dynamic loss scale, where known.
    """

    masters: list[Tensor]
    state_dict: dict[str, Any]
    loss_scale: dict[str, Any]


LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_plain(saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
    return SavedOptimizer([module[name] for name in layers], saved, {})


def read_unfused(saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
    scale = {name: saved[name] for name in LOSS_SCALE if saved.get(name) is not None}
    masters = list(itertools.chain(*saved["fp32_groups"]))
    return SavedOptimizer(masters, saved["optimizer_state_dict"], scale if saved["dynamic_loss_scale"] else {})


def read_zero_1_and_2(saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
    masters = list(saved["single_partition_of_fp32_groups"])
    return SavedOptimizer(masters, saved["base_optimizer_state"], scale_of(saved.get("loss_scaler")))


def read_zero_3(saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
    masters = saved["fp32_flat_groups"]
    return SavedOptimizer(list(masters), saved["optimizer_state_dict"], scale_of(saved.get("loss_scaler")))


def scale_of(scaler: Any) -> dict[str, Any]:
    """The numbers of a dynamic loss scaler; none of a static one."""
    if scaler is None or not scaler.dynamic:
        return {}
    return {name: getattr(scaler, name) for name in LOSS_SCALE}


SAVED_READERS: dict[str, Callable[[dict[str, Any], dict[str, Tensor], list[str]], SavedOptimizer]] = {
    "": read_plain,
    "FP16_UnfusedOptimizer": read_unfused,
    "DeepSpeedZeroOptimizer": read_zero_1_and_2,
    "BF16_Optimizer": read_zero_1_and_2,
    "DeepSpeedZeroOptimizer_Stage3": read_zero_3,
}
"""Wrapper -> reader of what its state_dict() has left in a file, given the model's state_dict beside it and its layers."""


def restore_loss_scale(wrapper: Any, saved: dict[str, Any]) -> None:
    """Continues a dynamic loss scale where a checkpoint left it; its window and factor are the JSON's. A static one stays."""
    is_unfused = type(wrapper).__name__ == "FP16_UnfusedOptimizer"
    scaler = wrapper.loss_scale_config if is_unfused else wrapper.loss_scaler
    if not (scaler.dynamic_loss_scale if is_unfused else scaler.dynamic):
        return
    for name, value in saved.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def before_loading(wrapper: Any) -> None:
    """Waits for copies on the way; under ZeRO 3 takes gathered parameters apart. A collective."""
    for name in ("_wait_for_offload_copies", "checkpoint_event_prologue"):
        if hasattr(wrapper, name):
            getattr(wrapper, name)()


@torch.no_grad()
def refresh_parameters(engine: Any) -> None:
    """Makes the model's weights follow the masters of all ranks. A collective."""
    wrapper = engine.optimizer
    kind = type(wrapper).__name__
    if kind == "FP16_UnfusedOptimizer":
        for master, partition in partitions_of(wrapper).items():
            partition.parameters[0].copy_(master)
    elif kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        wrapper.update_lp_params()
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        flats, partitioned = attribute(wrapper, "fp16_partitioned_groups_flat"), wrapper.fp16_partitioned_groups
        for master, flat, parts in zip(wrapper.fp32_partitioned_groups_flat, flats, partitioned, strict=True):
            flat.data.copy_(master.data)
            for part, values in zip(parts, wrapper.unflatten(flat, parts), strict=True):
                part.data = values.data
        # as in DeepSpeed's own loading: parameters that stay gathered are gathered anew from the parts
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
        wrapper.checkpoint_event_epilogue()
