"""A training state with every layer consolidated into one tensor, between any two forms: read from and written to DeepSpeed's folders."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from largebatch.engine.checkpoint.layout import KEY, EngineLayout, NamedCut
from largebatch.engine.checkpoint.resharding import CONSUMED, Target, fill
from largebatch.engine.checkpoint.saved import MASTER, LayerState, SavedCheckpoint, layout_in
from largebatch.layer_map.segment import uncut
from largebatch.optim.lars import LARS

NOT_CLIENTS = CONSUMED + (
    "lr_scheduler", "optimizer", "buffer_names", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "global_samples", "ds_config", "ds_version", "checkpoint_parallel_dims", KEY,
)  # fmt: skip
"""Entries of the model states that are DeepSpeed's own."""


logger = logging.getLogger("largebatch")


@dataclass
class ConsolidatedState:
    """Weights and optimizer state, layer by layer.

    Attributes:
        weights: the model's state_dict: parameters in fp32 where they are trained, and buffers.
        optimizer: class name of whose state it is, e.g. "LAMB".
        groups: [number of groups] options, with the names of the layers under "params".
        state: layer -> name -> tensor shaped like the layer, or a number such as step.
        num_steps: optimizer steps taken, skipped ones left out; None if not known.
        scheduler: state_dict of the learning-rate schedule, or None.
        counts: global_steps, global_samples and skipped_steps of an engine, where known.
        client_state: what the program that saved has put beside.
    """

    weights: dict[str, Tensor]
    optimizer: str
    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]]
    num_steps: int | None = None
    scheduler: dict[str, Any] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    client_state: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """In the order of the param groups."""
        return [name for group in self.groups for name in group["params"]]


def read_deepspeed(path: str) -> ConsolidatedState:
    """A checkpoint that DeepSpeed has written with largebatch registered, at any layout. One process; the result is as large
    as the model in fp32 with its state.

    Args:
        path: folder of one checkpoint (with the tag).

    Raises:
        ValueError: it does not say where its layers lie, or lies there in a way that cannot be undone (pipeline stages,
            experts, tensor parallelism), or files are missing.
    """
    layout = layout_in(path) if os.path.isdir(path) else None
    if layout is None:
        raise ValueError(
            f"{path!r} is no checkpoint that says where its layers lie; expected a folder such as checkpoints/step100, written "
            "with largebatch registered. Load an older one where it was saved and save it again"
        )
    saved = SavedCheckpoint(path, layout)
    if layout.obstacle:
        raise ValueError(
            f"{path!r} was saved with {layout.obstacle}, and layers made whole from that are not supported"
        )
    missing = saved.missing_files()
    if missing:
        raise ValueError(f"{path!r} has no {', '.join(missing[:3])}; copy the files of all nodes into one folder")
    states, shard = saved.model_states(), saved.optimizer(0)
    layer_states = saved.layer_states(shard)
    weights, state = read_layers(saved, layer_states)
    trained = {states["module"][n].data_ptr(): n for n in weights if n in states["module"]}
    for name, tensor in states["module"].items():
        if name not in weights and tensor.numel() > 0:  # a buffer, not trained, or a second name of a layer
            twin = trained.get(tensor.data_ptr())
            weights[name] = tensor.clone() if twin is None else weights[twin]
    for number in range(saved.num_model_files):
        for piece in saved.frozen_pieces(number, list(states.get("frozen_param_shapes") or {})):
            consolidated = weights.setdefault(
                piece.layer, piece.tensors[MASTER].new_zeros(torch.Size(states["frozen_param_shapes"][piece.layer]))
            )
            consolidated.view(-1)[piece.start : piece.stop] = piece.tensors[MASTER]
    for name, other in (states.get("shared_params") or {}).items():
        weights[name] = weights[other]
    ordered = {name: weights.pop(name) for name in states["module"] if name in weights} | weights
    options = shard.state_dict["param_groups"]
    return ConsolidatedState(
        weights=ordered,
        optimizer=layout.optimizer,
        groups=[{**o, "params": list(names)} for o, names in zip(options, layout.groups, strict=True)],
        state=state,
        num_steps=states["global_steps"] - states["skipped_steps"],
        scheduler=states.get("lr_scheduler"),
        counts={name: states[name] for name in ("global_steps", "global_samples", "skipped_steps")},
        client_state={key: value for key, value in states.items() if key not in NOT_CLIENTS},
    )


