"""Each optimizer against the papers' equations in fp64: 50 steps under a changing learning rate."""

import numpy as np
import pytest
import torch

from support import oracle
from support.cases import CASES
from support.problems import as_parameters, changing_lrs, random_gradients, random_layers, relative_error, run_optimizer

NUM_STEPS = 50


def both(case, dtype, seed):
    weights, grads = random_layers(seed), random_gradients(NUM_STEPS, seed + 1)
    lrs = changing_lrs(NUM_STEPS, case.peak_lr)
    expected, ratios = oracle.train(case.reference, weights, grads, lrs, **without_formulation(case.options))
    parameters = as_parameters(weights, dtype)
    optimizer = case.optimizer(parameters, lr=lrs[0], **case.options)
    return run_optimizer(optimizer, parameters, grads, lrs), expected, optimizer, ratios


def without_formulation(options):
    return {k: v for k, v in options.items() if k not in ("formulation", "kernels")}


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fifty_steps(case, dtype, bound, seed):
    found, expected, optimizer, ratios = both(case, dtype, seed)
    assert relative_error(found, expected) < bound
    found_ratios = [figures["trust_ratio"] for figures in optimizer.layer_stats().values()]
    assert found_ratios == pytest.approx(ratios, rel=20 * bound)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_oracle_notices_a_wrong_decay(case):
    """The comparison can fail: a tenth of a percent more weight decay is far outside its bound."""
    found, _, _, _ = both(case, torch.float64, 0)
    weights, grads = random_layers(0), random_gradients(NUM_STEPS, 1)
    options = without_formulation(case.options)
    options["weight_decay"] = options.get("weight_decay", 0.0) * 1.001 + 1e-7
    wrong, _ = oracle.train(case.reference, weights, grads, changing_lrs(NUM_STEPS, case.peak_lr), **options)
    assert relative_error(found, wrong) > 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_precision_parameters_are_off_by_their_rounding_only(case, dtype):
    """State and arithmetic are fp32: one step from exact weights differs from fp64 by one rounding of the result."""
    weights = [np.asarray(torch.tensor(w).to(dtype).double()) for w in random_layers(3)]
    grads = [[np.asarray(torch.tensor(g).to(dtype).double()) for g in random_gradients(1, 4)[0]]]
    expected, _ = oracle.train(case.reference, weights, grads, [case.peak_lr], **without_formulation(case.options))
    parameters = as_parameters(weights, dtype)
    optimizer = case.optimizer(parameters, lr=case.peak_lr, **case.options)
    run_optimizer(optimizer, parameters, grads, [case.peak_lr])
    for parameter, value in zip(parameters, expected, strict=True):
        half_ulp = torch.finfo(dtype).eps / 2
        assert np.abs(parameter.double().detach().numpy() - value).max() <= (half_ulp + 1e-5) * np.abs(value).max()
        for name, state in optimizer.state[parameter].items():
            assert state.dtype == torch.float32, name
