"""The layers of an optimizer: their names, which of them are adapted and decayed, and where an engine has put them."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from largebatch.exclusion import KINDS, LayerPolicy, ParameterIdentity, dimensions_of, identities, policy_of
from largebatch.layer_map.dtensor import layer_map_of, process_groups_of
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import LayerMap, whole_layer

logger = logging.getLogger("largebatch")

ProcessGroups = tuple[dist.ProcessGroup, ...]

ParamGroups = Sequence[Mapping[str, Any]]

TENSOR_PARALLEL_MARKS = ("tensor_model_parallel", "model_parallel")
"""Attributes of a parameter that tensor parallelism has cut: today's and the older one of Megatron."""

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
    """A layer as the optimizer was given it. The parameter itself is not kept: whoever cuts layers lets the whole ones go.

    Attributes:
        shape: None until a lazy parameter has one.
        tensor_id: of the tensor that holds it, as far as is known.
        identity: what is known of the parameter; None for nothing.
        placeholder: its name where none is known.
    """

    shape: torch.Size | None
    tensor_id: int
    identity: ParameterIdentity | None
    placeholder: str
    policy: LayerPolicy


def check_is_no_part(parameter: Tensor, name: str) -> None:
    """Raises ValueError for a parameter that says that it is not a layer but a part of some."""
    for mark, owner in FLAT_MARKS.items():
        if getattr(parameter, mark, None):
            raise ValueError(
                f"{name} is flattened or cut by {owner} and is no whole layer, so its norm would be wrong; use "
                "fully_shard (FSDP2), DDP or DeepSpeed ZeRO, whose layouts are known. In Accelerate: fsdp_version 2"
            )


def is_tensor_parallel(parameter: Tensor) -> bool:
    return any(getattr(parameter, mark, False) for mark in TENSOR_PARALLEL_MARKS)


