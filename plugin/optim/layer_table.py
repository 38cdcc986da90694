"""The layers of an optimizer: their names, which of them are adapted and decayed, and where an engine has put them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from largebatch.exclusion import KINDS, LayerPolicy, ParameterIdentity, identities, policy_of
from largebatch.layer_map.dtensor import layer_map_of, process_groups_of
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import LayerMap, whole_layer


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

    def attach(self, partitions: Mapping[Tensor, Partition]) -> None:
        """Takes in the flat tensors that stand for parameters."""
        for partition in partitions.values():
            for parameter in partition.parameters:
                assert parameter in self.policies, "a partition holds a parameter that this optimizer was not given"
        self.partitions = dict(partitions)

    def layout_of(self, tensor: Tensor) -> tuple[LayerMap, list[LayerPolicy], tuple[dist.ProcessGroup, ...]]:
        """Which layers a tensor holds, how they are treated, and the groups of ranks that hold the rest of them.

        Raises:
            RuntimeError: the tensor is neither a parameter nor a known partition of some.
        """
        partition = self.partitions.get(tensor)
        if partition is not None:
            groups = () if partition.process_group is None else (partition.process_group,)
            return partition.layer_map, [self.policies[p] for p in partition.parameters], groups
        if tensor in self.policies:
            if isinstance(tensor, DTensor):
                return layer_map_of(tensor), [self.policies[tensor]], process_groups_of(tensor)
            return whole_layer(tensor.numel()), [self.policies[tensor]], ()
        raise RuntimeError(
            f"the optimizer was handed a tensor of {tensor.numel()} elements that is none of the parameters it was built "
            "with. A wrapper (DeepSpeed ZeRO, FSDP) has replaced them, and norms over what it hands out would not be the "
            "norms of layers. With DeepSpeed, call largebatch.register() before deepspeed.initialize(); with FSDP, build the "
            "optimizer after fully_shard()"
        )