def read_layers(
    saved: SavedCheckpoint, layer_states: dict[str, LayerState]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """fp32 weights and state of every layer that is trained."""
    weights, state, targets = {}, {}, []
    renamed = LARS.checkpoint_names if saved.layout.optimizer == "LARS" else {}
    for name, shape in saved.layout.shapes.items():
        layer = layer_states[name]
        kept = wanted_state(saved.layout.optimizer, layer)
        tensors = {MASTER: torch.empty(shape)} | {n: torch.empty(shape, dtype=d) for n, d in kept.items()}
        targets.append(Target(name, 0, {n: t.view(-1) for n, t in tensors.items()}, {n: n for n in tensors}))
        weights[name] = tensors.pop(MASTER)
        back = {other: own for own, other in renamed.items()}
        state[name] = {back.get(n, n): t for n, t in tensors.items()}
        if saved.layout.optimizer != "LARS" or torch.bfloat16 in kept.values():  # else a placeholder
            state[name] |= layer.scalars
    fill(targets, saved, is_strict=True)
    return weights, state


def wanted_state(optimizer: str, layer: LayerState) -> dict[str, torch.dtype]:
    """Without the placeholders that LARS puts into a sharded engine's checkpoints."""
    if optimizer != "LARS":
        return layer.elementwise
    return {
        n: d for n, d in layer.elementwise.items() if n in (*LARS.checkpoint_names, *LARS.checkpoint_names.values())
    }


def write_deepspeed(consolidated: ConsolidatedState, path: str, origin: str) -> None:
    """A checkpoint folder that any engine can load, at any layout, with largebatch registered.

    Args:
        path: of the folder, which must not exist.
        origin: what it was made of, in words; said when it is loaded.

    Raises:
        ValueError: the folder exists.
    """
    if os.path.exists(path):
        raise ValueError(f"{path!r} exists; choose another name")
    layers = consolidated.layers
    if any(consolidated.weights[name].dtype == torch.float64 for name in layers):
        logger.warning("%r: weights of fp64 will be rounded to fp32, which DeepSpeed's masters are", path)
    group_of = {name: number for number, group in enumerate(consolidated.groups) for name in group["params"]}
    layout = EngineLayout(
        world_size=1,
        zero_stage=0,
        wrapper="",
        precision="fp32",
        offload="none",
        optimizer=consolidated.optimizer,
        groups=tuple(tuple(group["params"]) for group in consolidated.groups),
        shapes={name: tuple(consolidated.weights[name].shape) for name in layers},
        cuts=tuple(NamedCut(group_of[n], (n,), uncut(consolidated.weights[n].numel())) for n in layers),
        origin=origin,
    )
    steps = consolidated.num_steps or 0
    states = {
        "module": consolidated.weights,
        "optimizer": torch_state_dict(consolidated),
        "lr_scheduler": consolidated.scheduler,
        "global_steps": steps,
        "global_samples": 0,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
    }
    states |= consolidated.counts | consolidated.client_state | {KEY: layout.to_dict()}
    partial = f"{path}.partial"
    os.makedirs(partial)
    torch.save(states, os.path.join(partial, "mp_rank_00_model_states.pt"))
    os.rename(partial, path)


def torch_state_dict(consolidated: ConsolidatedState) -> dict[str, Any]:
    """The optimizer's part as torch.optim.Optimizer.load_state_dict wants it: layers numbered in the order of the groups."""
    numbers = {name: number for number, name in enumerate(consolidated.layers)}
    groups = [group | {"params": [numbers[n] for n in group["params"]]} for group in consolidated.groups]
    return {"state": {numbers[n]: dict(s) for n, s in consolidated.state.items() if s}, "param_groups": groups}