class LayerTable:
    """The layers at each place of the param groups; flat tensor -> the parameters it stands for.

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
        self.model = None if model is None else weakref.ref(model)
        self.identities: dict[Tensor, ParameterIdentity] | None = None
        """Of the model's parameters, while param groups are taken in."""
        self.groups: list[list[Layer]] = []
        self.of_parameter: dict[Tensor, Layer] = {}
        """Parameter -> layer, from the moment on that an engine is about to put other tensors in their places."""
        self.partitions: dict[Tensor, Partition] = {}
        self.cut_over: dict[Tensor, dist.ProcessGroup] = {}
        self.is_attached = False

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy.deepcopy, which follow no weak reference."""
        return vars(self) | {"model": None}

    @property
    def policies(self) -> list[LayerPolicy]:
        return [layer.policy for group in self.groups for layer in group]

    def pairs(self, param_groups: ParamGroups) -> Iterator[tuple[Tensor, Layer]]:
        """(parameter, layer), before anybody has exchanged the parameters."""
        for group, layers in zip(param_groups, self.groups, strict=True):
            yield from zip(group["params"], layers, strict=True)

    # --- taking in --------------------------------------------------------------------------------------------------

    def add_group(self, parameters: Sequence[Tensor], names: Sequence[str | None]) -> None:
        """Takes in the parameters of a new param group; the model's name of each goes before the one given here.

        Raises:
            ValueError: a parameter says that it is not a layer but a part of some, or exclusions ask for a name that is unknown.
        """
        if self.identities is None:
            model = None if self.model is None else self.model()
            self.identities = {} if model is None else identities(model)
        group = []
        for i, (parameter, name) in enumerate(zip(parameters, names, strict=True)):
            placeholder = f"group{len(self.groups)}.param{i}"
            check_is_no_part(parameter, name or placeholder)
            shape = None if is_lazy(parameter) else parameter.shape
            identity = self.identities.get(parameter)
            if identity is None and name is not None:
                identity = ParameterIdentity(name, num_dimensions=dimensions_of(parameter))
            policy = policy_of(identity, placeholder, **self.exclusions)
            group.append(Layer(shape, id(parameter), identity, placeholder, policy))
        self.groups.append(group)

    def end_taking_in(self, param_groups: ParamGroups) -> None:
        """Lets the model's parameters go.

        Raises:
            ValueError: parameters look like slices of one buffer.
        """
        self.identities = None
        self.check_are_layers(param_groups)

    def forget_groups_from(self, start: int) -> None:
        """Takes back the groups from number ``start`` on."""
        del self.groups[start:]

    def learn_names(self, model: nn.Module, param_groups: ParamGroups) -> None:
        """Names and module types for those parameters that have none yet."""
        known = identities(model)
        for parameter, layer in self.pairs(param_groups):
            if layer.identity is None and parameter in known:
                layer.identity = known[parameter]
                layer.policy = policy_of(layer.identity, layer.placeholder, **self.exclusions)

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
        known = [layer.identity for group in self.groups for layer in group if layer.identity is not None]
        likely = [identity.name for identity in known if identity.may_be_norm]
        for option, patterns in self.exclusions.items():
            if likely and "norm" in patterns:
                more = f" and {len(likely) - 5} more" if len(likely) > 5 else ""
                logger.warning(
                    "%s has 'norm', and %s%s stayed in: neither type nor name says for sure that they belong to a normalisation. "
                    "If they do, name them by a regular expression",
                    option,
                    ", ".join(likely[:5]),
                    more,
                )

    def check_are_layers(self, param_groups: ParamGroups) -> None:
        """Raises ValueError for parameters that look like slices of one buffer.

        A view of a larger storage may be a whole layer, as recurrent layers are on GPUs, where matrices and biases share one. It
        is taken for a slice where all parameters in its storage have one dimension, and no model says that they are its own.
        """
        by_storage: dict[int, list[tuple[Tensor, Layer]]] = {}
        for parameter, layer in self.pairs(param_groups):
            is_plain = layer.shape is not None and not isinstance(parameter, DTensor)
            if is_plain and parameter.layout is torch.strided and parameter.numel():
                by_storage.setdefault(parameter.untyped_storage()._cdata, []).append((parameter, layer))
        for found in by_storage.values():
            first, layer = found[0]
            is_models = layer.identity is not None and layer.identity.kinds is not None
            is_view = first.untyped_storage().nbytes() > first.numel() * first.element_size()
            if is_view and not is_models and all(parameter.ndim == 1 for parameter, _ in found):
                names = [layer.policy.name for _, layer in found]
                raise ValueError(
                    f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} is a view of a larger buffer, as flattened and "
                    "sharded parameters are; expected whole layers, because norms of slices would be wrong. If it is a whole "
                    "layer all the same, pass model= with the module that has it"
                )

    # --- engines ----------------------------------------------------------------------------------------------------

    def follow(self, param_groups: ParamGroups) -> None:
        """Remembers which parameter is which layer, before an engine exchanges them."""
        self.of_parameter = dict(self.pairs(param_groups))

    def attach(
        self,
        partitions: Mapping[Tensor, Partition],
        cut_over: Mapping[Tensor, dist.ProcessGroup],
        param_groups: ParamGroups,
    ) -> None:
        """Takes in the flat tensors that stand for parameters, and the groups over which parameters are cut themselves."""
        if not self.of_parameter:
            self.follow(param_groups)
        for partition in partitions.values():
            for parameter in partition.parameters:
                assert parameter in self.of_parameter, "a partition holds a parameter that this optimizer was not given"
        self.partitions = dict(partitions)
        self.cut_over = {parameter: group for parameter, group in cut_over.items() if parameter in self.of_parameter}
        self.is_attached = True

    # --- the step ---------------------------------------------------------------------------------------------------

    def layers_of_group(
        self, index: int, parameters: Sequence[Tensor], stepped: Iterable[Tensor]
    ) -> list[Layer | None]:
        """The layer of each tensor in a param group; None for what is a partition, or no layer that is known.

        A parameter that was given is known wherever it stands now. A tensor that somebody has put in a parameter's place is the
        same layer if it has the same shape, as a DTensor has that Accelerate's FSDP2 puts there after the optimizer was built.

        Args:
            index: of the param group.
            stepped: tensors that have state.

        Raises:
            RuntimeError: a parameter was replaced that has state, which would be lost.
            ValueError: what replaces it says that it is a part of a layer.
        """
        layers = self.groups[index] if index < len(self.groups) else []
        has_places, ids = len(layers) == len(parameters), {id(tensor) for tensor in parameters}
        by_id = {layer.tensor_id: layer for group in self.groups for layer in group}
        found: list[Layer | None] = []
        for place, tensor in enumerate(parameters):
            candidates = [by_id.get(id(tensor))]
            if has_places and layers[place].tensor_id not in ids:
                candidates.append(layers[place])
            if tensor in self.partitions:
                candidates = []
            layer = next((c for c in candidates if c is not None and c.shape in (None, tensor.shape)), None)
            found.append(layer)
            if layer is None:
                continue
            layer.shape = tensor.shape
            if id(tensor) != layer.tensor_id:
                check_is_no_part(tensor, layer.policy.name)
                stepped_ids = {id(t) for t in stepped}
                if layer.tensor_id in stepped_ids and id(tensor) not in stepped_ids:
                    raise RuntimeError(
                        f"{layer.policy.name} was replaced by another tensor after it was stepped, so its state would be lost; do that "
                        "before the first step, move the state too (optimizer.state[new] = optimizer.state.pop(old)), or build a "
                        "new optimizer and load the state into it"
                    )
                layer.tensor_id = id(tensor)
        return found

    def layout_of(self, tensor: Tensor, layer: Layer | None) -> Layout:
        """What lies in a tensor that is stepped.

        Args:
            layer: from :meth:`layers_of_group`.

        Raises:
            RuntimeError: the tensor is neither a layer nor a known partition of some, or a part of a layer whose rest is unknown.
        """
        partition = self.partitions.get(tensor)
        if partition is not None:
            groups = () if partition.process_group is None else (partition.process_group,)
            return Layout(
                partition.layer_map,
                [self.of_parameter[p].policy for p in partition.parameters],
                [groups + self.own_groups(p) for p in partition.parameters],
            )
        if layer is None:
            raise RuntimeError(
                f"the optimizer was handed a tensor of {tensor.numel()} elements that is none of the parameters it was built "
                "with. A wrapper (DeepSpeed ZeRO, FSDP) has replaced them, and norms over what it hands out would not be "
                "the norms of layers. With DeepSpeed, call largebatch.register() before deepspeed.initialize(); with FSDP, "
                "use fully_shard (FSDP2). A new layer of your own is taken by add_param_group()"
            )
        if isinstance(tensor, DTensor):
            return Layout(layer_map_of(tensor), [layer.policy], [process_groups_of(tensor)])
        if is_tensor_parallel(tensor) and not self.is_attached and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"{layer.policy.name} is marked as a part of a layer that tensor parallelism has cut "
                f"({' or '.join(TENSOR_PARALLEL_MARKS)}), and nothing says over which ranks; its norm is that of all parts. Use it "
                "under DeepSpeed with mpu=, or say it before the first step: optimizer.attach({}, {parameter: process group}), "
                "without those that are whole"
            )
        return Layout(whole_layer(tensor.numel()), [layer.policy], [self.own_groups(tensor)])

    def own_groups(self, parameter: Tensor) -> ProcessGroups:
        """Over which a parameter is cut itself, beside any partitioning."""
        return (self.cut_over[parameter],) if parameter in self.cut_over else ()

    def is_cut_itself(self, tensor: Tensor) -> bool:
        """Whether the elements of a tensor's layers are not numbered as those of the whole layers are."""
        partition = self.partitions.get(tensor)
        parameters = (tensor,) if partition is None else partition.parameters
        return any(isinstance(p, DTensor) or p in self.cut_over for p in parameters)
