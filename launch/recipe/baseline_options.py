"""The optimizers that a recipe may name beside ours: what their sections may say."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from largebatch.config import NON_NEGATIVE, Check, betas, boolean, check_option_names
from largebatch.engine.baselines import Adagrad
from largebatch.optim.registry import OPTIMIZERS

BASELINE_CHECKS: dict[str, Check] = {
    "lr": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "momentum": NON_NEGATIVE,
    "dampening": NON_NEGATIVE,
    "eps": NON_NEGATIVE,
    "lr_decay": NON_NEGATIVE,
    "initial_accumulator_value": NON_NEGATIVE,
    "betas": betas,
} | dict.fromkeys(("nesterov", "amsgrad", "maximize", "bias_correction", "torch_adam", "adam_w_mode", "fused"), boolean)
"""Option of torch's or DeepSpeed's optimizers -> what is allowed; others are left to them."""

OF_DEEPSPEEDS_ADAM = ("torch_adam", "adam_w_mode", "bias_correction", "set_grad_none", "fp32_optimizer_states")

WITHOUT_A_PLACE_HERE = {
    "lbfgs": "needs a closure",
    "sparseadam": "is for sparse gradients",
    "muadam": "needs a model made for muP",
    "muadamw": "needs a model made for muP",
    "musgd": "needs a model made for muP",
    "muon": "needs parameters marked for it",
}


def check_baseline_options(optimizer: dict[str, Any]) -> None:
    """Refuses options that a baseline does not have, and values that it cannot have. Ours are checked when they are built.

    Args:
        optimizer: the section, of a type that is known.

    Raises:
        ValueError, TypeError: naming the option, its value and what is allowed.
    """
    name, params = optimizer["type"].lower(), optimizer.get("params") or {}
    if name in OPTIMIZERS:
        return
    if name in WITHOUT_A_PLACE_HERE:
        raise ValueError(
            f"optimizer.type is {optimizer['type']!r}, which {WITHOUT_A_PLACE_HERE[name]}; this trainer cannot train with it"
        )
    of_deepspeed = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": Adagrad}
    cls = of_deepspeed.get(name) or getattr(torch.optim, optimizer["type"], None)
    if cls is not None:
        known = [option for option in inspect.signature(cls.__init__).parameters if option not in ("self", "params")]
        check_option_names(
            params, known + list(OF_DEEPSPEEDS_ADAM if name in ("adam", "adamw") else ()), "optimizer.params"
        )
    for option, value in params.items():
        if option in BASELINE_CHECKS:
            BASELINE_CHECKS[option](f"optimizer.params.{option}", value)


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
            f'largebatch.no_weight_decay is {patterns!r}; expected a list of "bias", "norm", "ndim<=1", "ndim==1" and regular expressions'
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
