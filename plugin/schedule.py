"""Learning rates as pure functions of the step: warm-up, decay, and scaling with the batch. No optimizer objects.

A step is an optimizer step, counted from 0; ``factor`` means the learning rate as a share of its peak.

- Gradual warm-up: Goyal et al., arXiv:1706.02677, section 2.2.
- Polynomial decay: arXiv:1708.03888, section 5 (power 2, "poly-2"); arXiv:1904.00962 (power 1).
- Step decay: arXiv:1706.02677, section 5.1 (x0.1 at epochs 30, 60, 80).
- Cosine decay: arXiv:1608.03983, equation 5, without restarts.
- Linear scaling: arXiv:1706.02677, section 2.1. Square-root scaling: arXiv:1904.00962, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from largebatch.config import is_finite, is_number


def scaled_lr(rule: str, *, base_lr: float, base_batch: int, global_batch: int) -> float:
    """The peak learning rate of a batch from that of another.

    Args:
        rule: "linear": proportional to the batch; "sqrt": to its square root; "none": base_lr as it is.
        base_lr: > 0, peak learning rate at ``base_batch`` samples a step.
        global_batch: samples a step, >= 1.
    """
    for name, value in (("base_lr", base_lr), ("base_batch", base_batch), ("global_batch", global_batch)):
        if not is_number(value) or not is_finite(value) or not value > 0:
            raise ValueError(f"lr_scaling.{name} is {value!r}; expected a number > 0")
    ratio = global_batch / base_batch
    factors = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    if not isinstance(rule, str) or rule not in factors:
        raise ValueError(f"lr_scaling.rule is {rule!r}; expected one of {', '.join(map(repr, factors))}")
    return base_lr * factors[rule]


def warmup_factor(step: int, *, num_warmup_steps: int, start_factor: float = 0.0, power: float = 1.0) -> float:
    """From ``start_factor`` up to 1: step 0 already makes one share of the way, step W-1 has the peak.

    Args:
        power: > 0, of the share of the warm-up; 1 is linear, NVIDIA Caffe's ramp-up is 2.
    """
    if step >= num_warmup_steps:
        return 1.0
    return start_factor + (1.0 - start_factor) * ((step + 1) / num_warmup_steps) ** power


def progress(step: int, *, num_warmup_steps: int, num_steps: int) -> float:
    """How much of the decay lies behind: 0 at the end of the warm-up, 1 from ``num_steps`` on."""
    if num_steps <= num_warmup_steps:
        return 0.0 if step < num_steps else 1.0
    return min(1.0, max(0.0, (step - num_warmup_steps) / (num_steps - num_warmup_steps)))


def polynomial_factor(
    step: int, *, num_steps: int, num_warmup_steps: int = 0, power: float = 2.0, end_factor: float = 0.0
) -> float:
    """``(1 - progress)^power`` from the peak down to ``end_factor`` (LARS: power 2; LAMB: power 1)."""
    done = progress(step, num_warmup_steps=num_warmup_steps, num_steps=num_steps)
    return end_factor + (1.0 - end_factor) * (1.0 - done) ** power


def cosine_factor(step: int, *, num_steps: int, num_warmup_steps: int = 0, end_factor: float = 0.0) -> float:
    """Half a cosine from the peak down to ``end_factor``."""
    done = progress(step, num_warmup_steps=num_warmup_steps, num_steps=num_steps)
    return end_factor + (1.0 - end_factor) * 0.5 * (1.0 + math.cos(math.pi * done))


def step_factor(step: int, *, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """``gamma`` to the number of milestones (in steps) that lie at or before the step."""
    return gamma ** sum(step >= milestone for milestone in milestones)
