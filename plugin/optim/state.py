"""The state of a layer-wise optimizer: made, saved and loaded, with the names that each reader expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.rules.rule import Rule

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Legal values of the optimizers' ``state_dtype`` argument. fp64 parameters have fp64 state, whatever it says."""


LAYER_STATE = "layer_state"
"""Name of what is kept of each layer: [layers of the tensor, len(rule.layer_state)] fp64."""


def state_dtype_of(tensor: Tensor, requested: str) -> torch.dtype:
    """dtype of the elementwise state of a tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else STATE_DTYPES[requested]


def dtype_of(name: str, tensor: Tensor, requested: str) -> torch.dtype:
    """Of the state with that name."""
    return {"step": torch.float32, LAYER_STATE: torch.float64}.get(name) or state_dtype_of(tensor, requested)


def needs_step(rule: Rule, dtype: torch.dtype) -> bool:
    """Whether state of this dtype has a step count: the rule's, or the one that stochastic rounding draws from."""
    return rule.counts_steps or (dtype == torch.bfloat16 and bool(rule.elementwise_state))


def fill_state(
    state: dict[str, Tensor], tensor: Tensor, rule: Rule, requested_dtype: str, num_layers: int | None = 1
) -> None:
    """Adds what the rule needs and the state lacks: zeros, laid out like the tensor; and a step count of its own.

    The count is changed in place, and an engine may have loaded one tensor into several states.

    Args:
        num_layers: in the tensor; None while that is not known, and the layers' own state is not made.
    """
    dtype = state_dtype_of(tensor, requested_dtype)
    if needs_step(rule, dtype):
        step = state.get("step", 0.0)
        device = tensor.device if tensor.device.type != "meta" else None
        value = (
            step.detach().to(device, torch.float32).reshape(())
            if isinstance(step, Tensor)
            else torch.full((), float(step), dtype=torch.float32, device=device)  # without a copy from the host
        )
        state["step"] = value.clone()
    for name in rule.elementwise_state:
        if name not in state:
            state[name] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)
        elif state[name].dtype != dtype:
            state[name] = state[name].to(dtype)
    if rule.layer_state and num_layers is not None:
        shape, found = (num_layers, len(rule.layer_state)), state.get(LAYER_STATE)
        if found is None:
            state[LAYER_STATE] = torch.zeros(shape, dtype=torch.float64, device=tensor.device)
        elif found.shape != shape:
            raise ValueError(
                f"the loaded {LAYER_STATE} has shape {tuple(found.shape)}; expected {shape}, a row for each layer in the tensor. "
                "It was saved at another layout; load it by the engine's load_checkpoint"
            )


def new_states(tensors: Sequence[Tensor], rule: Rule, requested_dtype: str) -> list[dict[str, Tensor]]:
    """What :func:`fill_state` would make for tensors without any state, so that a step over thousands of them is faster.

    What says where a tensor lies is made for all of them before any elements are: a step that looks it up finds it side by
    side in memory. A step of LAMB with 10,000 tensors of 1,000 elements takes 0.9 of the time.
    """
    dtypes = [state_dtype_of(tensor, requested_dtype) for tensor in tensors]
    names = rule.elementwise_state
    states: list[dict[str, Any]] = [
        ({"step": 0.0} if needs_step(rule, dtype) else {})
        | {name: torch.empty(0, dtype=dtype, device=t.device) for name in names}
        for t, dtype in zip(tensors, dtypes, strict=True)
    ]
    for name in names:
        for tensor, state in zip(tensors, states, strict=True):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous():
                state[name].resize_(tensor.shape).zero_()
            else:
                dtype = state[name].dtype
                state[name] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)
    for tensor, state in zip(tensors, states, strict=True):
        fill_state(state, tensor, rule, requested_dtype, None)
    return states


def with_checkpoint_names(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """State as DeepSpeed's universal checkpoints want it: exp_avg, exp_avg_sq and step; what we lack costs four bytes."""
    renamed = {names.get(name, name): value for name, value in state.items()}
    for value in list(renamed.values()):
        renamed.setdefault("exp_avg_sq", value.new_zeros(()).expand(value.shape))
    renamed.setdefault("step", torch.zeros(()))
    return renamed


def has_checkpoint_names(state: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    return any(other in state for other in names.values())


def with_own_names(state: Mapping[str, Any], names: Mapping[str, str], *, has_step: bool) -> dict[str, Any]:
    """The inverse of :func:`with_checkpoint_names`.

    Args:
        has_step: whether the step in it is a count of ours, and no filling.
    """
    others = [name for name in ("step", LAYER_STATE) if name in state and (has_step or name != "step")]
    return {own: state[other] for own, other in names.items() if other in state} | {n: state[n] for n in others}


COMMON_OPTIONS = (
    "lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "bias_correction", "decoupled_weight_decay",
)  # fmt: skip
"""Options of ours that other optimizers' param groups have, too."""


def check_is_own(
    state_dict: Mapping[str, Any],
    names: Mapping[str, str],
    rules: Sequence[Rule],
    options: Sequence[str],
    optimizer_class: type,
) -> None:
    """Raises ValueError for the state of another optimizer, whose buffers have other names or another meaning.

    Args:
        names: our state names -> those of a sharded engine's checkpoints. rules: of the optimizer's param groups.
        options: names of ours.
    """
    own = [name for name in options if name not in COMMON_OPTIONS]
    others_groups = [g for g in state_dict["param_groups"] if g["params"] and not any(name in g for name in own)]
    ids = {i for group in state_dict["param_groups"] for i in group["params"]}
    needed = {name for rule in rules for name in rule.elementwise_state}
    others = [
        state
        for i, state in state_dict["state"].items()
        if i in ids and state and not needed <= set(state) and not has_checkpoint_names(state, names)
    ]
    if others_groups or others:
        what = (
            f"state named {', '.join(map(str, others[0]))}"
            if others
            else "a param group without " + " or ".join(own[:3])
        )
        raise ValueError(
            f"the state dict holds {what}, and {optimizer_class.__name__} has {', '.join(sorted(needed))}: it is another "
            "optimizer's. `largebatch convert` makes ours of the state of torch, apex, timm and DeepSpeed; or take over the "
            "weights alone"
        )
    if any(rule.counts_steps for rule in rules):
        for i, state in state_dict["state"].items():
            if i in ids and state and "step" not in state and not has_checkpoint_names(state, names):
                raise ValueError(
                    f"the state of parameter {i} has {', '.join(map(str, state))} and no step; {optimizer_class.__name__} would "
                    "begin at step 0 with the moments of a later one. Give each state its step, or leave the state out"
                )


def check_same_meaning(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Raises ValueError if the state was made under a formula in which the same buffer means something else."""
    for saved, group in zip(saved_groups, groups, strict=False):
        for name in ("formulation", "lr_in_momentum"):
            if name in group and saved.get(name, group[name]) != group[name]:
                raise ValueError(
                    f"the saved momentum was made with {name}={saved[name]!r} and this optimizer has "
                    f"{name}={group[name]!r}; the buffers mean different things. Build it with {name}={saved[name]!r}"
                )
