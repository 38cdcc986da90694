"""Rules as users write them, outside the package: registered when this module is imported."""

from dataclasses import dataclass

import torch

import largebatch


@largebatch.register_rule("SmoothedRatio", lr=0.02, presets={"slow": {"smoothing": 0.9}})
class SmoothedRatio(largebatch.Rule):
    """LARS with a trust ratio that is averaged over the steps, each layer for itself, and grows in over the first of them."""

    momentum: float = 0.9
    smoothing: float = largebatch.option(0.5, "a number >= 0 and < 1", lambda x: 0 <= x < 1)

    elementwise_state = ("velocity",)
    layer_state = ("mean_ratio",)
    counts_steps = True

    def directions(self, part):
        return (part.grad + part.weight_decay * part.weight,)

    def mean(self, layers):
        (mean_ratio,), (norm,) = layers.layer_state, layers.norms
        ratio = layers.weight_norm / torch.where(norm > 0, norm, 1.0)
        return torch.where(mean_ratio > 0, self.smoothing * mean_ratio + (1 - self.smoothing) * ratio, ratio)

    def trust_ratio(self, layers):
        return (self.mean(layers) * (1 - 0.5**layers.step),)

    def layer_state_after(self, layers):
        return (self.mean(layers),)

    def advance(self, part, *, lr, ratios):
        (velocity,), (ratio,) = part.state, ratios
        velocity = self.momentum * velocity + ratio * (part.grad + part.weight_decay * part.weight)
        return part.weight - lr * velocity, (velocity,)


@largebatch.register_rule("NormalisedMomentum", lr=0.02)
@dataclass(frozen=True)
class NormalisedMomentum(largebatch.Rule):
    """NovoGrad (arXiv:1905.11286, Algorithm 1) with a trust ratio: the second moment is one number for each layer."""

    betas: tuple = (0.95, 0.98)
    eps: float = 1e-8

    elementwise_state = ("momentum",)
    layer_state = ("second_moment",)
    norms_before = ("grad_norm",)

    def vectors_before(self, part):
        return (part.grad,)

    def layer_state_before(self, layers):
        (moment,), (grad_norm,) = layers.layer_state, layers.norms_before
        return (torch.where(moment > 0, self.betas[1] * moment + (1 - self.betas[1]) * grad_norm**2, grad_norm**2),)

    def accumulate(self, part):
        (momentum,), (moment,) = part.state, part.layer_state
        return (self.betas[0] * momentum + part.grad / (moment.sqrt() + self.eps) + part.weight_decay * part.weight,)

    def directions(self, part):
        return part.state

    def trust_ratio(self, layers):
        (norm,) = layers.norms
        return (torch.where(norm > 0, layers.weight_norm / torch.where(norm > 0, norm, 1.0), 1.0),)

    def advance(self, part, *, lr, ratios):
        return part.weight - lr * ratios[0] * part.state[0], part.state


OPTIONS = {
    "SmoothedRatio": {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.01, "preset": "slow"},
    "NormalisedMomentum": {"lr": 0.02, "betas": [0.9, 0.9], "weight_decay": 0.05},
}
