"""A checkpoint on the disk, whatever layout it was saved in: its layers, read file by file and piece by piece.

Files are mapped into memory, not read: what is copied out of them is all that is ever loaded.
"""

from __future__ import annotations

import glob
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from largebatch.engine.checkpoint.layout import KEY, EngineLayout
from largebatch.engine.wrappers import READERS, SavedOptimizer
from largebatch.optim.state import LAYER_STATE

MASTER = "master"
"""Name of the fp32 weights beside the names of the optimizer's state."""


@dataclass(frozen=True)
class Piece:
    """A part of a layer in one file.

    Attributes:
        start: of its first element in the flattened layer.
        tensors: name -> 1-D tensor: MASTER and the elementwise state.
    """

    layer: str
    start: int
    tensors: dict[str, Tensor]

    @property
    def stop(self) -> int:
        return self.start + self.tensors[MASTER].numel()


@dataclass(frozen=True)
class LayerState:
    """What the optimizer keeps of a layer beside elementwise tensors, and what those are called.

    Attributes:
        group: number of its param group in the checkpoint.
        elementwise: name -> dtype.
        scalars: name -> number or 0-dim tensor, such as step; LAYER_STATE -> 1-dim fp64, the layer's own.
    """

    group: int
    elementwise: dict[str, torch.dtype]
    scalars: dict[str, Any]


