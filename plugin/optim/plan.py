"""The calls of a step, kept as long as nothing but gradients and learning rates changes.

Sorting the tensors into calls costs milliseconds for a deep network, comparing them with the last step's costs
microseconds. Whatever a user or an engine may exchange between two steps is compared by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from largebatch.config import LEARNING_RATE, CommonOptions, as_python
from largebatch.layer_map.dtensor import local_gradient, local_part
from largebatch.optim.calls import Call
from largebatch.rules.rule import Rule

GRAD = attrgetter("grad")


def same_items(first: list[Any], second: list[Any]) -> bool:
    """Whether both have the same objects in the same order."""
    return len(first) == len(second) and all(map(is_, first, second))


def values_of_all(mappings: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, mappings)))


def option_values(group: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    """As they are compared from step to step: a list that a schedule writes into is another one then."""
    return [as_python(group[name]) for name in names]


def place_of(parameter: Tensor) -> tuple:
    """Address and layout of what this rank holds of a parameter; a DTensor gives a new view of it at every call."""
    local = local_part(parameter)
    return local.data_ptr(), local.shape, local.stride()


@dataclass
class GroupPlan:
    """One param group as it was when its calls were made."""

    group: dict[str, Any]
    params: list[Tensor]
    option_names: tuple[str, ...]
    """All options but lr."""
    option_values: list[Any]
    options_and_rule: Callable[[dict[str, Any]], tuple[CommonOptions, Rule]]
    """Those of a group as it is now, checked."""
    without_grad: list[Tensor]
    """The params that had no gradient, which none of the calls has."""
    all_states: list[dict[str, Any]]
    """The values of the optimizer's state, other groups' included."""
    states: list[dict[str, Any]]
    """Those of the tensors with a gradient."""
    state_tensors: list[Any]
    calls: list[Call]
    local_places: list[tuple] | None
    """Where in memory lies what this rank holds of each parameter, if any is a DTensor."""

    def renew(self, optimizer_state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Hands this step's gradients and learning rate to the calls; False if anything else has changed."""
        group = self.group
        # the order of a dict is that of insertion, so equal values are those of the same tensors
        if not (
            same_items(group["params"], self.params)
            and same_items(list(optimizer_state.values()), self.all_states)
            and same_items(values_of_all(self.states), self.state_tensors)
        ):
            return False
        if any(parameter.grad is not None for parameter in self.without_grad):
            return False
        if option_values(group, self.option_names) != self.option_values and not self.renew_options():
            return False
        lr = group["lr"] if isinstance(group["lr"], Tensor) else as_python(group["lr"])
        LEARNING_RATE("lr", lr)
        for call in self.calls:
            call.segments.lr = lr
        return self.collect_gradients()

    def renew_options(self) -> bool:
        """Hands new options to the calls, as a schedule of weight decay or betas has set them; False if that is not enough."""
        options, rule = self.options_and_rule(self.group)
        if not all(call.renew_options(options, rule) for call in self.calls):
            return False
        self.option_values = option_values(self.group, self.option_names)
        return True

    def collect_gradients(self) -> bool:
        """Hands the gradients to the calls; False if a tensor has none, or another layout than it had."""
        if self.local_places is None:
            grads = list(map(GRAD, self.params))
        else:
            if list(map(place_of, self.params)) != self.local_places:
                return False
            grads = list(map(local_gradient, self.params))
        for call in self.calls:
            # most often one call has all the tensors
            takes_all = len(call.positions) == len(grads)
            call.segments.grads = grads if takes_all else [grads[i] for i in call.positions]
            if any(map(is_, call.segments.grads, repeat(None))) or not call.kernels.is_current(call.segments):
                return False
        return True

    def let_gradients_go(self) -> None:
        """They are theirs who made them; held here, they would outlive zero_grad()."""
        for call in self.calls:
            call.segments.grads = []


def plan_group(
    group: dict[str, Any],
    option_names: tuple[str, ...],
    options_and_rule: Callable[[dict[str, Any]], tuple[CommonOptions, Rule]],
    make_calls: Callable[[dict[str, Any]], list[Call]],
    optimizer_state: Mapping[Tensor, dict[str, Any]],
) -> GroupPlan:
    """Sorts a param group into calls."""
    calls = make_calls(group)
    params = list(group["params"])
    without_grad = [parameter for parameter in params if parameter.grad is None]
    states = [optimizer_state[parameter] for parameter in params if parameter.grad is not None]
    local_places = list(map(place_of, params)) if any(isinstance(p, DTensor) for p in params) else None
    return GroupPlan(
        group,
        params,
        option_names,
        option_values(group, option_names),
        options_and_rule,
        without_grad,
        list(optimizer_state.values()),
        states,
        values_of_all(states),
        calls,
        local_places,
    )
