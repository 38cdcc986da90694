"""The state of a layer-wise optimizer: made, saved and loaded, with the names that each reader expects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from largebatch.kernels.reference import compute_dtype
from largebatch.rules.rule import Rule


def fill_state(state: dict[str, Tensor], tensor: Tensor, rule: Rule) -> None:
    """Adds what the rule needs and the state lacks: zeros in the compute dtype, laid out like the tensor."""
    if rule.counts_steps and "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
    for name in rule.elementwise_state:
        if name not in state:
            dtype = compute_dtype(tensor.dtype)
            state[name] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)


def step_number(state: Mapping[str, Tensor], device: torch.device) -> float | Tensor:
    """t of the step being taken: a Python float on the CPU, elsewhere 0-dim fp64 on the device."""
    step = state["step"]
    return float(step) + 1 if device.type == "cpu" else step.to(device, torch.float64) + 1


def with_checkpoint_names(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """State as DeepSpeed's universal checkpoints want it: exp_avg, exp_avg_sq and step; what we lack costs four bytes."""
    renamed = {names.get(name, name): value for name, value in state.items()}
    for value in list(renamed.values()):
        renamed.setdefault("exp_avg_sq", value.new_zeros(()).expand(value.shape))
    renamed.setdefault("step", torch.zeros(()))
    return renamed


def has_checkpoint_names(state: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    return any(other in state for other in names.values())


def with_own_names(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of :func:`with_checkpoint_names`."""
    return {own: state[other] for own, other in names.items() if other in state}


def check_same_meaning(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Raises ValueError if the state was made under a formula in which the same buffer means something else."""
    for saved, group in zip(saved_groups, groups, strict=False):
        for name in ("formulation", "lr_in_momentum"):
            if name in group and saved.get(name, group[name]) != group[name]:
                raise ValueError(
                    f"the saved momentum was made with {name}={saved[name]!r} and this optimizer has "
                    f"{name}={group[name]!r}; the buffers mean different things. Build it with {name}={saved[name]!r}"
                )
