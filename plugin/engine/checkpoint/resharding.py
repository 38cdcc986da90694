"""Loads a checkpoint of any layout into an engine of any other: each rank copies the elements that it owns, and no others.

No rank ever holds a whole layer of another's: files are mapped into memory one after the other, and each piece goes straight
into the engine's own tensors. What this needs beside them is the pages of one file that are being copied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.engine.checkpoint.agreement import raise_together
from largebatch.engine.checkpoint.groups import options_for, scheduler_state_for
from largebatch.engine.checkpoint.layout import EngineLayout, NamedCut, describe
from largebatch.engine.checkpoint.remade_state import check_optimizers, make_state, scalars_of
from largebatch.engine.checkpoint.saved import MASTER, LayerState, Piece, SavedCheckpoint
from largebatch.engine.lr_schedulers import FactorLR
from largebatch.engine.wrappers import (
    SteppedTensor,
    before_loading,
    refresh_parameters,
    restore_loss_scale,
    stepped_tensors,
)

logger = logging.getLogger("largebatch")

CONSUMED = ("module", "skipped_steps", "global_steps", "dp_world_size", "mp_world_size", "data_sampler", "random_ltd")
"""What DeepSpeed's load_checkpoint does not hand back as client state."""


@dataclass
class Target:
    """A part of a layer that this rank owns, and where it goes.

    Attributes:
        start: of its first element in the flattened layer.
        tensors: name -> 1-D view into the engine's tensor; written.
        sources: name -> name in the checkpoint.
    """

    layer: str
    start: int
    tensors: dict[str, Tensor]
    sources: dict[str, str]
    num_filled: int = 0

    @property
    def numel(self) -> int:
        return self.tensors[MASTER].numel()

    def overlap(self, start: int, stop: int) -> tuple[int, int]:
        """Of this part with the layer's elements [start, stop); empty if the first is not below the second."""
        return max(self.start, start), min(self.start + self.numel, stop)

    def take(self, piece: Piece) -> None:
        first, last = self.overlap(piece.start, piece.stop)
        if first >= last:
            return
        for name, tensor in self.tensors.items():
            source, part = piece.tensors.get(self.sources[name]), tensor[first - self.start : last - self.start]
            if source is None:  # a layer that had no gradient so far
                part.zero_()
            else:
                part.copy_(source[first - piece.start : last - piece.start])
        self.num_filled += last - first


@torch.no_grad()
def load(
    engine: Any,
    saved: SavedCheckpoint,
    *,
    with_optimizer: bool = True,
    with_scheduler: bool = True,
    with_counters: bool = True,
    is_strict: bool = True,
) -> dict[str, Any]:
    """Weights, and unless told otherwise optimizer state, schedule, counters and loss scale. A collective.

    Args:
        engine: with an optimizer whose wrapper is known; it need not be fresh.
        with_optimizer, with_scheduler, with_counters: as DeepSpeed's load_optimizer_states, load_lr_scheduler_states, and
            the opposite of load_module_only.
        is_strict: all parameters have to be there. If not, and without the optimizer, those that are not there stay as they
            are and are named in the log.

    Returns:
        The client state that was given when the checkpoint was saved, and DeepSpeed's own entries.

    Raises:
        ValueError: on all ranks: the layouts cannot be exchanged, the layers are others, the optimizer is another, or
            files are missing. Nothing has been changed.
        RuntimeError: on all ranks: a file could not be read. The engine is not to be used.
    """
    current = describe(engine)
    optimizer, stepped = engine.basic_optimizer, stepped_tensors(engine.optimizer)
    with raise_together(f"{saved.path!r} cannot be loaded"):
        check_exchange(saved, current)
        check_layers(engine, saved, current, with_optimizer=with_optimizer, is_strict=is_strict)
        states, shard = saved.model_states(), saved.optimizer(0)
        layer_states = saved.layer_states(shard) if with_optimizer else {}
        if with_optimizer:  # frozen layers that lay beside the optimizer have no state
            layer_states |= {n: LayerState(0, {}, {}) for n in frozen_names(engine) if n not in layer_states}
        scalars = [
            scalars_of([layer_states[n] for n in cut.layers], cut.layers) for cut in current.cuts if layer_states
        ]
        options = (
            options_for(optimizer, shard.state_dict["param_groups"], saved.layout, current) if with_optimizer else []
        )
        schedule = schedule_for(engine, states, saved.layout, current) if with_scheduler and with_counters else None
    before_loading(engine.optimizer)
    with raise_together(f"{saved.path!r} could not be loaded", RuntimeError):
        views = ElementViews()
        targets = []
        for position, (tensor, cut) in enumerate(zip(stepped, current.cuts, strict=True)):
            flats, sources = {MASTER: views.of(tensor.tensor)}, {MASTER: MASTER}
            if layer_states:
                layers = [layer_states[name] for name in cut.layers]
                for name, (state, source) in make_state(optimizer, tensor, layers, scalars[position]).items():
                    flats[name], sources[name] = views.of(state), source
            targets += targets_in(tensor, cut, flats, sources)
        frozen = [
            Target(name, *slice_of_frozen(p), {MASTER: MASTER})
            for p, name in engine.param_names.items()
            if name not in current.shapes
        ]
        fill([*targets, *frozen], saved, is_strict)
        views.write_back()
        restore_buffers(engine, states)
    for group, values in zip(optimizer.param_groups, options, strict=with_optimizer):
        group.update(values)
    if with_optimizer and shard.loss_scale and current.precision == saved.layout.precision == "fp16":
        restore_loss_scale(engine.optimizer, shard.loss_scale)
    if with_counters:
        restore_counters(engine, states)
    if schedule is not None:
        engine.lr_scheduler.load_state_dict(schedule)
    refresh_parameters(engine.optimizer)
    consumed = CONSUMED + ("lr_scheduler",) * with_scheduler + ("optimizer",) * with_optimizer
    return {key: value for key, value in states.items() if key not in consumed}


