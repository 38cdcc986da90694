"""DeepSpeed's optimizer wrappers -> which layers lie in the flat tensors that they step. Reads their private attributes,
as largebatch.checkpoint.wrappers does for loading; checked against what it reads.

| wrapper                   | used for                                   | flat tensors                      | layers of tensor i         |
|---------------------------|--------------------------------------------|-----------------------------------|----------------------------|
| none                      | stage 0, fp32                              | none                              |                            |
| FP16_UnfusedOptimizer     | stage 0, fp16 and bf16                     | fp32_groups[i][j], one a layer    | fp16_groups[i][j]          |
| DeepSpeedZeroOptimizer    | stages 1 and 2                             | single_partition_of_fp32_groups   | round_robin_bit16_groups   |
| BF16_Optimizer            | stage 1, bf16, fp32 gradient accumulation  | fp32_groups_flat_partition        | bf16_groups                |
| DeepSpeedZeroOptimizer_Stage3 | stage 3                                | fp32_partitioned_groups_flat, one a sub-group | fp16_groups    |
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import Cut, LayerMap, uncut

TESTED_DEEPSPEED = ("0.19.8",)
"""Versions under which the test suite has passed."""


def read_layout(wrapper: Any) -> dict[Tensor, Partition]:
    """What every tensor holds that the wrapper will hand to the optimizer.

    Args:
        wrapper: ``engine.optimizer``.

    Raises:
        RuntimeError: the wrapper is one whose layout is not known, or it lacks an attribute, or what the attributes
            say does not agree with what the tensors hold.
    """
    layout = partitions_of(wrapper)
    for tensor, partition in layout.items():
        verify(wrapper, tensor, partition)
    return layout


def partitions_of(wrapper: Any) -> dict[Tensor, Partition]:
    """As :func:`read_layout`, without looking at the tensors, in the wrapper's order. Not a collective."""
    kind = type(wrapper).__name__
    if isinstance(wrapper, torch.optim.Optimizer):
        return {}
    if kind not in READERS:
        raise RuntimeError(
            f"{kind} ({type(wrapper).__module__}) is a DeepSpeed optimizer wrapper for which the layer norms are not "
            f"known to be exact; known are {', '.join(READERS)}. Switch off what puts it in their place, or take an "
            "optimizer without layer norms"
        )
    return READERS[kind](wrapper)


def attribute(wrapper: Any, name: str) -> Any:
    """An attribute of a wrapper, or an error that names it and the DeepSpeed version."""
    if not hasattr(wrapper, name):
        import deepspeed

        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__}: {type(wrapper).__name__} has no attribute {name!r}, from which the "
            f"layers of its partitions are read; largebatch is tested with DeepSpeed {', '.join(TESTED_DEEPSPEED)}"
        )
    return getattr(wrapper, name)


def read_unfused(wrapper: Any) -> dict[Tensor, Partition]:
    layout = {}
    masters, parameters = attribute(wrapper, "fp32_groups"), attribute(wrapper, "fp16_groups")
    for master, parameter in zip(itertools.chain(*masters), itertools.chain(*parameters), strict=True):
        cut = uncut(master.numel())
        layout[master] = Partition(cut.layer_map(0), (parameter,), None, cut)
    return layout


def read_zero_1_and_2(wrapper: Any) -> dict[Tensor, Partition]:
    flats = attribute(wrapper, "single_partition_of_fp32_groups")
    groups = attribute(wrapper, "round_robin_bit16_groups")
    offsets = attribute(wrapper, "round_robin_bit16_offsets")  # there may be padding between layers
    process_groups = attribute(wrapper, "real_dp_process_group")
    return read_slices(flats, groups, offsets, process_groups)


def read_bf16(wrapper: Any) -> dict[Tensor, Partition]:
    groups = attribute(wrapper, "bf16_groups")
    offsets = [cumulative_offsets(group) for group in groups]
    return read_slices(
        attribute(wrapper, "fp32_groups_flat_partition"), groups, offsets, attribute(wrapper, "real_dp_process_group")
    )


