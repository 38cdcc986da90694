"""The state of an optimizer, made anew for the tensors of another layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from largebatch.engine.checkpoint.saved import LayerState
from largebatch.engine.wrappers import SteppedTensor
from largebatch.optim.layerwise import LayerwiseOptimizer
from largebatch.optim.state import LAYER_STATE

logger = logging.getLogger("largebatch")

SAME_STATE = (
    ("LARS",),
    ("LAMB", "NLAMB", "NNLAMB"),
    ("SGD",),
    ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"),
    ("Adagrad",),
    ("DeepSpeedCPUAdagrad",),
)
"""Optimizers whose state has the same names and the same meaning."""


def check_optimizers(saved: str, current: str, path: str) -> None:
    """
    Raises:
        ValueError: the state of one means nothing to the other.
    """
    if saved == current or any(saved in family and current in family for family in SAME_STATE):
        return
    raise ValueError(
        f"{path!r} holds the state of {saved}, and this run trains with {current}; expected an optimizer with the same state. "
        "Take over the weights alone (load_optimizer_states=False), or see `largebatch convert --help`"
    )


def scalars_of(layers: Sequence[LayerState], names: Sequence[str]) -> dict[str, Any]:
    """The scalars, such as step, of a tensor that holds several layers.

    Args:
        layers, names: [num_layers] of the tensor, also of those of which this rank owns nothing.

    Raises:
        ValueError: they differ between the layers.
    """
    described = [layer for layer in layers if layer.elementwise or layer.scalars]
    without = [n for n, s in zip(names, layers, strict=True) if not (s.elementwise or s.scalars)]
    if described and without:
        logger.info("%s had no gradient and no state; it begins with zeros", ", ".join(without[:4]))
    found = dict(described[0].scalars) if described else {}
    if LAYER_STATE in found:
        nothing = torch.zeros_like(found[LAYER_STATE])
        found[LAYER_STATE] = torch.stack([layer.scalars.get(LAYER_STATE, nothing) for layer in layers])
    for name in found.keys() - {LAYER_STATE}:
        if len({float(layer.scalars[name]) for layer in described}) > 1:
            by_layer = [f"{n}: {float(s.scalars[name]):g}" for n, s in zip(names, layers, strict=True) if s.scalars]
            raise ValueError(
                f"{name} differs between layers that lie in one partition here ({', '.join(by_layer[:4])}); it is one number "
                "for each partition. Load at ZeRO stage 0"
            )
    return found


def make_state(
    optimizer: Any, stepped: SteppedTensor, layers: Sequence[LayerState], scalars: dict[str, Any]
) -> dict[str, tuple[Tensor, str]]:
    """Makes the state of a tensor: its scalars, and zeros to be filled in.

    Args:
        layers: [num_layers] of the tensor. scalars: from :func:`scalars_of`.

    Returns:
        {name: (tensor laid out as the stepped one, name in the checkpoint)}; empty if the checkpoint has no state.
    """
    elementwise = next((layer.elementwise for layer in layers if layer.elementwise), {})
    if not elementwise and not scalars:
        optimizer.state.pop(stepped.tensor, None)
        return {}
    make = state_of_ours if isinstance(optimizer, LayerwiseOptimizer) else state_of_any
    return make(optimizer, stepped, elementwise, scalars)


def state_of_ours(
    optimizer: LayerwiseOptimizer, stepped: SteppedTensor, elementwise: dict[str, torch.dtype], scalars: dict[str, Any]
) -> dict[str, tuple[Tensor, str]]:
    num_layers = len(stepped.partition.parameters)
    state = optimizer.allocate_state(stepped.tensor, optimizer.param_groups[stepped.group], num_layers)
    if "step" in state:
        state["step"].fill_(float(scalars.get("step", 0)))
    if LAYER_STATE in state:
        state[LAYER_STATE].copy_(scalars[LAYER_STATE])
    names = [name for name in state if name not in ("step", LAYER_STATE)]
    return {n: (state[n], n if n in elementwise else optimizer.checkpoint_names[n]) for n in names}


def state_of_any(
    optimizer: Any, stepped: SteppedTensor, elementwise: dict[str, torch.dtype], scalars: dict[str, Any]
) -> dict[str, tuple[Tensor, str]]:
    """For torch's and DeepSpeed's elementwise optimizers."""
    state, tensor = optimizer.state[stepped.tensor], stepped.tensor
    is_deepspeeds = type(optimizer).__module__.startswith("deepspeed.")
    for name, value in scalars.items():
        if name == "step" and is_deepspeeds:
            state[name] = int(value)
        elif name == "step":
            group = optimizer.param_groups[stepped.group]
            device = tensor.device if group.get("capturable") or group.get("fused") else torch.device("cpu")
            state[name] = torch.tensor(float(value), device=device)
        else:
            state[name] = value.clone() if isinstance(value, Tensor) else value
    for name, dtype in elementwise.items():
        if name not in state or state[name].shape != tensor.shape:
            state[name] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)
    return {name: (state[name], name) for name in elementwise}