class SavedCheckpoint:
    """A DeepSpeed checkpoint that says where its layers lie.

    Args:
        path: folder of one checkpoint (with the tag).
        layout: from :func:`layout_in`.
    """

    def __init__(self, path: str, layout: EngineLayout):
        self.path, self.layout = path, layout

    def missing_files(self) -> list[str]:
        """Names of the files that another layout needs and that are not there."""
        names = [self.model_file(r) for r in range(self.num_model_files)]
        if self.layout.zero_stage:
            names += [self.optimizer_file(r) for r in range(self.layout.num_shards)]
        return [name for name in names if not os.path.isfile(os.path.join(self.path, name))]

    @property
    def num_model_files(self) -> int:
        return self.layout.world_size if self.layout.zero_stage == 3 else 1

    def model_file(self, rank: int) -> str:
        prefix = f"zero_pp_rank_{rank}_" if self.layout.zero_stage == 3 else ""
        return f"{prefix}mp_rank_00_model_states.pt"

    def optimizer_file(self, rank: int) -> str:
        prefix = "bf16_" if self.layout.precision == "bf16" else ""
        return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    def model_states(self, rank: int = 0) -> dict[str, Any]:
        """The engine's own state, the module's buffers, and its weights except under ZeRO 3. Tensors are mapped."""
        return mapped(os.path.join(self.path, self.model_file(rank)))

    def optimizer(self, shard: int) -> SavedOptimizer:
        read = READERS[self.layout.wrapper].saved
        if self.layout.zero_stage:
            return read(mapped(os.path.join(self.path, self.optimizer_file(shard)))["optimizer_state_dict"], {}, [])
        states = self.model_states()
        return read(states["optimizer"], states["module"], [cut.layers[0] for cut in self.layout.cuts])

    def states_of_tensors(self, saved: SavedOptimizer) -> list[dict[str, Any]]:
        """The optimizer's state of each cut's tensor."""
        states, taken = saved.state_dict["state"], [0] * len(self.layout.groups)
        found = []
        for cut in self.layout.cuts:
            number = saved.state_dict["param_groups"][cut.group]["params"][taken[cut.group]]
            taken[cut.group] += 1
            found.append({k: v for k, v in states.get(number, {}).items() if v is not None})
        return found

    def layer_states(self, saved: SavedOptimizer) -> dict[str, LayerState]:
        """
        Raises:
            ValueError: the optimizer keeps something that is neither elementwise nor one number a tensor.
        """
        found = {}
        for cut, master, state in zip(self.layout.cuts, saved.masters, self.states_of_tensors(saved), strict=True):
            elementwise, scalars, of_layers = {}, {}, None
            for name, value in state.items():
                if name == LAYER_STATE:
                    of_layers = value
                elif is_elementwise(name, value, master, cut.cut.partition_numel):
                    elementwise[name] = value.dtype
                elif not isinstance(value, Tensor) or value.numel() == 1:
                    scalars[name] = value
                else:
                    raise ValueError(
                        f"{self.path!r}: {self.layout.optimizer} keeps {name!r} of shape {tuple(value.shape)} for layers of "
                        f"{master.numel()} elements; expected state of one number an element, because anything else "
                        "cannot be cut anew. Resume at the layout that it was saved in"
                    )
            for i, layer in enumerate(cut.layers):
                own = {} if of_layers is None else {LAYER_STATE: of_layers[i]}
                found[layer] = LayerState(cut.group, elementwise, scalars | own)
        return found

    def pieces(self, shard: int) -> Iterator[Piece]:
        """What one file holds, layer by layer; tensors are mapped and valid while the piece is kept."""
        saved = self.optimizer(shard)
        for cut, master, state in zip(self.layout.cuts, saved.masters, self.states_of_tensors(saved), strict=True):
            flats = {MASTER: flat(master)}
            flats |= {
                name: flat(value)
                for name, value in state.items()
                if is_elementwise(name, value, master, cut.cut.partition_numel)
            }
            for s in cut.cut.layer_map(shard).segments:
                tensors = {name: tensor[s.start : s.stop] for name, tensor in flats.items()}
                yield Piece(cut.layers[s.layer], s.layer_start, tensors)

    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what frozen_pieces may give: up to stage 2 everything in the model's state_dict."""
        states = self.model_states()
        if self.layout.zero_stage < 3:
            return {name: tuple(v.shape) for name, v in states["module"].items() if isinstance(v, Tensor)}
        return {name: tuple(shape) for name, shape in (states.get("frozen_param_shapes") or {}).items()}

    def frozen_pieces(self, shard: int, names: list[str]) -> Iterator[Piece]:
        """Of the parameters that no optimizer steps; under ZeRO 3 each file has a slice of them."""
        states = self.model_states(shard)
        fragments, shapes = states.get("frozen_param_fragments") or {}, states.get("frozen_param_shapes") or {}
        for name in names:
            if self.layout.zero_stage < 3:
                if name in states["module"]:
                    yield Piece(name, 0, {MASTER: flat(states["module"][name])})
            elif name in fragments:
                fragment, numel = flat(fragments[name]), torch.Size(shapes[name]).numel()
                start = shard * fragment.numel()
                yield Piece(name, start, {MASTER: fragment[: max(0, numel - start)]})


def layout_in(path: str) -> EngineLayout | None:
    """The layout of a checkpoint; None if it holds none, because it was written without largebatch or by an old version.

    Args:
        path: folder of one checkpoint.
    """
    for name in model_files_in(path):
        values = mapped(name).get(KEY)
        return None if values is None else EngineLayout.from_dict(values)
    return None


def model_files_in(path: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(path), "*mp_rank_*_model_states.pt")))


def mapped(path: str) -> dict[str, Any]:
    """A file of a checkpoint, its tensors mapped into memory and not yet read.

    In DeepSpeed's old format ("checkpoint": {"checkpoint_serialization": false}) nothing can be mapped: that is read whole.

    Raises:
        ValueError: it is no file of torch's.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=False)
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(f"{path!r} cannot be read: {type(error).__name__}: {reason}") from error


def flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def is_elementwise(name: str, value: Any, master: Tensor, numel: int) -> bool:
    """Whether a state has one number for each of the ``numel`` elements that its tensor has with its padding."""
    if not isinstance(value, Tensor) or name in ("step", LAYER_STATE) or value.numel() != numel:
        return False
    return value.dim() > 0 or master.dim() == 0