def read_zero_3(wrapper: Any) -> dict[Tensor, Partition]:
    flats = attribute(wrapper, "fp32_partitioned_groups_flat")
    groups = attribute(wrapper, "fp16_groups")
    process_groups = attribute(wrapper, "sub_group_process_groups")
    layout = {}
    for flat, group, process_group in zip(flats, groups, process_groups, strict=True):
        slice_numels = tuple(attribute(p, "partition_numel")() for p in group)
        # not flat.numel(): a partition that is offloaded to NVMe has no elements until it is swapped in
        cut = Cut(tuple(attribute(p, "ds_numel") for p in group), sum(slice_numels), slice_numels=slice_numels)
        layout[flat] = Partition(cut.layer_map(dist.get_rank(group=process_group)), tuple(group), process_group, cut)
    return layout


def read_slices(flats, groups, offsets, process_groups) -> dict[Tensor, Partition]:
    """Each group's layers concatenated, each rank one slice."""
    layout = {}
    for flat, group, group_offsets, process_group in zip(flats, groups, offsets, process_groups, strict=True):
        cut = Cut(tuple(p.numel() for p in group), flat.numel(), layer_offsets=tuple(group_offsets))
        layout[flat] = Partition(cut.layer_map(dist.get_rank(group=process_group)), tuple(group), process_group, cut)
    return layout


def cumulative_offsets(group: list[Tensor]) -> list[int]:
    return list(itertools.accumulate((p.numel() for p in group[:-1]), initial=0)) if group else []


def verify(wrapper: Any, flat: Tensor, partition: Partition) -> None:
    """Compares what the map says with what the tensors hold, and that the group covers every layer exactly once.

    Raises:
        RuntimeError: on every rank of the group, if any of them disagrees.
    """
    layer_map, kind = partition.layer_map, type(wrapper).__name__
    is_swapped_out = flat.numel() == 0
    agrees = is_swapped_out or all(
        torch.equal(
            flat.detach().reshape(-1)[s.start : s.stop],
            local_values(partition.parameters[s.layer], s.layer_start, s.numel).to(flat.device, flat.dtype),
        )
        for s in layer_map.segments
    )
    owned = owned_elements(layer_map)
    if partition.process_group is not None and dist.get_world_size(partition.process_group) > 1:
        from deepspeed.accelerator import get_accelerator

        evidence = torch.tensor([*owned, int(not agrees)], dtype=torch.int64)
        evidence = evidence.to(get_accelerator().current_device_name())
        dist.all_reduce(evidence, group=partition.process_group)
        *owned, num_disagreeing = evidence.tolist()
        agrees = num_disagreeing == 0
    if not agrees or tuple(owned) != layer_map.layer_numels:
        import deepspeed

        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__}: the partitions of {kind} do not hold the layers that its attributes say; "
            f"largebatch is tested with DeepSpeed {', '.join(TESTED_DEEPSPEED)}. Norms would be wrong, so nothing was trained"
        )


def local_values(parameter: Tensor, start: int, numel: int) -> Tensor:
    """Elements [start, start + numel) of the flattened layer, from what this rank has of the parameter."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3: this rank's slice, which begins at start
        return parameter.ds_tensor.detach().reshape(-1)[:numel]
    return parameter.detach().reshape(-1)[start : start + numel]


def owned_elements(layer_map: LayerMap) -> list[int]:
    """[num_layers] elements of each layer that lie in this partition."""
    owned = [0] * layer_map.num_layers
    for segment in layer_map.segments:
        owned[segment.layer] += segment.numel
    return owned


READERS = {
    "FP16_UnfusedOptimizer": read_unfused,
    "DeepSpeedZeroOptimizer": read_zero_1_and_2,
    "BF16_Optimizer": read_bf16,
    "DeepSpeedZeroOptimizer_Stage3": read_zero_3,
}
