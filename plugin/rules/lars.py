"""LARS: layer-wise adaptive rate scaling.

Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv:1708.03888, Algorithm 1; and
its restatement as Algorithm 1 of You et al., "Large Batch Optimization for Deep Learning", arXiv:1904.00962, which is
a different formula (the momentum is normalised, not the gradient) and is called "2019" here.

| paper (1708.03888) | here                | shape        | meaning                                    |
|--------------------|---------------------|--------------|--------------------------------------------|
| w                  | weight              | layer        | weights of one layer                       |
| g                  | grad                | layer        | gradient of the loss, without weight decay |
| v                  | momentum_buffer     | layer        | momentum                                   |
| gamma_t            | lr                  | scalar       | global learning rate of this step          |
| lambda             | ratio               | scalar/layer | local learning rate, here: trust ratio     |
| eta                | trust_coefficient   | scalar       | trust coefficient                          |
| m                  | momentum            | scalar       | momentum coefficient                       |
| beta               | weight_decay        | scalar       | weight decay                               |

Deviations from the paper (all off by default, each an option):
- ``eps`` in the denominator: apex LARC, timm, torchlars (1e-8).
- ``lr_in_momentum=False``: v <- m v + lambda (g + beta w); w <- w - gamma v (timm, LARC, torchlars). The paper
  multiplies gamma into v; the two differ whenever gamma changes.
- ``larc_clip``: gamma lambda becomes min(gamma, lambda) (apex LARC ``clip=True``; NVCaffe policy "clip").
- ``nesterov``: as in torch.optim.SGD (MLPerf TensorFlow reference, timm).
- ``decay_in_ratio=False``: ||g|| alone in the denominator (NVCaffe ``GetLocalRate``).
- ``decay_before_norm``: ||g + beta w|| in the denominator (SimCLR, BYOL, Barlow Twins, VICReg, MoCo v3, MAE, DINO, optax).
- ``damp_ratio_by_momentum``: lambda times (1 - m) (NVCaffe ``GetLocalRate``).
- ``skip_zero_norm_layers``: a layer with a zero norm also loses its weight decay and its clip (apex LARC).
- ``decoupled_weight_decay``: w <- (1 - gamma beta) w before the step, beta = 0 elsewhere (arXiv:1711.05101).
- ``weight_norm_bounds``, ``trust_ratio_bounds``: phi of arXiv:1904.00962; clamps such as ColossalAI's [0, 50].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from largebatch.rules.rule import Layers, Part, Rule
from largebatch.rules.trust_ratio import guarded_ratio, phi


@dataclass(frozen=True)
class LARS2017(Rule):
    """Algorithm 1 of arXiv:1708.03888. The arguments are those of :class:`largebatch.LARS`."""

    name: ClassVar[str] = "lars"
    elementwise_state: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    momentum: float
    trust_coefficient: float
    eps: float
    nesterov: bool
    lr_in_momentum: bool
    larc_clip: bool
    decay_in_ratio: bool
    decay_before_norm: bool
    damp_ratio_by_momentum: bool
    skip_zero_norm_layers: bool
    weight_norm_bounds: tuple[float, float] | None
    trust_ratio_bounds: tuple[float, float] | None

    def directions(self, part: Part) -> tuple[Tensor, ...]:
        return (part.grad + part.weight_decay * part.weight if self.decay_before_norm else part.grad,)

    def trust_ratio(self, layers: Layers) -> tuple[Tensor, ...]:
        # lambda = eta ||w|| / (||g|| + beta ||w||), or eta ||w|| / ||g + beta w||
        weight_norm, (grad_norm,) = layers.weight_norm, layers.norms
        decayed = layers.weight_decay * weight_norm if self.decay_in_ratio and not self.decay_before_norm else 0.0
        coefficient = self.trust_coefficient * ((1 - self.momentum) if self.damp_ratio_by_momentum else 1.0)
        ratio = guarded_ratio(
            coefficient * phi(weight_norm, self.weight_norm_bounds),
            grad_norm + decayed + self.eps,
            weight_norm=weight_norm,
            step_norm=grad_norm,
            bounds=self.trust_ratio_bounds,
        )
        if self.larc_clip:  # gamma lambda <- min(gamma, lambda)
            clipped = torch.where(ratio < layers.lr, ratio / layers.lr, 1.0)
            if self.skip_zero_norm_layers:
                clipped = torch.where((weight_norm > 0) & (grad_norm > 0), clipped, 1.0)
            ratio = clipped
        return (ratio,)

    def weight_decay_in_force(self, layers: Layers) -> Tensor:
        if not self.skip_zero_norm_layers:
            return layers.weight_decay
        (grad_norm,) = layers.norms
        return torch.where((layers.weight_norm > 0) & (grad_norm > 0), layers.weight_decay, 0.0)

    def advance(self, part: Part, *, lr, ratios: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (momentum_buffer,), (ratio,) = part.state, ratios
        inside, outside = (lr * ratio, 1.0) if self.lr_in_momentum else (ratio, lr)
        # v <- m v + gamma lambda (g + beta w)
        fresh = inside * (part.grad + part.weight_decay * part.weight)
        momentum_buffer = self.momentum * momentum_buffer + fresh
        update = fresh + self.momentum * momentum_buffer if self.nesterov else momentum_buffer
        # w <- w - v
        return part.weight - outside * update, (momentum_buffer,)


@dataclass(frozen=True)
class LARS2019(Rule):
    """Algorithm 1 of arXiv:1904.00962: LARS as the LAMB paper restates it.

    m <- beta1 m + (1 - beta1) (g + lambda x);  x <- x - eta phi(||x||) / ||m|| m. Here beta1 is ``momentum`` and
    lambda (there: the weight decay) ``weight_decay``. The learning rate is in no buffer.
    """

    name: ClassVar[str] = "lars2019"
    elementwise_state: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    momentum: float
    eps: float
    weight_norm_bounds: tuple[float, float] | None
    trust_ratio_bounds: tuple[float, float] | None

    def accumulate(self, part: Part) -> tuple[Tensor, ...]:
        """m <- beta1 m + (1 - beta1) (g + lambda x)."""
        (momentum_buffer,) = part.state
        fresh = part.grad + part.weight_decay * part.weight
        return (self.momentum * momentum_buffer + (1 - self.momentum) * fresh,)

    def directions(self, part: Part) -> tuple[Tensor, ...]:
        return part.state

    def trust_ratio(self, layers: Layers) -> tuple[Tensor, ...]:
        (momentum_norm,) = layers.norms
        ratio = guarded_ratio(
            phi(layers.weight_norm, self.weight_norm_bounds),
            momentum_norm + self.eps,
            weight_norm=layers.weight_norm,
            step_norm=momentum_norm,
            bounds=self.trust_ratio_bounds,
        )
        return (ratio,)

    def advance(self, part: Part, *, lr, ratios: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (momentum_buffer,), (ratio,) = part.state, ratios
        # x <- x - eta phi(||x||) / ||m|| m
        return part.weight - lr * ratio * momentum_buffer, part.state