class ElementViews:
    """Tensors as rows of elements in the order of the flattened layer; those in another memory format by way of a copy."""

    def __init__(self):
        self.copies: list[tuple[Tensor, Tensor]] = []

    def of(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_contiguous():
            return tensor.view(-1)
        copy = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        self.copies.append((tensor, copy))
        return copy

    def write_back(self) -> None:
        for tensor, copy in self.copies:
            tensor.copy_(copy.view(tensor.shape))


def check_exchange(saved: SavedCheckpoint, current: EngineLayout) -> None:
    """Raises ValueError for what is known to be impossible before anything is changed."""
    for whose, layout in (("saved with", saved.layout), ("to be loaded into", current)):
        if layout.obstacle:
            raise ValueError(
                f"{saved.path!r} was saved at {saved.layout} and is loaded at {current}; it is {whose} {layout.obstacle}, "
                "which can only be loaded as it was saved. Use the layout that it was saved in"
            )
    missing = saved.missing_files()
    if missing:
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        raise ValueError(
            f"{saved.path!r} was saved at {saved.layout}, and {', '.join(missing[:2])}{more} are not there. Another layout needs "
            "the files of all ranks: copy those of the other nodes into one folder that all ranks see"
        )


def check_layers(
    engine: Any, saved: SavedCheckpoint, current: EngineLayout, *, with_optimizer: bool, is_strict: bool
) -> None:
    """Raises ValueError where the layers are others: those that are trained, or for weights alone all parameters."""
    ours, theirs = dict(current.shapes), dict(saved.layout.shapes)
    if with_optimizer:
        check_optimizers(saved.layout.optimizer, current.optimizer, saved.path)
        # without ZeRO the param groups may hold layers that are frozen; with it they lie beside the optimizer
        frozen = frozen_names(engine)
        theirs |= {name: s for name, s in saved.frozen_shapes().items() if name in frozen and name not in theirs}
        ours |= {name: s for name, s in shapes_of(engine).items() if name in frozen and name in theirs}
    else:
        ours |= shapes_of(engine)
        frozen = saved.frozen_shapes()
        theirs |= {name: shape for name, shape in frozen.items() if name in ours and name not in theirs}
    wrong = []
    if with_optimizer or is_strict:
        wrong += [f"{name} is not in the checkpoint" for name in ours if name not in theirs]
        wrong += [f"{name} is not {'trained ' * with_optimizer}here" for name in theirs if name not in ours]
    wrong += [
        f"{name} has shape {ours[name]} here and {theirs[name]} there"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        hint = "" if with_optimizer or not is_strict else ". load_module_strict=False takes the layers that are in both"
        raise ValueError(f"{saved.path!r} holds other layers than the model: {', '.join(wrong[:3])}{more}{hint}")


def shapes_of(engine: Any) -> dict[str, tuple[int, ...]]:
    """Of all parameters of the model."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for p, name in engine.param_names.items()}


def frozen_names(engine: Any) -> set[str]:
    return {name for p, name in engine.param_names.items() if not p.requires_grad}


def targets_in(
    stepped: SteppedTensor, cut: NamedCut, flats: dict[str, Tensor], sources: dict[str, str]
) -> Iterator[Target]:
    """Every part of a layer that this rank owns in one tensor."""
    for s in stepped.partition.layer_map.segments:
        views = {name: flat[s.start : s.stop] for name, flat in flats.items()}
        yield Target(cut.layers[s.layer], s.layer_start, views, sources)


def fill(targets: list[Target], saved: SavedCheckpoint, is_strict: bool) -> None:
    """Copies what the files hold into the targets, opening only those that hold something of them.

    Raises:
        RuntimeError: the files do not hold every element of a target exactly once; or none, if ``is_strict``.
    """
    wanted: dict[str, list[Target]] = {}
    for target in targets:
        wanted.setdefault(target.layer, []).append(target)
    for shard in range(saved.layout.num_shards):
        if not holds_any(saved.layout, shard, wanted):
            continue
        for piece in saved.pieces(shard):
            for target in wanted.get(piece.layer, ()):
                target.take(piece)
    outside = [name for name in wanted if name not in saved.layout.shapes]  # no optimizer stepped them
    for shard in range(saved.num_model_files if outside else 0):
        for piece in saved.frozen_pieces(shard, outside):
            for target in wanted[piece.layer]:
                target.take(piece)
    absent = [name for name in wanted if not any(t.num_filled for t in wanted[name] if t.numel)]
    absent = [name for name in absent if any(t.numel for t in wanted[name])]
    if absent and not is_strict:
        logger.warning("%r does not hold %s; they stay as they are", saved.path, ", ".join(absent))
    check_filled([t for t in targets if is_strict or t.layer not in absent], saved.path)


def holds_any(layout: EngineLayout, shard: int, wanted: dict[str, list[Target]]) -> bool:
    for cut in layout.cuts:
        for s in cut.cut.layer_map(shard).segments:
            for target in wanted.get(cut.layers[s.layer], ()):
                first, last = target.overlap(s.layer_start, s.layer_start + s.numel)
                if first < last:
                    return True
    return False


def check_filled(targets: Iterable[Target], path: str) -> None:
    for target in targets:
        if target.num_filled != target.numel:
            raise RuntimeError(
                f"{path!r} holds {target.num_filled} of the {target.numel} elements of {target.layer!r} from {target.start} "
                "on; its files do not belong together"
            )


def restore_buffers(engine: Any, states: dict[str, Any]) -> None:
    persistent = engine.module.state_dict()
    for name, buffer in engine.module.named_buffers():
        if name in persistent and name in states["module"]:
            buffer.copy_(states["module"][name])


def slice_of_frozen(parameter: Tensor) -> tuple[int, dict[str, Tensor]]:
    """(first element, what this rank holds) of a parameter outside the optimizer."""
    if not hasattr(parameter, "ds_tensor"):
        return 0, {MASTER: parameter.detach().view(-1)}
    part = parameter.ds_tensor.detach().view(-1)
    start = dist.get_rank() * part.numel()
    return start, {MASTER: part[: max(0, parameter.ds_numel - start)]}


def schedule_for(
    engine: Any, states: dict[str, Any], saved: EngineLayout, current: EngineLayout
) -> dict[str, Any] | None:
    """State of the learning-rate schedule for the present param groups; None if there is no schedule or was none.

    A schedule of ours is a function of the step: without a state, as after a conversion, it goes on from the step.
    """
    scheduler = engine.lr_scheduler
    if scheduler is None:
        return None
    if states.get("lr_scheduler") is not None:
        return scheduler_state_for(states["lr_scheduler"], saved, current)
    num_steps = states["global_steps"] - states["skipped_steps"]
    if isinstance(scheduler, FactorLR):
        logger.info("the checkpoint has no learning-rate schedule; it goes on from step %d", num_steps)
        return scheduler.state_dict() | {"last_batch_iteration": num_steps}
    logger.warning(
        "the checkpoint has no learning-rate schedule; %s stays at its beginning, %d steps behind",
        type(scheduler).__name__,
        num_steps,
    )
    return None


def restore_counters(engine: Any, states: dict[str, Any]) -> None:
    """Steps and samples, as DeepSpeed's load_checkpoint."""
    engine.loaded_checkpoint_dp_world_size = states["dp_world_size"]
    engine.loaded_checkpoint_mp_world_size = states["mp_world_size"]
    engine.global_steps = states["global_steps"]
    engine.global_samples = states["global_samples"]
    engine.skipped_steps = states["skipped_steps"]
