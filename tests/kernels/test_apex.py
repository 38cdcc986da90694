"""The apex backend's wiring, against a stand-in for amp_C that follows apex's documented arguments and formula.

The real one needs a GPU and a build of apex; tests/kernels/test_gpu.py takes it where both are there.
"""

import types

import pytest
import torch

import largebatch
from largebatch.kernels import dispatch
from largebatch.kernels.apex_gpu import ApexKernels, UnsuitableError
from support.problems import as_parameters, random_gradients, random_layers, relative_error, run_optimizer


def l2norm(no_overflow, lists, per_tensor):
    norms = torch.stack([t.norm() for t in lists[0]])
    return norms.norm(), norms if per_tensor else None


def lamb(no_overflow, lists, lr, beta1, beta2, eps, step, corrects, decay, averages, mode, norm, max_norm, use_nvlamb):
    assert mode == 1 and averages == 1
    for g, p, m, v in zip(*lists, strict=True):
        g /= max(norm.item() / max_norm, 1.0)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        corrections = (1 - beta1**step, 1 - beta2**step) if corrects else (1.0, 1.0)
        g.copy_(m / corrections[0] / ((v / corrections[1]).sqrt() + eps) + decay * p)
        ratio = 1.0
        if (use_nvlamb or decay != 0) and g.norm() > 0 and p.norm() > 0:
            ratio = p.norm() / g.norm()
        p.sub_(lr * ratio * g)


@pytest.fixture
def with_apex(monkeypatch):
    stand_in = types.SimpleNamespace(multi_tensor_l2norm=l2norm, multi_tensor_lamb=lamb)
    kernels = ApexKernels(lambda function, *arguments: function(*arguments), stand_in)
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda device, name: kernels if name == "apex" else choose(device, name))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.01},
        {"weight_decay": 0.01, "bias_correction": False, "max_grad_norm": 0.5},
        {"weight_decay": 0.01, "exclude_from_weight_decay": ["w[13]$"], "exclude_from_adaptation": ["w3$"]},
    ],
    ids=str,
)
def test_apex_and_reference_agree(with_apex, options):
    results = []
    for kernels in ("apex", "reference"):
        parameters = as_parameters(random_layers())
        named = [(f"w{i}", p) for i, p in enumerate(parameters)]
        optimizer = largebatch.LAMB(named, lr=0.01, kernels=kernels, **options)
        run_optimizer(optimizer, parameters, random_gradients(10), [0.01] * 10)
        results.append((parameters, optimizer.layer_stats()))
    assert relative_error(results[0][0], results[1][0]) < 2e-6
    for name, figures in results[1][1].items():
        assert results[0][1][name] == pytest.approx(figures, rel=1e-5), name


def test_a_nan_drops_the_whole_step(with_apex):
    parameters = as_parameters(random_layers())
    optimizer = largebatch.LAMB(parameters, lr=0.01, kernels="apex")
    run_optimizer(optimizer, parameters, random_gradients(2), [0.01] * 2)
    before = [p.detach().clone() for p in parameters]
    parameters[4].grad[3, 1] = float("nan")
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert optimizer.num_skipped_steps == 1 and float(optimizer.state[parameters[0]]["step"]) == 2


@pytest.mark.parametrize(
    "optimizer_class, options, reason",
    [
        (largebatch.LARS, {}, "the rule is 'lars'; apex has LAMB only"),
        (largebatch.NLAMB, {}, "the rule is 'nlamb'; apex has LAMB only"),
        (largebatch.LAMB, {"bias_correction": "lr"}, "bias_correction is 'lr'"),
        (largebatch.LAMB, {"trust_ratio_bounds": (0.1, 2.0)}, "trust_ratio_bounds is"),
        (largebatch.LAMB, {"decoupled_weight_decay": True, "weight_decay": 0.1}, "decoupled_weight_decay is true"),
        (largebatch.LAMB, {"state_dtype": "bf16"}, "must all be fp32"),
        (
            largebatch.LAMB,
            {"weight_decay": 0.1, "exclude_from_adaptation": ["w"]},
            "apex adapts every layer that decays",
        ),
    ],
    ids=lambda v: None if isinstance(v, type) else str(v)[:40],
)
def test_what_apex_does_not_do_is_an_error(with_apex, optimizer_class, options, reason):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = optimizer_class([("w", weight)], lr=0.1, kernels="apex", **options)
    with pytest.raises(UnsuitableError, match="kernels 'apex' cannot do this step") as caught:
        optimizer.step()
    assert reason in str(caught.value)
    assert torch.equal(weight, torch.ones(3))


def test_apex_that_is_not_installed_is_an_error():
    with pytest.raises(dispatch.UnavailableKernelsError, match="'apex' (need NVIDIA apex|work on cuda)"):
        dispatch.choose("cuda", "apex")
    with pytest.raises(dispatch.UnavailableKernelsError, match="'apex' work on cuda tensors, not on cpu ones"):
        dispatch.choose("cpu", "apex")
