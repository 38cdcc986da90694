"""Baselines named in a ds_config take the steps of torch.optim, under every ZeRO stage, precision and param grouping."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.engine.baselines import Adagrad
from support import engine_runs

LR = 0.02
BASELINES = {
    "momentum": ("SGD", {"momentum": 0.9, "weight_decay": 0.05}, torch.optim.SGD),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}, torch.optim.SGD),
    "adagrad": ("Adagrad", {"weight_decay": 0.05, "initial_accumulator_value": 0.1}, torch.optim.Adagrad),
    "adam with L2": ("Adam", {"weight_decay": 0.05, "torch_adam": True, "adam_w_mode": False}, torch.optim.Adam),
    "adamw": ("AdamW", {"weight_decay": 0.05, "torch_adam": True}, torch.optim.AdamW),
    "adamw, small betas": (
        "AdamW",
        {"weight_decay": 0.05, "betas": [0.66, 0.98], "eps": 1e-6, "torch_adam": True},
        torch.optim.AdamW,
    ),
}
NUM_STEPS = 6


def masters(engine):
    """Whole layers in fp32."""
    from deepspeed.utils import safe_get_full_fp32_param

    if hasattr(engine.optimizer, "fp32_groups"):
        return [m.detach().clone() for m in itertools.chain(*engine.optimizer.fp32_groups)]
    if engine.optimizer is engine.basic_optimizer:
        return [p.detach().clone() for p in engine.module.parameters()]
    return [safe_get_full_fp32_param(p).clone() for p in engine.module.parameters()]


def train(name, stage, dtype, num_groups, zero=None):
    """Runs inside a rank: the weights after the steps."""
    json_type, params, _ = BASELINES[name]
    optimizer = {"type": json_type, "params": {"lr": LR, **params}}
    grad_accum = "fp32" if stage and dtype == "bf16" else None
    config = engine_runs.ds_config(
        json_type, stage, dtype, zero=zero, grad_accum=grad_accum, extra={"optimizer": optimizer}
    )
    with engine_runs.engine_for(config, num_groups=num_groups, num_steps=NUM_STEPS) as engine:
        for step in range(NUM_STEPS):
            engine_runs.take_step(engine, step)
        return masters(engine)


def unsharded(name, num_groups):
    _, params, cls = BASELINES[name]
    params = {key: value for key, value in params.items() if key not in ("torch_adam", "adam_w_mode")}
    model = engine_runs.LinearLoss()
    optimizer = cls(engine_runs.param_groups(model, num_groups), lr=LR, **params)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = engine_runs.learning_rate(step, NUM_STEPS, LR)
        for parameter, gradient in zip(model.layers, engine_runs.gradients_of(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach() for p in model.layers]


def check(rank_pool, world_size, name, stage, dtype, num_groups, **options):
    expected = unsharded(name, num_groups)
    for weights in rank_pool.run(world_size, train, name, stage, dtype, num_groups, **options):
        for got, layer in zip(weights, expected, strict=True):
            # elementwise arithmetic on the same numbers; vectors and their tails may round differently
            torch.testing.assert_close(got, layer, rtol=3e-6, atol=0)


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_is_torch_optim(rank_pool, name, stage, dtype, num_groups):
    check(rank_pool, 2, name, stage, dtype, num_groups)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "adagrad"])
def test_baseline_with_optimizer_offload(rank_pool, name):
    check(rank_pool, 2, name, 2, "bf16", 2, zero={"offload_optimizer": {"device": "cpu"}})


def adam_without_adam_w_mode():
    optimizer = {"type": "Adam", "params": {"lr": LR, "torch_adam": True}}
    with engine_runs.engine_for(engine_runs.ds_config("Adam", 0, extra={"optimizer": optimizer})) as engine:
        return type(engine.basic_optimizer).__name__


def test_deepspeeds_adam_is_adamw_unless_told_otherwise(rank_pool):
    """Why launch/train.py asks for adam_w_mode: the day that this fails, it need not."""
    assert rank_pool.run(1, adam_without_adam_w_mode) == ["AdamW"]


def saved_and_continued(folder):
    """Runs inside a rank: Adagrad with two groups over a checkpoint, against the same without the break."""
    import deepspeed

    optimizer = {"type": "Adagrad", "params": {"lr": LR, "weight_decay": 0.05}}
    config = engine_runs.ds_config("Adagrad", 1, extra={"optimizer": optimizer})
    with engine_runs.engine_for(config, num_groups=2, num_steps=NUM_STEPS) as engine:
        for step in range(3):
            engine_runs.take_step(engine, step)
        engine.save_checkpoint(folder, tag="third")
        for step in range(3, NUM_STEPS):
            engine_runs.take_step(engine, step)
        whole = masters(engine)
    deepspeed.comm.barrier()
    with engine_runs.engine_for(config, num_groups=2, num_steps=NUM_STEPS) as engine:
        engine.load_checkpoint(folder, tag="third")
        for step in range(3, NUM_STEPS):
            engine_runs.take_step(engine, step)
        return all(torch.equal(a, b) for a, b in zip(whole, masters(engine), strict=True))


def test_adagrad_continues_from_a_checkpoint(rank_pool, tmp_path):
    assert rank_pool.run(2, saved_and_continued, str(tmp_path)) == [True, True]


@settings(max_examples=20, deadline=None)
@given(
    lr=st.floats(0, 1),
    lr_decay=st.floats(0, 0.5),
    weight_decay=st.floats(0, 0.5),
    initial_accumulator_value=st.floats(0, 1),
    foreach=st.sampled_from([None, True, False]),
    maximize=st.booleans(),
)
def test_adagrad_is_torchs(**options):
    weights, gradients = torch.randn(7), torch.randn(3, 7)
    results = []
    for cls in (Adagrad, torch.optim.Adagrad):
        parameter = torch.nn.Parameter(weights.clone())
        optimizer = cls([parameter, torch.nn.Parameter(torch.ones(1))], **options)  # the second has no gradient
        for gradient in gradients:
            parameter.grad = gradient.clone()
            loss = optimizer.step(lambda: 5.0)
        assert loss == 5.0
        results.append((parameter.detach(), optimizer.state[parameter]["sum"], optimizer.state[parameter]["step"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_adagrad_checks_its_options():
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        Adagrad([torch.nn.Parameter(torch.ones(1))], lr=-1)
    with pytest.raises(TypeError, match="fused"):
        Adagrad([torch.nn.Parameter(torch.ones(1))], fused=True)
