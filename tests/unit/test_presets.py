"""Every preset against an independent computation of its peer: the peer itself where pip has it, else its formula.

The formulas below are written from the peers' sources, in numpy fp64, with the peer's own names.
"""

import math

import numpy as np
import pytest
import torch

import largebatch
from largebatch.presets import LAMB_PRESETS, LARS_PRESETS
from support import oracle
from support.oracle import norm
from support.problems import as_parameters, changing_lrs, random_gradients, random_layers, relative_error, run_optimizer

NUM_STEPS = 20
BOUND = 1e-12


def ours(optimizer_class, lrs, grads=None, weights=None, **options):
    parameters = as_parameters(weights or random_layers(), torch.float64)
    optimizer = optimizer_class(parameters, lr=lrs[0], **options)
    return run_optimizer(optimizer, parameters, grads or random_gradients(len(lrs)), lrs)


def global_norm(grads):
    return math.sqrt(sum(norm(g) ** 2 for g in grads))


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_lamb_timm(weight_decay):
    from timm.optim import Lamb

    lrs = changing_lrs(NUM_STEPS, 0.01)
    parameters = as_parameters(random_layers(), torch.float64)
    peer = Lamb(parameters, lr=lrs[0], weight_decay=weight_decay)
    expected = run_optimizer(peer, parameters, random_gradients(NUM_STEPS), lrs)
    assert relative_error(ours(largebatch.LAMB, lrs, preset="timm", weight_decay=weight_decay), expected) < BOUND
    assert relative_error(ours(largebatch.LAMB, lrs, weight_decay=weight_decay), expected) > 1e-4, "paper differs"


def test_lamb_timm_decoupled_decay_and_trust_clip():
    from timm.optim import Lamb

    lrs = changing_lrs(NUM_STEPS, 0.01)
    parameters = as_parameters(random_layers(), torch.float64)
    peer = Lamb(parameters, lr=lrs[0], weight_decay=0.5, decoupled_decay=True, trust_clip=True)
    expected = run_optimizer(peer, parameters, random_gradients(NUM_STEPS), lrs)
    options = {"weight_decay": 0.5, "decoupled_weight_decay": True, "trust_ratio_bounds": (0.0, 1.0)}
    assert relative_error(ours(largebatch.LAMB, lrs, preset="timm", **options), expected) < BOUND


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"larc_clip": True}], ids=["plain", "nesterov", "clip"])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_lars_timm(weight_decay, options):
    from timm.optim import Lars

    lrs = changing_lrs(NUM_STEPS, 0.5)
    parameters = as_parameters(random_layers(), torch.float64)
    peer_options = {"trust_clip" if k == "larc_clip" else k: v for k, v in options.items()}
    peer = Lars(parameters, lr=lrs[0], momentum=0.9, weight_decay=weight_decay, **peer_options)
    # timm divides by lr even where it is 0; our schedule ends above 0
    expected = run_optimizer(peer, parameters, random_gradients(NUM_STEPS), lrs)
    assert (
        relative_error(ours(largebatch.LARS, lrs, preset="timm", weight_decay=weight_decay, **options), expected)
        < BOUND
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lamb", "lars", "lars-nesterov"])
def test_paper_is_optax(name):
    """optax keeps the learning rate inside LARS's momentum; its denominator has ||g + wd w||, so without decay."""
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    jax.config.update("jax_enable_x64", True)
    lrs = changing_lrs(NUM_STEPS, 0.01 if name == "lamb" else 4.0)
    schedule = lambda count: jax.numpy.asarray(lrs)[count]  # noqa: E731
    peer = {
        "lamb": lambda: optax.lamb(schedule, eps=1e-6, weight_decay=0.01),
        "lars": lambda: optax.lars(schedule, momentum=0.9),
        "lars-nesterov": lambda: optax.lars(schedule, momentum=0.9, nesterov=True),
    }[name]()
    options = {"lamb": {"weight_decay": 0.01}, "lars": {}, "lars-nesterov": {"nesterov": True}}[name]
    weights = [jax.numpy.asarray(w) for w in random_layers()]
    state = peer.init(weights)
    for grads in random_gradients(NUM_STEPS):
        updates, state = peer.update([jax.numpy.asarray(g) for g in grads], state, weights)
        weights = optax.apply_updates(weights, updates)
    found = ours(largebatch.LAMB if name == "lamb" else largebatch.LARS, lrs, **options)
    assert relative_error(found, [np.asarray(w) for w in weights]) < BOUND


def test_lars_mlperf():
    """lars_optimizer.py of the TensorFlow reference: excluded layers have neither decay nor ratio, but the raw lr."""
    lrs = changing_lrs(NUM_STEPS, 2.0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)).double()
    start = [p.detach().numpy().copy() for p in model.parameters()]
    grads = random_gradients(NUM_STEPS, shapes=[w.shape for w in start])
    eeta, momentum, wd = 0.001, 0.9, 2e-4
    weights, mom = [w.copy() for w in start], [np.zeros_like(w) for w in start]
    for lr, step_grads in zip(lrs, grads, strict=True):
        for i, grad in enumerate(step_grads):
            if weights[i].ndim == 2:
                trust = eeta * norm(weights[i]) / (norm(grad) + wd * norm(weights[i]))
                scaled_lr, decayed = lr * trust, grad + wd * weights[i]
            else:
                scaled_lr, decayed = lr, grad
            mom[i] = momentum * mom[i] - scaled_lr * decayed
            weights[i] = weights[i] + mom[i]
    optimizer = largebatch.LARS(model.parameters(), lr=lrs[0], weight_decay=wd, preset="mlperf", model=model)
    found = run_optimizer(optimizer, list(model.parameters()), grads, lrs)
    assert relative_error(found, weights) < BOUND
    assert [p.name for p in optimizer.excluded_layers] == ["0.bias", "1.weight", "1.bias", "2.bias"]


