"""Learning rate and warm-up of a batch from those of another, or from the LARS paper's table.

- linear: learning rate proportional to the batch, warm-up a fixed number of epochs that starts at the base batch's learning
  rate (Goyal et al., arXiv:1706.02677, section 2.2). For SGD.
- sqrt: learning rate proportional to the square root of the batch, warm-up epochs proportional to the batch (You et al.,
  arXiv:1904.00962, section 4 and its tables). For LAMB and the Adam family.
- table: the rows of the LARS paper (arXiv:1708.03888, ICLR 2018 submission); its learning rates follow neither rule.
- none: as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from largebatch.config import nearest_hint
from largebatch.schedule import scaled_lr

RULES = ("linear", "sqrt", "table", "none")

LARS_TABLE: dict[str, dict[int, tuple[float, float]]] = {
    "alexnet": {512: (2, 2), 4096: (10, 2), 8192: (10, 2), 16384: (14, 2), 32768: (14, 2)},
    "alexnet_bn": {512: (2, 5), 4096: (10, 5), 8192: (14, 5), 16384: (23, 5), 32768: (22, 5)},
    "resnet50": {256: (4, 0), 1024: (9, 5), 8192: (30, 5), 16384: (33, 12), 32768: (40, 12)},
}
"""Model -> global batch -> (peak learning rate, warm-up epochs), trust coefficient 0.001."""


@dataclass(frozen=True)
class Rates:
    """Attributes: warmup_start_factor: share of the peak at which the warm-up starts; reason: one line on where they are from."""

    lr: float
    warmup_epochs: float
    warmup_start_factor: float
    reason: str


def default_rule(optimizer: str) -> str:
    """The rule of the paper that an optimizer comes from: "table" for LARS, "linear" for SGD, else "sqrt"."""
    return {"lars": "table", "sgd": "linear"}.get(optimizer.lower(), "sqrt")


def scaled_rates(
    rule: str,
    *,
    global_batch: int,
    base_lr: float,
    base_batch: int,
    base_warmup_epochs: float,
    start_factor: float = 0.0,
) -> Rates:
    """Peak learning rate and warm-up for a batch, by a rule other than "table".

    Args:
        base_lr: peak learning rate at ``base_batch`` samples a step.
        base_warmup_epochs: there.
        start_factor: where the warm-up starts, for rules that don't say.
    """
    if rule not in RULES or rule == "table":
        raise ValueError(f"the rule is {rule!r}; expected linear, sqrt or none{nearest_hint(rule, RULES)}")
    ratio = global_batch / base_batch
    lr = scaled_lr(rule, base_lr=base_lr, base_batch=base_batch, global_batch=global_batch)
    warmup = base_warmup_epochs
    if rule == "sqrt":
        warmup *= ratio
        reason = f"{base_lr:.4g} at {base_batch:,} by the square root of the batch, warm-up proportional to it"
    elif rule == "linear":
        if ratio > 1:
            warmup, start_factor = warmup or 5.0, 1 / ratio
        reason = f"{base_lr:.4g} at {base_batch:,} in proportion to the batch, gradual warm-up from there"
    else:
        reason = f"{base_lr:.4g} as at {base_batch:,}"
    return Rates(lr, warmup, start_factor, reason)


def lars_table_rates(model: str, global_batch: int) -> Rates:
    """The LARS paper's learning rate and warm-up; between two rows the line through them over log2 of the batch.

    Raises:
        ValueError: no table for the model, or the batch lies outside it.
    """
    if model not in LARS_TABLE:
        raise ValueError(
            f"the LARS paper has no table for {model!r}, only for {', '.join(LARS_TABLE)}; give --rule sqrt, linear or none"
        )
    rows = LARS_TABLE[model]
    source = f"table of {model} in arXiv:1708.03888"
    if global_batch in rows:
        lr, warmup = rows[global_batch]
        return Rates(lr, warmup, 0.0, f"{source}, row {global_batch:,}")
    below = max((batch for batch in rows if batch < global_batch), default=None)
    above = min((batch for batch in rows if batch > global_batch), default=None)
    if below is None or above is None:
        raise ValueError(
            f"the global batch is {global_batch:,}, outside the {source}, {min(rows):,} to {max(rows):,}; give --rule sqrt, linear "
            "or none"
        )
    share = math.log2(global_batch / below) / math.log2(above / below)
    lr, warmup = (low + share * (high - low) for low, high in zip(rows[below], rows[above], strict=True))
    return Rates(lr, warmup, 0.0, f"between rows {below:,} and {above:,} of the {source}")
