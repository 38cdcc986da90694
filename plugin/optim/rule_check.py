"""Whether a rule treats every element and every layer by itself, without which it could not be cut over ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from largebatch.rules.rule import Layers, Part, Rule

NUMEL, CUT = 24, 7
NUM_LAYERS = 4
LARGEST_ERROR = 1e-12
"""Relative; fp64 arithmetic may differ in its last bits between the middle of a tensor and its end."""


class RuleError(TypeError, ValueError):
    """A rule does something that no cut of a layer allows; says what."""


@functools.lru_cache(maxsize=64)
def check_rule(rule: Rule) -> None:
    """Applies a rule to a layer, and to the layer cut in two, and to layers together and one by one.

    Raises:
        RuleError: the results differ, or do not have the shapes that are declared.
        Exception: whatever the rule raises.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1

    step = 3.0 if rule.counts_steps else 0.0
    for weight_decay in (0.0, 0.01):
        part = Part(
            numbers(NUMEL) - 0.6,
            numbers(NUMEL) - 0.6,
            tuple(numbers(NUMEL) for _ in rule.elementwise_state),
            step,
            weight_decay,
            tuple(numbers().clone() for _ in rule.norms_before),
            tuple(numbers().clone() for _ in rule.layer_state),
        )
        ratios = tuple(numbers().clone() for _ in rule.ratios)
        check_parts(rule, part, ratios)
        check_layers(rule, numbers, weight_decay, step)


def check_parts(rule: Rule, part: Part, ratios: tuple[Tensor, ...]) -> None:
    def advanced(part: Part) -> tuple[Tensor, ...]:
        found = rule.advance(part, lr=0.1, ratios=ratios)
        if not isinstance(found, tuple) or len(found) != 2:
            raise RuleError(
                f"{type(rule).__name__}.advance returned {shown(found)}; expected (new weight, tuple of the new state)"
            )
        weight, state = found
        check_tuple(rule, "advance", state, rule.elementwise_state)
        return (weight, *state)

    functions: dict[str, tuple[Callable[[Part], tuple[Tensor, ...]], Sequence[str]]] = {
        "vectors_before": (rule.vectors_before, rule.norms_before),
        "accumulate": (rule.accumulate, rule.elementwise_state),
        "directions": (rule.directions, rule.norms),
        "advance": (advanced, ("weight", *rule.elementwise_state)),
    }
    for name, (function, results) in functions.items():
        before = copied(part)
        whole = function(part)
        check_tuple(rule, name, whole, results)
        whole = tuple(result.clone() for result in whole)  # what a method keeps it may write into the next time
        check_is_pure(rule, name, function, part, before, whole)
        pieces = [function(cut(part, slice(None, CUT))), function(cut(part, slice(CUT, None)))]
        for result, expected, *found in zip(results, whole, *pieces, strict=True):
            if expected.shape != part.weight.shape:
                raise RuleError(
                    f"{type(rule).__name__}.{name} returned {result} of shape {tuple(expected.shape)} for a weight of shape "
                    f"{tuple(part.weight.shape)}; expected one number for each element"
                )
            if expected.dtype != part.weight.dtype:
                raise RuleError(
                    f"{type(rule).__name__}.{name} returned {result} of dtype {expected.dtype} for a weight of dtype {part.weight.dtype}; "
                    "expected the same"
                )
            if not is_same(torch.cat(found), expected):
                raise RuleError(
                    f"{type(rule).__name__}.{name} returned another {result} for a layer in two parts than for the whole of it. It "
                    "may look at one element at a time: whatever needs the whole layer has to be a norm that the rule declares "
                    "in norms_before or norms"
                )