def test_lars_apex_larc():
    """apex LARC around torch SGD, clip=True; layers with a zero norm keep raw gradient and lr, without decay."""
    lrs = changing_lrs(NUM_STEPS, 3.0)
    weights = random_layers()
    weights[3] = np.zeros_like(weights[3])
    grads, wd, tc, eps, momentum = random_gradients(NUM_STEPS), 1e-2, 0.02, 1e-8, 0.9
    expected, bufs = [w.copy() for w in weights], [np.zeros_like(w) for w in weights]
    for lr, step_grads in zip(lrs, grads, strict=True):
        for i, grad in enumerate(step_grads):
            p, p_norm, g_norm = expected[i], norm(expected[i]), norm(grad)
            if p_norm != 0 and g_norm != 0:
                adaptive_lr = min(tc * p_norm / (g_norm + p_norm * wd + eps) / lr, 1)
                grad = (grad + wd * p) * adaptive_lr
            bufs[i] = momentum * bufs[i] + grad
            expected[i] = p - lr * bufs[i]
    found = ours(largebatch.LARS, lrs, grads, weights, preset="apex", weight_decay=wd)
    assert relative_error(found, expected) < BOUND


def test_lars_author_nvcaffe():
    """NVCaffe GetLocalRate, policy "clip": rate = (1 - m) eta ||w|| / ||g||, 1 for a zero norm, at most the global lr."""
    lrs = changing_lrs(NUM_STEPS, 10.0)
    weights = random_layers()
    weights[3] = np.zeros_like(weights[3])
    grads, wd, gw_ratio, moment = random_gradients(NUM_STEPS), 5e-4, 0.001, 0.9
    expected, history = [w.copy() for w in weights], [np.zeros_like(w) for w in weights]
    for lr, step_grads in zip(lrs, grads, strict=True):
        for i, grad in enumerate(step_grads):
            w_norm, g_norm = norm(expected[i]), norm(grad)
            rate = (1 - moment) * gw_ratio * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            rate = min(lr, rate)
            history[i] = moment * history[i] + rate * (grad + wd * expected[i])
            expected[i] = expected[i] - history[i]
    found = ours(largebatch.LARS, lrs, grads, weights, preset="author", weight_decay=wd)
    assert relative_error(found, expected) < BOUND


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lamb_apex(weight_decay):
    """multi_tensor_lamb.cu: gradient / max(norm / max_norm, 1); ratio only with decay (use_nvlamb=False)."""
    lrs = changing_lrs(NUM_STEPS, 0.01)
    grads = random_gradients(NUM_STEPS)
    b1, b2, eps = 0.9, 0.999, 1e-6
    p = random_layers()
    m, v = [np.zeros_like(w) for w in p], [np.zeros_like(w) for w in p]
    for step, (lr, step_grads) in enumerate(zip(lrs, grads, strict=True), start=1):
        clipped_global_grad_norm = max(global_norm(step_grads) / 1.0, 1.0)
        for i, g in enumerate(step_grads):
            scaled_grad = g / clipped_global_grad_norm
            m[i] = b1 * m[i] + (1 - b1) * scaled_grad
            v[i] = b2 * v[i] + (1 - b2) * scaled_grad**2
            update = (m[i] / (1 - b1**step)) / (np.sqrt(v[i] / (1 - b2**step)) + eps) + weight_decay * p[i]
            ratio = norm(p[i]) / norm(update) if weight_decay else 1.0
            p[i] = p[i] - lr * ratio * update
    assert relative_error(ours(largebatch.LAMB, lrs, grads, preset="apex", weight_decay=weight_decay), p) < BOUND


def test_lamb_apex_nvlamb():
    """use_nvlamb=True adapts layers without decay, too: the preset with adapt_undecayed."""
    lrs, grads = changing_lrs(NUM_STEPS, 0.01), random_gradients(NUM_STEPS)
    expected = ours(largebatch.LAMB, lrs, grads, max_grad_norm=1.0)
    assert relative_error(ours(largebatch.LAMB, lrs, grads, preset="apex", adapt_undecayed=True), expected) == 0
    assert relative_error(ours(largebatch.LAMB, lrs, grads, preset="apex"), expected) > 1e-3


