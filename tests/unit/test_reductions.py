"""With the ratio forced to 1, LARS is SGD and LAMB is AdamW."""

import pytest
import torch

import largebatch
from support.problems import as_parameters, changing_lrs, random_gradients, random_layers, relative_error, run_optimizer

NUM_STEPS = 30


def trained(optimizer_class, lrs, **options):
    parameters = as_parameters(random_layers(), torch.float64)
    named = [(f"layer{i}.weight", p) for i, p in enumerate(parameters)]
    is_ours = optimizer_class.__module__.startswith("largebatch")
    optimizer = optimizer_class(named if is_ours else parameters, lr=lrs[0], **options)
    return run_optimizer(optimizer, parameters, random_gradients(NUM_STEPS), lrs)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_lars_without_ratio_is_sgd_under_a_constant_lr(weight_decay, nesterov):
    lrs, options = [0.05] * NUM_STEPS, {"momentum": 0.9, "weight_decay": weight_decay, "nesterov": nesterov}
    expected = trained(torch.optim.SGD, lrs, **options)
    assert relative_error(trained(largebatch.LARS, lrs, exclude_from_adaptation=["."], **options), expected) < 1e-12


def test_lars_without_ratio_and_with_the_lr_outside_is_sgd_under_any_schedule():
    lrs, options = changing_lrs(NUM_STEPS, 0.05), {"momentum": 0.9, "weight_decay": 1e-2}
    expected = trained(torch.optim.SGD, lrs, **options)
    outside = trained(largebatch.LARS, lrs, exclude_from_adaptation=["."], lr_in_momentum=False, **options)
    inside = trained(largebatch.LARS, lrs, exclude_from_adaptation=["."], **options)
    assert relative_error(outside, expected) < 1e-12
    assert relative_error(inside, expected) > 1e-3, "the paper's place of the lr is another algorithm"


@pytest.mark.parametrize("options", [{}, {"decoupled_weight_decay": True}], ids=["in-update", "decoupled"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_without_ratio_is_adamw(weight_decay, options):
    lrs = changing_lrs(NUM_STEPS, 0.01)
    shared = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": weight_decay}
    expected = trained(torch.optim.AdamW, lrs, **shared)
    found = trained(largebatch.LAMB, lrs, exclude_from_adaptation=["."], **shared, **options)
    assert relative_error(found, expected) < 1e-11


def test_nlamb_without_ratio_is_not_adamw():
    lrs = changing_lrs(NUM_STEPS, 0.01)
    expected = trained(torch.optim.AdamW, lrs, eps=1e-6, weight_decay=0.0)
    assert relative_error(trained(largebatch.NLAMB, lrs, exclude_from_adaptation=["."]), expected) > 1e-4
