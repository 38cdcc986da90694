"""The papers' algorithms in numpy fp64, transcribed independently of largebatch.rules: one layer, one step each.

Every function takes and returns plain arrays; nothing here knows torch, groups or shards.
"""

import math

import numpy as np


def norm(x):
    return math.sqrt(math.fsum((np.asarray(x, np.float64).ravel() ** 2).tolist()))


def ratio_or_one(numerator, denominator, *norms):
    return numerator / denominator if all(n > 0 for n in norms) else 1.0


def lars(w, g, state, *, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001, eps=0.0):
    """arXiv:1708.03888, Algorithm 1."""
    v = state.get("v", np.zeros_like(w))
    local = ratio_or_one(trust_coefficient * norm(w), norm(g) + weight_decay * norm(w) + eps, norm(w), norm(g))
    v = momentum * v + lr * local * (g + weight_decay * w)
    return w - v, {"v": v}, local


def lars_2019(x, g, state, *, lr, momentum=0.9, weight_decay=0.0):
    """arXiv:1904.00962, Algorithm 1."""
    m = state.get("m", np.zeros_like(x))
    m = momentum * m + (1 - momentum) * (g + weight_decay * x)
    local = ratio_or_one(norm(x), norm(m), norm(x), norm(m))
    return x - lr * local * m, {"m": m}, local


def lamb(x, g, state, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, look_ahead=()):
    """arXiv:1904.00962, Algorithm 2; look_ahead names the moments with Nesterov's correction (N-LAMB, NN-LAMB)."""
    b1, b2 = betas
    t = state.get("t", 0) + 1
    m = b1 * state.get("m", np.zeros_like(x)) + (1 - b1) * g
    v = b2 * state.get("v", np.zeros_like(x)) + (1 - b2) * g * g
    if "m" in look_ahead:
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        if "v" in look_ahead:
            v_hat = b2 * v / (1 - b2 ** (t + 1)) + (1 - b2) * g * g / (1 - b2**t)
        else:
            v_hat = b2 * v / (1 - b2**t)
    else:
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    u = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * x
    local = ratio_or_one(norm(x), norm(u), norm(x), norm(u))
    return x - lr * local * u, {"t": t, "m": m, "v": v}, local


def nlamb(x, g, state, **options):
    return lamb(x, g, state, look_ahead=("m",), **options)


def nnlamb(x, g, state, **options):
    return lamb(x, g, state, look_ahead=("m", "v"), **options)


def lans(x, g, state, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
    """arXiv:2006.13484, Algorithm 2; the trust ratio of the first of its two directions."""
    b1, b2 = betas
    t = state.get("t", 0) + 1
    size = norm(g)
    g = g / size if size > 0 else g
    m = b1 * state.get("m", np.zeros_like(x)) + (1 - b1) * g
    v = b2 * state.get("v", np.zeros_like(x)) + (1 - b2) * g * g
    root = np.sqrt(v / (1 - b2**t)) + eps
    r = m / (1 - b1**t) / root + weight_decay * x
    c = g / root + weight_decay * x
    ratio_r, ratio_c = (
        ratio_or_one(norm(x), norm(r), norm(x), norm(r)),
        ratio_or_one(norm(x), norm(c), norm(x), norm(c)),
    )
    d = b1 * ratio_r * r + (1 - b1) * ratio_c * c
    return x - lr * d, {"t": t, "m": m, "v": v}, ratio_r


def train(step, weights, grads_of_step, lrs, **options):
    """Runs ``step`` over all layers; returns the final weights and the last trust ratios.

    Args:
        weights: list of arrays. grads_of_step: list (steps) of lists (layers) of arrays. lrs: one a step.
    """
    weights = [np.array(w, np.float64) for w in weights]
    states = [{} for _ in weights]
    ratios = [None] * len(weights)
    for grads, lr in zip(grads_of_step, lrs, strict=True):
        for i, g in enumerate(grads):
            weights[i], states[i], ratios[i] = step(weights[i], np.asarray(g, np.float64), states[i], lr=lr, **options)
    return weights, ratios