def test_lamb_deepspeed():
    """fused_lamb_cuda_kernel.cu: u from uncorrected moments, corrections in the step size, ratio clamped to [.01, 10]."""
    lrs = changing_lrs(NUM_STEPS, 0.01)
    grads = random_gradients(NUM_STEPS)
    b1, b2, eps, wd = 0.9, 0.999, 1e-6, 0.01
    p = random_layers()
    m, v = [np.zeros_like(w) for w in p], [np.zeros_like(w) for w in p]
    clamped = 0
    for step, (lr, step_grads) in enumerate(zip(lrs, grads, strict=True), start=1):
        step_size = lr * math.sqrt(1 - b2**step) / (1 - b1**step)
        for i, g in enumerate(step_grads):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            update = m[i] / (np.sqrt(v[i]) + eps) + wd * p[i]
            coeff = norm(p[i]) / norm(update)
            clamped += not 0.01 <= coeff <= 10
            p[i] = p[i] - step_size * min(max(coeff, 0.01), 10.0) * update
    assert clamped, "the clamp must be exercised"
    assert relative_error(ours(largebatch.LAMB, lrs, grads, preset="deepspeed", weight_decay=wd), p) < BOUND


def test_lamb_author():
    """fastalgo/imagenet_resnet50_lamb: no bias correction, clip_by_global_norm 1, batch norm out, biases in."""
    lrs = changing_lrs(NUM_STEPS, 0.04)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)).double()
    p = [w.detach().numpy().copy() for w in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    grads = random_gradients(NUM_STEPS, shapes=[w.shape for w in p])
    b1, b2, eps, wd = 0.9, 0.999, 1e-6, 1.5
    m, v = [np.zeros_like(w) for w in p], [np.zeros_like(w) for w in p]
    for lr, step_grads in zip(lrs, grads, strict=True):
        scale = 1.0 / max(global_norm(step_grads), 1.0)
        for i, g in enumerate(step_grads):
            is_norm = names[i].startswith("1.")
            m[i] = b1 * m[i] + (1 - b1) * g * scale
            v[i] = b2 * v[i] + (1 - b2) * (g * scale) ** 2
            update = m[i] / (np.sqrt(v[i]) + eps) + (0 if is_norm else wd * p[i])
            ratio = 1.0 if is_norm else oracle.ratio_or_one(norm(p[i]), norm(update), norm(p[i]), norm(update))
            p[i] = p[i] - lr * ratio * update
    optimizer = largebatch.LAMB(model.parameters(), lr=lrs[0], weight_decay=wd, preset="author", model=model)
    assert relative_error(run_optimizer(optimizer, list(model.parameters()), grads, lrs), p) < BOUND


def test_lamb_mlperf():
    """MLPerf BERT: bias correction, global clip 1 before the step, exclusion list out of decay and ratio."""
    lrs = changing_lrs(NUM_STEPS, 0.01)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)).double()
    p = [w.detach().numpy().copy() for w in model.parameters()]
    grads = random_gradients(NUM_STEPS, shapes=[w.shape for w in p])
    states = [{} for _ in p]
    for lr, step_grads in zip(lrs, grads, strict=True):
        scale = 1.0 / max(global_norm(step_grads), 1.0)
        for i, g in enumerate(step_grads):
            if p[i].ndim == 2:
                p[i], states[i], _ = oracle.lamb(p[i], g * scale, states[i], lr=lr, weight_decay=0.01)
            else:  # a step of Adam: the update without ratio
                before = p[i]
                _, states[i], ratio = oracle.lamb(before, g * scale, states[i], lr=lr)
                m, v, t = states[i]["m"], states[i]["v"], states[i]["t"]
                p[i] = before - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
    optimizer = largebatch.LAMB(model.parameters(), lr=lrs[0], weight_decay=0.01, preset="mlperf", model=model)
    assert relative_error(run_optimizer(optimizer, list(model.parameters()), grads, lrs), p) < BOUND


def test_paper_presets_change_nothing_and_an_explicit_option_wins():
    assert LARS_PRESETS["paper"] == {} and LAMB_PRESETS["paper"] == {}
    weight = torch.nn.Parameter(torch.ones(3))
    group = largebatch.LARS([weight], lr=1.0, preset="apex", eps=0.0).param_groups[0]
    assert (group["eps"], group["trust_coefficient"], group["lr_in_momentum"]) == (0.0, 0.02, False)
    assert largebatch.LAMB([weight], preset="apex", max_grad_norm=None).max_grad_norm is None
    assert largebatch.LARS([weight], 1.0).param_groups[0]["trust_coefficient"] == 0.001