def check_is_pure(
    rule: Rule,
    name: str,
    function: Callable[[Part], tuple[Tensor, ...]],
    part: Part,
    before: Part,
    found: tuple[Tensor, ...],
) -> None:
    """Whether a method leaves what it is given alone, returns the same for the same, and knows the step only if it says so."""
    title = f"{type(rule).__name__}.{name}"
    given = {"weight": part.weight, "grad": part.grad} | {
        f"state {n!r}": s for n, s in zip(rule.elementwise_state, part.state, strict=True)
    }
    originals = (before.weight, before.grad, *before.state)
    for (what, tensor), original in zip(given.items(), originals, strict=True):
        if not torch.equal(tensor, original):
            raise RuleError(
                f"{title} wrote into the {what} that it was given; expected new tensors, and those left as they are"
            )
    again = function(copied(part))
    if not all(map(is_same, again, found)):
        raise RuleError(
            f"{title} returned something else when it was called again with the same; expected a function of what it is given. "
            "What a rule remembers belongs into elementwise_state or layer_state"
        )
    if not rule.counts_steps and not all(map(is_same, function(copied(part)._replace(step=3.0)), found)):
        raise RuleError(
            f"{title} uses part.step, which is 0 in every step unless {type(rule).__name__} declares counts_steps = True"
        )


def copied(part: Part) -> Part:
    return part._replace(
        weight=part.weight.clone(), grad=part.grad.clone(), state=tuple(state.clone() for state in part.state)
    )


def check_layers(rule: Rule, numbers: Callable[..., Tensor], weight_decay: float, step: float) -> None:
    known = {
        "weight_norm": numbers(NUM_LAYERS),
        "norms": tuple(numbers(NUM_LAYERS) for _ in rule.norms),
        "norms_before": tuple(numbers(NUM_LAYERS) for _ in rule.norms_before),
        "layer_state": tuple(numbers(NUM_LAYERS) for _ in rule.layer_state),
        "weight_decay": torch.full((NUM_LAYERS,), weight_decay, dtype=torch.float64),
    }

    def layers(index: slice, *, is_before: bool, step: float = step) -> Layers:
        values = {k: v[index] if isinstance(v, Tensor) else tuple(x[index] for x in v) for k, v in known.items()}
        if is_before:
            values |= {"weight_norm": torch.zeros_like(values["weight_norm"]), "norms": ()}
        return Layers(**values, lr=0.1, find_step=lambda: torch.full_like(values["weight_norm"], step))

    for name, results, is_before in (
        ("layer_state_before", rule.layer_state, True),
        ("trust_ratio", rule.ratios, False),
        ("weight_decay_in_force", ("weight_decay",), False),
        ("layer_state_after", rule.layer_state, False),
    ):

        def function(index: slice, name: str = name, is_before: bool = is_before, step: float = step) -> Any:
            found = getattr(rule, name)(layers(index, is_before=is_before, step=step))
            return (found,) if name == "weight_decay_in_force" else found

        whole = function(slice(None))
        check_tuple(rule, name, whole, results)
        if not rule.counts_steps and not all(map(is_same, function(slice(None), step=3.0), whole)):
            raise RuleError(
                f"{type(rule).__name__}.{name} uses layers.step, which is 0 in every step unless {type(rule).__name__} declares "
                "counts_steps = True"
            )
        single = [function(slice(i, i + 1)) for i in range(NUM_LAYERS)]
        for result, expected, *found in zip(results, whole, *single, strict=True):
            if expected.shape != (NUM_LAYERS,) or expected.dtype != torch.float64:
                raise RuleError(
                    f"{type(rule).__name__}.{name} returned {result} of shape {tuple(expected.shape)} and dtype {expected.dtype} for "
                    f"{NUM_LAYERS} layers; expected [num_layers] in torch.float64"
                )
            if not is_same(torch.cat(found), expected):
                raise RuleError(
                    f"{type(rule).__name__}.{name} returned {result} that depends on what other layers are stepped together, or on "
                    "what it was called with before; expected a number for each layer from its own norms"
                )


def check_tuple(rule: Rule, name: str, values: Any, results: Sequence[str]) -> None:
    is_tuple = isinstance(values, tuple) and all(isinstance(value, Tensor) for value in values)
    if not is_tuple or len(values) != len(results):
        what = f"{len(values)} tensors" if is_tuple else shown(values)
        raise RuleError(
            f"{type(rule).__name__}.{name} returned {what}; expected a tuple of tensors, one for each of ({', '.join(results)})"
        )


def shown(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


def cut(part: Part, index: slice) -> Part:
    return part._replace(weight=part.weight[index], grad=part.grad[index], state=tuple(s[index] for s in part.state))


def is_same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=LARGEST_ERROR, atol=LARGEST_ERROR, equal_nan=True)
