"""Param groups of another number: which of the saved ones stands for each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from largebatch.engine.checkpoint.layout import EngineLayout
from largebatch.optim.state import check_same_meaning

logger = logging.getLogger("largebatch")


def saved_group_of(layers: Sequence[str], saved_groups: Sequence[Sequence[str]]) -> list[int]:
    """Numbers of the saved groups that the layers come from, that of most layers first."""
    counts: dict[int, int] = {}
    places = {layer: number for number, group in enumerate(saved_groups) for layer in group}
    for layer in layers:
        if layer in places:  # not so what was frozen when the checkpoint was saved
            counts[places[layer]] = counts.get(places[layer], 0) + 1
    return sorted(counts, key=lambda number: -counts[number]) or [0]


def value_for(origins: list[int], values: Sequence[Any], name: str, number: int) -> Any:
    """Of the saved groups' values the one for a group that is made of several.

    Raises:
        ValueError: they differ.
    """
    found = [values[i] for i in origins]
    if any(value != found[0] for value in found):
        raise ValueError(
            f"param group {number} joins layers of the saved groups {', '.join(map(str, origins))}, whose {name} differ "
            f"({', '.join(map(str, found))}); expected one {name}. Keep the param groups as they were saved"
        )
    return found[0]


def scheduler_state_for(state: dict[str, Any], saved: EngineLayout, current: EngineLayout) -> dict[str, Any]:
    """A scheduler's state in which every list with an entry for each param group has one for each of the present groups."""
    if saved.groups == current.groups:
        return state
    origins = [saved_group_of(group, saved.groups) for group in current.groups]
    adapted = dict(state)
    for name, value in state.items():
        if isinstance(value, (list, tuple)) and len(value) == len(saved.groups):
            adapted[name] = type(value)(value_for(o, value, name, i) for i, o in enumerate(origins))
    return adapted


def options_for(
    optimizer: Any, saved_options: list[dict[str, Any]], saved: EngineLayout, current: EngineLayout
) -> list[dict[str, Any]]:
    """[number of groups] learning rate and step of each param group; the other options stay as they are configured.

    Raises:
        ValueError: a group joins saved ones of different learning rates, or the state means something else here.
    """
    found = []
    for number, group in enumerate(optimizer.param_groups):
        origins = saved_group_of(current.groups[number], saved.groups)
        origin = saved_options[origins[0]]
        check_same_meaning([origin], [group])
        names = [name for name in ("lr", "step") if name in origin]
        found.append({n: value_for(origins, [options.get(n) for options in saved_options], n, number) for n in names})
        for name, value in origin.items():
            if name in group and name not in ("params", "lr", "step") and not is_same(group[name], value):
                logger.info("param group %d: %s is %r as configured, not %r as saved", number, name, group[name], value)
    return found


def is_same(ours: Any, theirs: Any) -> bool:
    as_list = [list(v) if isinstance(v, tuple) else v for v in (ours, theirs)]
    return as_list[0] == as_list[1]
