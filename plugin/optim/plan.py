"""The calls of a step, kept as long as nothing but gradients and learning rates changes.

Sorting the tensors into calls costs milliseconds for a deep network, comparing them with the last step's costs
microseconds. Whatever a user or an engine may exchange between two steps is compared by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor

from largebatch.config import LEARNING_RATE
from largebatch.optim.calls import Call


def are_same(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists hold the same objects, compared by identity."""
    return len(first) == len(second) and all(map(is_, first, second))


@dataclass
class GroupPlan:
    """One param group as it was when its calls were made."""

    group: dict[str, Any]
    params: list[Tensor]
    option_names: tuple[str, ...]
    """All options but lr."""
    option_values: list[Any]
    has_grad: list[bool]
    states: list[dict[str, Any]]
    """Of ``tensors``."""
    state_tensors: list[Any]
    tensors: list[Tensor]
    """Those with a gradient."""
    calls: list[Call]

    def renew(self, optimizer_state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Hands this step's gradients and learning rate to the calls; False if anything else has changed."""
        group = self.group
        if not are_same(group["params"], self.params):
            return False
        if [group[name] for name in self.option_names] != self.option_values:
            return False
        grads = [parameter.grad for parameter in self.params]
        if [grad is not None for grad in grads] != self.has_grad:
            return False
        if not all(call.kernels.is_current(call.segments) for call in self.calls):
            return False
        get = optimizer_state.get
        if not are_same([get(t) for t in self.tensors], self.states):
            return False
        if not are_same([value for state in self.states for value in state.values()], self.state_tensors):
            return False
        lr = group["lr"]
        LEARNING_RATE("lr", lr)
        for call in self.calls:
            call.segments.lr = lr
            call.segments.grads = [grads[i] for i in call.positions]
        return True


def plan_group(
    group: dict[str, Any],
    option_names: tuple[str, ...],
    make_calls: Callable[[dict[str, Any]], list[Call]],
    optimizer_state: Mapping[Tensor, dict[str, Any]],
) -> GroupPlan:
    """Sorts a param group into calls."""
    calls = make_calls(group)
    params = list(group["params"])
    tensors = [parameter for parameter in params if parameter.grad is not None]
    states = [optimizer_state[t] for t in tensors]
    return GroupPlan(
        group,
        params,
        option_names,
        [group[name] for name in option_names],
        [parameter.grad is not None for parameter in params],
        states,
        [value for state in states for value in state.values()],
        tensors,
        calls,
    )
