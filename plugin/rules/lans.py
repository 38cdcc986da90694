"""LANS: LAMB with gradients normalised by layer and Nesterov's two directions, each with a trust ratio of its own.

Source: Zheng et al., "Accelerated Large Batch Optimization of BERT Pretraining in 54 minutes", arXiv:2006.13484, Algorithm 2.

| paper             | here                          | shape        | meaning                                       |
|-------------------|-------------------------------|--------------|-----------------------------------------------|
| x                 | weight                        | layer        | weights of one layer                          |
| g                 | grad                          | layer        | gradient of the loss                          |
| g~                | normalised                    | layer        | g / ||g||                                     |
| m, v              | exp_avg, exp_avg_sq           | layer        | moments of g~                                 |
| r, c              | from_momentum, from_gradient  | layer        | m^ and g~, over sqrt(v^) + epsilon            |
| r + lambda x      | first direction               | layer        | goes on with weight beta1                     |
| c + lambda x      | second direction              | layer        | goes on with weight 1 - beta1                 |
| eta_t, t, beta1/2, epsilon, lambda, phi | as in largebatch.rules.lamb |  |                                          |

Deviations from the paper:
- A layer whose gradient is zero keeps it as it is (the paper divides by zero; the authors' code does the same as here).
- ``weight_norm_bounds``: phi other than the identity. ``trust_ratio_bounds``: clamp of both ratios. Off by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from largebatch.rules.rule import Layers, Part, Rule
from largebatch.rules.trust_ratio import guarded_ratio, phi


@dataclass(frozen=True)
class LANS(Rule):
    """LANS (arXiv:2006.13484, Algorithm 2).

    ``w <- w - lr (b1 ||w|| / ||r|| r + (1 - b1) ||w|| / ||c|| c)`` with ``r = m^ / (sqrt(v^) + eps) + wd w`` and
    ``c = g~ / (sqrt(v^) + eps) + wd w``, where the moments are those of ``g~ = g / ||g||``.

    Args:
        betas: decay rates of the moments, both >= 0 and < 1.
        eps: > 0, added to sqrt(v^).
        weight_norm_bounds: (lower, upper) of phi(||w||); None for the identity.
        trust_ratio_bounds: (lower, upper) clamp of both ratios; None for none.
    """

    elementwise_state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counts_steps: ClassVar[bool] = True
    norms_before: ClassVar[tuple[str, ...]] = ("grad_norm",)
    norms: ClassVar[tuple[str, ...]] = ("direction_norm", "gradient_direction_norm")
    ratios: ClassVar[tuple[str, ...]] = ("trust_ratio", "gradient_trust_ratio")

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_norm_bounds: tuple[float, float] | None = None
    trust_ratio_bounds: tuple[float, float] | None = None

    def __post_init__(self):
        if self.eps <= 0:
            raise ValueError(f"eps is {self.eps!r}; expected a number > 0")

    def vectors_before(self, part: Part) -> tuple[Tensor, ...]:
        return (part.grad,)

    def normalised(self, part: Part) -> Tensor:
        """g~ = g / ||g||."""
        (grad_norm,) = part.norms_before
        return part.grad / torch.where(grad_norm > 0, grad_norm, 1.0)

    def accumulate(self, part: Part) -> tuple[Tensor, ...]:
        """m <- beta1 m + (1 - beta1) g~;  v <- beta2 v + (1 - beta2) g~^2."""
        (exp_avg, exp_avg_sq), grad = part.state, self.normalised(part)
        beta1, beta2 = self.betas
        return beta1 * exp_avg + (1 - beta1) * grad, beta2 * exp_avg_sq + (1 - beta2) * grad.square()

    def directions(self, part: Part) -> tuple[Tensor, ...]:
        """r + lambda x and c + lambda x."""
        exp_avg, exp_avg_sq = part.state
        beta1, beta2 = self.betas
        m_hat = exp_avg / (1 - beta1**part.step)
        denominator = (exp_avg_sq / (1 - beta2**part.step)).sqrt() + self.eps
        decayed = part.weight_decay * part.weight
        return m_hat / denominator + decayed, self.normalised(part) / denominator + decayed

    def trust_ratio(self, layers: Layers) -> tuple[Tensor, ...]:
        # phi(||x||) / ||r + lambda x|| and phi(||x||) / ||c + lambda x||
        return tuple(
            guarded_ratio(
                phi(layers.weight_norm, self.weight_norm_bounds),
                norm,
                weight_norm=layers.weight_norm,
                step_norm=norm,
                bounds=self.trust_ratio_bounds,
            )
            for norm in layers.norms
        )

    def advance(self, part: Part, *, lr, ratios: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        beta1, _ = self.betas
        (from_momentum, from_gradient), (ratio, gradient_ratio) = self.directions(part), ratios
        # x <- x - eta_t (beta1 phi(||x||) / ||r + lambda x|| (r + lambda x) + (1 - beta1) ...)
        return (
            part.weight - lr * (beta1 * ratio) * from_momentum - lr * ((1 - beta1) * gradient_ratio) * from_gradient,
            part.state,
        )
