"""Layers, gradients and learning rates for tests of numbers."""

import numpy as np
import torch

SHAPES = ((37, 13), (37,), (13, 37), (1,), (203, 3), (4, 3, 5, 5), (7,), (64,))


def random_layers(seed=0, shapes=SHAPES):
    """Weights with very different norms, as fp64 arrays that fp32 holds exactly."""
    rng = np.random.default_rng(seed)
    scales = (0.05, 1.0, 3.0, 0.2, 20.0, 0.01, 0.5, 1.0)
    return [
        (rng.standard_normal(s) * scales[i % 8]).astype(np.float32).astype(np.float64) for i, s in enumerate(shapes)
    ]


def random_gradients(num_steps, seed=1, shapes=SHAPES):
    """[num_steps][num_layers] arrays, fp32-exact, whose size differs by layer and drifts over the steps."""
    rng = np.random.default_rng(seed)
    scales = (1.0, 0.01, 0.3, 2.0, 0.001, 10.0, 0.1, 1.0)
    return [
        [
            ((rng.standard_normal(s) + 0.3) * scales[i % 8] * (1 + 0.5 * np.sin(t / 3)))
            .astype(np.float32)
            .astype(np.float64)
            for i, s in enumerate(shapes)
        ]
        for t in range(num_steps)
    ]


def changing_lrs(num_steps, peak):
    """Warm-up and poly-2 decay, so that an lr in the wrong place shows."""
    warm = num_steps // 5
    return [
        peak * ((t + 1) / warm if t < warm else (1 - (t - warm) / (num_steps - warm)) ** 2) for t in range(num_steps)
    ]


def as_parameters(weights, dtype=torch.float32):
    return [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in weights]


def run_optimizer(optimizer, parameters, grads_of_step, lrs):
    """Steps a torch optimizer with given gradients under given learning rates."""
    for grads, lr in zip(grads_of_step, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = torch.tensor(grad, dtype=parameter.dtype)
        optimizer.step()
    return parameters


def relative_error(found, expected):
    """Largest over the layers of max|a - b| / max|b|."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        a = a.detach().double().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a, np.float64)
        b = b.detach().double().cpu().numpy() if isinstance(b, torch.Tensor) else np.asarray(b, np.float64)
        errors.append(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) if b.size else 0.0)
    assert all(np.isfinite(errors)), errors
    return max(errors)
