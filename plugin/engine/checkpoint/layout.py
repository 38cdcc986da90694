"""How an engine holds its layers: written into every checkpoint, so that another layout can find them there again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from largebatch.engine.internals import internal
from largebatch.engine.wrappers import READERS, SteppedTensor, name_of, reader_of, stepped_tensors
from largebatch.layer_map.segment import Cut

KEY = "largebatch_layout"
"""Under which the layout lies in the model states of a checkpoint."""

FORMAT = 1


@dataclass(frozen=True)
class NamedCut:
    """A tensor that the optimizer steps: the layers in it, and how they are cut over the ranks.

    Attributes:
        group: number of its param group.
        layers: [num_layers] names, numbered as in ``cut``.
    """

    group: int
    layers: tuple[str, ...]
    cut: Cut


@dataclass(frozen=True)
class EngineLayout:
    """Where every layer's master weights and optimizer state lie.

    Attributes:
        wrapper: DeepSpeed's class around the optimizer; "" for none.
        precision: "fp32", "bf16" or "fp16", of the model's own weights.
        offload: device of the optimizer's state: "none", "cpu" or "nvme".
        optimizer: class name.
        groups: names of each param group's layers, in the order in which they were given.
        shapes: layer -> shape.
        cuts: in the order in which the checkpoint's files list the masters.
        obstacle: why this can be loaded at no other layout; "" if it can.
        origin: what a converter has made the checkpoint of; "" if an engine has saved it.
    """

    world_size: int
    zero_stage: int
    wrapper: str
    precision: str
    offload: str
    optimizer: str
    groups: tuple[tuple[str, ...], ...]
    shapes: dict[str, tuple[int, ...]]
    cuts: tuple[NamedCut, ...]
    obstacle: str = ""
    origin: str = ""

    @property
    def num_shards(self) -> int:
        """Files of optimizer state: one for each rank under ZeRO."""
        return self.world_size if self.zero_stage else 1

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineLayout:
        """
        Raises:
            ValueError: written by a later version.
        """
        values = dict(values)
        found = values.pop("format")
        if found != FORMAT:
            raise ValueError(f"the checkpoint's layout has format {found}; expected {FORMAT}. Update largebatch")
        values["groups"] = tuple(tuple(group) for group in values["groups"])
        values["shapes"] = {name: tuple(shape) for name, shape in values["shapes"].items()}
        values["cuts"] = tuple(
            NamedCut(c["group"], tuple(c["layers"]), Cut(**{k: as_tuple(v) for k, v in c["cut"].items()}))
            for c in values["cuts"]
        )
        return cls(**values)

    def __str__(self) -> str:
        if self.origin:
            return f"whole layers from {self.origin}"
        offload = f", optimizer on {self.offload}" if self.offload != "none" else ""
        groups = f", {len(self.groups)} param groups" if len(self.groups) > 1 else ""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        return f"{ranks}, ZeRO stage {self.zero_stage}, {self.precision}{offload}{groups}"


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def can_be_described(engine: Any) -> bool:
    """Whether the engine steps an optimizer whose wrapper is known."""
    return name_of(engine.optimizer) in READERS


def describe(engine: Any) -> EngineLayout:
    """The layout of an engine; see :func:`can_be_described`. Not a collective."""
    names = engine.param_names
    groups = reader_of(engine.optimizer).grouped_parameters(engine.optimizer)
    shapes = {names[p]: tuple(getattr(p, "ds_shape", p.shape)) for group in groups for p in group}
    tensors = stepped_tensors(engine.optimizer)
    return EngineLayout(
        world_size=dist.get_world_size(),
        zero_stage=int(engine.zero_optimization_stage()),
        wrapper=name_of(engine.optimizer),
        precision="bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        offload=device_of(engine._config.zero_config.offload_optimizer),
        optimizer=type(engine.basic_optimizer).__name__,
        groups=tuple(tuple(names[p] for p in group) for group in groups),
        shapes=shapes,
        cuts=tuple(NamedCut(t.group, tuple(names[p] for p in t.partition.parameters), cut_of(t)) for t in tensors),
        obstacle=obstacle_in(engine, tensors),
    )


def cut_of(tensor: SteppedTensor) -> Cut:
    cut = tensor.partition.cut
    assert cut is not None, "the readers of wrappers always give the cut"
    return cut


def device_of(offload: Any) -> str:
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))


def obstacle_in(engine: Any, tensors: list[SteppedTensor]) -> str:
    """What keeps a layout from being exchanged for another; "" if nothing does."""
    zero = engine._config.zero_config
    world_size = dist.get_world_size()
    groups = [t.partition.process_group for t in tensors]
    if isinstance(engine.module, internal("PipelineModule")):
        return "pipeline stages"
    if engine.has_moe_layers:
        return "layers of experts"
    if engine.mp_world_size > 1:
        return f"tensor parallelism over {engine.mp_world_size} ranks"
    if any(group is not None and dist.get_world_size(group) != world_size for group in groups):
        return "partitions over a part of the ranks"
    if "nvme" in (device_of(zero.offload_optimizer), device_of(zero.offload_param)):
        return "offload to NVMe"
    if zero.elastic_checkpoint:
        return "zero_optimization.elastic_checkpoint"
    if engine.random_ltd_enabled() or engine.curriculum_learning_enabled():
        return "random layer token drop or curriculum learning"
    return ""


def differences(saved: EngineLayout, current: EngineLayout) -> list[str]:
    """What is not the same, in words; empty if DeepSpeed's own files fit as they are."""
    if saved.origin:
        return [f"converted from {saved.origin}"]
    found = [
        f"{words} {ours} in place of {theirs}"
        for words, theirs, ours in (
            ("world size", saved.world_size, current.world_size),
            ("ZeRO stage", saved.zero_stage, current.zero_stage),
            ("precision", saved.precision, current.precision),
            ("optimizer offload", saved.offload, current.offload),
            ("optimizer", saved.optimizer, current.optimizer),
            ("param groups", len(saved.groups), len(current.groups)),
        )
        if theirs != ours
    ]
    if found:
        return found
    if saved.groups != current.groups or saved.shapes != current.shapes:
        return ["other layers in the param groups"]
    if saved.wrapper != current.wrapper:
        return [f"{current.wrapper or 'no wrapper'} in place of {saved.wrapper or 'none'}"]
    return ["layers cut at other places"] if saved.cuts != current.cuts else []
