"""Param groups for the baselines, and what their section of a recipe has to say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from largebatch.exclusion import KINDS, identities, is_excluded
from largebatch.register import OPTIMIZERS


def parameter_groups(model: nn.Module, no_weight_decay: Sequence[str]) -> list[dict[str, Any]]:
    """The trainable parameters, those that are not decayed in a second param group with weight decay 0.

    Args:
        no_weight_decay: "bias", "norm" and regular expressions for parameter names; empty for one group.

    Raises:
        ValueError: a regular expression matches no parameter name.
    """
    found = {p: identity for p, identity in identities(model).items() if p.requires_grad}
    names = [identity.name for identity in found.values()]
    for pattern in no_weight_decay:
        if pattern not in KINDS and not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"largebatch.no_weight_decay has {pattern!r}, which matches no parameter name; the names are "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )
    undecayed = [p for p, identity in found.items() if is_excluded(identity, no_weight_decay)]
    if not undecayed:
        return [{"params": list(found)}]
    decayed = [p for p, identity in found.items() if not is_excluded(identity, no_weight_decay)]
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_baseline(config: dict[str, Any]) -> None:
    """Refuses what would not train the optimizer that a recipe seems to name.

    Args:
        config: a recipe, with "optimizer" and "largebatch".

    Raises:
        ValueError: ``no_weight_decay`` without effect, or an "Adam" that DeepSpeed would take for AdamW.
    """
    optimizer, patterns = config["optimizer"], config["largebatch"].get("no_weight_decay") or []
    name, params = optimizer["type"], optimizer.get("params") or {}
    is_ours = str(name).lower() in OPTIMIZERS
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(
            f'largebatch.no_weight_decay is {patterns!r}; expected a list of "bias", "norm" and regular expressions'
        )
    if patterns and is_ours:
        raise ValueError(
            f"largebatch.no_weight_decay is for the baselines; for {name} write optimizer.params.exclude_from_weight_decay: "
            f"{patterns} (and exclude_from_adaptation)"
        )
    if patterns and not params.get("weight_decay"):
        raise ValueError(
            f"largebatch.no_weight_decay is {patterns} and optimizer.params.weight_decay is "
            f"{params.get('weight_decay')!r}; it has no effect without weight decay"
        )
    if str(name).lower() == "adam" and "adam_w_mode" not in params:
        raise ValueError(
            'optimizer.type is "Adam" without optimizer.params.adam_w_mode, and DeepSpeed would train AdamW; write '
            '"adam_w_mode": false for Adam with L2 regularisation, or "type": "AdamW" for decoupled weight decay'
        )
