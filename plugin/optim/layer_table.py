"""The layers of an optimizer: their names, which of them are adapted and decayed, and where an engine has put them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from largebatch.exclusion import KINDS, LayerPolicy, ParameterIdentity, identities, policy_of
from largebatch.layer_map.dtensor import layer_map_of, process_groups_of
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import LayerMap, whole_layer

ProcessGroups = tuple[dist.ProcessGroup, ...]


@dataclass(frozen=True)
class Layout:
    """What lies in a tensor that is stepped.

    Attributes:
        layer_map: which elements of which layer.
        policies: [num_layers] how each layer is treated.
        process_groups: [num_layers] the groups of ranks that hold the rest of each layer; empty where this rank has all.
    """

    layer_map: LayerMap
    policies: list[LayerPolicy]
    process_groups: list[ProcessGroups]


class LayerTable:
    """Parameter -> name and treatment, in the order given; flat tensor -> the parameters it stands for.

    Args:
        model: the module that the parameters are of; None if only names, or nothing, are known.
        exclude_from_adaptation, exclude_from_weight_decay: see largebatch.exclusion.
    """

    def __init__(
        self,
        model: nn.Module | None,
        exclude_from_adaptation: Sequence[str],
        exclude_from_weight_decay: Sequence[str],
    ):
        self.exclusions = {
            "exclude_from_adaptation": tuple(exclude_from_adaptation),
            "exclude_from_weight_decay": tuple(exclude_from_weight_decay),
        }
        self.identities: dict[Tensor, ParameterIdentity] = identities(model) if model is not None else {}
        self.policies: dict[Tensor, LayerPolicy] = {}
        self.partitions: dict[Tensor, Partition] = {}
        self.cut_over: dict[Tensor, dist.ProcessGroup] = {}

    def add(self, parameter: Tensor, name: str | None, placeholder: str) -> None:
        """Takes in a parameter; the model's name for it goes before ``name``, and that before the placeholder."""
        if name is not None:
            self.identities.setdefault(parameter, ParameterIdentity(name))
        self.policies[parameter] = policy_of(self.identities.get(parameter), placeholder, **self.exclusions)

    def learn_names(self, model: nn.Module) -> None:
        """Names and module types for those parameters that have none yet."""
        for parameter, identity in identities(model).items():
            if parameter in self.policies and parameter not in self.identities:
                self.identities[parameter] = identity
                self.add(parameter, None, identity.name)

    def check_exclusions_match(self) -> None:
        """Raises ValueError for a regular expression that no parameter's name matches."""
        names = [policy.name for policy in self.policies.values()]
        for option, patterns in self.exclusions.items():
            for pattern in patterns:
                if pattern not in KINDS and not any(re.search(pattern, name) for name in names):
                    raise ValueError(
                        f"{option} has {pattern!r}, which matches no parameter name; the names are "
                        f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                    )

    def attach(self, partitions: Mapping[Tensor, Partition], cut_over: Mapping[Tensor, dist.ProcessGroup]) -> None:
        """Takes in the flat tensors that stand for parameters, and the groups over which parameters are cut themselves."""
        for partition in partitions.values():
            for parameter in partition.parameters:
                assert parameter in self.policies, "a partition holds a parameter that this optimizer was not given"
        self.partitions = dict(partitions)
        self.cut_over = {parameter: group for parameter, group in cut_over.items() if parameter in self.policies}

    def layout_of(self, tensor: Tensor) -> Layout:
        """What lies in a tensor that is stepped.

        Raises:
            RuntimeError: the tensor is neither a parameter nor a known partition of some.
        """
        partition = self.partitions.get(tensor)
        if partition is not None:
            groups = () if partition.process_group is None else (partition.process_group,)
            return Layout(
                partition.layer_map,
                [self.policies[p] for p in partition.parameters],
                [groups + self.own_groups(p) for p in partition.parameters],
            )
        if tensor not in self.policies:
            raise RuntimeError(
                f"the optimizer was handed a tensor of {tensor.numel()} elements that is none of the parameters it was built "
                "with. A wrapper (DeepSpeed ZeRO, FSDP) has replaced them, and norms over what it hands out would not be "
                "the norms of layers. With DeepSpeed, call largebatch.register() before deepspeed.initialize(); with FSDP, "
                "build the optimizer after fully_shard()"
            )
        if isinstance(tensor, DTensor):
            return Layout(layer_map_of(tensor), [self.policies[tensor]], [process_groups_of(tensor)])
        return Layout(whole_layer(tensor.numel()), [self.policies[tensor]], [self.own_groups(tensor)])

    def own_groups(self, parameter: Tensor) -> ProcessGroups:
        """Over which a parameter is cut itself, beside any partitioning."""
        return (self.cut_over[parameter],) if parameter in self.cut_over else ()

    def is_cut_itself(self, tensor: Tensor) -> bool:
        """Whether the elements of a tensor's layers are not numbered as those of the whole layers are."""
        partition = self.partitions.get(tensor)
        parameters = (tensor,) if partition is None else partition.parameters
        return any(isinstance(p, DTensor) or p in self.cut_over for p in parameters)
