"""LAMB, N-LAMB and NN-LAMB: layer-wise adaptive moments for batch training.

Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv:1904.00962,
Algorithm 2; N-LAMB and NN-LAMB are its appendix (Nadam-style bias corrections, with constant betas, so that the
paper's products of beta_i up to t are powers).

| paper     | here              | shape        | meaning                               |
|-----------|-------------------|--------------|---------------------------------------|
| x         | weight            | layer        | weights of one layer                  |
| g         | grad              | layer        | gradient of the loss                  |
| m         | exp_avg           | layer        | first moment                          |
| v         | exp_avg_sq        | layer        | second moment                         |
| m^, v^    | m_hat, v_hat      | layer        | bias-corrected moments                |
| t         | step              | scalar       | 1 at the first step                   |
| eta_t     | lr                | scalar       | learning rate of this step            |
| beta1/2   | betas             | scalars      | decay rates of the moments            |
| epsilon   | eps               | scalar       | added to sqrt(v^)                     |
| lambda    | weight_decay      | scalar       | weight decay                          |
| r + lambda x | update         | layer        | what is subtracted, before the ratio  |
| phi(||x||) / ||r + lambda x|| | ratio | scalar/layer | trust ratio                    |

Deviations from the paper (all off by default, each an option):
- ``bias_correction=False``: m^ = m, v^ = v (arXiv v1-v3 and the authors' TensorFlow code).
- ``bias_correction="lr"``: eta_t times sqrt(1 - beta2^t) / (1 - beta1^t) instead, outside the norm and with eps
  against the uncorrected sqrt(v) (DeepSpeed FusedLamb).
- ``decoupled_weight_decay``: x <- (1 - eta_t lambda) x before the step, lambda = 0 elsewhere (timm, Keras).
- ``weight_norm_bounds``: phi other than the identity. ``trust_ratio_bounds``: clamp of the ratio itself, such as
  DeepSpeed's [0.01, 10] and timm's ``trust_clip``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from largebatch.rules.rule import Layers, Part, Rule
from largebatch.rules.trust_ratio import guarded_ratio, phi


def square_root(value):
    """Of a Python float or of a 0-dim tensor, so that the step number may live on a device."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


@dataclass(frozen=True)
class LAMB(Rule):
    """Algorithm 2 of arXiv:1904.00962. The arguments are those of :class:`largebatch.LAMB`."""

    name: ClassVar[str] = "lamb"
    elementwise_state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counts_steps: ClassVar[bool] = True

    betas: tuple[float, float]
    eps: float
    bias_correction: bool | str
    weight_norm_bounds: tuple[float, float] | None
    trust_ratio_bounds: tuple[float, float] | None

    def accumulate(self, part: Part) -> tuple[Tensor, ...]:
        """m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2."""
        exp_avg, exp_avg_sq = part.state
        beta1, beta2 = self.betas
        return beta1 * exp_avg + (1 - beta1) * part.grad, beta2 * exp_avg_sq + (1 - beta2) * part.grad.square()

    def bias_corrected(self, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *, step) -> tuple[Tensor, Tensor]:
        """m^ = m / (1 - beta1^t);  v^ = v / (1 - beta2^t)."""
        if self.bias_correction is not True:
            return exp_avg, exp_avg_sq
        beta1, beta2 = self.betas
        return exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)

    def update(self, weight: Tensor, m_hat: Tensor, v_hat: Tensor, *, weight_decay) -> Tensor:
        """r + lambda x, where r = m^ / (sqrt(v^) + epsilon)."""
        return m_hat / (v_hat.sqrt() + self.eps) + weight_decay * weight

    def directions(self, part: Part) -> tuple[Tensor, ...]:
        m_hat, v_hat = self.bias_corrected(*part.state, part.grad, step=part.step)
        return (self.update(part.weight, m_hat, v_hat, weight_decay=part.weight_decay),)

    def trust_ratio(self, layers: Layers) -> tuple[Tensor, ...]:
        # phi(||x||) / ||r + lambda x||
        (update_norm,) = layers.norms
        ratio = guarded_ratio(
            phi(layers.weight_norm, self.weight_norm_bounds),
            update_norm,
            weight_norm=layers.weight_norm,
            step_norm=update_norm,
            bounds=self.trust_ratio_bounds,
        )
        return (ratio,)

    def advance(self, part: Part, *, lr, ratios: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (update,), (ratio,) = self.directions(part), ratios
        # x <- x - eta_t phi(||x||) / ||r + lambda x|| (r + lambda x)
        return part.weight - self.corrected_lr(lr, part.step) * ratio * update, part.state

    def corrected_lr(self, lr, step):
        """eta_t, or DeepSpeed's folding of both bias corrections into it."""
        if self.bias_correction != "lr":
            return lr
        beta1, beta2 = self.betas
        return lr * square_root(1 - beta2**step) / (1 - beta1**step)


class NLAMB(LAMB):
    """N-LAMB: Nesterov's look-ahead in the first moment (arXiv:1904.00962, appendix, N-LAMB)."""

    name: ClassVar[str] = "nlamb"

    def bias_corrected(self, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *, step) -> tuple[Tensor, Tensor]:
        """m^ = beta1 m / (1 - beta1^(t+1)) + (1 - beta1) g / (1 - beta1^t);  v^ = beta2 v / (1 - beta2^t)."""
        beta1, beta2 = self.betas
        m_hat = beta1 * exp_avg / (1 - beta1 ** (step + 1)) + (1 - beta1) * grad / (1 - beta1**step)
        return m_hat, beta2 * exp_avg_sq / (1 - beta2**step)


class NNLAMB(LAMB):
    """NN-LAMB: Nesterov's look-ahead in both moments (arXiv:1904.00962, appendix, NN-LAMB)."""

    name: ClassVar[str] = "nnlamb"

    def bias_corrected(self, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *, step) -> tuple[Tensor, Tensor]:
        """m^ as in N-LAMB;  v^ = beta2 v / (1 - beta2^(t+1)) + (1 - beta2) g^2 / (1 - beta2^t)."""
        beta1, beta2 = self.betas
        m_hat = beta1 * exp_avg / (1 - beta1 ** (step + 1)) + (1 - beta1) * grad / (1 - beta1**step)
        v_hat = beta2 * exp_avg_sq / (1 - beta2 ** (step + 1)) + (1 - beta2) * grad.square() / (1 - beta2**step)
        return m_hat, v_hat
