"""The layers of an optimizer: their names, which of them are adapted and decayed, and where an engine has put them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from largebatch.exclusion import KINDS, LayerPolicy, ParameterIdentity, identities, policy_of
from largebatch.layer_map.dtensor import layer_map_of, process_groups_of
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import LayerMap, whole_layer

logger = logging.getLogger("largebatch")

ProcessGroups = tuple[dist.ProcessGroup, ...]


FLAT_MARKS = {
    "_fsdp_flattened": "FullyShardedDataParallel (FSDP1)",
    "_is_flat_param": "FullyShardedDataParallel (FSDP1)",
    "_is_sharded": "fairscale",
    "_param_infos": "a wrapper that flattens parameters",
}
"""Attribute of a parameter -> who has put it there, and laid the parameter together with others or cut it."""


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


@dataclass
class Layer:
    """A parameter as the optimizer was given it, by which a DTensor is known that a wrapper puts in its place.

    Attributes:
        parameter: a weak reference.
        identity: what is known of the parameter; None for nothing.
        placeholder: its name where none is known.
    """

    parameter: Callable[[], Tensor | None]
    shape: torch.Size
    identity: ParameterIdentity | None
    placeholder: str
    policy: LayerPolicy

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"parameter": self.parameter()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameter = state["parameter"]
        vars(self).update(state, parameter=(lambda: None) if parameter is None else TensorWeakRef(parameter))


def check_is_no_part(parameter: Tensor, name: str) -> None:
    """Raises ValueError for a parameter that says that it is not a layer but a part of some."""
    for mark, owner in FLAT_MARKS.items():
        if getattr(parameter, mark, None):
            raise ValueError(
                f"{name} is flattened or cut by {owner} and is no whole layer, so its norm would be wrong; use "
                "fully_shard (FSDP2), DDP or DeepSpeed ZeRO, whose layouts are known. In Accelerate: fsdp_version 2"
            )


class LayerTable:
    """Parameter -> name and treatment, in the order given; flat tensor -> the parameters it stands for.

    It keeps no parameter alive: a wrapper that cuts the layers lets the whole ones go, and so must the optimizer.

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
        self.identities = WeakIdKeyDictionary(identities(model) if model is not None else {})
        """Parameter of the model -> ParameterIdentity."""
        self.groups: list[list[Layer]] = []
        self.layers = WeakIdKeyDictionary()
        """Parameter -> Layer."""
        self.partitions: dict[Tensor, Partition] = {}
        self.cut_over: dict[Tensor, dist.ProcessGroup] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy.deepcopy, which follow no weak references."""
        return vars(self) | {"identities": dict(self.identities), "layers": dict(self.layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.identities, self.layers = WeakIdKeyDictionary(self.identities), WeakIdKeyDictionary(self.layers)

    @property
    def policies(self) -> list[LayerPolicy]:
        return [layer.policy for group in self.groups for layer in group]

    def add_group(self, parameters: Sequence[Tensor], names: Sequence[str | None]) -> None:
        """Takes in the parameters of a new param group; the model's name of each goes before the one given here.

        Raises:
            ValueError: a parameter says that it is not a layer but a part of some, or it has no name and is asked for one.
        """
        group = []
        for i, (parameter, name) in enumerate(zip(parameters, names, strict=True)):
            placeholder = f"group{len(self.groups)}.param{i}"
            check_is_no_part(parameter, name or placeholder)
            identity = self.identities.get(parameter)
            if identity is None and name is not None:
                identity = ParameterIdentity(name, num_dimensions=parameter.ndim)
            policy = policy_of(identity, placeholder, **self.exclusions)
            group.append(Layer(TensorWeakRef(parameter), parameter.shape, identity, placeholder, policy))
        self.groups.append(group)
        self.layers.update(zip(parameters, group, strict=True))

    def forget_groups_from(self, start: int) -> None:
        """Takes back the groups from number ``start`` on."""
        for layer in [layer for group in self.groups[start:] for layer in group]:
            parameter = layer.parameter()
            if parameter is not None:
                del self.layers[parameter]
        del self.groups[start:]

    def learn_names(self, model: nn.Module) -> None:
        """Names and module types for those parameters that have none yet."""
        for parameter, identity in identities(model).items():
            layer = self.layers.get(parameter)
            if layer is not None and layer.identity is None:
                layer.identity, layer.policy = identity, policy_of(identity, layer.placeholder, **self.exclusions)

    def check_exclusions_match(self) -> None:
        """Raises ValueError for a regular expression that no parameter's name matches, and tells of likely norms that stay in."""
        names = [policy.name for policy in self.policies]
        for option, patterns in self.exclusions.items():
            for pattern in patterns:
                if pattern not in KINDS and not any(re.search(pattern, name) for name in names):
                    raise ValueError(
                        f"{option} has {pattern!r}, which matches no parameter name; the names are "
                        f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                    )
        likely = [x.identity.name for x in self.layers.values() if x.identity is not None and x.identity.may_be_norm]
        for option, patterns in self.exclusions.items():
            if likely and "norm" in patterns:
                more = f" and {len(likely) - 5} more" if len(likely) > 5 else ""
                logger.warning(
                    "%s has 'norm', and %s%s stayed in: neither type nor name says that their module is a normalisation. If it "
                    "is one, name it by a regular expression",
                    option,
                    ", ".join(likely[:5]),
                    more,
                )

    def check_are_layers(self) -> None:
        """Raises ValueError for parameters that look like slices of one buffer.

        A view of a larger storage may be a whole layer, as recurrent layers are on GPUs, where matrices and biases share one. It
        is taken for a slice where all parameters in its storage have one dimension, and no model says that they are its own.
        """
        by_storage: dict[int, list[Tensor]] = {}
        for parameter in self.layers:
            if not isinstance(parameter, DTensor) and parameter.layout is torch.strided and parameter.numel():
                by_storage.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)
        for parameters in by_storage.values():
            identity = self.layers[parameters[0]].identity
            is_models = identity is not None and identity.kinds is not None
            num_bytes = parameters[0].numel() * parameters[0].element_size()
            is_view = parameters[0].untyped_storage().nbytes() > num_bytes
            if is_view and not is_models and all(parameter.ndim == 1 for parameter in parameters):
                names = [self.layers[parameter].policy.name for parameter in parameters]
                raise ValueError(
                    f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} is a view of a larger buffer, as flattened and "
                    "sharded parameters are; expected whole layers, because norms of slices would be wrong. If it is a whole "
                    "layer all the same, pass model= with the module that has it"
                )

    def attach(self, partitions: Mapping[Tensor, Partition], cut_over: Mapping[Tensor, dist.ProcessGroup]) -> None:
        """Takes in the flat tensors that stand for parameters, and the groups over which parameters are cut themselves."""
        for partition in partitions.values():
            for parameter in partition.parameters:
                assert parameter in self.layers, "a partition holds a parameter that this optimizer was not given"
        self.partitions = dict(partitions)
        self.cut_over = {parameter: group for parameter, group in cut_over.items() if parameter in self.layers}

    def adopt(self, index: int, parameters: Sequence[Tensor], stepped: Collection[Tensor]) -> None:
        """Takes DTensors in a param group for the layers that were given at their places, where the shapes are the same.

        Accelerate's FSDP2 puts them there after the optimizer was built. Whatever else is unknown stays so.

        Args:
            index: of the param group.
            stepped: tensors that have state.

        Raises:
            RuntimeError: a parameter was replaced that has state, which would be lost.
        """
        layers = self.groups[index] if index < len(self.groups) else []
        if self.partitions or len(layers) != len(parameters):
            return
        for layer, parameter in zip(layers, parameters, strict=True):
            if parameter in self.layers or not isinstance(parameter, DTensor) or parameter.shape != layer.shape:
                continue
            whole = layer.parameter()
            if whole is not None and any(whole is tensor for tensor in stepped):
                raise RuntimeError(
                    f"{layer.policy.name} was replaced by a DTensor after it was stepped, so its state would be lost; apply "
                    "fully_shard before the first step, or build a new optimizer and load the state into it"
                )
            if whole is not None:
                del self.layers[whole]
            layer.parameter = TensorWeakRef(parameter)
            self.layers[parameter] = layer

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
                [self.layers[p].policy for p in partition.parameters],
                [groups + self.own_groups(p) for p in partition.parameters],
            )
        if tensor not in self.layers:
            raise RuntimeError(
                f"the optimizer was handed a tensor of {tensor.numel()} elements that is none of the parameters it was built "
                "with. A wrapper (DeepSpeed ZeRO, FSDP) has replaced them, and norms over what it hands out would not be "
                "the norms of layers. With DeepSpeed, call largebatch.register() before deepspeed.initialize(); with FSDP, "
                "use fully_shard (FSDP2)"
            )
        if isinstance(tensor, DTensor):
            return Layout(layer_map_of(tensor), [self.layers[tensor].policy], [process_groups_of(tensor)])
        return Layout(whole_layer(tensor.numel()), [self.layers[tensor].policy], [self.own_groups(tensor)])

    def own_groups(self, parameter: Tensor) -> ProcessGroups:
        """Over which a parameter is cut itself, beside any partitioning."""
        return (self.cut_over[parameter],) if parameter in self.cut_over else ()

    def is_cut_itself(self, tensor: Tensor) -> bool:
        """Whether the elements of a tensor's layers are not numbered as those of the whole layers are."""
        partition = self.partitions.get(tensor)
        parameters = (tensor,) if partition is None else partition.parameters
        return any(isinstance(p, DTensor) or p in self.cut_over for p in parameters)
