"""The presets of self-supervised training against each codebase's formula: written from its source, in numpy fp64, with its names."""

import json
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

import largebatch
import largebatch.ds_configs
from largebatch.ds_configs.tables.files import text_of
from largebatch.ds_configs.tables.self_supervised import configs
from largebatch.presets import LARS_PRESETS
from support.oracle import norm
from support.problems import changing_lrs, random_gradients, relative_error, run_optimizer

NUM_STEPS = 20
BOUND = 1e-12
WD, ETA, MOMENTUM = 0.05, 0.001, 0.9


class Network(nn.Module):
    """A convolution, batch norm, a linear head; a temperature without dimensions; one matrix of zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 2)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.zeros = nn.Parameter(torch.zeros(3, 2))
        self.double()


def is_bias_or_norm(name, w):
    return name.startswith("bn.") or name.endswith("bias")


def has_one_dimension(name, w):
    return w.ndim == 1


def has_few_dimensions(name, w):
    return w.ndim <= 1


def adapted(w, d):
    """1 where a norm is zero, in all of these codes."""
    return ETA * norm(w) / norm(d) if norm(w) > 0 and norm(d) > 0 else 1.0


def self_supervised(w, grad, v, lr, is_excluded):
    """BYOL, Barlow Twins, VICReg, MoCo v3, MAE, DINO."""
    dp = grad if is_excluded else grad + WD * w
    if not is_excluded:
        dp = dp * adapted(w, dp)
    v = MOMENTUM * v + dp
    return w - lr * v, v


def simclr(w, grad, v, lr, is_excluded):
    """classic_momentum, no Nesterov: scaled_lr goes into v."""
    if not is_excluded:
        grad = grad + WD * w
    trust_ratio = 1.0 if is_excluded else adapted(w, grad)
    v = MOMENTUM * v + lr * trust_ratio * grad
    return w - v, v


def larc(w, grad, v, lr, is_excluded):
    """SwAV: apex LARC, clip=False, trust_coefficient 0.001; zero norms leave the raw gradient, without decay."""
    if norm(w) != 0 and norm(grad) != 0:
        grad = (grad + WD * w) * (ETA * norm(w) / (norm(grad) + norm(w) * WD + 1e-8))
    v = MOMENTUM * v + grad
    return w - lr * v, v


def lightly(w, grad, v, lr, is_excluded):
    """Excluded: in a param group with weight_decay 0, which is neither decayed nor adapted."""
    if not is_excluded and norm(w) != 0 and norm(grad) != 0:
        grad = (grad + WD * w) * (ETA * norm(w) / (norm(grad) + norm(w) * WD + 1e-8))
    v = MOMENTUM * v + grad
    return w - lr * v, v


CODES = {
    "simclr": (simclr, is_bias_or_norm),
    "byol": (self_supervised, is_bias_or_norm),
    "barlow_twins": (self_supervised, has_one_dimension),
    "vicreg": (self_supervised, has_one_dimension),
    "moco_v3": (self_supervised, has_few_dimensions),
    "mae_linear_probe": (self_supervised, has_few_dimensions),
    "swav": (larc, lambda name, w: False),
    "lightly": (lightly, is_bias_or_norm),
}


def theirs(code, is_excluded, lrs, grads, lr_of_excluded=1.0):
    expected = {n: p.detach().numpy().copy() for n, p in Network().named_parameters()}
    buffers = {n: np.zeros_like(w) for n, w in expected.items()}
    for lr, step_grads in zip(lrs, grads, strict=True):
        for (name, w), grad in zip(list(expected.items()), step_grads, strict=True):
            left_out = is_excluded(name, w)
            own_lr = lr * lr_of_excluded if left_out else lr
            expected[name], buffers[name] = code(w, grad, buffers[name], own_lr, left_out)
    return list(expected.values())


def problem():
    shapes = [tuple(p.shape) for p in Network().parameters()]
    return changing_lrs(NUM_STEPS, 3.0), random_gradients(NUM_STEPS, shapes=shapes)


def test_all_presets_of_self_supervised_training_are_here():
    others = {"paper", "mlperf", "apex", "timm", "author"}
    assert CODES.keys() == LARS_PRESETS.keys() - others


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("preset", CODES)
def test_preset(preset, kernels):
    lrs, grads = problem()
    expected = theirs(*CODES[preset], lrs, grads)
    model = Network()
    optimizer = largebatch.LARS(
        model.parameters(), lr=lrs[0], weight_decay=WD, preset=preset, model=model, kernels=kernels
    )
    assert relative_error(run_optimizer(optimizer, list(model.parameters()), grads, lrs), expected) < BOUND


@pytest.mark.parametrize("preset", [p for p in CODES if p not in ("swav", "lightly")])
def test_the_papers_lars_is_another(preset):
    """The comparison can fail: ||g|| + wd ||w|| in the denominator moves the weights elsewhere."""
    lrs, grads = problem()
    model, options = Network(), LARS_PRESETS[preset] | {"decay_before_norm": False}
    optimizer = largebatch.LARS(model.parameters(), lr=lrs[0], weight_decay=WD, model=model, **options)
    found = run_optimizer(optimizer, list(model.parameters()), grads, lrs)
    assert relative_error(found, theirs(*CODES[preset], lrs, grads)) > 1e-6


def test_barlow_twins_with_its_own_learning_rate_for_biases_and_norms():
    """main.py: lr 0.2 for weights and 0.0048 for the rest, in two param groups."""
    lrs, grads = problem()
    share = 0.0048 / 0.2
    expected = theirs(*CODES["barlow_twins"], lrs, grads, lr_of_excluded=share)
    model = Network()
    weights = [p for p in model.parameters() if p.ndim != 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights}, {"params": rest, "lr": lrs[0] * share}]
    optimizer = largebatch.LARS(groups, lr=lrs[0], weight_decay=WD, preset="barlow_twins", model=model)
    for lr, step_grads in zip(lrs, grads, strict=True):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr * share
        for parameter, grad in zip(model.parameters(), step_grads, strict=True):
            parameter.grad = torch.as_tensor(grad)
        optimizer.step()
    assert relative_error(list(model.parameters()), expected) < BOUND


def test_decay_is_in_the_norm_or_not_in_the_ratio():
    with pytest.raises(ValueError, match="decay_before_norm is true with decay_in_ratio false"):
        largebatch.LARS(Network().parameters(), lr=0.1, decay_before_norm=True, decay_in_ratio=False)
    with pytest.raises(ValueError, match="decay_before_norm is True with formulation '2019'"):
        largebatch.LARS(Network().parameters(), lr=0.1, decay_before_norm=True, formulation="2019")


# --- the published settings ---------------------------------------------------------------------------------------------

CONFIGS = pathlib.Path(largebatch.ds_configs.__file__).parent / "self_supervised"
PUBLISHED = {
    "simclr_4096": (0.3 * 16, 100),
    "byol_4096": (0.2 * 16, 1000),
    "barlow_twins_2048": (0.2 * 8, 1000),
    "vicreg_2048": (0.2 * 8, 1000),
    "moco_v3_4096": (0.3 * 16, 1000),
    "mae_linear_probe_16384": (0.1 * 64, 90),
    "swav_4096": (4.8, 800),
    "lightly_simclr_256": (1.2, 100),
}
"""File -> peak learning rate, epochs."""
BORDERS = {"swav_4096": (0.3, 0.0048), "barlow_twins_2048": (0.0, 0.0016), "vicreg_2048": (0.0, 0.0016)}
"""Learning rates before the first step and after the last, where they are not 0."""


def test_there_is_one_for_each_preset_and_all_are_written_from_the_table():
    files = {path.stem: path.read_text() for path in CONFIGS.glob("*.json")}
    assert files == {name: text_of(config) for name, config in configs()}, "python -m largebatch.ds_configs.tables"
    assert files.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_setting(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    model, params = Network(), config["optimizer"]["params"]
    assert name.startswith(params["preset"]) and params["preset"] in LARS_PRESETS
    optimizer = largebatch.LARS.from_json_params(model.parameters(), params, model)
    scheduler = largebatch.WarmupCosineDecayLR(optimizer, **config["scheduler"]["params"])
    peak, num_epochs = PUBLISHED[name]
    steps_per_epoch = 1_281_167 // config["train_batch_size"]
    start, end = BORDERS.get(name, (0.0, 0.0))
    assert scheduler.num_steps == num_epochs * steps_per_epoch and scheduler.num_warmup_steps == 10 * steps_per_epoch
    rates = [peak * scheduler.factor(step) for step in (0, 10 * steps_per_epoch, scheduler.num_steps)]
    first = start + (peak - start) / (10 * steps_per_epoch)  # the first step makes one share of the way
    assert rates == pytest.approx([first, peak, end], rel=1e-9, abs=1e-9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(first, rel=1e-9)
    assert params["lr"] == pytest.approx(peak, rel=1e-12)
