"""DeepSpeed's optimizer wrappers: which layers lie in the flat tensors that they step, and where those lie in a checkpoint.

The only reader of their private attributes. What it reads is checked against what the tensors hold (:func:`read_layout`): an
unknown layout is an error, never a wrong norm.

| wrapper                       | used for                                  | flat tensors                     | layers of tensor i       |
|-------------------------------|-------------------------------------------|----------------------------------|--------------------------|
| none                          | stage 0, fp32                             | none                             |                          |
| FP16_UnfusedOptimizer         | stage 0, fp16 and bf16                    | fp32_groups[i][j], one a layer   | fp16_groups[i][j]        |
| DeepSpeedZeroOptimizer        | stages 1 and 2                            | single_partition_of_fp32_groups  | round_robin_bit16_groups |
| BF16_Optimizer                | stage 1, bf16, fp32 gradient accumulation | fp32_groups_flat_partition       | bf16_groups              |
| DeepSpeedZeroOptimizer_Stage3 | stage 3                                   | fp32_partitioned_groups_flat, one a sub-group | fp16_groups |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.engine.internals import internal, versions
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import Cut, LayerMap, uncut


@dataclass(frozen=True)
class SteppedTensor:
    """What the optimizer steps: a parameter, its master, or a partition of many.

    Attributes:
        group: number of its param group.
    """

    tensor: Tensor
    group: int
    partition: Partition


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


def attribute(wrapper: Any, *names: str) -> Any:
    """The first of these attributes that a wrapper has, or an error that names them and the DeepSpeed version."""
    for name in names:
        if hasattr(wrapper, name):
            return getattr(wrapper, name)
    raise RuntimeError(
        f"{versions()}: {type(wrapper).__name__} has no attribute {' or '.join(map(repr, names))}, from which the layers of "
        "its partitions are read, so no norm could be trusted"
    )


class Reader:
    """How one class of wrappers is read; the methods take the wrapper."""

    def layout(self, wrapper: Any) -> dict[Tensor, Partition]:
        """What every tensor holds that the wrapper hands to the optimizer, in its order. Not a collective."""
        raise NotImplementedError

    def group_numbers(self, wrapper: Any) -> list[int]:
        """Param group of each tensor, in the order of :meth:`layout`."""
        return list(range(len(self.layout(wrapper))))

    def grouped_parameters(self, wrapper: Any) -> list[list[Tensor]]:
        """The model's parameters in each param group, in the order in which they were given."""
        raise NotImplementedError

    def saved(self, saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
        """What the wrapper's state_dict() has left in a file.

        Args:
            module: the model's state_dict beside it.
            layers: the names of its layers, where there is one a tensor.
        """
        raise NotImplementedError

    def dynamic_scaler(self, wrapper: Any) -> Any:
        """What holds the numbers of a dynamic loss scale; None without one."""
        scaler = wrapper.loss_scaler
        return scaler if scaler.dynamic else None

    def refresh_parameters(self, wrapper: Any) -> None:
        """Makes the model's weights follow the masters of all ranks. A collective."""
        wrapper.update_lp_params()


class NoWrapper(Reader):
    """A torch optimizer that steps the parameters themselves."""

    def layout(self, wrapper: Any) -> dict[Tensor, Partition]:
        return {p: whole(p, p) for group in wrapper.param_groups for p in group["params"]}

    def group_numbers(self, wrapper: Any) -> list[int]:
        return [number for number, group in enumerate(wrapper.param_groups) for _ in group["params"]]

    def grouped_parameters(self, wrapper: Any) -> list[list[Tensor]]:
        return [list(group["params"]) for group in wrapper.param_groups]

    def saved(self, saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
        return SavedOptimizer([module[name] for name in layers], saved, {})

    def refresh_parameters(self, wrapper: Any) -> None:
        pass


class Unfused(Reader):
    """Stage 0: one master a layer."""

    def layout(self, wrapper: Any) -> dict[Tensor, Partition]:
        masters, parameters = attribute(wrapper, "fp32_groups"), attribute(wrapper, "fp16_groups")
        pairs = zip(itertools.chain(*masters), itertools.chain(*parameters), strict=True)
        return {master: whole(master, parameter) for master, parameter in pairs}

    def group_numbers(self, wrapper: Any) -> list[int]:
        return [number for number, group in enumerate(attribute(wrapper, "fp32_groups")) for _ in group]

    def grouped_parameters(self, wrapper: Any) -> list[list[Tensor]]:
        return [list(group) for group in attribute(wrapper, "fp16_groups")]

    def saved(self, saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
        scale = {name: saved[name] for name in LOSS_SCALE if saved.get(name) is not None}
        masters = list(itertools.chain(*saved["fp32_groups"]))
        return SavedOptimizer(masters, saved["optimizer_state_dict"], scale if saved["dynamic_loss_scale"] else {})

    def loss_scale_state(self, wrapper: Any) -> Any:
        """What has dynamic_loss_scale, cur_scale, cur_iter and last_overflow_iter: older versions, the wrapper itself."""
        return getattr(wrapper, "loss_scale_config", wrapper)

    def dynamic_scaler(self, wrapper: Any) -> Any:
        state = self.loss_scale_state(wrapper)
        return state if state.dynamic_loss_scale else None

    def refresh_parameters(self, wrapper: Any) -> None:
        for master, partition in self.layout(wrapper).items():
            partition.parameters[0].copy_(master)


class ZeroStages1And2(Reader):
    def layout(self, wrapper: Any) -> dict[Tensor, Partition]:
        groups = attribute(wrapper, "round_robin_bit16_groups")
        return read_slices(
            attribute(wrapper, "single_partition_of_fp32_groups"),
            groups,
            # there may be padding between layers; older versions have none, and no offsets
            getattr(wrapper, "round_robin_bit16_offsets", None) or [cumulative_offsets(group) for group in groups],
            attribute(wrapper, "real_dp_process_group"),
        )

    def grouped_parameters(self, wrapper: Any) -> list[list[Tensor]]:
        return [list(group) for group in attribute(wrapper, "bit16_groups")]

    def saved(self, saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
        masters = list(saved["single_partition_of_fp32_groups"])
        return SavedOptimizer(masters, saved["base_optimizer_state"], scale_of(saved.get("loss_scaler")))


class BF16(ZeroStages1And2):
    """Stage 1, whose partitions follow each other without padding."""

    def layout(self, wrapper: Any) -> dict[Tensor, Partition]:
        groups = attribute(wrapper, "bf16_groups")
        return read_slices(
            attribute(wrapper, "fp32_groups_flat_partition"),
            groups,
            [cumulative_offsets(group) for group in groups],
            attribute(wrapper, "real_dp_process_group"),
        )

    def grouped_parameters(self, wrapper: Any) -> list[list[Tensor]]:
        return [list(group) for group in attribute(wrapper, "bf16_groups")]


class ZeroStage3(Reader):
    def layout(self, wrapper: Any) -> dict[Tensor, Partition]:
        flats, groups = attribute(wrapper, "fp32_partitioned_groups_flat"), attribute(wrapper, "fp16_groups")
        process_groups = getattr(wrapper, "sub_group_process_groups", None)  # older versions: the same for all
        if process_groups is None:
            process_groups = [attribute(wrapper, "dp_process_group")] * len(flats)
        layout = {}
        for flat, group, process_group in zip(flats, groups, process_groups, strict=True):
            slice_numels = tuple(attribute(p, "partition_numel")() for p in group)
            # not flat.numel(): a partition that is offloaded to NVMe has no elements until it is swapped in
            cut = Cut(tuple(attribute(p, "ds_numel") for p in group), sum(slice_numels), slice_numels=slice_numels)
            layout[flat] = Partition(
                cut.layer_map(dist.get_rank(group=process_group)), tuple(group), process_group, cut
            )
        return layout

    def group_numbers(self, wrapper: Any) -> list[int]:
        mapping = attribute(wrapper, "sub_group_to_group_id")
        return [mapping[k] for k in range(len(attribute(wrapper, "fp16_groups")))]

    def grouped_parameters(self, wrapper: Any) -> list[list[Tensor]]:
        groups: list[list[Tensor]] = [[] for _ in wrapper.optimizer.param_groups]
        for number, sub_group in zip(self.group_numbers(wrapper), attribute(wrapper, "fp16_groups"), strict=True):
            groups[number].extend(sub_group)
        return groups

    def saved(self, saved: dict[str, Any], module: dict[str, Tensor], layers: list[str]) -> SavedOptimizer:
        masters = list(saved["fp32_flat_groups"])
        return SavedOptimizer(masters, saved["optimizer_state_dict"], scale_of(saved.get("loss_scaler")))

    def refresh_parameters(self, wrapper: Any) -> None:
        flats, partitioned = attribute(wrapper, "fp16_partitioned_groups_flat"), wrapper.fp16_partitioned_groups
        for master, flat, parts in zip(wrapper.fp32_partitioned_groups_flat, flats, partitioned, strict=True):
            flat.data.copy_(master.data)
            for part, values in zip(parts, wrapper.unflatten(flat, parts), strict=True):
                part.data = values.data
        # as in DeepSpeed's own loading: parameters that stay gathered are gathered anew from the parts
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
        wrapper.checkpoint_event_epilogue()


UNFUSED = Unfused()

NONE = ""
"""In the place of a wrapper's name where there is none."""

READERS: dict[str, Reader] = {
    NONE: NoWrapper(),
    "FP16_UnfusedOptimizer": UNFUSED,
    "DeepSpeedZeroOptimizer": ZeroStages1And2(),
    "BF16_Optimizer": BF16(),
    "DeepSpeedZeroOptimizer_Stage3": ZeroStage3(),
}
"""Class name of a wrapper -> how it is read."""


def name_of(wrapper: Any) -> str:
    return NONE if isinstance(wrapper, torch.optim.Optimizer) else type(wrapper).__name__


def reader_of(wrapper: Any) -> Reader:
    """
    Raises:
        RuntimeError: the wrapper is none whose layout is known.
    """
    name = name_of(wrapper)
    if name not in READERS:
        known = [kind for kind in READERS if kind]
        raise RuntimeError(
            f"{name} ({type(wrapper).__module__}) is a DeepSpeed optimizer wrapper for which the layer norms are not "
            f"known to be exact; known are {', '.join(known)}. Switch off what puts it in their place, or take an "
            "optimizer without layer norms"
        )
    return READERS[name]


def read_layout(wrapper: Any) -> dict[Tensor, Partition]:
    """What every tensor holds that the wrapper puts in the place of parameters. A collective.

    Args:
        wrapper: ``engine.optimizer``.

    Raises:
        RuntimeError: the wrapper is one whose layout is not known, or it lacks an attribute, or what the attributes
            say does not agree with what the tensors hold.
    """
    layout = {} if name_of(wrapper) == NONE else reader_of(wrapper).layout(wrapper)
    for tensor, partition in layout.items():
        verify(wrapper, tensor, partition)
    return layout


def stepped_tensors(wrapper: Any) -> list[SteppedTensor]:
    """In the order of the wrapper's lists. Not a collective."""
    reader = reader_of(wrapper)
    pairs = zip(reader.layout(wrapper).items(), reader.group_numbers(wrapper), strict=True)
    return [SteppedTensor(tensor, number, partition) for (tensor, partition), number in pairs]


def whole(tensor: Tensor, parameter: Tensor) -> Partition:
    """The partition of a tensor that is one layer."""
    cut = uncut(tensor.numel())
    return Partition(cut.layer_map(0), (parameter,), None, cut)


def read_slices(
    flats: Iterable[Tensor],
    groups: Iterable[Sequence[Tensor]],
    offsets: Iterable[Sequence[int]],
    process_groups: Iterable[dist.ProcessGroup],
) -> dict[Tensor, Partition]:
    """Each group's layers concatenated, each rank one slice."""
    layout = {}
    for flat, group, group_offsets, process_group in zip(flats, groups, offsets, process_groups, strict=True):
        cut = Cut(tuple(p.numel() for p in group), flat.numel(), layer_offsets=tuple(group_offsets))
        layout[flat] = Partition(cut.layer_map(dist.get_rank(group=process_group)), tuple(group), process_group, cut)
    return layout


def cumulative_offsets(group: Sequence[Tensor]) -> list[int]:
    return list(itertools.accumulate((p.numel() for p in group[:-1]), initial=0)) if group else []


def verify(wrapper: Any, flat: Tensor, partition: Partition) -> None:
    """Compares what the map says with what the tensors hold, and that the group covers every layer exactly once.

    Raises:
        RuntimeError: on every rank of the group, if any of them disagrees.
    """
    layer_map = partition.layer_map
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
        evidence = torch.tensor([*owned, int(not agrees)], dtype=torch.int64)
        evidence = evidence.to(internal("get_accelerator")().current_device_name())
        dist.all_reduce(evidence, group=partition.process_group)
        *owned, num_disagreeing = evidence.tolist()
        agrees = num_disagreeing == 0
    if not agrees or tuple(owned) != layer_map.layer_numels:
        raise RuntimeError(
            f"{versions()}: the partitions of {type(wrapper).__name__} do not hold the layers that its attributes say. Norms "
            "would be wrong, so nothing was trained"
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


def scale_of(scaler: Any) -> dict[str, Any]:
    """The numbers of a dynamic loss scaler; none of a static one."""
    if scaler is None or not scaler.dynamic:
        return {}
    return {name: getattr(scaler, name) for name in LOSS_SCALE}


def restore_loss_scale(wrapper: Any, saved: dict[str, Any]) -> None:
    """Continues a dynamic loss scale where a checkpoint left it; its window and factor are the JSON's. A static one stays."""
    scaler = reader_of(wrapper).dynamic_scaler(wrapper)
    for name, value in saved.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def before_loading(wrapper: Any) -> None:
    """Waits for copies on the way; under ZeRO 3 takes gathered parameters apart. A collective."""
    for name in ("_wait_for_offload_copies", "checkpoint_event_prologue"):
        if hasattr(wrapper, name):
            getattr(wrapper, name)()


@torch.no_grad()
def refresh_parameters(wrapper: Any) -> None:
    """Makes the model's weights follow the masters of all ranks. A collective."""
    reader_of(wrapper).refresh_parameters(wrapper)
